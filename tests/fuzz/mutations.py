"""Mutations of small valid files: flipped bits, cuts, splices, repetitions and other numbers."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import strategies as st

NUMBERS = (0, 1, 7, 255, 2**15, 2**16 - 1, 9000, 10**9, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
"""In binary files, in place of others."""

WORDS = (
    b"-1",
    b"0",
    b"9000",
    b"1000000000",
    b"1e999",
    b"-1e-9",
    b"NaN",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'"x"',
    b"1" * 400,
)
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
        st.sampled_from(("flip", "set", "cut", "delete", "splice", "repeat", "number", "word", "word")),
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
        at = int(place * len(data))
        match how:
            case "flip":
                data = data[:at] + bytes([(*data, 0)[at] ^ (1 << value % 8)]) + data[at + 1 :] if data else data
            case "set":
                data = data[:at] + bytes([value % 256]) * min(length, 16) + data[at + min(length, 16) :]
            case "cut":
                data = data[:at] if value % 4 == 0 else data
            case "delete":
                data = data[:at] + data[at + length :]
            case "splice":
                other = others[value % len(others)]
                start = int(value / 2**16 * len(other))
                data = data[:at] + other[start : start + length] + data[at:]
            case "repeat":
                data = data[:at] + data[at : at + length] * (value % 300) + data[at + length :]
            case "number":
                size, order = (1, 2, 4, 8)[value % 4], ("little", "big")[value // 4 % 2]
                number = NUMBERS[value // 8 % len(NUMBERS)] % 2 ** (8 * size)
                data = data[:at] + number.to_bytes(size, order) + data[at + size :]  # type: ignore[arg-type]
            case "word":
                found = [*NUMBER.finditer(data[: 2**16])]
                if found:
                    one = found[int(place * len(found))]
                    data = data[: one.start()] + WORDS[value % len(WORDS)] + data[one.end() :]
        data = data[:AT_MOST]
    return data
