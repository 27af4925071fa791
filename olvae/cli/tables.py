"""``olvae tables``."""

from typing import Annotated

import typer

__all__ = ["command"]


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead.")] = False,
) -> None:
    """The README's tables of parameters and multiply-accumulates, counted now, beside the published figures.

    Example: olvae tables --json > tables.json
    """
    import json

    from olvae.bench.networks import network_table, print_table

    rows = network_table()
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        print_table(rows)
