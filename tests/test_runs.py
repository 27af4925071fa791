"""Run folders: names, opening, settings, and the lock of the one training that a run has at a
time.
"""

import errno
import multiprocessing
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from olvae import runs
from olvae.config import ConfigError, save
from olvae.models.target_names import check_target
from olvae.runs import (
    FOLDER_NAME,
    Run,
    Settings,
    create,
    find_run,
    locked,
    open_run,
    run_of,
    settings_of,
)


def test_run_names_are_distinct_within_a_second_and_checked(tmp_path):
    """Five of a second differ."""
    made = [create(tmp_path / "logs", "my_demo", "bf16") for _ in range(5)]
    assert len({run.path for run in made}) == 5
    for run in made:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(-\d)?_my_demo_bf16", run.path.name)
        assert run.checkpoints.is_dir()
        assert run.images.is_dir()
    for name in ("", "a/b", "..\\x", "a b"):
        with pytest.raises(ValueError, match="`name`"):
            create(tmp_path / "other", name, "32")
    assert not (tmp_path / "other").exists()


def test_open_run_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: no such"):
        open_run(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=re.escape(f"last: no run in {tmp_path}")):
        open_run("last", tmp_path)
    run = create(tmp_path, "a", "32")
    with pytest.raises(FileNotFoundError, match=r"config\.yaml .*missing"):
        open_run(run.path)
    run.config.write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"checkpoints.last\.ckpt is missing"):
        open_run(run.path)
    run.last_checkpoint.write_bytes(b"")
    assert open_run(run.path) == open_run(run.last_checkpoint) == run
    (run.checkpoints / "best.ckpt").touch()
    for file in (run.checkpoints / "best.ckpt", run.config):
        with pytest.raises(FileNotFoundError, match=rf"{file.name}: .*a file"):
            open_run(file)
    assert run_of(run.last_checkpoint) == run_of(run.checkpoints / "best.ckpt") == run
    assert run_of(run.images / "x.ckpt") is None
    run.config.unlink()
    assert run_of(run.last_checkpoint) is None


def test_one_word_names_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = (
        "01T00-00-00_demo_32",
        "01T00-00-00-2_demo_32",
        "01T00-00-00-10_demo_32",
        "02T00-00-00_a_b_bf16",
    )
    for name in (*names, "03T00-00-00_stopped_32"):
        (tmp_path / "runs" / f"2026-01-{name}" / "checkpoints").mkdir(parents=True)
        if "stopped" not in name:
            Run(tmp_path / "runs" / f"2026-01-{name}").last_checkpoint.touch()
    newest = {
        "last": names[3],
        "a_b": names[3],
        "demo": names[2],
        "runs/demo": names[2],
        "latest": names[3],
    }
    newest["runs/last"] = names[3]
    assert {word: Path(find_run(word)).name.removeprefix("2026-01-") for word in newest} == newest
    assert find_run("last", "elsewhere") == "last"
    near = [
        (check_target, "lst", "last"),
        (check_target, "dmeo", "demo"),
        (open_run, "runs/dmeo", "runs/demo"),
    ]
    for look, word, meant in near:
        with pytest.raises(FileNotFoundError, match=rf"^{word}: .* {meant}\?$"):
            look(word)
    for word in (
        "stopped",
        "dem",
        "elsewhere/last",
        "olvae:demo",
        "owner/demo",
        "a.B:x//y",
        "",
        ".",
        tmp_path,
    ):
        assert find_run(word) == word
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "a.png").touch()  # the data of a run of the same name
    assert Path(find_run("demo")).name.endswith(names[2])
    (tmp_path / "demo" / "config.json").touch()
    assert find_run("demo") == "demo"
    Run(Path(find_run("last"))).config.touch()
    assert open_run("last") == open_run("runs/a_b") == Run(Path(find_run("last")))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("best is 2026-11-30T10-55-15_demo_32.", ["2026-11-30T10-55-15_demo_32"]),
        ("2026-11-30T10-55-15_a.b_32: 2026-11-30T10-55-15-2_c_d_bf16, raw",
         ["2026-11-30T10-55-15_a.b_32", "2026-11-30T10-55-15-2_c_d_bf16"]),
        ("runs/2026-11-30T10-55-15_demo_32", []),
        ("2026-11-30T10-55-15_demo_32/checkpoints, 2026-11-30T10-55-15_demo_32.ckpt", []),
    ],
)  # fmt: skip
def test_folders_of_runs_are_found_in_sentences_but_not_in_paths(text, found):
    assert [match[0] for match in FOLDER_NAME.finditer(text)] == found


