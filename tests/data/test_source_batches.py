"""A source's numbers, samples and batches, by a source of numbers in memory."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.config import ConfigError
from olvae.data import source as source_module
from olvae.data.image import EvalTransform, MultiBand
from olvae.data.read_errors import ReadError, ReadErrors
from olvae.data.source import (
    LoaderLayout,
    LoaderProcess,
    Sample,
    Source,
    _collate,
    _end_workers,
    _leave_interrupts_to_the_trainer,
    continued,
    eval_sample,
    total,
)
from olvae.files import ECHO_S, SIGNALS, lines_sha256
from tests.data.images import be_rank

ERROR = ReadError("a.jpg", "cut off")


class NumbersSource(Source):
    """Images of one value, their number; some can't be read."""

    shares_evenly = True

    def __init__(
        self, val: int | None = 5, broken: tuple[int, ...] = (), **options: object
    ) -> None:
        super().__init__(**{"size": [2, 3], "batch_size": 2, **options})
        self.val = val
        self.broken = broken
        self.asked: list[tuple[int, int, LoaderProcess]] = []

    samples_per_epoch = 7
    val_images = property(lambda self: self.val)

    def sample(self, number: int) -> Sample:
        if number in self.broken:
            return Sample(None, str(number), (ERROR,))
        return Sample(torch.full((3, 2, 3), number), str(number), enlarged=number == 1)

    def stream(self, seed: int, position: int, process: LoaderProcess) -> Iterator[Sample]:
        self.asked.append((seed, position, process))
        return (self.sample(place) for place in process.positions(position))

    def once(self, process: LoaderProcess) -> Iterator[Sample]:
        self.asked.append((-1, -1, process))
        return map(self.sample, range(process.index, self.val, process.count))

    def describe(self) -> str:
        return "numbers"


def keys(samples: Iterator[Sample]) -> list[str]:
    return [sample.key for sample in samples]


def test_processes_are_numbered_over_all_ranks():
    processes = [
        LoaderProcess(worker, 2, rank, 3, 4, 100) for worker in range(2) for rank in range(3)
    ]
    assert [(process.index, process.count) for process in processes] == [(n, 6) for n in range(6)]
    assert list(islice(processes[4].positions(3), 3)) == [100 + 22, 100 + 37, 100 + 40]


def test_a_layout_knows_what_each_process_gave():
    layout = LoaderLayout(5, 2, 3, 4)
    assert layout.processes == 6
    # Five batches of each rank, and some of the sixth's samples.
    assert layout.used(5 + 5 * 4 * 3 + 2) == [12, 12, 12, 8, 8, 8]


def test_layouts_that_continue_are_added_unless_the_processes_are_the_same():
    first, again, other = (
        LoaderLayout(start, workers, 3, 4) for start, workers in ((0, 2), (9, 2), (9, 1))
    )
    assert continued([], first) == (first,)
    assert continued([first], again) == (first,)
    assert continued([first], other) == (first, other)
    assert continued([other, first], again) == (other, first)
    assert continued([first, other], again) == (first, other, again)


def test_the_total_is_known_if_all_numbers_are():
    assert [total(numbers) for numbers in ([], [2, 3], [2, None])] == [0, 5, None]
    assert (NumbersSource().images, NumbersSource(val=None).images) == (12, None)


@pytest.mark.parametrize(
    ("setting", "least", "below"),
    [
        ("batch_size", 1, 0),
        ("channels", 1, 0),
        ("num_workers", 0, -1),
        ("max_unreadable", 0.0, -0.1),
    ],
)
def test_settings_have_a_least_value(setting, least, below):
    NumbersSource(**{setting: least})
    with pytest.raises(ValueError, match=f"{setting} must .*, got {below}"):
        NumbersSource(**{setting: below})


def test_all_images_may_be_unreadable_and_the_range_fits_the_channels():
    assert NumbersSource(max_unreadable=1.0).max_unreadable == 1
    with pytest.raises(ValueError, match=r"max_unreadable must .*, got 1\.1"):
        NumbersSource(max_unreadable=1.1)
    with pytest.raises(ConfigError, match="2 pairs for images of 3 channels"):
        NumbersSource(range=[[0, 1], [0, 2]])


