"""``olvae validate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


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
    """Tabulate what a training step needs, by precision and checkpointing, at the config's own size."""
    from rich import box
    from rich.table import Table

    from olvae.models.footprint import footprint, without_weights
    from olvae.models.large.tiling import GIB
    from olvae.training.setup import start_from

    if config["model"].get("from") is not None:
        start_from(config)
    model = without_weights(config["model"])
    size = ((config.get("data") or {}).get("params") or {}).get("size") or 256
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{name}: GiB of a training step on a GPU, at {size} pixels",
        caption="fixed: weights, gradients, optimizers, averages. Then for each image of a micro-batch. Add a tenth.",
    )
    for heading in ("precision", "model.params.checkpoint", "fixed", "per image"):
        table.add_column(heading, justify="right" if heading in ("fixed", "per image") else "left", no_wrap=True)
    for precision in ("32", "bf16"):
        for checkpoint in (False, True):
            need = footprint(model, size, precision, checkpoint)
            values = (f"{need.fixed / GIB:.2f}", f"{need.per_image / GIB:.3f}")
            table.add_row(precision, str(checkpoint).lower(), *values)
    return table
