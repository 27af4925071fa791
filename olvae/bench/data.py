"""Images per second of data sources, against decoding and resizing the same images alone."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np

from olvae.data.find import evaluation_source
from olvae.data.lists import ListSource
from olvae.data.pixels import image_to_tensor
from olvae.data.reading import Photo
from olvae.data.shards import Entry, read_shard
from olvae.data.source import Source
from olvae.data.transforms import RandomScaleCrop
from olvae.data.webdataset import WebDatasetSource

__all__ = ["bench_data"]

FLOOR_IMAGES = 256
"""Images that the floor keeps undecoded in memory and goes round."""

ROUNDS = 3


def bench_data(
    sources: Sequence[str], size: int, batch_size: int, workers: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Time the training loaders of sources, and the floor, in turns.

    The floor is what no loader of one process can beat: the first source's images, undecoded in memory, decoded and
    cropped as for training, one after another.

    Args:
        sources: each a SRC.
        size, batch_size: of the loaders.
        workers: numbers of loader processes to try.
        seconds: measured per loader and turn; each has three turns, the best of which counts.

    Returns:
        A row for the floor and for each source and number of workers: source, workers, images_per_s, of_floor
        (the share of the floor, per worker).
    """
    found = {name: evaluation_source(name, size, batch_size) for name in sources}
    rates: dict[tuple[str, int], float] = {}
    floor = 0.0
    decode = _floor(next(iter(found.values())), size)
    for turn in range(ROUNDS):
        floor = max(floor, _rate(decode, 1, seconds))
        for name, source in found.items():
            for count in workers:
                source.batch_size, source.num_workers = batch_size, count
                batches = iter(source.train_loader(seed=turn))
                for _ in islice(batches, 2 * max(1, count) + 1):  # the processes start, and fill their queues
                    pass
                rate = _rate(partial(next, batches), batch_size, seconds)
                rates[name, count] = max(rates.get((name, count), 0.0), rate)
    rows: list[dict[str, Any]] = [{"source": "floor", "workers": 1, "images_per_s": floor, "of_floor": 1.0}]
    for (name, count), rate in rates.items():
        share = rate / floor / max(1, count)
        rows.append({"source": name, "workers": count, "images_per_s": rate, "of_floor": share})
    return rows


def _floor(source: Source, size: int) -> Callable[[], Any]:
    crop, rng = RandomScaleCrop(size), np.random.default_rng(0)
    images = cycle(list(islice(_undecoded(source), FLOOR_IMAGES)))

    def decode() -> Any:
        name, data = next(images)
        return image_to_tensor(crop(Photo(data, name, source.channels), rng))

    return decode


def _undecoded(source: Source) -> Iterator[tuple[str, Any]]:
    if isinstance(source, WebDatasetSource):
        for shard in source.train:
            yield from ((e.name, e.data) for e in read_shard(shard, source.image_key) if isinstance(e, Entry))
    elif isinstance(source, ListSource):
        order = np.random.default_rng(0).permutation(len(source.train))
        for i in order:
            image = source.train[int(i)]
            yield (image.name, image.undecoded()) if isinstance(image, Photo) else (str(i), image)


def _rate(work: Callable[[], Any], images: int, seconds: float) -> float:
    """Images per second of work that gives ``images`` each time."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        done += images
    return done / (time.perf_counter() - start)
