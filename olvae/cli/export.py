"""``olvae export``."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from olvae.cli.options import AllowMismatch, Raw, check_paths, loading

if TYPE_CHECKING:  # slow to import
    from olvae.models.autoencoder import LiteVAE

__all__ = ["command"]


class Format(str, Enum):
    """What is written."""

    litevae = "litevae"
    diffusers = "diffusers"
    ldm = "ldm"
    comfyui = "comfyui"


FILES = (Format.ldm, Format.comfyui)

FACTORS = ("--latents", "--scaling-factor", "--shift-factor")

REFUSED = {
    Format.litevae: (),
    Format.diffusers: ("--fold", "--onnx"),
    Format.ldm: ("--fold", "--onnx", *FACTORS, "--license"),
    Format.comfyui: ("--onnx", *FACTORS, "--license"),
}
"""Options that have no meaning in a format."""

WHY = {
    "--fold": "AutoencoderKL has no self-modulated convolutions",
    "--onnx": "ONNX files are written by --format litevae",
    "--license": "one file has no model card",
    **dict.fromkeys(FACTORS, "the factors are the diffusion model's there, not the autoencoder's"),
}


class Dtype(str, Enum):
    """The exported weights' dtype."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run folder, a checkpoint, an export, olvae:NAME, an id of the hub, diffusers:ID_OR_FOLDER of an "
            "AutoencoderKL, or a file of latent-diffusion's.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="PATH", help="The folder to create; for ldm and comfyui the .safetensors file.")
    ],
    layout: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="litevae: AutoencoderLiteVAE, for this package and diffusers. diffusers: its own AutoencoderKL. ldm: "
            "one file with latent-diffusion's names, for ComfyUI and A1111. comfyui: one file of a LiteVAE, for the "
            "node in integrations/comfyui. By default diffusers for AutoencoderKL's networks, else litevae.",
            show_default=False,
        ),
    ] = None,
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
        Path | None, typer.Option(metavar="DIR", help="Take both factors from what olvae latents or encode wrote.")
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
    """Export an autoencoder for this package, the Hugging Face hub, diffusers, ComfyUI or A1111.

    The export is loaded back and compared with the model before it appears in --out.

    Example: olvae export runs/*_demo_32 --out demo-vae --latents latents
    """
    from rich.console import Console

    from olvae.config import ConfigError

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
    given = {
        "--fold": fold,
        "--onnx": onnx,
        "--scaling-factor": scaling_factor is not None,
        "--shift-factor": shift_factor is not None,
        "--latents": latents is not None,
        "--license": license_id is not None,
    }
    if layout is not None:
        _check_options(layout, given)
    if latents is not None:
        latents = _factors_file(latents)
    check_paths(target)
    with loading():
        from olvae.export.comfyui import export_comfyui
        from olvae.export.folder import Provenance, check_empty, export, first_target, read_factors
        from olvae.export.latent_diffusion import export_latent_diffusion
        from olvae.export.single import check_file
        from olvae.models.loading.stable_diffusion import as_litevae
        from olvae.models.loading.targets import RAW, find_target
        from olvae.models.named import DIFFUSERS
        from olvae.modules.base import weights_checksum
        from olvae.modules.precision import DTYPES

    if layout in FILES:
        check_file(out, force)
    else:
        if out.suffix == ".safetensors" and not out.is_dir():
            raise ConfigError(f"--out {out}: names a file, but the export is a folder; one file is --format ldm")
        check_empty(out, force)

    console = Console(stderr=True)
    with loading():
        found = find_target(target, config, config_base, raw, allow_mismatch)
        if fresh := (found.config.get("run") or {}).get("untrained"):
            raise ConfigError(
                f"{target}: its {fresh} has never been trained: train it first, with --base distil/{fresh} and "
                "--actual_resume"
            )
        loaded = found.load()
        model = as_litevae(loaded, target)
    layout = _choose_format(model, layout, target)
    _check_options(layout, given)

    if layout in FILES:
        with console.status("writing and comparing"):
            if layout is Format.ldm:
                differences = export_latent_diffusion(model, out, DTYPES[dtype.value], force)
            else:
                differences = export_comfyui(model, out, DTYPES[dtype.value], fold, force)
        _report(differences)
        _note_stock(model, layout)
        typer.echo(f"export: {out}", err=True)
        return

    per_channel, guessed = model.latents_mean is not None, False
    factors_from = None
    if (model.scaling_factor, model.shift_factor) != (1.0, 0.0) or per_channel:
        factors_from = f"from {found.name}"
    if per_channel and any(given[option] for option in FACTORS):
        raise ConfigError(f"{target}: has latents_mean and latents_std per channel: leave out {', '.join(FACTORS)}")
    if latents is not None:
        model.scaling_factor, model.shift_factor = read_factors(latents, found.name, weights_checksum(loaded))
        factors_from = f"measured by olvae {'latents' if latents.name == 'latents.json' else 'encode'}"
    elif scaling_factor is not None or shift_factor is not None:
        model.scaling_factor = model.scaling_factor if scaling_factor is None else scaling_factor
        model.shift_factor = model.shift_factor if shift_factor is None else shift_factor
        factors_from = "given to olvae export"
    elif not loaded.factors_known:
        factors_from, guessed = "diffusers' default, the file holds none", True

    folder = found.run.path if found.run is not None else Path(target.removeprefix(DIFFUSERS))
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
        stock = layout is Format.diffusers
        differences = export(model, out, provenance, DTYPES[dtype.value], fold, onnx, force, stock)

    _report(differences)
    _note_stock(model, layout)
    if factors_from is None:
        typer.echo(
            "scaling factor 1 and shift factor 0, not measured: measure with olvae latents, then export with --latents",
            err=True,
        )
    elif guessed:
        typer.echo(
            f"note: {target} holds no factors: {model.scaling_factor:g} and {model.shift_factor:g} are diffusers' "
            "defaults, Stable Diffusion 1's; other models need --scaling-factor and --shift-factor",
            err=True,
        )
    typer.echo(f"export: {out}", err=True)


