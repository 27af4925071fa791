"""``olvae evaluate``."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from olvae.cli.options import (
    PRECISIONS,
    AllowMismatch,
    ConfigFile,
    Device,
    Raw,
    check_paths,
    comma_list,
    loading,
    split_commas,
    watched,
)

if TYPE_CHECKING:  # slow to import
    from olvae.evaluation.runner import Evaluated
    from olvae.runs import Run

__all__ = ["BatchSize", "First", "Targets", "TestImages", "command", "results_folder"]

METRICS = ("psnr", "ssim", "ssim_uniform", "ms_ssim", "l1", "lpips", "lpips_alex", "rfid", "kid")
PROTOCOLS = ("open-litevae", "latent-diffusion", "dc-ae", "llamagen", "va-vae")
"""Names of the registries, which import torch."""

ALL = "all"

Targets = Annotated[
    list[str],
    typer.Argument(
        metavar="TARGET...",
        help="Run folders, checkpoints, exported folders, olvae:NAME, hub ids, or diffusers:ID_OR_FOLDER.",
    ),
]

TestImages = Annotated[
    str | None,
    typer.Option(metavar="SRC", help="A folder, shards, a list, ...; by default the first target's test images."),
]

BatchSize = Annotated[
    int | None, typer.Option("--batch-size", "-B", min=1, help="Images per batch; by default the config's, or 8.")
]

First = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N images.")]


def command(
    targets: Targets,
    config: ConfigFile = None,
    config_base: Annotated[
        Path | None,
        typer.Option(
            "--config_base", "--config-base", metavar="DIR", help="A folder in which to find a run's config by name."
        ),
    ] = None,
    batch_size: BatchSize = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=comma_list((ALL, *METRICS)),
            help="psnr, ssim, ms_ssim, l1, lpips, lpips_alex, rfid, kid, ssim_uniform.",
        ),
    ] = ALL,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]",
            callback=comma_list(PROTOCOLS),
            help="open-litevae, latent-diffusion, dc-ae, llamagen or va-vae.",
        ),
    ] = "open-litevae",
    data: TestImages = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels per side; by default the config's, otherwise the protocol's.")
    ] = None,
    images: First = None,
    posterior: Annotated[Literal["mode", "sample"] | None, typer.Option(help="By default the protocol's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, if latents are sampled.")] = 0,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    weights_dir: Annotated[
        Path | None,
        typer.Option("--weights-dir", metavar="DIR", help="Search here first for VGG16, AlexNet and Inception."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Add rows for the first target untrained, and for bicubic resampling.")
    ] = False,
    cross: Annotated[
        bool,
        typer.Option(
            "--cross",
            help="Two targets, teacher then student: also each encoder with the other's decoder, and the error of the "
            "student's latents.",
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            callback=comma_list(("fp16", "bf16", "32"), aliases=PRECISIONS),
            help="fp16, bf16: adds a row in that precision, with its largest activations; float32 is always included.",
        ),
    ] = "32",
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Add the rows of an earlier metrics.json. May be repeated."),
    ] = None,
    mix_protocols: Annotated[
        bool, typer.Option("--mix-protocols", help="Let --beside add results of other protocols or images, marked.")
    ] = False,
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results go; by default the run folder, or FILE_results for a file."),
    ] = None,
    report: Annotated[
        bool, typer.Option(help="Write report.html, one page with everything, galleries and test patterns too.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Also print metrics.json to standard output.")] = False,
) -> None:
    """Evaluate how well one or several autoencoders reconstruct the same test images.

    A metric whose pretrained network is missing is listed as skipped, with what to do about it. Each protocol gives a
    table of its own. Under torchrun, the processes share the images. Whose choices the protocols are:
    https://open-litevae.github.io/open-litevae/evaluation/

    Example: olvae evaluate -B 16 runs/*_demo_32

    Example: olvae evaluate my-vae --data photos --precision fp16,bf16,32 --out precisions

    Example: olvae evaluate runs/*_demo_32 diffusers:stabilityai/sd-vae-ft-mse --data photos --size 256 --out comparison
    """
    import json
    import logging
    from dataclasses import replace

    from olvae.config import ConfigError

    check_paths(*targets, data=data)
    with loading():
        from olvae.allocator import keep_freed_memory
        from olvae.devices import join, leave, resolve_device
        from olvae.evaluation.precision import parse_precisions
        from olvae.evaluation.protocol import named
        from olvae.evaluation.report.tables import print_results
        from olvae.evaluation.results import Results
        from olvae.evaluation.runner import DEFAULT_METRICS, UNTRAINED, Request, evaluate
        from olvae.files import no_empty_folders
        from olvae.models.loading.targets import find_target, name_apart

    names = split_commas(metrics)
    names = list(DEFAULT_METRICS) if ALL in names else names
    protocols = [named(name, posterior=posterior, seed=seed, size=size) for name in split_commas(protocol)]
    precisions = parse_precisions(precision)
    found = name_apart([find_target(t, config, config_base, raw, allow_mismatch) for t in targets], [UNTRAINED])
    folder = results_folder(out, targets[0], found[0].run)
    earlier = [(path, Results.read(path)) for path in beside or ()]
    suffixes = {p.name: "" if p is protocols[0] else f"_{p.name}" for p in protocols}
    places = {(folder / f"metrics{suffix}.json").resolve() for suffix in suffixes.values()}
    if over := [path for path, _ in earlier if path.resolve() in places]:
        raise ConfigError(f"--beside {over[0]}: new results would overwrite it: add --out DIR")

    keep_freed_memory()
    rank, _ = join()
    if rank:
        logging.getLogger("olvae").setLevel(logging.ERROR)
    device = resolve_device(device)
    request = Request(
        found,
        protocols,
        names,
        data,
        size,
        images,
        batch_size,
        weights_dir,
        device,
        baselines,
        test_patterns=report,
        cross=cross,
        precisions=precisions,
    )
    if device.startswith("cpu") and "fp16" in precisions and images is None and not rank:
        typer.echo("fp16 is very slow on a CPU: --device cuda, or --images N for fewer images", err=True)
    evaluated = evaluate(request, watched("evaluating"), watched("test patterns", shared=False))
    leave()
    if evaluated is None:
        return
    written: list[tuple[str, Path]] = []
    refused: list[ValueError] = []
    shown: list[Results] = []
    for one in evaluated:
        results = one.results
        for path, other in earlier:
            try:
                results = results.beside(other, mix_protocols)
            except ValueError as reason:  # told at the end: the new results are kept
                results, refused = one.results, [*refused, ValueError(f"{path}: {reason}")]
                break
        shown.append(results)
        suffix = suffixes[results.protocol["name"]]
        with no_empty_folders(folder):
            written += _write(replace(one, results=results), folder, suffix, report)
        if as_json and not suffix:
            typer.echo(json.dumps(results.as_dict(), indent=2))
    print_results(shown)
    for what, path in written:
        typer.echo(f"{what + ':':<9}{path}", err=True)
    if refused:
        raise refused[0]


def results_folder(out: Path | None, target: str, run: "Run | None") -> Path:
    """Where results go, checked before the work.

    Args:
        out: as the user asked; None means the run's folder, or one beside a file of weights.
        target: as the user wrote it.
        run: the target's, if it is a run folder.

    Raises:
        ConfigError: there is no default for this target.
        OSError: the folder can't be made or written to.
    """
    from olvae.config import ConfigError
    from olvae.files import check_folder

    if out is not None:
        folder = out
    elif run is not None:
        folder = Path(target)
    elif Path(target).is_file():
        folder = Path(target).with_name(f"{Path(target).stem}_results")
    else:
        raise ConfigError("--out DIR is missing: the first target is neither a run folder nor a file")
    return check_folder(folder)


def _write(evaluated: "Evaluated", folder: Path, suffix: str, page: bool) -> list[tuple[str, Path]]:
    """Write the files of one protocol; where metrics.json is, the others are its own. Returns what and where."""
    from olvae.evaluation.report.page import write_page
    from olvae.evaluation.report.pictures import write_figure
    from olvae.evaluation.report.tables import write_csv, write_markdown
    from olvae.files import remove_partials

    folder.mkdir(parents=True, exist_ok=True)
    results = evaluated.results
    files = {
        "figure": folder / f"reconstructions{suffix}.png",
        "report": folder / f"report{suffix}.html",
        "images": folder / f"per_image{suffix}.csv",
        "table": folder / f"metrics{suffix}.md",
        "numbers": folder / f"metrics{suffix}.json",
    }
    remove_partials(folder.glob(".partial-*"), idle_s=1.0)
    files["numbers"].unlink(missing_ok=True)  # of an earlier evaluation
    if evaluated.galleries:
        write_figure(evaluated.galleries, files["figure"])
    if page:
        write_page(evaluated, files["report"], shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    write_csv(results, files["images"])
    write_markdown(results, files["table"])
    results.write(files["numbers"])
    left_out = {"figure": not evaluated.galleries, "report": not page}
    return [(what, path) for what, path in files.items() if not left_out.get(what)]
