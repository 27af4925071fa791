"""``olvae encode``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from olvae.cli.options import STOPPED, AllowMismatch, ConfigFile, Device, Raw, TargetArgument

__all__ = ["command"]


def command(
    target: TargetArgument,
    data: Annotated[str, typer.Option(metavar="SRC", help="A folder, shards, a list, a data set, a config.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the shards go; empty, or begun before.")],
    config: ConfigFile = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pixels: the shorter side is resized to it, the centre cropped; by default those it was trained at.",
        ),
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Every image at its own size, padded to a multiple of f.")
    ] = False,
    moments: Annotated[
        bool,
        typer.Option("--moments/--sample", help="Store the posterior's mean and deviation, or one sample of it."),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the samples; an image's noise depends on it and on its key.")] = 0,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    flip: Annotated[bool, typer.Option("--flip", help="Encode the mirrored images as well.")] = False,
    classes: Annotated[
        bool, typer.Option("--classes", help="Folders are classes: keep the number of an image's folder as .cls.")
    ] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a shard; shards stay as they are divided.")] = 1000,
    batch_size: Annotated[int, typer.Option("--batch-size", "-B", min=1, help="Images at a time.")] = 16,
    threads: Annotated[int, typer.Option(min=0, help="That read images, in each process.")] = 4,
    memory: Annotated[
        float, typer.Option(metavar="GiB", min=0.01, help="What encoding images of their own sizes may take.")
    ] = 4.0,
    device: Device = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print stats.json to standard output as well.")] = False,
) -> None:
    """Turn images into WebDataset shards of latents, with statistics; run it again to continue.

    Killed at any moment, the same command finishes the work, and the result is the same to the byte. Processes share
    the work: torchrun --nproc_per_node 4 --module olvae.cli.main encode ... docs/encode.md describes the shards, and
    how a diffusion model's trainer reads them.

    Example: olvae encode runs/2026-01-31T12-00-00_demo_32 --data photos --size 128 --out latents
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from olvae.config import ConfigError
    from olvae.devices import gather, join, leave, resolve_device
    from olvae.export.encode import DTYPES, EncodeJob, EncodeOptions
    from olvae.export.inputs import find_inputs
    from olvae.files import check_folder
    from olvae.models.large.memory import GIB
    from olvae.models.loading.targets import find_target

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    if native and size is not None:
        raise ConfigError("--native and --size: give one of the two")
    check_folder(out)
    rank, world = join()
    found = find_target(target, config, raw=raw, allow_mismatch=allow_mismatch)
    model = found.load().to(resolve_device(device))
    inputs = find_inputs(data, model.in_channels, shard_size, classes)
    size = 0 if native else size or found.usual_size(model)
    options = EncodeOptions(size, moments, seed, dtype, flip)
    describe = {"target": found.name, "source": data}
    encoder = EncodeJob(model, inputs, options, out, describe)
    if rank == 0 and len(inputs) < world:
        typer.echo(
            f"note: {len(inputs)} shard{'s' * (len(inputs) > 1)} of latents for {world} processes: the others have "
            "nothing to do; images that are in no shards yet are divided by --shard-size",
            err=True,
        )

    console = Console(stderr=True)
    counts = [inputs.count(shard) for shard in range(rank, len(inputs), world)]
    total = None if None in counts else sum(count for count in counts if count is not None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=rank > 0 or not console.is_terminal) as progress:
        share = "" if world == 1 else f", 1 of {world} shares"
        task = progress.add_task(f"encoding{share}", total=total)
        try:
            encoder.run(rank, world, batch_size, threads, int(memory * GIB), lambda n: progress.advance(task, n))
        except KeyboardInterrupt:
            if rank == 0:
                typer.echo(f"stopped: finished shards are in {out}; the same command goes on from there", err=True)
            sys.exit(STOPPED)
    if gather(None) is not None:
        stats = encoder.finish()
        if as_json:
            typer.echo(json.dumps(stats, indent=2))
        lost = stats["unreadable"]["count"]
        skipped = f"; {lost} could not be read, stats.json names them" if lost else ""
        of_size = f" of {size} px" if size else ""
        shards = f"{len(inputs)} shard{'s' * (len(inputs) > 1)}"
        typer.echo(
            f"latents: {out}, {stats['count']} images{of_size} in {shards}{skipped}\n"
            f"numbers: {out / 'stats.json'}, scaling_factor {stats['scaling_factor']:.4f}, "
            f"shift_factor {stats['shift_factor']:.4f}",
            err=True,
        )
    leave()
