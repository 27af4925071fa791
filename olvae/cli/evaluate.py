"""Run ``olvae evaluate``: metrics, tables and a report of reconstructions."""

import json
import logging
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from olvae.cli.options import (
    PRECISIONS,
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
from olvae.config import ConfigError, resolve_class
from olvae.files import check_folder
from olvae.runs import Run, find_run

if TYPE_CHECKING:  # slow to import
    from olvae.evaluation.observers.observer import Observer
    from olvae.evaluation.results import Evaluated, Results

METRICS = (
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
PROTOCOLS = (
    "open-litevae",
    "latent-diffusion",
    "dc-ae",
    "llamagen",
    "va-vae",
)  # names; the registries import torch
OBSERVERS = {
    "colour": "olvae.evaluation.observers.colour.Colour",
    "ifid": "olvae.evaluation.observers.ifid.InterpolatedFID",
    "text": "olvae.evaluation.observers.text.Text",
}
"""Observers of the package that are asked for by name."""
ALL = "all"
ZOO_PAGE = """# One table of autoencoders

Made by `{}`, which writes it as zoo.md: all under one protocol, on the same images.
"latent" is the factor and the number of channels. [What the columns mean](evaluation.md).

"""

TARGETS = typer.Argument(
    metavar="TARGET...",
    help="Runs (folder, name, or last), checkpoints, exports, olvae:NAME, hub ids, or diffusers:ID_OR_FOLDER.",
)
Targets = Annotated[list[str], TARGETS]

TestImages = Annotated[
    str | None,
    typer.Option(
        metavar="SRC",
        help="A folder, shards, a list, ...; by default the first target's test images.",
    ),
]

BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", "-B", min=1, help="Images per batch; by default the config's, or 8."
    ),
]

First = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N images.")]

