"""Run ``olvae evaluate``: metrics, tables and a report of reconstructions."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from olvae.cli.options import (
    PRECISION_NAMES,
    AllowMismatch,
    ConfigBase,
    ConfigFile,
    Device,
    Raw,
    check_applies,
    check_paths,
    comma_list,
    in_flags,
    loading,
    split_commas,
    with_progress,
)
from olvae.config import ConfigError, check_name_or_path, resolve_class
from olvae.data.places import check_outside
from olvae.files import check_folder
from olvae.runs import Run, find_run

if TYPE_CHECKING:  # slow to import
    from olvae.evaluation.observers.observer import Evaluated, Observer
    from olvae.evaluation.protocol import Protocol
    from olvae.evaluation.results import Results

# Names of metrics and protocols; their registries import torch, which help has no time for.
METRIC_NAMES = (
    "psnr",
    "ssim",
    "ssim_uniform",
    "ms_ssim",
    "l1",
    "lpips",
    "lpips_alex",
    "rfid",
    "kid",
    "fdd",
)
PROTOCOL_NAMES = (
    "open-litevae",
    "latent-diffusion",
    "dc-ae",
    "llamagen",
    "va-vae",
)

# Observers of the package that are asked for by name.
OBSERVERS = {
    "colour": "olvae.evaluation.observers.pixels.colour.Colour",
    "ifid": "olvae.evaluation.observers.ifid.InterpolatedFID",
    "ifid_nearest": "olvae.evaluation.observers.ifid.NearestFID",
    "interpolated_precision": "olvae.evaluation.observers.ifid.InterpolatedPrecision",
    "linear_probe": "olvae.evaluation.observers.linear_probe.LinearProbe",
    "lite0": "olvae.evaluation.observers.pixels.lite0.Lite0Distance",
    "round_trips": "olvae.evaluation.observers.pixels.round_trips.RoundTrips",
    "spectrum": "olvae.evaluation.observers.spectrum.Spectrum",
    "text": "olvae.evaluation.observers.text.Text",
}
ZOO_OBSERVERS = ("colour", "ifid", "text")  # of --zoo, unless others are named

ALL = "all"
ZOO_PAGE = """# One table of autoencoders

Made by `{}`, which writes it as zoo.md: all under one protocol, on the same images.
"latent" is the factor and the number of channels. [What the columns mean](evaluate.md).

