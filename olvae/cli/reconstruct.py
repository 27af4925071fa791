"""``olvae reconstruct``."""

from pathlib import Path
from typing import Annotated

import typer

from olvae.cli.options import AllowMismatch, ConfigFile, Device, ProgressBar, Raw, TargetArgument, check_paths, loading

__all__ = ["command"]


def command(
    target: TargetArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for NAME.png and NAME_compare.png.")] = Path(
        "reconstructions"
    ),
    config: ConfigFile = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="32, 16 or bf16.")] = "32",
    tile: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Side of the decoder's tiles in latent positions; else from --memory."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GiB",
            help="Memory for activations, besides images and weights; by default half of a GPU's free memory, or 1 on "
            "the CPU. Tiles do not change the result.",
        ),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Decode a sample of the posterior, not its mode.")] = False,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Seed of --sample, the same for every image; 0 by default.")
    ] = None,
) -> None:
    """Reconstruct images of any size; write each result, and a picture of input, output and error with the PSNR.

    Example: olvae reconstruct olvae:photos-f8c12 photo.jpg

    Example: olvae reconstruct runs/*_demo_32 photo.jpg holiday/ --out reconstructions
    """
    from olvae.config import ConfigError

    if tile is not None and memory is not None:
        raise ConfigError("--tile and --memory: give one of the two")
    if seed is not None and not sample:
        raise ConfigError("--seed applies to --sample: give both, or neither")
    if memory is not None and not 0 < memory < 2**20:
        raise ConfigError(f"--memory {memory}: give a number of GiB, for example 2")
    check_paths(target)
    with loading():
        import torch

        from olvae.devices import resolve_device, resolve_precision
        from olvae.export.reconstruct import ReconstructOptions, collect_images, name_outputs, reconstruct_file
        from olvae.files import check_folder, legible
        from olvae.models.large.tiling import GIB, default_memory
        from olvae.models.loading.targets import find_target

    check_folder(out)
    where = torch.device(resolve_device(device))
    resolve_precision(precision, where.type)
    found = find_target(target, config, raw=raw, allow_mismatch=allow_mismatch)
    pictures = collect_images(images, out)
    model = found.load().to(where).fold()
    if tile is not None and model.receptive_field is None:
        name = type(getattr(model, "decoder", model)).__name__
        raise ConfigError(f"--tile {tile}: {name} sees the whole latent at every position: leave --tile out")
    channels = model.in_channels
    outputs = name_outputs(pictures, out, ".png" if channels in (1, 3, 4) else ".npy")
    budget = default_memory(where) if memory is None else int(memory * GIB)
    options = ReconstructOptions(
        where,
        budget,
        tile,
        (seed or 0) if sample else None,
        {"32": None, "16": torch.float16, "bf16": torch.bfloat16}[precision],
    )

    failed = 0
    with ProgressBar("reconstructing", len(outputs)) as bar:

        def show(fraction: float) -> None:
            bar.set(number + fraction)

        for number, (source, result) in enumerate(outputs.items()):
            try:
                value = reconstruct_file(model, source, result, options, show)
            except ValueError as error:
                failed += 1
                bar.print(f"error: {error}")
            else:
                bar.print(legible(f"{value:6.2f} dB  {source} -> {result}"))
            bar.set(number + 1)
    done = len(outputs) - failed
    if done:
        typer.echo(f"{done} of {len(outputs)} reconstructed by {found.name}: {out}", err=True)
    if failed:
        raise typer.Exit(1)
