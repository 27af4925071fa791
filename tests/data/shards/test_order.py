"""The order of shards' images: by hand, each image once, also after other processes continue it."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from olvae.data.shards.order import (
    Deal,
    Places,
    Round,
    ShardGroup,
    classes_in_a_batch,
    describe_sorted,
)
from olvae.data.source import LoaderLayout, continued


def test_group_takes_from_all_shards_in_turn_and_in_proportion():
    """Rows of 5: two of b's 3 images are in the first three, and each row has one of a."""
    group = ShardGroup([5, 3])
    order = [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1), (0, 4), (1, 2)]
    assert list(group.at(0, 8)) == order
    for first in range(9):
        for last in range(first, 9):
            assert list(group.at(first, last)) == order[first:last]


@pytest.mark.parametrize("counts", [[4], [7, 7, 7], [1, 100, 0, 13], [3, 0]], ids=str)
def test_group_has_each_image_once_and_each_shard_in_order(counts):
    group = ShardGroup(counts)
    found = list(group.at(0, group.images))
    expected = [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    assert sorted(found) == expected
    for shard in range(len(counts)):
        assert [i for s, i in found if s == shard] == list(range(counts[shard]))


def test_one_shard_after_the_other_is_a_group_of_one():
    assert list(ShardGroup([6]).at(2, 5)) == [(0, 2), (0, 3), (0, 4)]


def test_places_are_cut_and_joined():
    places = Places.of([(8, 10), (0, 3), (3, 4), (6, 6)])
    assert len(places) == 6
    assert list(places.part(0, 6)) == [(0, 4), (8, 10)]
    assert list(places.part(3, 5)) == [(3, 4), (8, 9)]
    assert list(places.part(2, 2)) == []
    assert len(Places.of([])) == 0
    assert list(Places.of([(6, 8), (0, 1), (5, 6)]).part(0, 4)) == [(0, 1), (5, 8)]


class Stream:
    """Every process's places by epoch, from layout to layout, as loaders would use them."""

    def __init__(self, images: int, shuffle: int) -> None:
        self.images, self.shuffle, self.seed = images, shuffle, 3
        self.used: dict[int, Counter[int]] = {}

    def run(self, layouts: list[LoaderLayout], until: int) -> None:
        """Use the samples of the last layout up to a number over all ranks."""
        now = layouts[-1]
        deal = Deal(self.images, layouts, self.seed, self.shuffle)
        for index, samples in enumerate(now.used(until)):
            for position in range(samples):
                number, place = deal.find(position)
                one = deal.round(number)
                share = one.share(now.processes)
                block, inside = divmod(place, self.shuffle)
                length = min(self.shuffle, share - block * self.shuffle)
                order = one.block_order(self.seed, block, index, now.processes, length)
                at = index * share + block * self.shuffle + order[inside]
                ((first, _),) = one.places.part(at, at + 1)
                self.used.setdefault(one.epoch, Counter())[first] += 1


LAYOUTS = {
    "2x4 to 2x8": [(0, 4, 2, 2), (96, 8, 2, 2)],
    "2x4 to 1x3": [(0, 4, 2, 2), (96, 3, 1, 2)],
    "other batches": [(0, 2, 1, 4), (40, 2, 1, 5)],
    "at an epoch's end": [(0, 2, 2, 2), (196, 1, 1, 2)],
    "often": [(0, 4, 2, 2), (32, 1, 1, 3), (95, 3, 2, 2), (143, 2, 1, 2), (243, 5, 1, 1)],
    "in the next epoch": [(0, 4, 1, 2), (216, 3, 1, 2), (312, 1, 1, 2)],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_image_comes_once_in_an_epoch_whatever_processes_share_it(name):
    images = 200
    stream = Stream(images, shuffle=7)
    layouts = [LoaderLayout(*numbers) for numbers in LAYOUTS[name]]
    ends = [layout.start for layout in layouts[1:]] + [3 * images]
    for i, until in enumerate(ends):
        stream.run(layouts[: i + 1], until)

    # No image twice; left out are fewer than there are processes, at every deal.
    left_out = sum(layout.processes for layout in layouts)
    for epoch in (0, 1):
        assert set(stream.used[epoch].values()) == {1}
        assert len(stream.used[epoch]) >= images - left_out
        assert max(stream.used[epoch]) < images


def test_the_old_way_repeats_a_quarter_of_the_images():
    """What the new one is for: positions of other processes, without what was used before."""
    images = 1024
    stream = Stream(images, shuffle=16)
    half = 512
    stream.run([LoaderLayout(0, 4, 2, 2)], half)
    before = set(stream.used[0])
    stream.used = {}
    stream.run([LoaderLayout(0, 8, 2, 2)], images)
    later = Deal(images, [LoaderLayout(0, 8, 2, 2)], 3, 16)
    again = set()
    for index in range(16):
        share = later.round(0).share(16)
        again |= set(range(index * share + half // 16, (index + 1) * share))
    assert len(before & again) / images == pytest.approx(0.25, abs=0.02)


def test_a_blocks_order_is_the_same_in_every_version():
    """Runs that are resumed rely on it."""
    places = Places.of([(0, 90)])
    for dealt, numbers in ((0, [5, 3, 7, 1, 4, 2]), (6, [5, 3, 7, 1, 4, 2, 6])):
        expected = np.random.default_rng(numbers).permutation(9).tolist()
        assert Round(3, places, dealt).block_order(5, 7, 1, 4, 9) == expected
    assert Round(3, places).share(4) == 22


def test_processes_that_are_the_same_continue_the_same_deal():
    first = LoaderLayout(0, 2, 1, 4)
    assert continued([first], LoaderLayout(64, 2, 1, 4)) == (first,)
    other = LoaderLayout(64, 2, 1, 8)
    assert continued([first], other) == (first, other)
    assert continued([], other) == (other,)


def test_a_change_between_two_epochs_deals_whole_ones():
    layouts = [LoaderLayout(0, 2, 1, 5), LoaderLayout(100, 4, 1, 5)]
    deal = Deal(100, layouts, 0, 10)
    assert deal.round(0).epoch == 1
    assert deal.round(0).dealt == 0
    assert deal.find(25) == (1, 0)


def test_a_rest_of_fewer_images_than_processes_is_left_out():
    layouts = [LoaderLayout(0, 1, 1, 2), LoaderLayout(98, 8, 1, 2)]
    deal = Deal(100, layouts, 0, 10)
    assert [len(deal.round(i).places) for i in range(2)] == [2, 100]
    assert [deal.round(i).dealt for i in range(2)] == [1, 0]
    assert deal.find(0) == (1, 0)


def test_a_hundred_thousand_shards_are_dealt_without_looking_at_images():
    """Work per change is the number of processes, not of images."""
    images = 10**8
    layouts = [LoaderLayout(0, 8, 64, 16), LoaderLayout(16 * 64 * 1000, 8, 32, 16)]
    deal = Deal(images, layouts, 0, 500)
    one = deal.round(0)
    assert images - 16 * 64 * 1000 - len(one.places) == 0
    starts = [next(one.places.part(i, i + 1))[0] for i in (0, len(one.places) - 1)]
    assert starts[0] < starts[1] < images
    ends = list(one.places.part(0, len(one.places)))
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    assert np.sum([b - a for a, b in ends]) == len(one.places)


def test_classes_in_a_batch_are_those_that_draws_give():
    rng = np.random.default_rng(0)
    for classes in (1, 7, 32, 1000):
        drawn = [len(set(rng.integers(classes, size=16))) for _ in range(4000)]
        assert classes_in_a_batch(16, classes) == pytest.approx(np.mean(drawn), rel=0.01)


def test_shards_that_are_sorted_by_class_are_described():
    """ImageNet's own shards: one class each; read one by one, and 32 at once; and mixed ones."""
    line = describe_sorted(16, 1.0, 1000, 1)
    assert "1.0 of 1000 classes" in line
    assert "batch of 16 has about 1.0 of them, and 15.9" in line
    assert "12.7 of them" in describe_sorted(16, 1.0, 1000, 32)
    assert describe_sorted(16, 600.0, 1000, 1) is None
    assert describe_sorted(16, 1.0, 1, 1) is None
    # Less than one class in a shard, as of shards without any; and just nine tenths.
    assert "about 1.0 of them" in describe_sorted(16, 0.2, 1000, 1)
    least = 0.9 * classes_in_a_batch(2, 10)
    few = 1.0 / (2.0 - least)  # of two draws 2 - 1 / n are different
    assert describe_sorted(2, few * 1.001, 10, 1) is None
    assert describe_sorted(2, few * 0.999, 10, 1) is not None
