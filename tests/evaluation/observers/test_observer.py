"""The contract of an observer: rows of single images, whatever batches and processes have them."""

import copy

import pytest
import torch

from olvae.evaluation.observers.observer import Observer, PerImageObserver, Subject
from olvae.evaluation.page import Page
from olvae.evaluation.results import Row
from tests.conftest import tiny
from tests.evaluation.peers import seen
from tests.evaluation.test_results import results_of


class Means(PerImageObserver):
    """The mean level of each image, and the number of the image in its key."""

    name = "means"

    def measure(self, batch):
        if batch.target == "nothing":
            return None
        means = batch.x.float().mean((1, 2, 3)).tolist()
        return [(mean, int(key)) for mean, key in zip(means, batch.keys, strict=True)]

    def summarise(self, columns):
        means, numbers = columns
        return {"mean": sum(means) / len(means), "numbers": list(numbers)}


def image(level: int) -> torch.Tensor:
    return torch.full((3, 4, 4), level, dtype=torch.uint8)


def batch(*numbers: int, target: str = "a", draw: int = 0):
    x = torch.stack([image(10 * number) for number in numbers])
    return seen(target, [str(number) for number in numbers], x, draw=draw)


def test_rows_are_in_the_order_of_keys_whatever_the_batches():
    orders = [[(3, 1), (2,)], [(1,), (2,), (3,)], [(2, 3, 1)]]
    found = []
    for order in orders:
        means = Means()
        for numbers in order:
            means.update(batch(*numbers))
        found.append(means.result("a", 0))
    assert found == [{"mean": 20.0, "numbers": [1, 2, 3]}] * 3


def test_processes_that_have_the_same_image_count_it_once():
    first, second = Means(), Means()
    first.update(batch(1, 2))
    second.update(batch(2, 4))
    second.update(batch(5, target="b"))
    first.merge(copy.deepcopy(second.state()))
    assert first.result("a", 0) == {"mean": pytest.approx(70 / 3), "numbers": [1, 2, 4]}
    assert first.result("b", 0)["numbers"] == [5]


def test_only_the_first_draw_of_latents_is_looked_at():
    means = Means()
    means.update(batch(1))
    means.update(batch(2, draw=1))
    assert means.result("a", 0)["numbers"] == [1]


def test_nothing_to_measure_is_no_entry():
    means = Means()
    means.update(batch(1, target="nothing"))
    assert means.result("nothing", 0) is None
    assert means.result("another", 0) is None
    assert means.state() == {}


def test_a_row_for_each_image_is_asked_for():
    class One(Means):
        def measure(self, batch):
            return [(0.0, 0)]

    with pytest.raises(ValueError, match="shorter"):
        One().update(batch(1, 2))


def test_rows_of_different_lengths_are_an_error():
    class Uneven(Means):
        def measure(self, batch):
            return [(0.0,) * int(key) for key in batch.keys]

    uneven = Uneven()
    uneven.update(batch(1, 2))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        uneven.result("a", 0)


def test_what_to_measure_is_the_subclasss():
    with pytest.raises(NotImplementedError):
        PerImageObserver().update(batch(1))
    with pytest.raises(NotImplementedError):
        PerImageObserver().summarise([])


def test_measuring_keeps_no_gradients():
    class Gradient(Means):
        def measure(self, batch):
            assert not torch.is_grad_enabled()
            return super().measure(batch)

    Gradient().update(batch(1))


def test_an_observer_that_overrides_nothing_changes_nothing(tmp_path):
    """Each hook is called by an evaluation; none of them has to be there."""
    observer = Observer()
    subjects = {"a": Subject(tiny())}
    row = Row("a", 1, {"psnr": 20.0})
    page = Page(results_of(row))
    assert observer.derive(subjects) == subjects
    with observer.watch("a", 0, subjects["a"], ["1"]):
        observer.update(batch(1))
    observer.merge(observer.state())
    observer.examine(subjects, 16, "cpu")
    assert observer.result("a", 0) is None
    assert observer.complete(row, {"a": row}) is row
    assert observer.section(page) is None
    shown = (observer.choices(), observer.of_images("a", ["1"]), observer.columns({}))
    assert [dict(each) for each in shown] == [{}, {}, {}]
    assert [*observer.conflicts(["a"], ["psnr"], []), *observer.lines([row])] == []
    assert observer.write(tmp_path, "") == {}
    assert not [*tmp_path.iterdir()]
