"""The example that trains on LitData's chunks, where LitData is installed."""

import os
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from olvae.data.source import LoaderLayout, LoaderProcess
from tests.data.images import encoded
from tests.examples.loading import ROOT, load_example

litdata = pytest.importorskip("litdata", reason="pip install litdata")


def content(number: int) -> dict[str, object]:
    return {"key": f"{number:06d}", "image": encoded(number)}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("litdata")
    for name, images in (("train", 60), ("val", 7)):
        cache = litdata.streaming.Cache(str(folder / name), chunk_size=20)
        for number in range(images):
            cache[number] = content(number)
        cache.done()
        cache.merge()
    return folder


@pytest.fixture
def source(chunks):
    module = load_example("litdata_source")
    return module.LitDataSource(str(chunks / "train"), str(chunks / "val"), 16, 2)


def keys(samples, number: int) -> list[str]:
    return [sample.key for sample in islice(samples, number)]


def test_each_process_has_its_part_of_an_epoch_and_continues_in_it(source):
    parts = [keys(source.stream(3, 0, LoaderProcess(i, 2)), 60) for i in range(2)]
    for epoch in (slice(0, 30), slice(30, 60)):
        assert len({key for part in parts for key in part[epoch]}) == 60
    assert parts[0][:30] != parts[0][30:]
    for position in (7, 30, 41):
        rest = keys(source.stream(3, position, LoaderProcess(1, 2)), 60 - position)
        assert rest == parts[1][position:]


def test_other_processes_continue_an_epoch(source):
    first = LoaderLayout(0, 2, 1, 2)
    now = LoaderLayout(20, 3, 1, 2)
    seen = Counter()
    for worker in range(2):
        process = LoaderProcess(worker, 2, batch_size=2)
        seen.update(keys(source.continued_stream(3, 0, process, [first]), 10))
    for worker in range(3):
        process = LoaderProcess(worker, 3, batch_size=2)
        seen.update(keys(source.continued_stream(3, 20, process, [first, now]), 14))
    # 40 images are left for three processes: LitData makes their parts equal.
    assert len(seen) == 60
    assert sum(seen.values()) == 62


def test_validation_sees_each_image_once(source):
    parts = [list(source.once(LoaderProcess(i, 2))) for i in range(2)]
    assert sorted(sample.key for part in parts for sample in part) == [f"{i:06d}" for i in range(7)]


def test_it_trains(chunks, tmp_path):
    settings = [
        "data.target=litdata_source.LitDataSource",
        f"data.params={{folder: {chunks / 'train'}, val_folder: {chunks / 'val'}, size: 32, "
        "batch_size: 2, num_workers: 2}",
        "lightning.trainer.max_steps=3",
    ]
    command = [sys.executable, "-m", "olvae", "train", "--base", "demo", "--gpus", "0"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
    subprocess.run(
        [*command, "--logdir", str(tmp_path), *settings], check=True, cwd=tmp_path, env=environment
    )
    assert list(tmp_path.glob("*/checkpoints/last.ckpt"))
