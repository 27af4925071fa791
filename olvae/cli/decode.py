"""``olvae decode``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from olvae.cli.options import (
    AllowMismatch,
    ConfigFile,
    Device,
    ProgressBar,
    Raw,
    TargetArgument,
    check_paths,
    loading,
)


def command(
    target: TargetArgument,
    source: Annotated[str, typer.Argument(metavar="SRC", help="Shards of latents: a folder, a file, a pattern.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the images to.")],
    config: ConfigFile = None,
    image_format: Annotated[Literal["png", "jpg"], typer.Option("--format", help="Of the pictures.")] = "png",
    batch_size: Annotated[int, typer.Option("--batch-size", "-B", min=1, help="Latents at a time.")] = 16,
    memory: Annotated[
        float,
        typer.Option(metavar="GiB", min=0.01, help="Memory for decoding; what needs more is tiled."),
    ] = 4.0,
    device: Device = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Turn the latents of `olvae encode` into images, named by their keys; posteriors are decoded at their mode.

    Example: olvae decode runs/*_demo_32 latents --out images
    """
    check_paths(target, data=source)
    with loading():
        from olvae.data.shards.index import find_shards, with_counts
        from olvae.data.shards.latent_source import LATENT, read_stats
        from olvae.data.source import total
        from olvae.devices import resolve_device
        from olvae.export.decoding import decode_shards
        from olvae.files import check_folder, no_empty_folders
        from olvae.models.large.tiling import GIB
        from olvae.models.loading.targets import find_target
        from olvae.modules.base import weights_checksum

    check_folder(out)
    where = resolve_device(device)
    stats = read_stats(source) if Path(source).is_dir() else {}
    shards = with_counts(find_shards(source), image_key=LATENT)
    model = find_target(target, config, raw=raw, allow_mismatch=allow_mismatch).load()
    if stats.get("weights", (mine := weights_checksum(model))) != mine:
        typer.echo(f"note: {stats.get('target')} made these latents, with other weights than {target}'s", err=True)
    model.to(where)

    with no_empty_folders(out), ProgressBar("decoding", total([shard.images for shard in shards])) as bar:
        done = decode_shards(model, shards, out, image_format, batch_size, int(memory * GIB), bar.advance)
    for error in done.unreadable:
        typer.echo(f"skipped {error.name}: {error.reason}", err=True)
    typer.echo(f"images: {out}, {done.images} of them", err=True)
