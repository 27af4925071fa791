from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from olvae.data.image import Photo, Picture
from olvae.data.mapped.dataset import ImageDataset, MappedSource
from olvae.data.read_errors import UnreadableImageError
from olvae.data.source import LoaderProcess
from olvae.data.transforms import RandomScaleCrop
from tests.data.images import encoded, picture, same, take


class Pictures(ImageDataset):
    def __init__(self, count: int, broken: Sequence[int] = ()) -> None:
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Picture | Photo:
        return Photo(encoded(index)[: 100 if index in self.broken else None], f"{index}.jpg")


def source(count: int = 20, broken: Sequence[int] = (), **arguments: Any) -> MappedSource:
    train, val = Pictures(count, broken), Pictures(7, broken)
    transform = RandomScaleCrop(arguments.pop("size", 16))
    return MappedSource(train, val, transform, **{"batch_size": 4, **arguments})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [(), (3, 8)])
def test_the_loader_goes_on_at_any_batch_with_any_number_of_workers(workers, broken):
    s = source(broken=broken, num_workers=workers, max_unreadable=0.5)
    whole = take(source(broken=broken, max_unreadable=0.5).train_loader(3), 12)
    for batches in (0, 1, 4, 7):
        assert same(take(s.train_loader(3, batches * 4), 12 - batches), whole[batches:])


@pytest.mark.parametrize("rank", [0, 7])
def test_no_rank_believes_that_it_has_nothing_to_validate(rank, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    loader = source().val_loader()  # of seven images
    assert len(loader) == 1
    assert len(list(loader)) == (rank == 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_share_an_epoch_and_the_validation_images(workers, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    training, validation = [], []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        s = source(count=16, num_workers=workers)
        whole = take(s.train_loader(3), 6)
        assert same(take(s.train_loader(3, 3 * 4 * 2), 3), whole[3:])
        training += [key for batch, _ in whole[:2] for key in batch]
        validation += [key for batch, _ in take(s.val_loader(), 99) for key in batch]
    assert sorted(training, key=int) == [str(i) for i in range(16)]
    assert sorted(validation) == [str(i) for i in range(7)]


def test_the_ranks_are_those_of_when_the_loader_starts(monkeypatch):
    """Lightning makes the process group after it was given the loaders."""
    loader = source().val_loader()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert len(loader) == 1
    assert [batch["key"] for batch in loader] == [["1", "3", "5"]]


def test_the_length_of_a_loader_is_known_where_it_ends():
    """Lightning's limit_val_batches takes a share of it."""
    assert len(source().val_loader()) == 2
    assert len(source().test_loader(3)) == 3
    with pytest.raises(TypeError, match="only reading all images"):
        len(source().train_loader())


def test_another_image_stands_in_for_one_that_cannot_be_read(caplog):
    s = source(broken=(3, 8), max_unreadable=0.5)
    loader = s.train_loader()
    batches = take(loader, 10)
    assert all(len(keys) == len(image) == 4 for keys, image in batches)
    assert not {"3", "8"} & {key for keys, _ in batches for key in keys}
    assert loader.read_errors.lost == 2
    totals = [m for m in caplog.messages if "epoch" in m]  # in the second, a stand-in was a broken one too
    assert totals == [f"training: {n} images skipped in this epoch" for n in (2, 3)]


def test_where_nothing_can_be_read_it_ends():
    with pytest.raises(UnreadableImageError, match="nor are 20 others"):
        take(source(broken=range(20), max_unreadable=1.0).train_loader(), 1)


def test_validation_goes_without_what_cannot_be_read():
    loader = source(broken=(0, 1, 2, 3, 6), max_unreadable=1.0).val_loader()
    assert [keys for keys, _ in take(loader, 9)] == [["4", "5"]]  # the first batch was empty
    assert loader.read_errors.lost == 5


def test_processes_share_the_stream():
    s = source()
    seen = [sample.key for i in range(3) for sample in islice(s.stream(0, 0, LoaderProcess(i, 3)), 6)]
    assert len(set(seen)) == 18
    whole = [sample.key for sample in islice(s.stream(0, 0, LoaderProcess(1, 3)), 15)]
    assert [sample.key for sample in islice(s.stream(0, 4, LoaderProcess(1, 3)), 11)] == whole[4:]
    assert [sample.key for sample in s.once(LoaderProcess(1, 3))] == ["1", "4"]


@pytest.mark.parametrize("seed", range(8))
def test_a_jpeg_that_is_decoded_at_a_fraction_gives_nearly_the_same_crop(seed):
    """Within 1 of 255 on average for a smooth picture; exactly, where the crop needs every pixel."""
    import io

    stream = io.BytesIO()
    picture(seed, (900, 701)).save(stream, "JPEG", quality=95)
    crop = RandomScaleCrop(64)
    photo, whole = Photo(stream.getvalue(), "a.jpg"), Photo(stream.getvalue(), "a.jpg").read()
    a, b = (np.asarray(crop(p, np.random.default_rng(seed)), dtype=float) for p in (photo, whole))
    assert 0 < np.abs(a - b).mean() < 1
    near = RandomScaleCrop(300)
    assert near(Photo(stream.getvalue(), "a.jpg"), np.random.default_rng(seed)) == near(
        whole, np.random.default_rng(seed)
    )
    assert isinstance(whole, Image.Image)


def test_mistakes():
    for arguments in ({"size": 0}, {"batch_size": 0}, {"num_workers": -1}, {"channels": 0}, {"max_unreadable": 2.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            source(**arguments)
    with pytest.raises(ValueError, match="samples_per_image"):
        source(samples_per_image=0)
