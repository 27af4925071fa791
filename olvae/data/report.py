"""The findings of a check on a terminal."""

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from olvae.data.findings import Consumers, Findings, SeenShard, Speed, Spread
from olvae.data.index import printable

__all__ = ["print_findings"]

BAR = 30  # cells of the longest bar
NAMED = 10


def print_findings(findings: Findings, console: Console) -> None:
    """Tables of what there is; then what is worth knowing, and what is to be mended."""
    parts: list[RenderableType] = [_facts(findings)]
    if findings.shorter_side is not None:
        parts += ["", _sizes(findings), "", _histogram(findings)]
    console.print(Group(*parts), soft_wrap=False)
    _print_names("unreadable", [f"{printable(fault.name)}: {fault.reason}" for fault in findings.unreadable], console)
    groups = [" = ".join(printable(name) for name in group) for group in findings.duplicates]
    _print_names("same pixels", groups, console)
    for style, word, lines in (("yellow", "note", findings.notes), ("bold red", "problem", findings.problems)):
        for line in lines:
            console.print(Text(f"{word}: ", style).append(printable(line), "default"), soft_wrap=True)
    if not findings.problems:
        console.print(Text("fine: ", "green").append("nothing is in the way of training", "default"))


def _facts(findings: Findings) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    lost = len(findings.unreadable)
    readable = f"{lost:,} of them unreadable ({lost / findings.images:.2%})" if lost else "all readable"
    table.add_row("images", f"{findings.images:,}, {readable}")
    table.add_row("files", ", ".join(f"{count:,} {kind}" for kind, count in findings.kinds.items()) or "-")
    groups = len(findings.duplicates)
    in_groups = f", in {groups:,} groups of the same pixels" if groups else ""
    table.add_row("copies", f"{findings.copies:,}{in_groups}")
    if findings.aspect_ratio is not None:
        table.add_row("small", f"{findings.smaller:,} with a shorter side of less than {findings.size} pixels")
        table.add_row("long", f"{findings.long:,} with one side at least twice the other")
        table.add_row("widest", escape(f"{printable(findings.widest)} ({findings.aspect_ratio.max:.2f} : 1)"))
        table.add_row("tallest", escape(f"{printable(findings.tallest)} ({findings.aspect_ratio.min:.2f} : 1)"))
    if findings.shards:
        table.add_row("shards", _shards(findings.shards))
    if findings.consumers is not None:
        table.add_row("epoch", _consumers(findings.consumers))
    if findings.speed is not None:
        table.add_row("speed", _speed(findings.speed))
    return table


def _sizes(findings: Findings) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="dim")
    for name in ("min", "median", "max"):
        table.add_column(name, justify="right")
    rows = {
        "width": findings.width,
        "height": findings.height,
        "shorter side": findings.shorter_side,
        "width / height": findings.aspect_ratio,
    }
    for name, spread in rows.items():
        assert isinstance(spread, Spread)
        form = ".2f" if name == "width / height" else ",.0f"
        table.add_row(f"[bold]{name}[/]", *(format(value, form) for value in (spread.min, spread.median, spread.max)))
    return table


def _histogram(findings: Findings) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("shorter side", justify="right")
    table.add_column("images", justify="right")
    table.add_column("")
    most = max(count for _, _, count in findings.sides)
    filled = [i for i, (_, _, count) in enumerate(findings.sides) if count]
    for low, high, count in findings.sides[filled[0] : filled[-1] + 1]:
        label = f"{low:,} and more" if high is None else f"{low:,} to {high - 1:,}"
        cells = max(1, round(BAR * count / most)) if count else 0
        table.add_row(label, f"{count:,}", f"[cyan]{'█' * cells}[/]")
    return table


def _shards(shards: list[SeenShard]) -> str:
    counts = sorted(shard.images for shard in shards)
    low, middle, high = counts[0], counts[len(counts) // 2], counts[-1]
    each = f"{low:,} images each" if low == high else f"{low:,} to {high:,} images each, median {middle:,}"
    broken = sum(shard.broken is not None for shard in shards)
    return f"{len(shards):,}, {each}{f'; {broken:,} broken' if broken else ''}"


def _consumers(consumers: Consumers) -> str:
    who = f"{consumers.workers} workers x {consumers.ranks} ranks"
    if consumers.images is None:
        return f"an unknown number of images in {consumers.shards} training shards, for {who}"
    of = "" if consumers.shards is None else f" in {consumers.shards:,} shards"
    text = f"{consumers.images:,} training images{of}: {consumers.batches:,} batches of {consumers.batch_size} per rank"
    if consumers.per_process is None:
        return text
    return f"{text}; {who}: {consumers.per_process:,} images per process, {consumers.left_out:,} left out"


def _speed(speed: Speed) -> str:
    text = f"{speed.images_per_s:,.0f} images/s per worker at {speed.size} pixels, read, decoded and cropped"
    if speed.need is None:
        return text
    return f"{text}; {speed.need:,.0f} images/s take {speed.workers} workers in all, and here are {speed.cores} cores"


def _print_names(title: str, lines: list[str], console: Console) -> None:
    if not lines:
        return
    console.print(Text(f"\n{title}:", "bold"))
    for line in lines[:NAMED]:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if len(lines) > NAMED:
        console.print(Text(f"  and {len(lines) - NAMED:,} more; --json has all"))