def test_a_batch_is_at_most_an_epoch(monkeypatch):
    NumbersSource(batch_size=7).check_batch()
    with pytest.raises(ValueError, match=r"batch_size 8 is larger .*set 7 or less"):
        NumbersSource(batch_size=8).check_batch()
    monkeypatch.setattr(NumbersSource, "samples_per_epoch", None)
    NumbersSource(batch_size=8).check_batch()
    with pytest.raises(ValueError, match="NumbersSource can't be limited to 3 images"):
        NumbersSource().limit(3)


def test_the_validation_set_is_described_by_its_images_and_their_share():
    source = NumbersSource()
    how = source.eval_transform.describe()
    assert source.describe_val_images() == how

    def digest(*lines: str) -> str:
        return lines_sha256(lines)[:16]

    assert source.describe_val_set() == f"5 images, 2x3, {digest(how, '5 images')}"
    source.crops = "tiles"
    assert source.describe_val_images() == "tiles"
    source.val_limit = (3, 4)
    whole = digest("tiles", "5 images", "")
    assert source.describe_val_set() == f"3 batches of 2 x 4 processes, of 5 images, 2x3, {whole}"
    source.shares_evenly = False
    part = digest("tiles", "5 images", "0 loader processes")
    assert source.describe_val_set().endswith(f", {part}")
    assert NumbersSource(val=None).describe_val_set().startswith("an unknown number of images, 2x3")


def test_a_limited_validation_counts_batches_that_could_be_read():
    source = NumbersSource(val=12, broken=(0, 1))
    assert keys(source.validated()) == [str(number) for number in range(12)]
    source.val_limit = (1, 1)
    assert keys(source.validated()) == ["0", "1", "2", "3"]
    source.val_limit = (2, 2)
    assert keys(source.validated()) == ["0", "2", "4", "6", "1", "3", "5", "7"]
    source.num_workers = 2
    # Worker 0 of rank 0 has 0, 4 and 8, worker 1 has 2, 6 and 10; worker 0 of rank 1 1, 5 and 9.
    assert keys(source.validated()) == ["0", "4", "2", "6", "1", "5", "3", "7"]
    source.val_limit = (9, 1)
    assert len(keys(source.validated())) == 12


def test_masks_stay_resized_by_nearest():
    source = NumbersSource()
    adm = EvalTransform(4, resize="adm")
    source.evaluate_with(adm)
    assert source.eval_transform == adm
    source.evaluate_with(replace(adm, resample="nearest"))
    source.evaluate_with(adm)
    assert source.eval_transform == replace(adm, resample="nearest")


def test_the_first_images_are_the_readable_ones_of_a_seed():
    source = NumbersSource(broken=(1,))
    assert keys(source.first_samples(8, 3)) == ["0", "2", "3"]
    assert [int(image[0, 0, 0]) for image in source.first_images(8, 3)] == [0, 2, 3]
    assert source.asked == [(8, 0, LoaderProcess(batch_size=2))] * 2


def test_the_layout_of_a_loader_without_workers_is_one_process():
    assert NumbersSource().layout(7, 3) == (7, 1, 3, 2)
    assert NumbersSource(num_workers=4).layout(7, 3) == (7, 4, 3, 2)


def test_training_batches_are_the_stream_from_a_sample_on():
    source = NumbersSource()
    loader = source.train_loader(seed=8, start=5)
    batches = list(islice(loader, 3))
    assert [batch["key"] for batch in batches] == [["5", "6"], ["7", "8"], ["9", "10"]]
    assert batches[0]["image"].shape == (2, 3, 2, 3)
    assert source.asked == [(8, 4, LoaderProcess(0, 1, 0, 1, 2, offset=1))]
    assert loader.drop_last
    with pytest.raises(TypeError, match="unknown before reading"):
        len(loader)


def test_validation_batches_are_each_image_once(monkeypatch):
    source = NumbersSource(broken=(2, 3))
    taken = []
    monkeypatch.setattr(ReadErrors, "take", lambda _, *args: taken.append(args))
    monkeypatch.setattr(ReadErrors, "end_of_epoch", lambda _: taken.append("end"))
    loader = source.val_loader()
    assert [batch["key"] for batch in loader] == [["0", "1"], ["4"]]
    assert taken == [([], 2, 1), ([ERROR, ERROR], 0, 1), ([], 1, 1), "end"]
    assert loader.enlarged == 1
    assert not loader.drop_last
    assert len(loader) == 3
    assert [len(batch["key"]) for batch in source.test_loader()] == [2, 1]
    assert [len(batch["key"]) for batch in source.test_loader(5)] == [3]
    # Without a loader, and as one of two ranks.
    assert keys(iter(loader.dataset)) == ["0", "1", "2", "3", "4"]
    be_rank(monkeypatch, 1)
    assert len(loader.dataset) == 3
    assert [batch["key"] for batch in loader] == [["1"]]


