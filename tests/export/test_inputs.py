"""Batches of equal size from images of many."""

from itertools import permutations

import pytest
import torch

from olvae.data.read_errors import ReadError
from olvae.export import inputs
from olvae.export.inputs import Item, in_order, read_batches


class Fixed:
    """An image of a size."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)

    def read(self):
        return self


@pytest.fixture
def items(monkeypatch):
    monkeypatch.setattr(inputs, "image_to_tensor", lambda one: torch.zeros(3, one.size[1], one.size[0]).byte())

    def make(*sizes):
        return [
            ReadError(str(i), "broken") if size is None else Item(str(i), str(i), lambda size=size: Fixed(*size))
            for i, size in enumerate(sizes)
        ]

    return make


def numbers(batches):
    return [[number for number, _ in batch] for batch in batches]


@pytest.mark.parametrize("threads", [0, 2])
def test_equal_once_they_are_padded(items, threads):
    a, b = (16, 8), (8, 16)
    sizes = [a, b, (15, 7), None, b, a, (9, 9), a, (17, 8)]  # 9x9 becomes 16x16, 17x8 24x8
    batches = list(read_batches(items(*sizes), 0, 8, 2, threads, False))
    assert numbers(batches) == [[0, 2], [3], [1, 4], [5, 7], [6], [8]]
    assert [one.item.key for batch in batches for _, one in batch if not isinstance(one, ReadError)] == [
        *("0", "2", "1", "4", "5", "7", "6", "8")
    ]


def test_a_rare_size_waits_for_so_many_images(items, monkeypatch):
    monkeypatch.setattr(inputs, "GROUPED_BATCHES", 3)
    sizes = [(8, 16), *[(8, 8)] * 8, (8, 16)]
    assert numbers(read_batches(items(*sizes), 0, 8, 2, 0, False)) == [[1, 2], [3, 4], [5, 6], [0], [7, 8], [9]]


def test_and_while_there_is_memory(items, monkeypatch):
    monkeypatch.setattr(inputs, "GROUPED_BYTES", 3 * 8 * 8 * 3)  # three images of 8x8
    sizes = [(8, 8 * i) for i in (1, 1, 2, 1, 3, 1)]
    assert numbers(read_batches(items(*sizes), 0, 8, 5, 0, False)) == [[0, 1], [2], [3], [4], [5]]


def test_numbers_are_put_in_order():
    for order in permutations(range(4)):
        assert list(in_order((i, str(i)) for i in order)) == ["0", "1", "2", "3"]
