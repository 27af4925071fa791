"""Of an evaluation's page the part on test patterns."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from olvae.evaluation.artefacts import Artefacts, amplification, amplified
from olvae.evaluation.report.parts import NONE, Badge, Cell, Line, Table, number
from olvae.evaluation.report.pictures import Inline, inline

__all__ = ["artefact_summary", "artefact_tables"]


PATCH = 128
"""Pixels of the screen, per side, of a patch of a test pattern."""


class Patch(NamedTuple):
    """What became of a pattern: two pictures, and the numbers."""

    pictures: list[tuple[str, Inline]]
    text: str


class Patches(NamedTuple):
    """A table of pictures.

    Args:
        badges: of its columns.
        rows: per pattern its name, what was put in, and what became of it by target.
        side: pixels of the corner that is shown.
        screen: pixels of the screen for them.
        large: whether the input is shown as large as the reconstructions.
        factor: how much deviations are amplified.
    """

    badges: list[Badge]
    rows: list[tuple[str, Inline, list[Patch]]]
    side: int
    screen: int
    large: bool = False
    factor: int = 1


def artefact_summary(results: Mapping[str, Artefacts], badge: Mapping[str, Badge]) -> Table:
    """A line per target."""
    headings = [
        "grid, mean",
        "grid, largest",
        "amplitude, mean",
        "with border, mean",
        "shift, largest",
        "squares of 1 px, PSNR in dB",
        "squares of 8 px, PSNR in dB",
    ]
    return Table(headings, [Line(badge[name], [*map(Cell, _summary(found))]) for name, found in results.items()], [])


def artefact_tables(results: Mapping[str, Artefacts], badge: Mapping[str, Badge]) -> list[tuple[Patches, Patches]]:
    """Tables of pictures, of colours and of patterns. Targets whose patterns differ in size or in channels have
    tables of their own."""
    together: dict[tuple[object, ...], dict[str, Artefacts]] = {}
    for name, found in results.items():
        kind = (found.size, *(colour.name for colour in found.colours))
        together.setdefault(kind, {})[name] = found
    factor = amplification(results.values()) if results else 1
    return [(_colours(group, badge, factor), _patterns(group, badge)) for group in together.values()]


def _summary(found: Artefacts) -> list[str]:
    colours = found.colours
    psnr = {pattern.name: pattern.psnr for pattern in found.patterns}
    return [
        f"{sum(colour.grid for colour in colours) / len(colours):.2f}",
        f"{max(colour.grid for colour in colours):.2f}",
        f"{sum(colour.amplitude for colour in colours) / len(colours):.2f}",
        f"{sum(colour.amplitude_with_border for colour in colours) / len(colours):.2f}",
        f"{max(abs(value) for colour in colours for value in colour.shift):.1f}",
        *(number(psnr[name], 2) if name in psnr else NONE for name in ("squares 1 px", "squares 8 px")),
    ]


def _colours(group: Mapping[str, Artefacts], badge: Mapping[str, Badge], factor: int) -> Patches:
    side = _side(group.values())
    rows = []
    for colours in zip(*(found.colours for found in group.values()), strict=True):
        patches = []
        for colour in colours:
            deviation = amplified(colour.deviation[:, :side, :side], factor)
            shift = max(colour.shift, key=abs)
            text = f"grid {colour.grid:.2f}, amplitude {colour.amplitude:.2f}, shift {number(shift, 1)}"
            patches.append(Patch([("reconstruction", _corner(colour.y, side)), ("deviation", inline(deviation))], text))
        rows.append((colours[0].name, _corner(colours[0].x, side), patches))
    return Patches([badge[name] for name in group], rows, side, _screen(side), factor=factor)


def _patterns(group: Mapping[str, Artefacts], badge: Mapping[str, Badge]) -> Patches:
    side = _side(group.values())
    rows = []
    for patterns in zip(*(found.patterns for found in group.values()), strict=True):
        patches = [
            Patch([("reconstruction", _corner(pattern.y, side))], f"PSNR {number(pattern.psnr, 2)} dB")
            for pattern in patterns
        ]
        rows.append((patterns[0].name, _corner(patterns[0].x, side), patches))
    return Patches([badge[name] for name in group], rows, side, _screen(side), large=True)


def _corner(image: Tensor, side: int) -> Inline:
    return inline(image[:, :side, :side])


def _side(group: Iterable[Artefacts]) -> int:
    """Pixels of the corner that is shown: 64, or where a tile of the grid is larger than 16 pixels, 128."""
    results = list(group)
    wanted = PATCH // 2 if max(found.period for found in results) <= PATCH // 8 else PATCH
    return min(wanted, results[0].size)


def _screen(side: int) -> int:
    """Pixels of the screen for so many of the picture: a whole multiple, or else scaling would make its own grid."""
    return side * max(1, PATCH // side)
