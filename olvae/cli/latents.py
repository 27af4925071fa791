"""``olvae latents``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from olvae.cli.options import AllowMismatch, ConfigFile, Device, Raw

if TYPE_CHECKING:
    from olvae.data.source import Batch

__all__ = ["command"]


def command(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Run folders, checkpoints, exports, ids of the Hugging Face hub, diffusers:ID_OR_FOLDER.",
        ),
    ],
    config: ConfigFile = None,
    raw: Raw = False,
    allow_mismatch: AllowMismatch = False,
    data: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="A folder, shards, a list, ...; by default the first target's test images."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-B", min=1, help="Images at a time; by default the config's, or 8.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N images.")] = None,
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the report goes; by default the first target, or for a file FILE_results."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report to standard output as well.")] = False,
) -> None:
    """Describe the latents of one or several models on the same images, beside N(0, I).

    Histogram, moments, KL and activity per channel, correlation, spectrum, MMD, and the shift and scaling factors
    that a diffusion config needs; docs/latents.md explains each number. Under torchrun processes share the images.

    Example: olvae latents runs/2026-01-31T12-00-00_demo_32 --data photos --images 1000 --out report
    """
    import json

    from rich.console import Console
    from rich.progress import Progress

    from olvae.data.open import source_of
    from olvae.devices import gather, join, leave, resolve_device
    from olvae.evaluation.latents.report import (
        draw_channels,
        draw_distribution,
        encode_latents,
        print_latents,
        report_content,
        write_report,
    )
    from olvae.evaluation.report.outputs import results_folder
    from olvae.models.loading.targets import find_target, name_apart

    rank, world = join()
    found = [find_target(target, config, raw=raw, allow_mismatch=allow_mismatch) for target in targets]
    folder = results_folder(out, targets[0], found[0].run)
    device = resolve_device(device)
    models = {target.name: target.load() for target in name_apart(found)}

    channels = next(iter(models.values())).in_channels
    source = source_of(found[0].config, data, channels=channels)
    if images is not None:
        source.limit(images)
    count, batches = source.count("test"), source.test_loader(batch_size or (8 if data else None))
    described = {"source": data or found[0].config["data"]["target"], "images": source.test_images}

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=rank > 0 or not console.is_terminal) as progress:
        task = progress.add_task("encoding", total=count and -(-count // world))

        def counted() -> "Iterator[Batch]":
            for batch in batches:
                yield batch
                progress.advance(task, len(batch["image"]))

        accumulators = encode_latents(models, counted(), device)
        parts = gather(accumulators)
        leave()
        if parts is None:
            return
        for part in parts[1:]:
            for name, accumulator in part.items():
                accumulators[name].merge(accumulator)
        task = progress.add_task("comparing with N(0, I)", total=len(models))
        summaries = {}
        for name, accumulator in accumulators.items():
            summaries[name] = accumulator.compute()
            progress.advance(task)

    folder.mkdir(parents=True, exist_ok=True)
    seen = next(iter(summaries.values())).n
    content = report_content(summaries, {**described, "size": source.size, "n": seen})
    write_report(content, folder / "latents.json")
    draw_distribution(summaries, folder / "latents.png")
    draw_channels(summaries, folder / "latent_channels.png")
    print_latents(summaries, content["data"])
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    typer.echo(
        f"numbers: {folder / 'latents.json'}\nfigures: {folder / 'latents.png'}\n"
        f"         {folder / 'latent_channels.png'}",
        err=True,
    )
