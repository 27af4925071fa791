"""``olvae tables``."""

from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Count the parameters and multiply-accumulates in the README's tables, and show them beside the published ones.

    Example: olvae tables --json > tables.json
    """
    import json

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from olvae.bench.cases import network_table

    rows = network_table()
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
        return
    title = "Networks at 256x256: counted now, and as published"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title)
    for heading in ("group", "variant", "name"):
        table.add_column(heading, no_wrap=True)
    for heading in ("M\nparams", "pub-\nlished", "\nGMACs", "pub-\nlished"):
        table.add_column(heading, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        params, macs = f"{row.params / 1e6:.4f}", f"{row.macs / 1e9:.2f}"
        published = "-" if row.published_macs is None else f"{row.published_macs / 1e9:.1f}"
        ends = following is not None and following.group != row.group
        table.add_row(*row[:3], params, f"{row.published_params / 1e6:.2f}", macs, published, end_section=ends)
    Console().print(table)