def test_the_number_of_batches_is_unknown_where_the_images_or_their_shares_are():
    uneven = NumbersSource()
    uneven.shares_evenly = False
    for source in (NumbersSource(val=None), uneven):
        with pytest.raises(TypeError, match="unknown before reading"):
            len(source.val_loader())


def test_loaders_count_errors_of_the_source_and_keep_their_workers():
    source = NumbersSource(num_workers=1, max_unreadable=0.3)
    training, validation = source.train_loader(), source.val_loader()
    assert training.read_errors == ReadErrors(7, 12, 0.3, "training", source.unreadable)
    assert validation.read_errors == ReadErrors(None, 12, 0.3, "validation", source.unreadable)
    assert source.test_loader().read_errors.purpose == "test"
    assert (validation.enlarged, validation.persistent_workers) == (0, True)
    assert not NumbersSource().val_loader().persistent_workers


def test_a_batch_has_what_all_its_readable_samples_have():
    one, two = (
        Sample(torch.full((1, 2, 3), float(n)), str(n), label=n, moments=torch.ones(2, 1, 1) * n)
        for n in (1, 2)
    )
    lost = Sample(None, "3", (ERROR,), enlarged=True)
    batch = _collate("image", [one, lost, two])
    assert batch["image"][:, 0, 0, 0].tolist() == [1, 2]
    assert (batch["key"], batch["errors"], batch["enlarged"]) == (["1", "2"], [ERROR], 1)
    assert batch["label"].tolist() == [1, 2]
    assert batch["moments"].shape == (2, 2, 1, 1)
    assert "group" not in batch
    batch = _collate("latent", [one._replace(label=None), two._replace(moments=None, group="p")])
    assert batch.keys() == {"latent", "key", "errors", "enlarged", "group"}
    assert batch["group"] == ["1", "p"]
    assert _collate("image", [lost]) == {"key": [], "errors": [ERROR], "enlarged": 1}
    kinds = [
        one._replace(key=str(kind), image=torch.zeros(1, 2, 3, dtype=kind))
        for kind in (torch.uint8, torch.float32)
    ]
    with pytest.raises(ValueError, match=r"torch\.uint8 is uint8, torch\.float32 is float32: conv"):
        _collate("image", kinds)


class Read:
    """A photo that notes how it is read."""

    def read(self, masks: bool) -> Image.Image:
        self.masks = masks
        return MultiBand([Image.new("L", (5, 4), 7)])


def test_masks_alone_are_read_without_their_colours():
    for resample, size in (("nearest", 4), ("bicubic", 6)):
        photo = Read()
        sample = eval_sample(photo, "it", EvalTransform(size, resample=resample))
        assert photo.masks == (resample == "nearest")
        assert (sample.key, sample.enlarged) == ("it", size == 6)
        assert np.unique(sample.image).tolist() == [7]


def test_a_worker_ends_by_a_sigterm_that_is_no_echo(monkeypatch):
    handlers = {}
    ended = []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(source_module, "os", SimpleNamespace(_exit=ended.append))
    times = iter([10.0, 10.0 + ECHO_S / 2, 10.0 + ECHO_S])
    monkeypatch.setattr(source_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    _leave_interrupts_to_the_trainer(0)
    wait = handlers.pop(signal.SIGTERM)
    assert handlers == {number: signal.SIG_IGN for number in SIGNALS if number != signal.SIGTERM}
    for exits in ([], [], [0]):
        wait(signal.SIGTERM, None)
        assert ended == exits


def test_workers_of_all_loaders_are_ended_at_exit(monkeypatch):
    stopped = []
    batches = [Read(), Read()]
    monkeypatch.setattr(source_module, "_with_workers", set(batches))
    monkeypatch.setattr(source_module, "stop_workers", stopped.append)
    _end_workers()
    assert set(stopped) == set(batches)