NOT_ALL = "all: but ssim_uniform and fdd; with --zoo psnr, ssim, lpips, rfid."
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
            help="In place of TARGETs the autoencoders that people use, all or those named, in one table: DIR/zoo.md. "
            "Continues where it was interrupted. --weights-dir may hold local copies, in a folder for each name.",
        ),
    ] = None,
    config: ConfigFile = None,
    config_base: ConfigBase = None,
    batch_size: BatchSize = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=comma_list((ALL, *METRICS)),
            help=f"{', '.join(METRICS)}. {NOT_ALL}",
        ),
    ] = ALL,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]", callback=comma_list(PROTOCOLS), help=f"{', '.join(PROTOCOLS)}."
        ),
    ] = "open-litevae",
    data: TestImages = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            help="256, or 80x256; by default the config's, otherwise the protocol's.",
        ),
    ] = None,
    images: First = None,
    posterior: Annotated[
        Literal["mode", "sample"] | None, typer.Option(help="By default the protocol's.")
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
            help="Add rows for the linear code of equal size, for bicubic resampling, and for the first target "
            "untrained.",
        ),
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Images to fit the linear code on; by default the first target's training.",
        ),
    ] = None,
    cross: Annotated[
        bool,
        typer.Option(
            "--cross",
            help="TEACHER STUDENT: each encoder with each decoder, and the latents' error.",
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=comma_list(
                (*PRECISIONS[:3], "fp16-autocast", "bf16-autocast"), aliases=PRECISIONS
            ),
            help="fp16, bf16: adds a row in that precision, with its largest activations; with -autocast, under "
            "autocast. float32 is always included.",
        ),
    ] = "32",
    observe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Look at more: {', '.join(OBSERVERS)}, or your package.module.Class. May be repeated.",
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Add rows of an earlier metrics.json. May be repeated."),
    ] = None,
    mix_protocols: Annotated[
        bool, typer.Option("--mix-protocols", help="Let --beside mix protocols, marked.")
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

    A metric whose pretrained network is missing is listed as skipped, with what to do about it. Each protocol gives a
    table of its own. Under torchrun, the processes share the images. Whose choices the protocols are:
    https://open-litevae.github.io/open-litevae/evaluation/

    Example: olvae evaluate -B 16 demo

    Example: olvae evaluate my-vae --data photos --precision fp16,bf16,32 --out precisions

    Example: olvae evaluate demo diffusers:stabilityai/sd-vae-ft-mse --data photos --size 256 --out comparison

    Example: olvae evaluate --zoo sdxl,flux2,qwen-image --data photos --size 256 --out zoo
    """
    if (zoo is None) == (not targets) or (
        zoo is not None and (not data or not out or baselines or "," in protocol)
    ):
        raise ConfigError(
            "name TARGETs, as last, or `zoo` with `data`, `out` and one `protocol`, without `baselines`"
        )
    check_paths(*(targets := targets or []), data=data)
    check_paths(data=fit)
    check_applies("--fit", fit is not None, "--baselines", baselines)
    check_applies("--mix-protocols", mix_protocols, "--beside", bool(beside))
    with loading():
        from olvae.data.pixels.size_and_range import Sides
        from olvae.devices import join, keep_freed_memory, leave, resolve_device
        from olvae.evaluation.baselines import Baselines
        from olvae.evaluation.observers.observer import UNTRAINED
        from olvae.evaluation.protocol import PROTOCOLS as PRESETS
        from olvae.evaluation.report import write_markdown
        from olvae.evaluation.runner import DEFAULT_METRICS, Request, evaluate
        from olvae.evaluation.zoo import ZOO_METRICS, evaluate_zoo, read_zoo
        from olvae.models.loading.targets import find_target, name_apart

    names = (
        split_commas(metrics)
        if ALL not in split_commas(metrics)
        else [*(ZOO_METRICS if zoo else DEFAULT_METRICS)]
    )
    pixels = Sides.read(size).node if size else None
    choices = (("posterior", posterior), ("seed", seed), ("size", pixels))
    changes: dict[str, Any] = {name: value for name, value in choices if value is not None}
    protocols = [replace(PRESETS[name], **changes) for name in split_commas(protocol)]
    if seed and all(p.noise_seed is None for p in protocols):
        raise ConfigError("--seed applies to samples: add --posterior sample, or leave it out")
    find = partial(
        find_target, config=config, config_base=config_base, raw=raw, allow_mismatch=allow_mismatch
    )
    found = name_apart([find(target) for target in targets], [UNTRAINED])
    observers = _observers(
        cross,
        split_commas(precision),
        report,
        observe or ([] if zoo is None else [*OBSERVERS]),
        weights_dir,
    )
    observers += [Baselines(found[0], fit)] if baselines else []
    folder = results_folder(out, "".join(targets[:1]), found[0].run if found else None)
    suffixes = {p.name: "" if p is protocols[0] else f"_{p.name}" for p in protocols}
    places = [folder / f"metrics{s}.json" for s in suffixes.values() if found]
    earlier = _read_earlier_files(beside or (), places, observers)
    keep_freed_memory()
    if rank := join()[0]:
        logging.getLogger("olvae").setLevel(logging.ERROR)
    device = resolve_device(device)
    request = Request(
        found, protocols, names, data, pixels, images, batch_size, weights_dir, device, observers
    )
    if device.startswith("cpu") and "fp16" in precision and images is None and not rank:
        typer.echo(
            "fp16 is very slow on a CPU: --device cuda, or --images N for fewer images", err=True
        )
    if zoo is None:
        evaluated = evaluate(request, with_progress)
    else:
        listed = read_zoo(() if zoo == ALL else split_commas(zoo))
        evaluated = evaluate_zoo(
            listed, find, request, folder, _command() if report else None, with_progress
        )
    leave()
    if evaluated is not None:
        _finish(evaluated, folder, suffixes, earlier, mix_protocols, report, as_json)
        if zoo is not None:
            write_markdown(evaluated[0], folder / "zoo.md", ZOO_PAGE.format(_command()))


def _observers(
    crossed: bool, precisions: list[str], report: bool, own: Iterable[str], weights_dir: Path | None
) -> list["Observer"]:
    """Make the observers that the flags ask for, in the order of the page."""
    from olvae.evaluation.observers import (
        bands,
        cross,
        flat_colours,
        gallery,
        half_precision,
        not_rgb,
    )
    from olvae.evaluation.observers.observer import Observer

    observers: list[Observer] = [cross.Cross()] if crossed else []
    observers += [half_precision.HalfPrecision(precisions)] if precisions != ["32"] else []
    observers += [not_rgb.RealValues(), not_rgb.Transparency(), gallery.Gallery(), bands.Bands()]
    observers += [flat_colours.FlatColours()] if report else []
    arguments = {"ifid": {"weights_dir": weights_dir}}
    observers += [
        resolve_class(OBSERVERS.get(name, name), Observer)(**arguments.get(name, {}))
        for name in own
    ]
    return observers


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "olvae"), *sys.argv[1:]])


def _of_earlier_rows() -> "list[Observer]":
    """Make the observers that show entries of earlier results; others show what they saw themselves."""
    from olvae.evaluation.observers import cross, half_precision

    return [cross.Cross(), half_precision.HalfPrecision()]


def _read_earlier_files(
    paths: Iterable[Path], places: Iterable[Path], observers: "Iterable[Observer]"
) -> "dict[Path, Results]":
    """Read what `beside` names; ConfigError if new results would overwrite one, a note if they replace others."""
    from olvae.evaluation.results import Results

    taken = {place.resolve() for place in places}
    earlier = {path: Results.read(path, [*_of_earlier_rows(), *observers]) for path in paths}
    if replaced := [str(place) for place in taken if place.is_file()]:
        typer.echo(
            f"note: {', '.join(replaced)}: earlier results, which these replace; --out keeps both",
            err=True,
        )
    if over := [path for path in earlier if path.resolve() in taken]:
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
    """Write and print results beside earlier ones; ValueError, after that, if these are not comparable."""
    from olvae.evaluation.report import print_results, write_files

    written: list[tuple[str, Path]] = []
    refused: list[ValueError] = []
    for i, one in enumerate(evaluated):
        results, names = one.results, [observer.name for observer in one.observers]
        try:
            results = results.beside(earlier, mix)
        except ValueError as reason:
            refused.append(reason)
        shown = (
            [observer for observer in _of_earlier_rows() if observer.name not in names]
            if earlier
            else []
        )
        evaluated[i] = replace(one, results=results, observers=[*shown, *one.observers])
        suffix = suffixes[results.protocol["name"]]
        written += write_files(evaluated[i], folder, suffix, _command() if page else None).items()
        if as_json and not suffix:
            typer.echo(json.dumps(results.as_dict(), indent=2))
    print_results(evaluated, in_flags)
    for what, path in written:
        typer.echo(f"{what + ':':<9}{path}", err=True)
    if refused:
        raise refused[0]


def results_folder(out: Path | None, target: str, run: Run | None) -> Path:
    """Choose and check the folder of the results: ``out``, the run's folder, or one beside a file of weights."""
    if out is None and run is not None:
        out = Path(find_run(target))
    elif out is None and Path(target).is_file():
        out = Path(target).with_name(f"{Path(target).stem}_results")
    if out is None:
        raise ConfigError(
            "--out DIR is missing: the first target is neither a run folder nor a file"
        )
    return check_folder(out)
