from itertools import islice

import pytest
import torch.distributed as dist

from olvae.data.sampler import StreamSampler


def draws(count: int, length: int = 7, seed: int = 0, start: int = 0):
    return list(islice(StreamSampler(length, seed, start), count))


def test_each_image_once_an_epoch_in_an_order_of_its_own():
    epochs = [[d.image for d in draws(21)][i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 23])
def test_starting_later_is_the_same_stream(start):
    assert draws(20, start=start) == draws(20 + start)[start:]


def test_seeds():
    assert draws(50) == draws(50)
    assert draws(50) != draws(50, seed=1)
    assert len({d.seed for d in draws(50)}) == 50
    assert draws(1)[0].rng().random() == draws(1)[0].rng().random()


def test_ranks_share_the_stream(monkeypatch):
    whole = draws(20, start=4)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        parts.append(draws(10, start=4))
    assert [d for pair in zip(*parts, strict=True) for d in pair] == whole


def test_no_images():
    with pytest.raises(ValueError, match="at least one"):
        StreamSampler(0, 0)
