import json

import pytest

from olvae.files import check_folder, whole, write_json


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json({"a": 1}, path)
    assert json.loads(path.read_text()) == {"a": 1}

    def half() -> None:
        with whole(path) as partial:
            partial.write_text("half")
            assert partial.parent == tmp_path
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    with pytest.raises(ValueError, match="JSON"):
        write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_two_may_write_at_once(tmp_path):
    with whole(tmp_path / "a") as first, whole(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the outer one ends last


def test_where_results_could_go(tmp_path, monkeypatch):
    assert check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(NotADirectoryError, match=r"results need a folder, and .*file is a file"):
            check_folder(place)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="can't be written: name another folder"):
        check_folder(tmp_path / "a")
