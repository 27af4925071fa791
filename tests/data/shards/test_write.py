"""The writer of resumable shards, beside what packing and encoding test of it."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier

import pytest

from olvae.config import ConfigError
from olvae.data.read_errors import ReadError
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.data.shards.write import ResumableShards, WebDatasetSample

PLAN = {"options": {"size": 8, "flip": False}, "images": "abc"}


@pytest.fixture
def shards(tmp_path):
    shards = ResumableShards(tmp_path / "out", ".state")
    shards.begin(PLAN)
    return shards


def samples(count: int):
    return [WebDatasetSample(f"{i:03d}", {"jpg": b"x" * i, "cls": b"1"}) for i in range(count)]


def test_a_written_shard_and_its_record_are_found_again(shards):
    assert shards.finished(2) is None
    error = ReadError("b.jpg", "the file is empty")
    written = shards.write(2, [*samples(3), error], lambda: {"sum": 3.5})
    assert (written.record.images, written.unreadable, written.details) == (
        3,
        [error],
        {"sum": 3.5},
    )
    assert ResumableShards(shards.folder, ".state").finished(2) == written
    entries = list(read_shard(Shard(str(shards.path(2)))))
    assert [(entry.data, dict(entry.files)) for entry in entries] == [
        (b"x" * i, {"cls": b"1"}) for i in range(3)
    ]
    shards.forget(2)
    assert shards.finished(2) is None


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_a_damaged_shard_is_not_finished(shards, damage):
    shards.write(0, samples(2))
    path, content = shards.path(0), shards.path(0).read_bytes()
    path.unlink()
    if damage == "shorter":
        path.write_bytes(content[:-1])
    assert shards.finished(0) is None
    shards.write(0, samples(2))
    assert path.read_bytes() == content


def test_a_written_shard_without_images_has_no_file(shards):
    shards.write(0, samples(1))
    shards.write(0, [ReadError("a.jpg", "broken")])
    assert not shards.path(0).exists()
    assert shards.finished(0).record.images == 0


def test_partial_shards_of_a_failed_or_killed_run_are_removed(shards):
    def fail():
        yield samples(1)[0]
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="is gone"):
        shards.write(0, fail())
    assert [path.name for path in shards.folder.rglob("*")] == [".state", "plan.json"]
    (shards.folder / ".state" / ".partial-12345678-000000.tar").write_bytes(b"half")
    again = ResumableShards(shards.folder, shards.state)
    again.write(0, samples(1))
    assert sorted(path.name for path in shards.folder.rglob("*.tar")) == ["000000.tar"]
    assert again.write_offsets([0])
    assert (shards.folder / "index.offsets").read_bytes() == bytes(4)
    assert not again.write_offsets([0, 1])
    (shards.folder / "index.offsets").unlink()
    shards.remove_state()
    assert [path.name for path in shards.folder.iterdir()] == ["000000.tar"]


def test_a_command_that_is_alone_begins_without_half_written_files(shards):
    state = shards.folder / shards.state
    (state / ".partial-12345678-000007.tar").touch()
    ResumableShards(shards.folder, shards.state).begin(PLAN)
    assert [path.name for path in state.iterdir()] == ["plan.json"]


def test_another_plan_is_refused_once_a_shard_is_finished(shards):
    other = {"options": {"size": 16, "flip": False}, "images": "abd"}
    shards.begin(other)
    shards.begin(PLAN)
    shards.write(0, samples(1))
    with pytest.raises(
        ConfigError,
        match=r"out: .*size 8 \(now 16\)",
    ):
        shards.begin(other)
    with pytest.raises(ConfigError, match="other images"):
        shards.begin({**PLAN, "images": "abd"})
    assert json.loads((shards.folder / ".state" / "plan.json").read_text()) == PLAN
    shards.begin(PLAN)


def test_writing_shards_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def lockless(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("olvae.data.shards.write.lock_file", lockless)
    with ResumableShards(tmp_path / "out", ".state").locked("it"):
        pass
    assert "No locks available" in caplog.text


@pytest.mark.parametrize(
    ("first", "then", "free"),
    [
        (range(2, 5), range(4, 6), False),
        (range(2, 5), range(2, 5), False),
        (range(2, 5), range(3, 4), False),
        (range(2, 5), None, False),
        (None, range(2, 5), False),
        (range(2, 5), range(5, 12), True),
        (range(2, 5), range(2), True),
    ],
)
def test_commands_write_parts_at_the_same_time_unless_they_overlap(
    tmp_path, monkeypatch, first, then, free
):
    monkeypatch.setattr("olvae.data.shards.write.LOCK_S", 0.0)
    refusal = pytest.raises(ConfigError, match="out: another `it`")
    two = ResumableShards(tmp_path / "out", ".state", then)
    one = ResumableShards(tmp_path / "out", ".state", first)
    with one.locked("it"), nullcontext() if free else refusal, two.locked("it"):
        pass
    with two.locked("it"):
        pass


def test_a_part_leaves_the_files_and_the_plan_of_other_parts(tmp_path):
    one = ResumableShards(tmp_path / "out", ".state", range(2))
    one.begin(PLAN)
    partial = tmp_path / "out" / ".state" / ".partial-12345678-000001.tar"
    partial.touch()
    two = ResumableShards(tmp_path / "out", ".state", range(2, 4))
    two.begin(PLAN)
    with pytest.raises(RuntimeError), two.locked("it"):
        raise RuntimeError
    with pytest.raises(ConfigError, match="other images"):
        two.begin({**PLAN, "images": "abd"})
    assert partial.exists()
    one.write(1, samples(1))
    assert not partial.exists()


def test_of_parts_that_begin_at_once_with_other_options_one_is_refused(tmp_path):
    """Each has looked for a plan before the other wrote one."""
    met = Barrier(2, timeout=20)

    class Met(ResumableShards):
        checks = 0

        def check(self, plan):
            super().check(plan)
            Met.checks += 1
            if Met.checks <= 2:
                met.wait()

    def begin(number):
        part = Met(tmp_path / "out", ".state", range(number, number + 1))
        part.begin({**PLAN, "images": str(number)})
        return number

    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(begin, number) for number in range(2)]
    (failed,) = (job.exception() for job in jobs if job.exception())
    assert "other images" in str(failed)
    (begun,) = (job.result() for job in jobs if not job.exception())
    plan = json.loads((tmp_path / "out" / ".state" / "plan.json").read_text())
    assert plan["images"] == str(begun)


def test_a_part_that_began_right_after_the_check_of_another_refuses_that_one(tmp_path):
    first = ResumableShards(tmp_path / "out", ".state", range(1))

    class Overtaken(ResumableShards):
        def check(self, plan):
            super().check(plan)
            if not first.path(0).exists():
                first.begin(PLAN)
                first.write(0, samples(0))

    second = Overtaken(tmp_path / "out", ".state", range(1, 2))
    with pytest.raises(ConfigError, match="other images"):
        second.begin({**PLAN, "images": "abd"})
    assert json.loads((tmp_path / "out" / ".state" / "plan.json").read_text()) == PLAN
