"""Sizes of images: height and width of a data set's images, and the most that a file may have."""

from collections.abc import Sequence
from typing import NamedTuple

from olvae.config import ConfigError

Size = int | Sequence[int]
"""``data.params.size``: the side of squares in pixels, or height and width, as [80, 256]."""

MAX_PIXELS = 160_000_000  # the largest camera's pictures have 151 million; each takes up to 20 bytes while it is read
MAX_RATIO = 100  # largest ratio of a picture's sides: resized to size s, it has up to 100 s^2 pixels


class Sides(NamedTuple):
    """Height and width of images, in pixels or in latent positions."""

    height: int
    width: int

    @classmethod
    def of(cls, size: Size) -> "Sides":
        """From what a config or JSON has. Raises ValueError unless it is one or two whole numbers from 1 on."""
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ValueError(f"size must be at least 1, or [height, width] of such numbers, got {size}")
        return cls(*sides)

    @classmethod
    def read(cls, text: str) -> "Sides":
        """From a command's argument, 64 or 80x256; ConfigError for others."""
        try:
            sides = [int(side) for side in text.split("x")]
            return cls.of(sides if len(sides) > 1 else sides[0])
        except ValueError as error:
            raise ConfigError(f"`size` {text}: expected pixels, as in 256 or, height before width, 80x256") from error

    @property
    def node(self) -> int | list[int]:
        """What a config or JSON has: one number for squares."""
        return self.height if self.height == self.width else [*self]

    @property
    def short(self) -> str:
        """What a command takes, 64 or 80x256."""
        return str(self.height) if self.height == self.width else str(self)

    def __floordiv__(self, factor: int) -> "Sides":
        return Sides(self.height // factor, self.width // factor)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    def fits(self, factor: int) -> bool:
        """Whether both are multiples of a factor."""
        return self.height % factor == self.width % factor == 0

    def multiples(self, factor: int) -> tuple["Sides", "Sides"]:
        """The nearest multiples below, or the factor itself, and above."""
        below, above = self // factor, Sides(*(side + factor - 1 for side in self)) // factor
        return Sides(*(factor * max(1, n) for n in below)), Sides(*(factor * n for n in above))


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a picture that would take too much memory."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"its header claims {width}x{height} pixels, more than {MAX_PIXELS // 10**6} million")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_RATIO} times the other")
