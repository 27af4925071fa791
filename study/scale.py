"""What grows with images, shards, processes and tasks: synthetic, on one core, in minutes.

    python -m study.scale

Shards are empty, or hard links to one of a few bytes; indexes are made up. A row of growth is
measured at some sizes, in CPU seconds with child processes; its exponent is the slope of a line
through the logarithms, so that 1 is linear. What it was before November 2026 is from issue 54.
"""

import json
import os
import pickle
import socket
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import tifffile
from torch.multiprocessing import start_processes

from olvae.data import audit, read_errors
from olvae.data.order.permutation import draws
from olvae.data.picture_folder import find_images
from olvae.data.pixels.size_and_range import EIGHT_BITS
from olvae.data.read_errors import ReadErrors, UnreadableImages
from olvae.data.shards import shard_source
from olvae.data.shards.index import INDEX, find_shards
from olvae.data.shards.indexing import index_shards
from olvae.data.shards.tar_reading import Entry, Shard, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.shards.write import ResumableShards, WebDatasetSample
from olvae.data.source import LoaderLayout, LoaderProcess, Sample
from olvae.evaluation.statistics import difference
from olvae.export.tiff_rows import open_rows
from olvae.launcher import Agreement, gather, join, leave, of_each
from olvae.metrics.features import FeatureFile
from olvae.pool import SharedProgress, run_in_processes

Work = Callable[[], object]

# Of a large training.
RANKS = 512


class Growth(NamedTuple):
    """What takes longer with a size; ``prepare`` gets an empty folder, and returns the work."""

    what: str
    unit: str
    sizes: Sequence[int]
    small: Sequence[int]  # at which a test counts operations
    prepare: Callable[[Path, int], Work]
    before: str


class Figure(NamedTuple):
    """A number that is measured; ``measure`` gets an empty folder."""

    what: str
    measure: Callable[[Path], str]
    before: str


