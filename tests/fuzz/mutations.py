"""Mutations of small valid files: flipped bits, cuts, splices, repetitions and other numbers."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import strategies as st

NUMBERS = (
    0,
    1,
    7,
    255,
    2**15,
    2**16 - 1,
    9000,
    10**9,
    2**31 - 1,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
)
"""In binary files, in place of others."""

WORDS = (*b'-1 0 9000 1000000000 1e999 -1e-9 NaN null true [] {} "x"'.split(), b"1" * 400)
"""In texts, in place of numbers."""

NUMBER = re.compile(rb"-?\d+(\.\d+)?")

AT_MOST = 2**22
"""Bytes of a mutated file: what is to be found is what takes more memory than the file."""


class Change(NamedTuple):
    how: str
    place: float
    length: int
    value: int


CHANGES = st.lists(
    st.builds(
        Change,
        st.sampled_from(
            ("flip", "set", "cut", "delete", "splice", "repeat", "number", "word", "word")
        ),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from((1, 2, 3, 4, 8, 16, 100, 512, 3000)),
        st.integers(0, 2**16 - 1),
    ),
    min_size=1,
    max_size=6,
)


def mutate(data: bytes, changes: Sequence[Change], others: Sequence[bytes]) -> bytes:
    """``data`` after the changes; pieces of ``others`` may be spliced in."""
    for how, place, length, value in changes:
        at, old, new = int(place * len(data)), length, b""  # `old` bytes at `at` become `new`
        match how:
            case "flip":
                old, new = 1, bytes(byte ^ (1 << value % 8) for byte in data[at : at + 1])
            case "set":
                old = min(length, 16)
                new = bytes([value % 256]) * old
            case "cut":
                old = len(data) if value % 4 == 0 else 0
            case "splice":
                other = others[value % len(others)]
                start = int(value / 2**16 * len(other))
                old, new = 0, other[start : start + length]
            case "repeat":
                new = data[at : at + length] * (value % 300)
            case "number":
                old = (1, 2, 4, 8)[value % 4]
                number = NUMBERS[value // 8 % len(NUMBERS)] % 2 ** (8 * old)
                new = number.to_bytes(old, "big" if value // 4 % 2 else "little")
            case "word":
                found = [*NUMBER.finditer(data[: 2**16])]
                start, end = found[int(place * len(found))].span() if found else (0, 0)
                at, old, new = start, end - start, WORDS[value % len(WORDS)] if found else b""
        data = (data[:at] + new + data[at + old :])[:AT_MOST]
    return data
