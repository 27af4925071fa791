"""``olvae tables``."""

from typing import Annotated

import typer

__all__ = ["command"]


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Count the parameters and multiply-accumulates in the README's tables, and show them beside the published ones.

    Example: olvae tables --json > tables.json
    """
    import json

    from olvae.bench.networks import network_table, print_table

    rows = network_table()
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        print_table(rows)
