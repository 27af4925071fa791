"""Images per second of data sources, against decoding and resizing the same images alone."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, islice
from typing import Any

import numpy as np
from torch import Tensor

from olvae.bench.timing import Work, measure
from olvae.config import ConfigError
from olvae.data.image import Photo, Picture, image_to_tensor
from olvae.data.mapped.dataset import MappedSource
from olvae.data.mix import MixSource
from olvae.data.opening import open_source
from olvae.data.read_errors import UnreadableImageError
from olvae.data.shards.tar_reading import Entry, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import Source

__all__ = ["bench_data", "floor_work", "loader_work"]

FLOOR_IMAGES = 256
"""Images that the floor keeps undecoded in memory and decodes in turn."""

ROUNDS = 3


def bench_data(
    sources: Sequence[str], size: int, batch_size: int, workers: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Time the training loaders of sources, and the floor, in turns.

    The floor is what no loader of one process can beat: images of the first source, undecoded in memory, decoded and
    cropped as that source does for training, one by one. A source that crops in another way, or a mix, has its own.

    Args:
        sources: each a SRC.
        size: of the crops, in pixels; a config has its own.
        batch_size: of the loaders.
        workers: numbers of loader processes to try.
        seconds: measured per loader and turn; each has three turns, of which the best counts.

    Returns:
        A row for each floor and for each source and number of workers: source, size, workers, images_per_s, of_floor
        (the share of the floor, per worker).

    Raises:
        ConfigError: a source can't be shared by that many workers, or can't be timed.
        ValueError: no image of a source can be read.
    """
    opened = {name: open_source(name, size, batch_size) for name in sources}
    for name, source in opened.items():
        source.batch_size = batch_size
        for number in workers:
            source.num_workers = number
            try:
                source.check_processes(1)
            except ValueError as error:
                raise ConfigError(f"--workers {number}: {name}: {error}") from error
    first = next(iter(opened.values()))
    floors = {name: "floor" if _crops_as(source, first) else f"floor of {name}" for name, source in opened.items()}
    owners: dict[str, str] = {}
    for name, floor in floors.items():
        owners.setdefault(floor, name)
    loaders = [(name, number) for name in opened for number in workers]
    work: dict[tuple[str, int | None], Work] = {
        **{(floor, None): floor_work(name, opened[name], seconds) for floor, name in owners.items()},
        **{(name, number): loader_work(opened[name], number, seconds) for name, number in loaders},
    }
    rates = {key: 1 / times.best for key, times in measure(work, "cpu", ROUNDS, warm_up=False).items()}
    rows: list[dict[str, Any]] = [
        {"source": floor, "size": opened[name].size, "workers": 1, "images_per_s": rates[floor, None], "of_floor": 1.0}
        for floor, name in owners.items()
    ]
    for name, number in loaders:
        rate, size = rates[name, number], opened[name].size
        share = rate / rates[floors[name], None] / max(1, number)
        rows.append({"source": name, "size": size, "workers": number, "images_per_s": rate, "of_floor": share})
    return rows


def floor_work(name: str, source: Source, seconds: float) -> Work:
    """Decode and crop images of a source, in memory, one by one for some seconds; measures the seconds of an image."""
    decode = _floor(name, source)
    return lambda: _per_image(decode, 1, seconds)


def loader_work(source: Source, workers: int, seconds: float) -> Work:
    """Take batches of a source's training loader for some seconds; measures the seconds of an image.

    Each time with processes of its own, from when they have started and their queues have been emptied.
    """
    seeds = count()

    def run() -> list[float]:
        source.num_workers = workers
        batches = iter(source.train_loader(seed=next(seeds)))
        for _ in islice(batches, 2 * max(1, workers) + 1):
            pass
        return _per_image(lambda: next(batches), source.batch_size, seconds)

    return run


Decode = Callable[[np.random.Generator], Tensor]


def _decoder(source: MappedSource | WebDatasetSource, data: bytes | Picture, name: str) -> Decode:
    """Decodes and crops an image in memory as its source does."""
    return lambda rng: image_to_tensor(source.transform(Photo(data, name, source.channels), rng))


def _crops_as(source: Source, first: Source) -> bool:
    """Whether a source shares the floor of the first one."""
    if isinstance(source, MappedSource | WebDatasetSource) and isinstance(first, MappedSource | WebDatasetSource):
        return vars(source.transform) == vars(first.transform)
    return source is first


def _floor(name: str, source: Source) -> Callable[[], Tensor]:
    rng, images = np.random.default_rng(0), []
    for decode in islice(_undecoded(source), FLOOR_IMAGES):
        with contextlib.suppress(UnreadableImageError):
            decode(rng)
            images.append(decode)
    if not images:
        raise ValueError(f"{name}: no image of it can be read")
    turns = cycle(images)
    return lambda: next(turns)(rng)


def _undecoded(source: Source) -> Iterator[Decode]:
    """Training images, in memory; those of a mix in the shares of its sources."""
    if isinstance(source, WebDatasetSource):
        for shard in source.train:
            entries = read_shard(shard, source.image_key)
            yield from (_decoder(source, entry.data, entry.name) for entry in entries if isinstance(entry, Entry))
    elif isinstance(source, MappedSource):
        for i in np.random.default_rng(0).permutation(len(source.train)):
            with contextlib.suppress(UnreadableImageError):
                photo = source.train[int(i)]
                yield _decoder(source, photo.undecoded(), photo.name)
    elif isinstance(source, MixSource):
        parts = [list(islice(_undecoded(part), FLOOR_IMAGES)) for part in source.sources]
        turns = [cycle(part) for part in parts]
        order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(parts)), source.shares))
        yield from (next(turns[i]) for i in order if parts[i])
    else:
        raise ConfigError(f"data.target: {type(source).__name__} can't be timed against decoding alone")


def _per_image(work: Callable[[], Any], images: int, seconds: float) -> list[float]:
    """Seconds per image of ``work``, which gives ``images`` each time."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        done += images
    return [(time.perf_counter() - start) / done]
