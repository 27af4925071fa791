import hashlib
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from olvae.files import (
    atomic_write,
    check_folder,
    file_sha256,
    no_empty_folders,
    put_back,
    unread_output,
    warn_once,
    write_json,
)


def test_atomic_write_leaves_a_file_complete_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json({"a": 1}, path)
    assert json.loads(path.read_text()) == {"a": 1}

    def half() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            assert partial.parent == tmp_path
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    with pytest.raises(ValueError, match="JSON"):
        write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_temporary_file_has_the_extension_and_may_lie_elsewhere(tmp_path):
    (tmp_path / "drafts").mkdir()
    with atomic_write(tmp_path / "a.png", tmp_path / "drafts") as partial:
        assert partial.parent == tmp_path / "drafts"
        assert partial.suffix == ".png"
        partial.write_bytes(b"x")
    assert file_sha256(tmp_path / "a.png") == hashlib.sha256(b"x").hexdigest()
    assert not list((tmp_path / "drafts").iterdir())


def test_atomic_write_flushes_a_file_before_it_takes_the_place(tmp_path, monkeypatch):
    """Flushed whole, in its own folder, while the old one is still there."""
    (tmp_path / "a").write_text("old")
    seen = []

    def flush(descriptor: int) -> None:
        (partial,) = tmp_path.glob(".partial-*")
        assert os.fstat(descriptor).st_ino == partial.stat().st_ino
        seen.append((partial.read_text(), (tmp_path / "a").read_text()))

    monkeypatch.setattr(os, "fsync", flush)
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("new")
    assert seen == [("new", "old")]
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(20000)),  # the system's error, without the file
        lambda path: torch.save(torch.zeros(5000), path),  # "unexpected pos 4096 vs 4000"
    ],
)
@pytest.mark.posix
def test_a_full_disk_is_named_with_the_file(tmp_path, full_disk, write):
    path = tmp_path / "a.pt"
    with full_disk(4096), pytest.raises(OSError, match="too large") as caught:
        write_with(path, write)
    assert caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def write_with(path, write) -> None:
    with atomic_write(path) as partial:
        write(partial)


def test_another_error_of_a_library_stays(tmp_path):
    def fail(_) -> None:
        raise RuntimeError("not about the disk")

    with pytest.raises(RuntimeError, match="the disk"):
        write_with(tmp_path / "a", fail)


def test_atomic_write_by_two_at_once(tmp_path):
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the outer one ends last
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "b"):
        pass  # nothing was written
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_check_folder_refuses_files_and_unwritable_places(tmp_path, monkeypatch):
    assert check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(NotADirectoryError, match=r"folder, and .*file"):
            check_folder(place)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="not writable"):
        check_folder(tmp_path / "a")


def test_failed_write_leaves_no_new_empty_folder(tmp_path):
    (tmp_path / "old").mkdir()

    def fail(folder: str, *files: str) -> None:
        with no_empty_folders(tmp_path / folder):
            for file in files:
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).touch()
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt

    for folder, files, left in (
        ("a/b/c", (), ["old"]),
        ("old", (), ["old"]),
        ("old/a", (), ["old"]),
        ("a/b/c", ("a/file",), ["a", "a/file", "old"]),
    ):
        with pytest.raises(KeyboardInterrupt):
            fail(folder, *files)
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left
    with no_empty_folders(tmp_path / "kept"):
        (tmp_path / "kept").mkdir()
    assert (tmp_path / "kept").is_dir()


def test_put_back_returns_a_folder_to_where_it_was(tmp_path):
    """Not to a place of the same name in a folder that is new."""
    old = tmp_path / f".vae.{socket.gethostname()}~999999999-x" / "vae.old"
    old.mkdir(parents=True)
    (old / "config.json").touch()
    put_back(tmp_path / "sub" / "vae")
    assert (tmp_path / "vae" / "config.json").is_file()
    assert not old.exists()
    assert not (tmp_path / "sub").exists()


def test_output_that_nobody_reads_is_no_error(tmp_path):
    """Also Python's own flush at the end, which would exit with 120."""
    lines = """
import os, sys
from olvae.files import unread_output
with unread_output():
    print("a line")
    print("another", file=sys.stderr, flush=True)
    os.write(2, b"of the system")
print("a last one")
open("done", "w").close()
"""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-c", lines],
        stdout=writer,
        stderr=writer,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    os.close(writer)
    assert (ended.returncode, (tmp_path / "done").exists()) == (0, True)


def test_lines_that_nobody_reads_are_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with unread_output():
            sys.stderr.writelines(["a line\n", "another\n"])


@pytest.mark.posix
def test_output_is_heard_again_after_a_pipe_was_full(monkeypatch):
    """A non-blocking one, as a program that starts this one may give."""
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    with os.fdopen(writer, "w", buffering=1) as stream, os.fdopen(reader, "rb") as heard:
        monkeypatch.setattr(sys, "stderr", stream)
        with unread_output():
            # More than the pipe and Python's buffer hold.
            for _ in range(100):
                sys.stderr.write("x" * 9999 + "\n")
            sys.stderr.flush()
            assert heard.read().startswith(b"xxx")
            sys.stderr.write("again\n")
            sys.stderr.flush()
            assert heard.read().endswith(b"again\n")


def test_output_that_is_read_stays_as_it_was(capsys):
    before = sys.stdout, sys.stderr
    with unread_output():
        sys.stdout.write("a\n")
        sys.stderr.write("b\n")
        assert sys.stderr.isatty() == before[1].isatty()
    assert capsys.readouterr() == ("a\n", "b\n")
    assert (sys.stdout, sys.stderr) == before


def test_warn_once_warns_once(caplog):
    warn_once.cache_clear()
    warn_once("a")
    warn_once("a")
    warn_once("b")
    assert [record.message for record in caplog.records] == ["a", "b"]