class Name(str):
    """A text whose comparisons are Python's, so that they count, and take time."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True

    __hash__ = str.__hash__


class Undecoded(WebDatasetSource):
    """Shards whose images are not decoded."""

    def train_sample(self, entry: Entry, _: np.random.Generator) -> Sample:
        return Sample(None, entry.key)


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def cpu_s() -> float:
    """CPU seconds of this process, and of its children that have ended."""
    return sum(os.times()[:4])


def empty_shards(folder: Path, n: int) -> Path:
    """Empty files, and an index that gives each a thousand images."""
    folder.mkdir()
    records = {}
    for number in range(n):
        (folder / f"{number:06d}.tar").touch()
        records[f"{number:06d}.tar"] = {"images": 1000}
    (folder / INDEX).write_text(json.dumps({"shards": records}), encoding="utf-8")
    return folder


def linked_shards(folder: Path, n: int, images: int) -> Path:
    """Hard links to one shard of so many images of a byte."""
    one = ResumableShards(folder.with_name("one"), ".state")
    one.begin({"options": {}})
    one.write(0, [WebDatasetSample(f"{number:06d}", {"jpg": b"x"}) for number in range(images)])
    folder.mkdir()
    records = {}
    for number in range(n):
        os.link(one.path(0), folder / f"{number:06d}.tar")
        records[f"{number:06d}.tar"] = {"images": images}
    (folder / INDEX).write_text(json.dumps({"shards": records}), encoding="utf-8")
    return folder


# Rows of growth.


def start_remote(_: Path, n: int) -> Work:
    urls = [f"https://a.invalid/{number:06d}.tar" for number in range(n)]
    source = Undecoded(urls, 16, 2, val_shards=urls[:1])
    source.train = [Shard(Name(url)) for url in urls]

    def first(shard: Shard, *_: Any) -> Iterator[Entry]:
        yield Entry(shard.url, shard.url, b"", {})

    def start() -> None:
        with patch.object(shard_source, "read_shard", first):
            next(source.stream(0, 0, LoaderProcess(3, 8)))

    return start


def open_indexed(folder: Path, n: int) -> Work:
    shards = empty_shards(folder / "shards", n)
    return lambda: Undecoded(str(shards), 16, 2)


def resume(folder: Path, n: int) -> Work:
    shards = linked_shards(folder / "shards", n, 100)
    source = Undecoded(str(shards), 16, 16, shuffle=50)
    now = LoaderLayout(16 * 64 * (n // 32), 8, 4, 16)
    layouts = [LoaderLayout(0, 8, 64, 16), now]
    process = LoaderProcess(3, 8, 2, 4, 16)
    return lambda: next(source.continued_stream(0, now.start, process, layouts))


def check(folder: Path, n: int) -> Work:
    shards = empty_shards(folder / "shards", n)
    names = [Name(url) for url in find_shards(shards)]

    def work() -> None:
        with patch.object(audit, "find_shards", lambda _: names):
            audit.audit_source(str(shards), 16)

    return work


def nothing(task: int, progress: SharedProgress) -> int:
    progress.advance()
    return task


def pool(_: Path, n: int) -> Work:
    return lambda: run_in_processes(nothing, range(n), 2, lambda _: None)


def index(folder: Path, n: int) -> Work:
    shards = linked_shards(folder / "shards", n // 100, 100)
    return lambda: index_shards(str(shards))


def write(folder: Path, n: int) -> Work:
    shards = ResumableShards(folder / "shards", ".state")
    shards.begin({"options": {}})

    def work() -> None:
        for number in range(n):
            shards.write(number, [WebDatasetSample("0", {"jpg": b"x"})])

    return work


def find(folder: Path, n: int) -> Work:
    for number in range(n):
        if number % 1000 == 0:
            (folder / f"{number:06d}").mkdir()
        (folder / f"{number // 1000 * 1000:06d}" / f"{number:06d}.jpg").touch()
    return lambda: find_images(folder)


def intervals(_: Path, n: int) -> Work:
    values = np.random.default_rng(0).standard_normal((2, n))
    rows = [dict(zip(map(str, range(n)), row, strict=True)) for row in values.tolist()]
    return lambda: difference(*rows)


def digests(images: Iterable[int]) -> list[tuple[int, int | None]]:
    """Numbers as long as the digests of lost files and images."""
    return [(image + 2**62, image + 2**62) for image in images]


def lost_images(n: int) -> tuple[ReadErrors, list[Any]]:
    """Errors of the first of 512 ranks that have lost n images, and what the others send first."""
    errors = ReadErrors(None, 100 * n, 0.1, "training", UnreadableImages())
    errors.unreadable.unshared = digests(range(0, n, RANKS))
    names = {f"https://bucket.invalid/shards/{i:06d}.tar": "can't be read" for i in range(10)}
    others = []
    for rank in range(1, RANKS):
        others.append((digests(range(rank, n, RANKS)), names, 0, 0))
    return errors, others


def share(_: Path, n: int) -> Work:
    errors, others = lost_images(n)
    nothing_new: list[Any] = [([], {}, 0, 0)] * (RANKS - 1)

    def work() -> None:
        with patch.object(read_errors, "of_each", lambda own: [own, *others]):
            errors.share()
        # Then one more is lost, again and again.
        with patch.object(read_errors, "of_each", lambda own: [own, *nothing_new]):
            for image in range(n, n + 3):
                errors.unreadable.unshared = digests([image])
                errors.share()

    return work


def draw(_: Path, n: int) -> Work:
    return lambda: [*draws(0, n, iter(range(0, n, n // 1000)))]


def moments(_: Path, n: int) -> Work:
    rows = np.random.default_rng(0).standard_normal((100, 2048)).astype(np.float32)
    keys = [f"{number:08d}" for number in range(n)]

    def work() -> None:
        file = FeatureFile()
        for start in range(0, n, 100):
            file.add(keys[start : start + 100], rows[: n - start])
        file.moments(keys)

    return work


def sparse_tiff(place: Path, height: int, width: int) -> None:
    """One tile, and the file leaves out all others."""
    tiles = -(-height // 256) * -(-width // 256)
    tifffile.imwrite(
        place,
        iter([np.zeros((256, 256, 3), np.uint8), *[None] * (tiles - 1)]),
        shape=(height, width, 3),
        dtype=np.uint8,
        tile=(256, 256),
        photometric="rgb",
    )


def rows_of_tiff(folder: Path, n: int) -> Work:
    sparse_tiff(folder / "a.tif", n, 2048)

    def work() -> None:
        rows = open_rows(folder / "a.tif", 3, EIGHT_BITS, 2**22)
        assert rows is not None
        for top in range(0, n, 64):
            rows.read(top, top + 64)
        rows.close()

    return work


GROWTH = (
    Growth(
        "an epoch's start on remote shards without an index",
        "shards",
        (8_000, 32_000, 100_000),
        (100, 200, 400),
        start_remote,
        "n^2.1: .95 s at 8,000, 150 s at 100,000",
    ),
    Growth(
        "opening shards with an index",
        "shards",
        (25_000, 50_000, 100_000),
        (100, 200, 400),
        open_indexed,
        "n^1.07: 6.7 s at 100,000",
    ),
    Growth(
        "resuming in the middle of an epoch, from 512 processes to 32",
        "shards",
        (4_000, 16_000, 64_000),
        (64, 256),
        resume,
        ".1 s at 100,000 (the same processes)",
    ),
    Growth(
        "`data check` of empty shards",
        "shards",
        (1_000, 4_000, 16_000),
        (50, 100, 200),
        check,
        "n^1.95: 3.4 s at 16,000 in its first process",
    ),
    Growth(
        "the pool of processes",
        "tasks",
        (1_000, 4_000, 16_000),
        (50, 100, 200),
        pool,
        "n^2: 2 s a call at 1,000,000",
    ),
    Growth(
        "`data index`, once",
        "images",
        (10_000, 40_000, 160_000),
        (200, 400, 800),
        index,
        "75 us an image in each rank at each start",
    ),
    Growth(
        "writing shards of one image",
        "shards",
        (100, 300, 900),
        (10, 20, 40),
        write,
        "a listing for each: 116 ms at 100,000, n^2 in all",
    ),
    Growth(
        "finding the files of a folder",
        "files",
        (5_000, 20_000, 80_000),
        (50, 100, 200),
        find,
        "5.5 s at 200,000",
    ),
    Growth(
        "the paired bootstrap of one metric",
        "images",
        (50_000, 100_000, 200_000),
        (100, 200, 400),
        intervals,
        "3 s at 50,000, 19 s at 200,000",
    ),
    Growth(
        "mean and covariance of an evaluation's features",
        "images",
        (4_000, 8_000, 16_000),
        (500, 1_000, 2_000),
        moments,
        "all in memory",
    ),
    Growth(
        "the place of 1000 images in the order of all, in each loader process",
        "images",
        (2**22, 2**24, 10**8),
        (2**21, 2**23, 2**25),
        draw,
        "a list of all",
    ),
    Growth(
        "reading a TIFF of 2048 columns by rows",
        "rows",
        (16_384, 32_768, 65_536),
        (1_024, 2_048, 4_096),
        rows_of_tiff,
        "refused from 160 million pixels on",
    ),
    Growth(
        "unreadable images that 512 ranks exchange, and three more one by one",
        "lost images",
        (25_000, 50_000, 100_000),
        (512, 1024, 2048),
        share,
        "every rank's whole list for each new one",
    ),
)


# Single figures.


def keys_of(source: Undecoded, layouts: Sequence[LoaderLayout], until: int) -> Counter[str]:
    """The samples from the last layout's start on, by key, over all its processes."""
    now = layouts[-1]
    source.num_workers = now.workers
    source.batch_size = now.batch_size
    found: Counter[str] = Counter()
    for worker in range(now.workers):
        for rank in range(now.world):
            process = LoaderProcess(worker, now.workers, rank, now.world, now.batch_size)
            batches = (until - now.start) // (now.batch_size * now.world)
            taken = len(range(worker, batches, now.workers)) * now.batch_size
            stream = source.continued_stream(0, now.start, process, layouts)
            found.update(sample.key for sample in islice(stream, taken))
    return found


