"""Heights and widths: from configs and commands, and back."""

import pytest

from olvae.config import ConfigError
from olvae.data.pixels.sides import Sides


def test_squares_are_one_number_and_others_two():
    assert Sides.of(64) == Sides.of([64, 64]) == Sides.read("64") == (64, 64)
    assert Sides.of([80, 256]) == Sides.read("80x256") == (80, 256)
    assert [(s.node, s.short, str(s)) for s in (Sides(64, 64), Sides(80, 256))] == [
        (64, "64", "64x64"),
        ([80, 256], "80x256", "80x256"),
    ]


def test_multiples():
    assert Sides(80, 256).fits(16)
    assert not Sides(80, 250).fits(16)
    assert not Sides(90, 256).fits(16)
    assert Sides(90, 250).multiples(16) == ((80, 240), (96, 256))
    assert Sides(5, 40).multiples(16) == ((16, 32), (16, 48))
    assert Sides(80, 256) // 8 == (10, 32)


@pytest.mark.parametrize("size", [0, [80], [80, 0], [80, 256, 3], [80, 25.6], -8, "64"])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"size must be at least 1, or \[height, width\] of such numbers, got "):
        Sides.of(size)


@pytest.mark.parametrize("text", ["", "0", "80x", "x80", "80x256x3", "8.5", "[80, 256]"])
def test_what_is_no_argument(text):
    with pytest.raises(ConfigError, match=r"^`size` .*: expected pixels, as in 256 or, height before width, 80x256$"):
        Sides.read(text)
