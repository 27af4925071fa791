"""``olvae evaluate``, and ``python scripts/compute_metrics.py``."""

from pathlib import Path
from typing import Annotated

import typer

from olvae.cli.options import AllowMismatch, ConfigFile, Device, Raw

__all__ = ["command"]


def command(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...", help="Run folders, checkpoints, exports, ids of the hub, or diffusers:ID_OR_FOLDER."
        ),
    ],
    config: ConfigFile = None,
    config_base: Annotated[
        Path | None,
        typer.Option("--config_base", "--config-base", metavar="DIR", help="Find a run's config in here by its name."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-B", min=1, help="Images at a time; by default the config's, or 8.")
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(metavar="LIST", help="psnr, ssim, ms_ssim, l1, lpips, lpips_alex, rfid, kid, ssim_uniform."),
    ] = "all",
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]", help="open-litevae, latent-diffusion, dc-ae, llamagen, va-vae: docs/evaluation.md."
        ),
    ] = "open-litevae",
    data: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="A folder, shards, a list, ...; by default the first target's test images."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels; by default the config's, else the protocol's.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N images.")] = None,
    posterior: Annotated[str | None, typer.Option(help="mode or sample; by default what the protocol says.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise of samples.")] = 0,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    weights_dir: Annotated[
        Path | None,
        typer.Option("--weights-dir", metavar="DIR", help="Where VGG16, AlexNet and Inception are looked for first."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Add the untrained first target, and bicubic by its factor.")
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Put the rows of an earlier metrics.json into the table. May be repeated."),
    ] = None,
    mix_protocols: Annotated[
        bool, typer.Option("--mix-protocols", help="Allow --beside results of other protocols or images, marked.")
    ] = False,
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results go; by default the first target, or for a file FILE_results."),
    ] = None,
    report: Annotated[
        bool, typer.Option(help="Write report.html: everything on one page, with galleries and test patterns.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json to standard output as well.")] = False,
) -> None:
    """Evaluate reconstructions of the same test images by one or several autoencoders.

    A metric whose pretrained network is not there is listed as skipped, with what to do. Several protocols give a
    table each. Under torchrun the images are shared among the processes.

    Example: python scripts/compute_metrics.py -B 16 runs/2026-01-31T12-00-00_demo_32

    Example: olvae evaluate runs/… diffusers:stabilityai/sd-vae-ft-mse --data photos --size 256 --out comparison
    """
    import json
    import logging

    from olvae.config import ConfigError
    from olvae.devices import join, leave, resolve_device
    from olvae.evaluation.protocol import PROTOCOLS, named
    from olvae.evaluation.report.outputs import results_folder, write_outputs
    from olvae.evaluation.report.tables import print_evaluations
    from olvae.evaluation.results import Evaluation, read_earlier
    from olvae.evaluation.runner import DEFAULT_METRICS, UNTRAINED, Request, assess
    from olvae.metrics.registry import METRICS
    from olvae.models.loading.targets import find_target, name_apart

    names = _names(metrics) if metrics != "all" else list(DEFAULT_METRICS)
    if (unknown := [name for name in names if name not in METRICS]) or not names:
        raise ConfigError(f"--metrics {metrics}: {', '.join(unknown) or 'none'}: choose from all, {', '.join(METRICS)}")
    if posterior not in (None, "mode", "sample"):
        raise ConfigError(f"--posterior {posterior}: mode or sample")
    if unknown := [name for name in _names(protocol) if name not in PROTOCOLS]:
        raise ConfigError(f"--protocol {unknown[0]}: choose from {', '.join(PROTOCOLS)}")
    protocols = [named(name, posterior=posterior, seed=seed, size=size) for name in _names(protocol)]
    found = name_apart([find_target(t, config, config_base, raw, allow_mismatch) for t in targets], [UNTRAINED])
    folder = results_folder(out, targets[0], found[0].run)
    earlier = [read_earlier(path) for path in beside or ()]
    suffixes = {p.name: "" if p is protocols[0] else f"_{p.name}" for p in protocols}
    places = {(folder / f"metrics{suffix}.json").resolve() for suffix in suffixes.values()}
    if over := [path for path in beside or () if path.resolve() in places]:
        raise ConfigError(f"--beside {over[0]}: new results would be written over it: add --out DIR")

    rank, _ = join()
    if rank:
        logging.getLogger("olvae").setLevel(logging.ERROR)
    request = Request(
        found, protocols, names, data, size, images, batch_size, weights_dir, resolve_device(device), baselines, report
    )
    assessments = assess(request)
    leave()
    if assessments is None:
        return
    written: list[tuple[str, Path]] = []
    refused: list[ValueError] = []
    shown: list[Evaluation] = []
    for assessment in assessments:
        for alone in assessment.evaluations:
            try:
                evaluation = alone.with_rows([row for old in earlier for row in old.beside(alone, mix_protocols)])
            except ValueError as reason:  # not for nothing: its own results are kept
                evaluation, refused = alone, [*refused, reason]
            shown.append(evaluation)
            suffix = suffixes[evaluation.protocol.name]
            written += write_outputs(assessment, evaluation, folder, suffix, report)
            if as_json and not suffix:
                typer.echo(json.dumps(evaluation.as_dict(), indent=2))
    print_evaluations(shown)
    for what, path in written:
        typer.echo(f"{what + ':':<9}{path}", err=True)
    if refused:
        raise refused[0]


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
