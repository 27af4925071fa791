"""Group images that are never parted: the slices of a patient, the tiles of a scene."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from olvae.files import counted

FILE = "file"
_FOLDER = "folder"
# Of scenes alone, whose source knows them.
BLOCKS = "blocks"

# The entry of an image's JSON file, in a shard, that names its group.
GROUP = "hold_out_group"

# Slices of one thing by their names: at least so many things, each of so many slices, whose numbers
# follow one another from 0 or 1. A thing is numbered as well: patient7_ or scene-12/frame; not so a
# class's folder, such as Forest or WordNet's n01443537.
THINGS = 3
SLICES = 10
THING = re.compile(r"(?:^|[/_.-])(?!class|n\d{8})([a-z]+[ _.-]?)\d+[a-z]?[/ _.-]", re.I)


class Grouping:
    """Which images are held out together, by the names of their files.

    Args:
        how: ``file``: the images of a file; ``folder``: the images of a folder, without its
            subfolders; or a regular expression with a group of the name ``group``, for example
            ``(?P<group>patient\\d+)``: the images in whose names it finds the same text.

    Raises ValueError: the expression has a mistake, or no such group.
    """

    def __init__(self, how: str = FILE) -> None:
        self.how = how
        self.pattern: re.Pattern[str] | None = None
        if how in (FILE, _FOLDER):
            return
        try:
            self.pattern = re.compile(how)
        except re.error as error:
            raise ValueError(
                f"`hold_out_by` {how!r} is no regular expression: {error}: "
                f"set {FILE}, {_FOLDER} or (?P<group>...)"
            ) from error
        if "group" not in self.pattern.groupindex:
            raise ValueError(
                f"`hold_out_by` {how!r} has no group of this name: "
                f"set {FILE}, {_FOLDER} or (?P<group>...)"
            )

    def of(self, name: str) -> str:
        """Name the group of a file; ``name`` is its path below the folder of images, with ``/``.

        Raises ValueError: the expression does not find a group in it.
        """
        if self.how == FILE:
            return name
        if self.pattern is None:
            return str(PurePosixPath(name).parent)
        found = self.pattern.search(name)
        if found is None or found["group"] is None:
            raise ValueError(
                f"`hold_out_by` {self.how!r} finds no group in {name!r}: "
                "write an expression that fits all names"
            )
        return found["group"]

    def members(self, names: Iterable[str]) -> dict[str, list[int]]:
        """The places of each group's members in ``names``, in the order of first sight."""
        groups = defaultdict(list)
        for place, name in enumerate(names):
            groups[self.of(name)].append(place)
        return dict(groups)


def usual_grouping(trained_by: str | None) -> Grouping:
    """Group other images as a training does; its blocks are parts of its own scenes.

    Raises ValueError as :class:`Grouping`.
    """
    return Grouping(FILE if trained_by is None or trained_by == BLOCKS else trained_by)


def fill_with_groups(groups: Iterable[Sequence[int]], at_most: int) -> list[list[int]]:
    """Fill lists of up to ``at_most`` numbers with whole groups; a larger group has its own."""
    filled: list[list[int]] = []
    for group in groups:
        if filled and len(filled[-1]) + len(group) <= at_most:
            filled[-1].extend(group)
        else:
            filled.append(list(group))
    return filled


def shared_groups(train: set[str], held_out: set[str]) -> str | None:
    """Say which groups have images of training and of validation; None if none has."""
    # Files that lie in no folder below their two roots are not of one folder.
    shared = sorted((train & held_out) - {"."})
    if not shared:
        return None
    more = ", ..." if len(shared) > 10 else ""
    groups = counted(len(shared), "group")
    return (
        f"{groups} by `hold_out_by` with images of training and of validation: "
        f"{', '.join(shared[:10])}{more}: keep each on one side"
    )


def look_like_slices(names: Iterable[str]) -> str | None:
    """Say that most files look like slices of a few things, and what to set; None if they do not.

    Such are ``patient1_001.png`` to ``patient3_120.png``, or ``scene1/0.png`` to ``scene9/19.png``.
    """
    # The numbers at the ends of names, by what is before them.
    rows: dict[str, set[int]] = defaultdict(set)
    count = 0
    for name in names:
        count += 1
        stem = name.rpartition(".")[0]
        thing = stem.rstrip("0123456789")
        if 0 < len(stem) - len(thing) < 10:
            rows[thing].add(int(stem[len(thing) :]))

    # Rows of slices, and the words that are numbered.
    things = []
    words = set()
    slices = 0
    for thing, numbers in rows.items():
        whole = len(numbers) >= SLICES and max(numbers) - min(numbers) + 1 == len(numbers)
        numbered = THING.search(thing)
        if whole and min(numbers) < 2 and numbered:
            things.append(thing)
            words.add(numbered[1].replace(".", r"\."))
            slices += len(numbers)
    if len(things) < THINGS or 2 * slices < count:
        return None

    # The simplest setting that keeps these together.
    how = r"(?P<group>.*\D)\d+\.\w+$"
    if len({thing.rpartition("/")[0] for thing in things if thing.count("/") == 1}) == len(things):
        how = _FOLDER
    elif len(words) == 1:
        how = rf"(?P<group>{words.pop()}\d+)"
    return (
        f"{slices} files look like slices of {len(things)} things, such as {things[0]}*, and "
        "`hold_out_by` file puts slices of one thing into training and validation: set "
        f"`hold_out_by` (data.params.hold_out_by of a config), here for example to '{how}'"
    )
