"""What a source's loader does to its processes; what it reads is the sources' own tests'."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from itertools import count, islice

import numpy as np
import pytest

from olvae.data.order.permutation import MOST_LISTED, Permutation, draws, epoch_order
from olvae.data.packing import PackOptions, pack
from olvae.data.picture_folder import FolderSource
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import LoaderProcess

SCRIPT = """
import sys
from olvae.data.picture_folder import FolderSource

source = FolderSource(sys.argv[1], 16, 2, num_workers=1)
kept = [iter(source.test_loader()), iter(source.train_loader(0))]
print([len(next(batches)["key"]) for batches in kept])
"""


def test_python_ends_while_loaders_have_processes(image_folder):
    """They survive the one SIGTERM that multiprocessing sends before it waits for them."""
    command = [sys.executable, "-c", SCRIPT, str(image_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[2, 2]\n", "")


def test_more_processes_than_cores_are_no_warning_of_torch(image_folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = iter(FolderSource(str(image_folder), 16, 2, num_workers=2).test_loader())
        assert len(next(batches)["key"]) == 2


def drawn(number: int, length: int = 7, seed: int = 0, start: int = 0):
    return list(islice(draws(seed, length, count(start)), number))


def test_draws_are_the_seeds_and_the_same_in_every_version():
    """Runs that are resumed, and published results, rely on it."""
    assert drawn(50) == drawn(50)
    assert drawn(50) != drawn(50, seed=1)
    first, second = (np.random.default_rng((3, epoch, 1)).permutation(5) for epoch in (0, 1))
    assert drawn(3, length=5, seed=3, start=4) == [(4, first[4]), (5, second[0]), (6, second[1])]
    assert epoch_order(3, 1, 5).tolist() == second.tolist()


@pytest.mark.parametrize(("length", "computed"), [(2**20, False), (2**20 + 1, True)])
def test_draws_of_more_than_a_million_images_are_computed_and_not_listed(length, computed):
    start = 3 * length - 2  # the end of an epoch, and another one's begin
    tracemalloc.start()
    found = drawn(4, length, seed=2, start=start)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (used < 100_000) == computed
    if computed:
        orders = [Permutation(length, (2, epoch, 1)) for epoch in (2, 3)]
    else:
        orders = [epoch_order(2, epoch, length) for epoch in (2, 3)]
    numbers = [orders[0][length - 2], orders[0][length - 1], orders[1][0], orders[1][1]]
    assert found == [(start + i, number) for i, number in enumerate(numbers)]


def batches(
    workers: int, rank: int, world: int, batch_size: int, start: int, number: int
) -> list[list[int]]:
    """Positions that a rank's DataLoader delivers: whole batches of its workers, in turn."""
    streams = []
    for worker in range(workers):
        process, position = LoaderProcess(worker, workers, rank, world, batch_size).resumed(start)
        streams.append(process.positions(position))
    return [list(islice(streams[i % workers], batch_size)) for i in range(number)]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 24, 37, 120])
def test_whatever_the_workers_and_ranks_batches_hold_the_next_positions(workers, world, start):
    ranks = [batches(workers, rank, world, 4, start, 9) for rank in range(world)]
    for number, parts in enumerate(zip(*ranks, strict=True)):
        first = start + number * 4 * world
        assert sorted(position for part in parts for position in part) == list(
            range(first, first + 4 * world)
        )
        assert parts[0] == list(range(first, first + 4 * world, world))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("limit", [1, 2, 9])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_limited_validation_is_the_first_batches_of_its_loader(image_folder, limit, workers):
    """Each loader process has whole shards; here one shard has more images than another."""
    pack(str(image_folder), image_folder.parent / "packed", PackOptions(shard_size=5))
    shards = sorted(str(path) for path in (image_folder.parent / "packed").glob("*.tar"))
    streamed = WebDatasetSource(shards, 16, 2, workers, val_shards=shards)
    for source in (FolderSource(str(image_folder), 16, 2, workers, val_fraction=0.5), streamed):
        source.val_limit = (limit, 1)
        batches = islice(iter(source.val_loader()), limit)
        expected = [key for batch in batches for key in batch["key"]]
        assert [sample.key for sample in source.validated()] == expected
        # The text says which.
        whole = source.describe_val_set()
        source.val_limit = None
        assert source.describe_val_set() != whole


def test_runs_from_before_keep_their_order_of_more_than_a_million_images():
    n = MOST_LISTED + 7
    numbers = [number for _, number in draws(3, n, range(40))]
    listed = [number for _, number in draws(3, n, range(40), listed=True)]
    assert listed == epoch_order(3, 0, n)[:40].tolist()
    assert numbers != listed


def test_a_workers_sigterm_repeated_within_a_second_is_the_first_ones_echo(image_folder):
    """Schedulers repeat theirs; a later one is the loader's, and ends a worker."""
    batches = iter(FolderSource(image_folder, 16, 2, num_workers=1).train_loader(0))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for _ in range(5):
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.02)
    assert [len(next(batches)["key"]) for _ in range(4)] == [2] * 4
    assert worker.is_alive()
    time.sleep(1.0)
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == 0
