"""``olvae validate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["command"]


def command(
    configs: Annotated[
        list[Path], typer.Argument(metavar="CFG...", help="Config files or recipes; each is checked on its own.")
    ],
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Also print what a training step needs on a GPU; takes seconds, and no GPU."),
    ] = False,
) -> None:
    """List every mistake of a config at once, without building anything.

    Finds unknown and missing keys, wrong types, and targets that do not import. Exits with 1 if there is a mistake.

    Example: olvae validate mine.yaml imagenet/A2
    """
    from olvae.config import ConfigError, load, validate

    found = 0
    for path in configs:
        try:
            mistakes = validate(load([path]))
        except ConfigError as error:
            mistakes = list(error.mistakes)
        found += len(mistakes)
        for mistake in mistakes:
            typer.echo(mistake if mistake.startswith(str(path)) else f"{path}: {mistake}", err=True)
        if not mistakes:
            typer.echo(f"{path}: no mistakes", err=True)
        if memory and not mistakes:
            from rich.console import Console

            Console().print(_memory(load([path]), str(path)))
    if found:
        raise typer.Exit(1)


def _memory(config: dict[str, Any], name: str) -> "Table":
    """What a training step needs, by size, precision and phase: at 128 and 256 pixels and at the config's own size.

    A size other than its own is left out if the networks do not take it.
    """
    from itertools import product

    from rich import box
    from rich.table import Table

    from olvae.models.footprint import CHECKPOINTS, GIB, footprints, without_weights
    from olvae.training.setup import start_from

    if config["model"].get("from") is not None:
        start_from(config)
    model = without_weights(config["model"])
    own = ((config.get("data") or {}).get("params") or {}).get("size")
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{name}: GiB of a training step on a GPU",
        caption="fixed: weights, gradients, Adam, averages, and what is kept whatever the batch. Then for each image "
        "of a micro-batch, by model.params.checkpoint. A tenth to a quarter comes on top.",
    )
    for heading in ("size", "precision", "phase", "fixed", *(f"{value}".lower() for value in CHECKPOINTS)):
        table.add_column(heading, justify="left" if heading in ("precision", "phase") else "right", no_wrap=True)
    for size, (precision, label) in product(sorted({128, 256, own or 256}), (("32", "32"), ("bf16", "bf16, 16"))):
        try:
            counted = footprints(model, size, precision)
        except ValueError:
            if size == own:
                raise
            continue
        for phase in dict.fromkeys(phase for phase, _ in counted):
            row = [counted[phase, value] for value in CHECKPOINTS]
            per_image = [f"{footprint.per_image / GIB:.3f}" for footprint in row]
            table.add_row(str(size), label, phase, f"{row[0].fixed / GIB:.2f}", *per_image)
    return table
