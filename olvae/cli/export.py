"""Run ``olvae export``: write a trained model in a format of this package, diffusers or ComfyUI."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from olvae.cli.options import (
    AllowMismatch,
    ConfigBase,
    ConfigFile,
    Raw,
    TargetArgument,
    check_paths,
    in_flags,
    loading,
)


def command(
    target: TargetArgument,
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="The folder to create; for ldm, comfyui, qwen2d and monai the .safetensors file.",
        ),
    ],
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="litevae: AutoencoderLiteVAE, for this package and diffusers. diffusers: its own "
            "AutoencoderKL. ldm: one file with the names of Stable Diffusion's, FLUX's or Wan's "
            "project, for ComfyUI and A1111. comfyui: one file of a LiteVAE, for the node in "
            "integrations/comfyui. taesd: two files of TAESD's or TAEF2's networks. qwen2d: one "
            "file of Qwen-Image's or Wan's for images alone. monai: one file with MONAI's names. "
            "Or a Layout of your own, package.module.Class. By default diffusers for an "
            "AutoencoderKL, else litevae.",
        ),
    ] = None,
    config: ConfigFile = None,
    config_base: ConfigBase = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(help="Round the weights to this dtype."),
    ] = "float32",
    fold: Annotated[
        bool,
        typer.Option(
            "--fold",
            help="Turn self-modulated convolutions into ordinary ones, for inference only.",
        ),
    ] = False,
    scaling_factor: Annotated[
        float | None,
        typer.Option(help="For a diffusion model: 1 / standard deviation of the latents."),
    ] = None,
    shift_factor: Annotated[
        float | None, typer.Option(help="For a diffusion model: mean of the latents.")
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Take both factors from what olvae latents or encode wrote."
        ),
    ] = None,
    per_channel: Annotated[
        bool,
        typer.Option(
            "--per-channel",
            help="Take a mean and a deviation for each channel from --latents, in place of both "
            "factors.",
        ),
    ] = False,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx",
            help="Write encoder.onnx and decoder.onnx too, or VAE_encoder.onnx beside "
            "VAE.safetensors; needs onnx, onnxscript, onnxruntime.",
        ),
    ] = False,
    license_id: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="The weights' licence by the hub's name: mit, ..."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the export in --out.")] = False,
) -> None:
    """Export an autoencoder for this package, the Hugging Face hub, diffusers, ComfyUI or A1111.

    The export is loaded back and compared with the model before it appears in --out.

    Example: olvae export demo --out demo-vae --latents latents
    """
    check_paths(target)
    with loading():
        from olvae.export.exporting import ExportSettings, export_target
        from olvae.models.loading.targets import find_target

        settings = ExportSettings(
            layout,
            dtype,
            fold,
            onnx,
            scaling_factor,
            shift_factor,
            latents,
            per_channel,
            license_id,
            force,
        )
        settings.check(out)
        found = find_target(target, config, config_base, raw, allow_mismatch)

    # Write the export and compare it; what was compared is reported with the largest difference.
    waiting = "writing and comparing"
    if onnx:
        waiting += ", ONNX takes a minute"
    with Console(stderr=True).status(waiting):
        differences, notes = export_target(found, out, settings)
    for what, difference in differences.items():
        result = f"within {difference:.1e} of the largest value" if difference else "equal"
        typer.echo(f"{what}: {result}", err=True)
    for note in notes:
        typer.echo(f"note: {in_flags(note)}", err=True)
    typer.echo(f"export: {out}", err=True)
