"""Group images that are never parted: the slices of a patient, the tiles of a scene."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

FILE = "file"
FOLDER = "folder"


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
        if how in (FILE, FOLDER):
            return
        try:
            self.pattern = re.compile(how)
        except re.error as error:
            raise ValueError(
                f"`hold_out_by` {how!r} is no regular expression: {error}: "
                f"set {FILE}, {FOLDER} or (?P<group>...)"
            ) from error
        if "group" not in self.pattern.groupindex:
            raise ValueError(
                f"`hold_out_by` {how!r} has no group of this name: "
                f"set {FILE}, {FOLDER} or (?P<group>...)"
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