def test_a_run_with_its_best_checkpoint_alone_is_named_too(tmp_path):
    """As after a full disk; also without a config, whose time it then takes from the checkpoint."""
    for name in ("older", "newer"):
        run = create(tmp_path, name, "32")
        (run.checkpoints / "best.ckpt").touch()
        os.utime(run.newest_checkpoint, (1, 1) if name == "older" else None)
    assert [find_run(word, tmp_path) for word in ("last", "newer")] == [run.path, run.path]
    assert Path(find_run("older", tmp_path)).name.endswith("_older_32")


@pytest.fixture
def in_zone(monkeypatch):
    """Change the local time zone; back to the machine's at the end."""

    def change(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield change
    monkeypatch.undo()
    time.tzset()


@pytest.mark.posix
def test_the_newest_run_is_so_in_any_time_zone(tmp_path, in_zone):
    """The names have a local time; the order is by the time in config.yaml, else by the file's."""
    made = []
    for zone, name in (("Asia/Tokyo", "a"), ("UTC", "a"), ("America/New_York", "b")):
        in_zone(zone)
        run = create(tmp_path, name, "32")
        run.last_checkpoint.touch()
        made.append(run)
    assert sorted(run.path.name for run in made) == [run.path.name for run in reversed(made)]

    def newest() -> list[Path]:
        return [Path(find_run(word, tmp_path)) for word in ("a", "last")]

    for i, run in enumerate(made):
        run.config.write_text("run:\n  name: a\n")
        os.utime(run.config, (i, i))
    assert newest() == [made[1].path, made[2].path]
    for i, run in enumerate(made):
        settings = Settings(name="a", begun=runs.utc_text(1e9 - i))
        save({"run": settings.as_dict()}, run.config)
    assert newest() == [made[0].path, made[0].path]
    made[2].config.write_text("run:\n  begun: yesterday\n")
    assert newest() == [made[0].path, made[2].path]


def test_run_settings_are_what_was_written_and_defaults_for_the_rest():
    settings = Settings(
        name="a", seed=3, initial_seed=2, weights="x.ckpt", paths={"/data/photos": "photos"}
    )
    assert settings_of({"run": settings.as_dict()}) == settings
    assert not {"job", "begun"} & set(settings.as_dict())
    assert settings_of({"run": {"seed": 5, "gpus": None, "an_older_key": 1}}) == Settings(
        seed=5, initial_seed=5
    )
    for config in ({}, {"run": None}, {"run": "cut off"}):
        assert settings_of(config) == Settings()


@pytest.fixture
def run(tmp_path) -> Run:
    return create(tmp_path, "a", "32")


def refused(run: Run) -> str:
    with pytest.raises(ConfigError) as caught, locked(run):
        pass
    return str(caught.value)


def test_run_lock_names_its_holder_even_after_an_interrupt(run):
    def interrupted() -> None:
        with locked(run):
            raise KeyboardInterrupt

    with locked(run):
        host = re.escape(socket.gethostname())
        holder = rf"process {os.getpid()} on {host}, since \d{{4}}-\d\d-\d\dT\S+"
        end = "wait for its end, or stop it"
        message = rf"{re.escape(str(run.path))}: is being trained by {holder}: {end}"
        assert re.fullmatch(message, refused(run))
        assert re.fullmatch(message, refused(run))  # the refused one has not changed it
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupted()


@pytest.mark.posix
def test_killed_process_leaves_no_run_lock_though_its_child_lives(run):
    """A loader process outlives a trainer that was killed by some seconds."""
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()

    def train() -> None:
        with locked(run):
            if os.fork() == 0:
                ready.set()
                end.wait(60)
                os._exit(0)
            os.wait()

    trainer = context.Process(target=train)
    trainer.start()
    assert ready.wait(60)
    assert f"process {trainer.pid} on" in refused(run)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    with locked(run):
        pass
    end.set()


def test_run_lock_that_ends_soon_is_waited_for(run):
    """As of a machine that died, on a network file system."""
    with ThreadPoolExecutor(1) as thread, ExitStack() as held:
        with locked(run):
            waiting = thread.submit(held.enter_context, locked(run, patience=60))
            time.sleep(0.3)
            assert not waiting.done()
        waiting.result()
        assert f"process {os.getpid()} on" in refused(run)


def test_run_lock_on_a_file_system_without_locks_is_a_warning(run, monkeypatch, caplog):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(runs, "lock_file", unsupported)
    with locked(run):
        pass
    assert caplog.messages == [
        f"{run.path}: no lock here (No locks available): "
        "make sure that nothing else trains this run"
    ]