def _factors_file(given: Path) -> Path:
    """Of --latents: the file, or the one in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if given.is_file():
        return given
    for name in ("latents.json", "stats.json"):
        if (given / name).is_file():
            return given / name
    what = "neither latents.json nor stats.json is in this folder" if given.is_dir() else "no such file or folder"
    raise FileNotFoundError(f"--latents {given}: {what}: name what olvae latents or olvae encode wrote")


def _check_options(layout: Format, given: dict[str, bool]) -> None:
    """Raise ConfigError for an option that means nothing in a format."""
    from olvae.config import ConfigError

    for option in REFUSED[layout]:
        if given[option]:
            raise ConfigError(f"{option} does not go with --format {layout.value}: {WHY[option]}")


def _choose_format(model: "LiteVAE", asked: Format | None, target: str) -> Format:
    """The format that was asked for, or the default of the model's networks.

    Raises:
        ConfigError: the format can't hold the networks.
    """
    from olvae.config import ConfigError
    from olvae.export.latent_diffusion import latent_diffusion_weights
    from olvae.models.loading.stable_diffusion import diffusers_config, is_stable_diffusion

    kl = is_stable_diffusion(model)
    layout = asked or (Format.diffusers if kl else Format.litevae)
    if layout is Format.comfyui and kl:
        raise ConfigError(f"{target}: an AutoencoderKL: what ComfyUI loads is --format ldm")
    if layout in (Format.diffusers, Format.ldm) and not kl:
        raise ConfigError(
            f"{target}: a LiteVAE has other networks than AutoencoderKL: --format litevae for diffusers' "
            "AutoencoderLiteVAE, --format comfyui for ComfyUI"
        )
    try:
        if layout is Format.diffusers:
            diffusers_config(model)
        elif layout is Format.ldm:
            latent_diffusion_weights(model)
    except ValueError as error:
        raise ConfigError(f"{target}: {error}: --format litevae can hold it") from error
    return layout


def _report(differences: dict[str, float]) -> None:
    for what, difference in differences.items():
        typer.echo(f"{what}: " + (f"within {difference:.1e} of the largest value" if difference else "equal"), err=True)


def _note_stock(model: "LiteVAE", layout: Format) -> None:
    """Say what stock loaders do not know of the model."""
    from olvae.export.autoencoder_kl import reflects
    from olvae.export.latent_diffusion import not_stock

    if layout in (Format.diffusers, Format.ldm) and (halves := reflects(model)):
        typer.echo(
            f"note: padding: reflect in the {' and the '.join(halves)}, which this format can't say: loaders have to "
            'set padding_mode="reflect" on every convolution that pads, otherwise borders differ',
            err=True,
        )
    if layout is Format.ldm and (odd := not_stock(model)):
        typer.echo(f"note: ComfyUI and A1111 build Stable Diffusion's widths only, not {odd}", err=True)
