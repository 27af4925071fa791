import hashlib
import json
import os

import pytest

from olvae.files import atomic_write, check_folder, file_sha256, no_empty_folders, write_json


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
        with pytest.raises(
            NotADirectoryError, match=r"results need a folder, and .*file is a file"
        ):
            check_folder(place)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="is not writable: name another folder"):
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
