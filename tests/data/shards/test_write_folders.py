"""The writer's folder: what may be there, who may write, and what an interrupted run leaves."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from olvae.config import ConfigError
from olvae.data.read_errors import ReadError
from olvae.data.shards import write as module
from olvae.data.shards.index import ShardRecord
from olvae.data.shards.write import ResumableShards, WebDatasetSample, lock_name, overlaps

PLAN = {"options": {"size": 8, "flip": False}, "images": "abc"}


def sample(key: str, size: int) -> WebDatasetSample:
    return WebDatasetSample(key, {"jpg": b"x" * size, "cls": b"1"})


@pytest.fixture
def shards(tmp_path) -> ResumableShards:
    return ResumableShards(tmp_path / "out", ".state")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_parts_lock_their_own_numbers():
    assert (lock_name(None), lock_name(range(2, 5))) == ("lock", "lock-2-4")
    for lock, part, both in (
        ("lock-2-4", range(4, 9), True),
        ("lock-2-4", range(3), True),
        ("lock-2-4", range(5, 9), False),
        ("lock-2-4", range(2), False),
        ("lock-2-4", range(3, 4), True),
        ("lock-2-4", None, True),
        ("lock", range(3), True),
        ("lock", None, True),
    ):
        assert overlaps(lock, part) == both


def test_a_folder_of_other_files_is_refused_and_one_of_the_state_is_not(shards):
    shards.check(PLAN)
    shards.folder.mkdir()
    shards.check(PLAN)
    (shards.folder / ".state").mkdir()
    shards.check(PLAN)
    (shards.folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="has other files already"):
        shards.begin(PLAN)
    (shards.folder / "thesis.tex").unlink()
    shards.begin(PLAN)
    shards.begin(PLAN)
    (shards.folder / "thesis.tex").touch()
    shards.begin(PLAN)


def test_another_plan_replaces_one_of_which_nothing_is_finished(shards):
    shards.begin(PLAN)
    other = {"options": {"size": 8, "flip": True, "new": 1}, "images": "abd"}
    shards.begin(other)
    plan = shards.folder / ".state" / "plan.json"
    assert json.loads(plan.read_text()) == other
    # A description or a shard in its place is finished work.
    for finished in (shards.folder / ".state" / "000003.json", shards.folder / "000003.tar"):
        finished.write_text("{}")
        with pytest.raises(ConfigError, match=r"begun with flip True \(now False\): give the same"):
            shards.begin(PLAN)
        with pytest.raises(ConfigError, match="begun with other images, other more: give"):
            shards.begin({**other, "images": "abc", "more": 1})
        shards.begin(other)
        finished.unlink()
    # So is what another command may be at work on.
    part = ResumableShards(shards.folder, ".state", range(3))
    with pytest.raises(ConfigError, match="begun with flip True"):
        part.begin(PLAN)
    part.begin(other)


def test_a_shard_is_described_with_its_offsets_and_checksum(shards):
    shards.begin(PLAN)
    lost = ReadError("b.jpg", "bad")
    written = shards.write(3, [sample("000", 600), lost, sample("001", 5)])
    content = shards.path(3).read_bytes()
    assert shards.path(3) == shards.folder / "000003.tar"
    assert written.record == ShardRecord(2, len(content), hashlib.sha256(content).hexdigest())
    assert (written.unreadable, written.details) == ([lost], {})
    # Header and 600 bytes take 3 blocks, header and 1 byte take 2.
    offsets = np.fromfile(shards.folder / ".state" / "000003.offsets", "<u4")
    assert offsets.tolist() == [0, 5]
    empty = shards.write(2, [lost])
    assert (empty.record.images, empty.record.bytes) == (0, 0)
    assert shards.finished(2) == empty
    assert shards.write_offsets([3, 2])
    assert np.fromfile(shards.folder / "index.offsets", "<u4").tolist() == [0, 5]
    assert not shards.write_offsets([2, 4])
    shards.forget(3)
    shards.forget(3)
    assert shards.finished(3) is None
    shards.remove_state(lock_alone=True)
    assert (shards.folder / ".state").exists()
    shards.remove_state()
    shards.remove_state()
    assert names(shards.folder) == ["000003.tar", "index.offsets"]


def test_a_lock_alone_is_nothing_to_keep(shards):
    state = shards.folder / ".state"
    state.mkdir(parents=True)
    (state / "lock").touch()
    shards.remove_state(lock_alone=True)
    assert not state.exists()


def test_half_written_shards_are_removed_by_the_one_who_writes_them(shards):
    shards.begin(PLAN)
    state = shards.folder / ".state"
    for name in ("12345678-000001.tar", "12345679-000001.tar", "12345678-000002.tar"):
        (state / f".partial-{name}").touch()
    part = ResumableShards(shards.folder, ".state", range(2))
    part.write(1, [sample("000", 5)])
    assert [path.name for path in state.glob(".partial-*")] == [".partial-12345678-000002.tar"]
    (shards.folder / ".partial-12345678-index").touch()
    shards.remove_partials()
    assert not list(shards.folder.rglob(".partial-*"))


@pytest.mark.parametrize("begun", ["nothing", "a shard", "half a shard"])
def test_an_interrupted_run_leaves_its_state_once_a_shard_was_begun(shards, begun):

    def run() -> None:
        with shards.locked("it"):
            shards.begin(PLAN)
            if begun == "a shard":
                shards.write(0, [sample("000", 5)])
            elif begun == "half a shard":
                (shards.folder / ".state" / ".partial-12345678-000000.tar").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert (shards.folder / ".state").exists() == (begun != "nothing")
    assert shards.folder.exists()


@pytest.mark.parametrize(
    ("part", "process", "alone"),
    [(None, (0, 1), True), (None, (0, 2), False), (range(2), (0, 1), False)],
)
def test_one_process_without_a_part_is_alone(tmp_path, monkeypatch, part, process, alone):
    monkeypatch.setattr(module, "this_process", lambda: process)
    gathered = []
    monkeypatch.setattr(module, "gather", gathered.append)
    shards = ResumableShards(tmp_path / "out", ".state", part)
    assert shards.alone == alone

    def run() -> None:
        with shards.locked("it"):
            shards.begin(PLAN)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert gathered == [None]
    assert (shards.folder / ".state" / "plan.json").exists() != alone


def test_the_first_of_several_processes_takes_the_lock(tmp_path, monkeypatch):
    locked = []
    monkeypatch.setattr(module, "lock_file", lambda file, seconds: locked.append(seconds))
    monkeypatch.setattr(module, "gather", lambda _: None)
    for rank in (1, 0):
        monkeypatch.setattr(module, "this_process", lambda rank=rank: (rank, 2))
        with ResumableShards(tmp_path / "out", ".state").locked("it"):
            assert locked == ([] if rank else [module.LOCK_S])
            assert (tmp_path / "out" / ".state" / "lock").exists() == (rank == 0)
    # A part also looks at locks of others that share its numbers.
    for part, locks in ((range(5, 9), 1), (range(2, 6), 3)):
        locked.clear()
        (tmp_path / "out" / ".state" / "lock").unlink(missing_ok=True)
        (tmp_path / "out" / ".state" / "lock-0-4").touch()
        with ResumableShards(tmp_path / "out", ".state", part).locked("it"):
            assert len(locked) == locks