"""

# Arguments and flags that olvae latents and olvae app take as well.
TARGETS = typer.Argument(
    metavar="TARGET",
    help="Runs (folder, name, or last), checkpoints, exports, olvae:NAME, hub ids, or "
    "diffusers:ID_OR_FOLDER.",
)
Targets = Annotated[list[str], TARGETS]

TestImages = Annotated[
    str | None,
    typer.Option(
        metavar="SRC",
        help="A folder, shards, a list, ...; by default the first target's test images.",
    ),
]

EvaluateBatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", "-B", min=1, help="Images per batch; by default the config's, or 8."
    ),
]

First = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N images.")]

# The registries know the defaults; a test compares them.
NOT_ALL = "all = every metric except ssim_uniform and fdd (with --zoo: psnr, ssim, lpips, rfid)."

WeightsDir = Annotated[
    Path | None,
    typer.Option(
        "--weights-dir",
        "--weights_dir",
        metavar="DIR",
        help="Search here first for VGG16, AlexNet, Inception and DINOv2.",
    ),
]

Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where results go; by default the run folder, or FILE_results for a file.",
    ),
]


def command(
    targets: Annotated[list[str] | None, TARGETS] = None,
    zoo: Annotated[
        str | None,
        typer.Option(
            metavar="[NAMES]",
            help="Compare popular autoencoders in one table, DIR/zoo.md, in place of TARGETs: all, "
            "or these names. Continues where it was interrupted. --weights-dir may hold local "
            "copies, in a folder for each name.",
        ),
    ] = None,
    config: ConfigFile = None,
    config_base: ConfigBase = None,
    batch_size: EvaluateBatchSize = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=comma_list((ALL, *METRIC_NAMES)),
            help=f"{', '.join(METRIC_NAMES)}. {NOT_ALL}",
        ),
    ] = ALL,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]",
            callback=comma_list(PROTOCOL_NAMES),
            help=f"{', '.join(PROTOCOL_NAMES)}.",
        ),
    ] = "open-litevae",
    data: TestImages = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            help="Size of the images, 256 or 80x256; by default the config's, otherwise the "
            "protocol's.",
        ),
    ] = None,
    images: First = None,
    posterior: Annotated[
        Literal["mode", "sample"] | None,
        typer.Option(help="Decode the mode or a sample; by default as the protocol."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the noise, if latents are sampled.")
    ] = 0,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    weights_dir: WeightsDir = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Add rows for the linear code of equal size, for bicubic resampling, and for the "
            "first target untrained.",
        ),
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Images to fit the linear code on; by default the first target's training images.",
        ),
    ] = None,
    cross: Annotated[
        bool,
        typer.Option(
            "--cross",
            help="For TEACHER STUDENT: add rows for each encoder with each decoder, and the error "
            "of the latents.",
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=comma_list(
                (*PRECISION_NAMES[:4], "fp16-autocast", "bf16-autocast"), aliases=PRECISION_NAMES
            ),
            help="Add rows in fp16, bf16 or tf32, with the largest activations; fp16-autocast and "
            "bf16-autocast run under autocast. float32 is always included.",
        ),
    ] = "32",
    observe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIST",
            help=f"Add observers: {', '.join(OBSERVERS)}, or your package.module.Class. May be "
            "repeated.",
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Add rows of an earlier metrics.json. May be repeated."),
    ] = None,
    mix_protocols: Annotated[
        bool,
        typer.Option("--mix-protocols", help="Let --beside add rows of other protocols, marked."),
    ] = False,
    device: Device = None,
    out: Out = None,
    report: Annotated[
        bool, typer.Option(help="Write report.html, with galleries and constant colours.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Also print metrics.json to standard output.")
    ] = False,
) -> None:
    """Evaluate how well one or several autoencoders reconstruct the same test images.

    A metric whose pretrained network is missing is listed as skipped, with what to do about it.
    Each protocol gives a table of its own. Under torchrun, the processes share the images. Where
    the protocols come from: https://open-litevae.github.io/open-litevae/protocol/

    Example: olvae evaluate -B 16 demo

    Example: olvae evaluate my-vae --data photos --precision fp16,bf16,32 --out precisions

    Example: olvae evaluate demo diffusers:stabilityai/sd-vae-ft-mse --data photos --size 256

    Example: olvae evaluate --zoo sdxl,flux2,qwen-image --data photos --size 256 --out zoo
    """
    # TARGETs, or the zoo: it has one table, in a folder of its own, for images of the user's.
    zoo_fits = data and out and not (targets or baselines or "," in protocol)
    if not (targets if zoo is None else zoo_fits):
        raise ConfigError(
            "name TARGETs, as last, or `zoo` with `data`, `out` and one `protocol`, without "
            "`baselines`"
        )
    targets = targets or []
    check_paths(*targets, data=data)
    check_paths(data=fit)
    check_applies("--fit", fit is not None, "--baselines", baselines)
    check_applies("--mix-protocols", mix_protocols, "--beside", bool(beside))
    with loading():
        from olvae.data.pixels.size_and_range import Sides
        from olvae.devices import keep_freed_memory, resolve_device
        from olvae.evaluation.baselines import Baselines
        from olvae.evaluation.observers.observer import UNTRAINED
        from olvae.evaluation.report import write_markdown
        from olvae.evaluation.runner import DEFAULT_METRICS, Request, evaluate
        from olvae.evaluation.zoo import ZOO_METRICS, evaluate_zoo, read_zoo
        from olvae.launcher import together
        from olvae.models.loading.targets import find_target, name_apart

    # What is measured: metrics, and protocols with the changes that the flags make.
    names = split_commas(metrics)
    if ALL in names:
        names = [*(ZOO_METRICS if zoo else DEFAULT_METRICS)]
    pixels = Sides.read(size).node if size else None
    protocols = _protocols(
        split_commas(protocol), {"posterior": posterior, "seed": seed, "size": pixels}
    )

    # In one process or several; the first one has the result.
    with together() as (rank, _):
        if rank:
            logging.getLogger("olvae").setLevel(logging.ERROR)

        # The autoencoders, and what else is looked at: in the zoo, everything.
        find = partial(
            find_target,
            config=config,
            config_base=config_base,
            raw=raw,
            allow_mismatch=allow_mismatch,
        )
        found = name_apart([find(target) for target in targets], [UNTRAINED])
        observers = _observers(
            cross,
            split_commas(precision),
            report,
            observe or ([] if zoo is None else ZOO_OBSERVERS),
            weights_dir,
        )
        if baselines:
            observers.append(Baselines(found[0], fit))

        # Where results go, a file for each protocol; earlier results are read before the work.
        folder = results_folder(out, "".join(targets[:1]), found[0].run if found else None, data)
        suffixes = {p.name: "" if p is protocols[0] else f"_{p.name}" for p in protocols}
        places = [folder / f"metrics{suffix}.json" for suffix in suffixes.values()] if found else []
        earlier = _read_earlier_files(beside or (), places, observers)

        # Evaluate.
        keep_freed_memory()
        device = resolve_device(device)
        request = Request(
            found,
            protocols,
            names,
            data,
            pixels,
            images,
            batch_size,
            weights_dir,
            device,
            observers,
        )
        if device.startswith("cpu") and "fp16" in precision and images is None and not rank:
            typer.echo(
                "fp16 is very slow on a CPU: --device cuda, or --images N for fewer images",
                err=True,
            )
        if zoo is None:
            evaluated = evaluate(request, with_progress)
        else:
            listed = read_zoo(() if zoo == ALL else split_commas(zoo))
            evaluated = evaluate_zoo(
                listed, find, request, folder, _command() if report else None, with_progress
            )
    if evaluated is not None:
        _finish(evaluated, folder, suffixes, earlier, mix_protocols, report, as_json)
        if zoo is not None:
            write_markdown(evaluated[0], folder / "zoo.md", ZOO_PAGE.format(_command()))


def _protocols(names: Iterable[str], settings: Mapping[str, Any]) -> "list[Protocol]":
    """Return protocols by their names, with the settings that are not None in place of theirs."""
    from olvae.evaluation.protocol import PROTOCOLS as PRESETS

    changes = {name: value for name, value in settings.items() if value is not None}
    protocols = [replace(PRESETS[name], **changes) for name in names]
    if settings["seed"] and all(p.noise_seed is None for p in protocols):
        raise ConfigError("--seed applies to samples: add --posterior sample, or leave it out")
    return protocols


def _observers(
    crossed: bool, precisions: list[str], report: bool, own: Iterable[str], weights_dir: Path | None
) -> list["Observer"]:
    """Make the observers that the flags ask for, in the order of the page."""
    from olvae.evaluation.observers import cross, enlarged, gallery, half_precision
    from olvae.evaluation.observers.interpolated import Interpolated
    from olvae.evaluation.observers.observer import Observer
    from olvae.evaluation.observers.pixels import bands, flat_colours, not_rgb

    observers: list[Observer] = []
    if crossed:
        observers.append(cross.Cross())
    if precisions != ["32"]:
        observers.append(half_precision.HalfPrecision(precisions))
    observers.append(enlarged.Enlarged())
    observers += [not_rgb.RealValues(), not_rgb.Transparency(), gallery.Gallery(), bands.Bands()]
    if report:
        observers.append(flat_colours.FlatColours())
    for text in own:
        for name in text.replace(" ", "").split(","):
            check_name_or_path("--observe", name, OBSERVERS)
            found = resolve_class(OBSERVERS.get(name, name), Observer)
            arguments = {"weights_dir": weights_dir} if issubclass(found, Interpolated) else {}
            observers.append(found(**arguments))
    return observers


def _command() -> str:
    """Return the command line, as the user can repeat it."""
    return shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "olvae"), *sys.argv[1:]])


def _of_earlier_rows() -> "list[Observer]":
    """Make the observers that can show earlier results; others show only what they saw."""
    from olvae.evaluation.observers import cross, half_precision

    return [cross.Cross(), half_precision.HalfPrecision()]


def _read_earlier_files(
    paths: Iterable[Path], places: Iterable[Path], observers: "Iterable[Observer]"
) -> "dict[Path, Results]":
    """Read the files of `beside`; note which earlier results will be replaced.

    Raise ConfigError if new results would overwrite one of the files.
    """
    from olvae.evaluation.results import Results

    taken = {place.resolve() for place in places}
    earlier = {path: Results.read(path, [*_of_earlier_rows(), *observers]) for path in paths}
    replaced = [str(place) for place in taken if place.is_file()]
    if replaced:
        typer.echo(
            f"note: {', '.join(replaced)}: earlier results, which these replace; --out keeps both",
            err=True,
        )
    over = [path for path in earlier if path.resolve() in taken]
    if over:
        raise ConfigError(f"`beside` {over[0]}: new results would overwrite it: set `out`")
    return earlier


def _finish(
    evaluated: "list[Evaluated]",
    folder: Path,
    suffixes: Mapping[str, str],
    earlier: "Mapping[Path, Results]",
    mix: bool,
    page: bool,
    as_json: bool,
) -> None:
    """Write and print results, with earlier ones beside them.

    Earlier ones that are not comparable are left out; raise ValueError for them in the end.
    """
    from olvae.evaluation.report import print_results, write_files

    written: list[tuple[str, Path]] = []
    refused: list[ValueError] = []
    for i, one in enumerate(evaluated):
        results = one.results
        try:
            results = results.beside(earlier, mix)
        except ValueError as reason:
            refused.append(reason)

        # Observers that show earlier rows, as far as they did not look themselves.
        shown = []
        if earlier:
            names = [observer.name for observer in one.observers]
            shown = [observer for observer in _of_earlier_rows() if observer.name not in names]
        evaluated[i] = replace(one, results=results, observers=[*shown, *one.observers])

        # Files of each protocol; --json prints the first one's.
        suffix = suffixes[results.protocol["name"]]
        written += write_files(evaluated[i], folder, suffix, _command() if page else None).items()
        if as_json and not suffix:
            typer.echo(json.dumps(results.as_dict(), indent=2))

    print_results(evaluated, in_flags)
    for what, path in written:
        typer.echo(f"{what + ':':<9}{path}", err=True)
    if refused:
        raise refused[0]


def results_folder(out: Path | None, target: str, run: Run | None, data: str | None = None) -> Path:
    """Choose and check the results' folder: ``out``, the run's, or one beside a weights file.

    Raise ConfigError if it is inside the folder that is read of ``data``: the next use would read
    the results' pictures. A folder of shards with pictures in it would be one of pictures.
    """
    if out is None and run is not None:
        out = Path(find_run(target))
    elif out is None and Path(target).is_file():
        out = Path(target).with_name(f"{Path(target).stem}_results")
    if out is None:
        raise ConfigError(
            "--out DIR is missing: the first target is neither a run folder nor a file"
        )
    if data is not None and os.path.isdir(Path(data).expanduser()):  # noqa: PTH112  # of any length
        from olvae.data.opening import evaluated_place

        check_outside(out, evaluated_place(data))
    return check_folder(out)
