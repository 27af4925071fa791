"""``olvae validate``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    configs: Annotated[list[Path], typer.Argument(metavar="CFG...", help="Config files; each is checked on its own.")],
) -> None:
    """List every mistake of a config at once, without building anything.

    Finds unknown and missing keys, wrong types, and targets that do not import. Exits with 1 if there is a mistake.

    Example: olvae validate configs/demo.yaml
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
    if found:
        raise typer.Exit(1)
