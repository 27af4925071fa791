"""``olvae export``."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from olvae.cli.options import AllowMismatch, Raw

__all__ = ["command"]


class Dtype(str, Enum):
    """The exported weights' dtype."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def command(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A run folder, a checkpoint, an export, an id of the hub.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to create.")],
    config: Annotated[
        Path | None, typer.Option(metavar="CFG", help="The config of a checkpoint, if it is not beside it.")
    ] = None,
    config_base: Annotated[
        Path | None,
        typer.Option(
            "--config_base", metavar="DIR", help="A folder to search for the run's config, by the run's name."
        ),
    ] = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    dtype: Annotated[Dtype, typer.Option(help="Round the weights to this dtype.")] = Dtype.float32,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold", help="Turn self-modulated convolutions into ordinary ones; such weights are for inference only."
        ),
    ] = False,
    scaling_factor: Annotated[
        float | None, typer.Option(help="For a diffusion model: 1 / standard deviation of the latents.")
    ] = None,
    shift_factor: Annotated[float | None, typer.Option(help="For a diffusion model: mean of the latents.")] = None,
    latents: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Take both factors from the latents.json of olvae latents.")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write encoder.onnx and decoder.onnx too; needs open-litevae[onnx].")
    ] = False,
    license_id: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="The weights' licence, by the hub's name for it: mit, ..."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the export in --out.")] = False,
) -> None:
    """Export a trained autoencoder as a folder that this package, the Hugging Face hub and diffusers load.

    The export is loaded back and compared with the model before it appears in --out.

    Example: olvae export runs/2026-01-31T12-00-00_demo_32 --out demo-vae --latents latents.json
    """
    import signal

    from rich.console import Console

    from olvae.config import ConfigError
    from olvae.export.folder import Provenance, check_empty, export, first_target, read_factors
    from olvae.models.autoencoder import LiteVAE
    from olvae.models.loading.targets import RAW, find_target
    from olvae.modules.precision import DTYPES

    if latents is not None and (scaling_factor is not None or shift_factor is not None):
        raise ConfigError("--latents has both factors: leave out --scaling-factor and --shift-factor")
    if scaling_factor is not None and not 0 < scaling_factor < float("inf"):
        raise ConfigError(f"--scaling-factor {scaling_factor}: give a number above 0")
    if shift_factor is not None and not abs(shift_factor) < float("inf"):
        raise ConfigError(f"--shift-factor {shift_factor}: give a finite number")
    if config is not None and config_base is not None:
        raise ConfigError("--config names the config, --config_base a folder to search for it: give one of them")
    if onnx and dtype is not Dtype.float32:
        raise ConfigError(f"--onnx writes float32: leave out --dtype {dtype.value}, or --onnx")
    check_empty(out, force)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that temporary files are removed

    console = Console(stderr=True)
    with console.status("loading"):
        found = find_target(target, config, config_base, raw, allow_mismatch)
        model = found.load()
    if not isinstance(model, LiteVAE):
        raise ConfigError(f"{target}: not a LiteVAE; diffusers loads it already, so there is nothing to export")
    factors_from = f"from {found.name}" if (model.scaling_factor, model.shift_factor) != (1.0, 0.0) else None
    if latents is not None:
        model.scaling_factor, model.shift_factor = read_factors(latents, found.name)
        factors_from = "measured by olvae latents"
    elif scaling_factor is not None or shift_factor is not None:
        model.scaling_factor = model.scaling_factor if scaling_factor is None else scaling_factor
        model.shift_factor = model.shift_factor if shift_factor is None else shift_factor
        factors_from = "given to olvae export"

    folder = found.run.path if found.run is not None else Path(target)
    metrics = folder / "metrics.json"
    measured = metrics.is_file()
    if measured and found.run is not None and (RAW in (evaluated := first_target(metrics))) != found.raw:
        typer.echo(f"note: {metrics} is left out: it is about {evaluated}, not {found.name}", err=True)
        measured = False
    provenance = Provenance(
        name=found.name,
        config=found.config,
        metrics=metrics if measured else None,
        raw=found.raw,
        licence=license_id,
        factors_from=factors_from,
    )
    with console.status("writing and comparing" + (", ONNX takes a minute" if onnx else "")):
        differences = export(model, out, provenance, DTYPES[dtype.value], fold, onnx, force)

    for what, difference in differences.items():
        typer.echo(f"{what}: " + (f"within {difference:.1e} of the largest value" if difference else "equal"), err=True)
    if factors_from is None:
        typer.echo(
            "scaling factor 1 and shift factor 0, not measured: measure with olvae latents, then export with --latents",
            err=True,
        )
    typer.echo(f"export: {out}", err=True)