def repeated(folder: Path) -> str:
    source = Undecoded(str(linked_shards(folder / "shards", 68, 100)), 16, 4, val_fraction=4 / 68)
    images = 6400
    first = LoaderLayout(0, 4, 2, 4)
    second = LoaderLayout(images // 2, 8, 2, 4)
    seen = keys_of(source, [first], second.start)
    seen += keys_of(source, [first, second], images)
    twice = sum(number > 1 for number in seen.values()) / images
    return f"{twice:.0%} twice, {1 - len(seen) / images:.1%} never"


def classes(folder: Path) -> str:
    shards = linked_shards(folder / "shards", 68, 1000)
    found = []
    for interleave in (None, 1):
        source = Undecoded(str(shards), 16, 16, val_fraction=4 / 68, interleave=interleave)
        stream = source.stream(0, 0, LoaderProcess(batch_size=16))
        # A shard is a class.
        batches = [[next(stream).key[:6] for _ in range(16)] for _ in range(200)]
        found.append(np.mean([len(set(batch)) for batch in batches]))
    return f"{found[0]:.1f} of 15.9 (`interleave: 1`: {found[1]:.1f})"


def amplification(folder: Path) -> str:
    processes = 512
    found = []
    for n in (100, 20):
        images = 5120 * 16 // n
        shards = linked_shards(folder / f"{n}" / "shards", n + 1, images)
        source = Undecoded(str(shards), 16, 2, val_fraction=1 / (n + 1), shuffle=8)
        read = 0
        used = 0

        def count(*arguments: Any) -> Iterator[Any]:
            nonlocal read
            for entry in read_shard(*arguments):
                read += 1
                yield entry

        # Some of the processes, each for its whole part of an epoch.
        with patch.object(shard_source, "read_shard", count):
            for index in range(0, processes, 16):
                stream = source.stream(0, 0, LoaderProcess(index, processes))
                used += sum(1 for _ in islice(stream, n * images // processes))
        found.append(f"{read / used:.2f}")
    return " and ".join(found)


def numbers(_: Path) -> str:
    images = 10**7
    tracemalloc.start()
    next(draws(0, images, iter([images // 2])))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return f"{peak / 1e6:.1f} MB"


def features(_: Path) -> str:
    rows = np.zeros((1000, 2048), np.float32)
    file = FeatureFile()
    tracemalloc.start()
    for number in range(10):
        file.add([f"{number}/{row:08d}" for row in range(1000)], rows)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return f"{held / 10_000:.0f} B an image in memory"


def lost_bytes(_: Path) -> str:
    errors, others = lost_images(100_000)
    names = others[0][1]
    first = sum(len(pickle.dumps(part)) for part in [(errors.unreadable.unshared, names), *others])
    more = RANKS * len(pickle.dumps((digests([1]), names, 0, 0)))
    return f"{first / 1e6:.1f} MB, then {more / 1e6:.1f} MB"


def held_out(folder: Path) -> str:
    source = Undecoded(str(empty_shards(folder / "shards", 100_000)), 16, 2)
    return f"{source.val_images:,} in {len(source.val)} shards"


def meet(rank: int, world: int, port: int, folder: Path) -> None:
    """Join a group as torchrun's ranks do, agree and gather; note the number of open files."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in where.items()})
    opened = Path("/proc/self/fd")
    before = len([*opened.iterdir()])
    join()
    Agreement().any_asked(0, wait=True)
    of_each(rank)
    gather(rank)
    (folder / f"{world}-{rank}").write_text(str(len([*opened.iterdir()]) - before))
    leave()


def sockets(folder: Path) -> str:
    worlds = (4, 8, 16)
    found = []
    for world in worlds:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start_processes(meet, (world, port, folder), world, start_method="fork")
        counts = [int((folder / f"{world}-{rank}").read_text()) for rank in range(world)]
        found.append((max(counts[1:]), counts[0]))
    slopes = np.polyfit(worlds, found, 1)[0]
    return f"{slopes[0]:.1f} a rank, in the first one {slopes[1]:.1f}"


def large_tiff(folder: Path) -> str:
    side = 30_000
    place = folder / "a.tif"
    sparse_tiff(place, side, side)
    tracemalloc.start()
    rows = open_rows(place, 3, EIGHT_BITS, 2**30)
    assert rows is not None
    for top in range(0, 2048, 64):
        rows.read(top, top + 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows.close()
    return f"{peak / side**2:.2f} B a pixel ({peak / 1e6:.0f} MB)"


FIGURES = (
    Figure(
        "images of an epoch that 16 processes continue after 8 (64 shards, at its half)",
        repeated,
        "24 % twice, 24 % never",
    ),
    Figure(
        "classes in a batch of 16, shards of 1000 sorted by class, `shuffle: 500`",
        classes,
        "1.00 of 15.9",
    ),
    Figure(
        "entries read over delivered: 100 shards and 20 shards on 512 processes",
        amplification,
        "3.8 and 14",
    ),
    Figure("the order of 10^7 numbered images, in each loader process", numbers, "80 MB"),
    Figure("features of an evaluation, each side", features, "8 kB an image in memory"),
    Figure(
        "what a rank receives of 100,000 unreadable images on 512 ranks, and for one more",
        lost_bytes,
        "3.6 GB, again for each",
    ),
    Figure("images held out of 10^8 in 100,000 shards", held_out, "5,000,000"),
    Figure("open files that a group takes in each process", sockets, "28 + 4 a rank"),
    Figure("reading an image of 30,000x30,000 by rows", large_tiff, "refused"),
)


def main() -> None:
    print("| what | n | CPU s | exponent | before |")
    print("|---|--:|--:|--:|---|")
    for row in GROWTH:
        costs = []
        for size in row.sizes:
            with tempfile.TemporaryDirectory() as folder:
                work = row.prepare(Path(folder), size)
                start = cpu_s()
                work()
                costs.append(max(cpu_s() - start, 0.01))  # the clock's step
        law = f"{exponent(row.sizes, costs):.2f}"
        print(
            f"| {row.what} | {row.sizes[-1]:,} {row.unit} | {costs[-1]:.2f} | {law} | "
            f"{row.before} |",
            flush=True,
        )
    print("\n| what | now | before |")
    print("|---|---|---|")
    for figure in FIGURES:
        with tempfile.TemporaryDirectory() as folder:
            print(
                f"| {figure.what} | {figure.measure(Path(folder))} | {figure.before} |", flush=True
            )


if __name__ == "__main__":
    main()
