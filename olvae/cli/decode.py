"""``olvae decode``."""

from pathlib import Path
from typing import Annotated

import typer

from olvae.cli.options import AllowMismatch, ConfigFile, Device, Raw, TargetArgument

__all__ = ["command"]


def command(
    target: TargetArgument,
    source: Annotated[str, typer.Argument(metavar="SRC", help="Shards of latents: a folder, a file, a pattern.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the images go.")],
    config: ConfigFile = None,
    image_format: Annotated[str, typer.Option("--format", help="png or jpg.")] = "png",
    batch_size: Annotated[int, typer.Option("--batch-size", "-B", min=1, help="Latents at a time.")] = 16,
    memory: Annotated[
        float, typer.Option(metavar="GiB", min=0.01, help="What decoding may take, before it goes on in tiles.")
    ] = 4.0,
    device: Device = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Turn the latents of `olvae encode` into images, named by their keys; of a posterior the mode.

    Example: olvae decode runs/2026-01-31T12-00-00_demo_32 latents --out images
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from olvae.config import ConfigError
    from olvae.data.shards.index import with_counts
    from olvae.data.shards.latents import LATENT, read_stats
    from olvae.data.shards.urls import find_shards
    from olvae.devices import resolve_device
    from olvae.export.decode import FORMATS, decode_shards
    from olvae.export.encode import fingerprint
    from olvae.files import check_folder
    from olvae.models.large.memory import GIB
    from olvae.models.loading.targets import find_target

    if image_format not in FORMATS:
        raise ConfigError(f"--format {image_format}: choose from {', '.join(FORMATS)}")
    check_folder(out)
    where = resolve_device(device)
    stats = read_stats(source) if Path(source).is_dir() else {}
    shards = with_counts(find_shards(source), image_key=LATENT)
    model = find_target(target, config, raw=raw, allow_mismatch=allow_mismatch).load()
    if stats.get("weights", (mine := fingerprint(model))) != mine:
        typer.echo(f"note: {stats.get('target')} made these latents, with other weights than {target}'s", err=True)
    model.to(where)

    console = Console(stderr=True)
    counts = [shard.images for shard in shards]
    total = None if None in counts else sum(count for count in counts if count is not None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("decoding", total=total)
        budget = int(memory * GIB)
        done = decode_shards(model, shards, out, image_format, batch_size, budget, lambda n: progress.advance(task, n))
    for fault in done.unreadable:
        typer.echo(f"skipped {fault.name}: {fault.reason}", err=True)
    typer.echo(f"images: {out}, {done.images} of them", err=True)
