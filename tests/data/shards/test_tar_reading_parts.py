"""Reading shards part by part: names, details, reasons; and when a download is tried again."""

import gzip
import hashlib
import io
import json
import lzma
from typing import Any

import pytest

from olvae.data.read_errors import ReadError
from olvae.data.shards import tar_reading
from olvae.data.shards.tar_reading import (
    Entry,
    Shard,
    Unpacked,
    _Download,
    _explain,
    _reason,
    _status,
    file_name,
    open_url,
    read_shard,
)
from tests.data.images import encoded, write_tar


def test_a_shards_file_has_a_name_in_any_url():
    odd = "https://h/1/download"
    hashed = hashlib.sha256(odd.encode()).hexdigest()[:8]
    for url, name in (
        ("a/b.v2.tar", "b.v2.tar"),
        ("pipe:cat /x.tar/000.tar.gz | cat", "000.tar.gz"),
        ("https://h/a.tar?X-Name=y", "a.tar"),
        ("pipe:make-images", "pipe:make-images"),
        (odd, f"download-{hashed}"),
    ):
        assert file_name(url) == name


def test_a_file_named_twice_is_a_warning_and_no_image_is_lost(tmp_path):
    files = [("1.jpg", encoded(1)), ("1.jpg", encoded(1)), ("2.jpg", encoded(2))]
    path = str(write_tar(tmp_path / "a.tar", files))
    found = list(read_shard(Shard(path)))
    assert {entry.key for entry in found if isinstance(entry, Entry)} >= {"a/2"}
    (error,) = (entry for entry in found if isinstance(entry, ReadError))
    assert (error.name, error.lost) == (path, False)
    assert "duplicate" in error.reason


def entry(**files: bytes) -> Entry:
    return Entry(
        "a/1", "a.tar/1.jpg", b"", {name.replace("_", "."): c for name, c in files.items()}
    )


def test_details_are_of_both_json_files_and_none_of_broken_ones():
    both = entry(json=b'{"a": 1, "b": 1}', latent_json=b'{"b": 2}')
    assert both.details == {"a": 1, "b": 2}
    for content in (b"{", b"[1]", b"3", b"\xff"):
        assert entry(json=content, latent_json=b'{"b": 2}').details == {"b": 2}
    assert entry().details == {}


def test_a_group_is_a_text_in_the_details():
    assert entry(json=b'{"hold_out_group": "p1"}').group == "p1"
    assert entry(latent_json=b'{"hold_out_group": "p1"}').group == "p1"
    for content in (b"{}", b'{"hold_out_group": 3}', b'{"x": "hold_out_group"}'):
        assert entry(json=content).group is None


def test_a_local_file_is_read_from_a_byte_on(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    with open_url(str(tmp_path / "a"), 4) as stream:
        assert stream.read(3) == b"456"


def test_the_largest_file_of_a_shard_is_read(tmp_path, monkeypatch):
    path = str(write_tar(tmp_path / "a.tar", [("1.jpg", b"x" * 10), ("2.jpg", b"x" * 11)]))
    monkeypatch.setattr(tar_reading, "MAX_FILE_BYTES", 10)
    found = list(read_shard(Shard(path)))
    assert found[0].data == b"x" * 10
    assert found[1].reason.startswith("2.jpg: a sparse file, or larger than")
    assert (len(found), found[1].lost) == (2, True)


class Drops(io.BytesIO):
    """A stream that gives a byte at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(1, size))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_what_comes_byte_by_byte_is_unpacked(pack):
    content = json.dumps(list(range(99))).encode()
    unpacked = Unpacked(Drops(pack(content)))
    assert unpacked.packed == (pack is not bytes)
    assert b"".join(iter(lambda: unpacked.read(7), b"")) == content


class StatusError(Exception):
    def __init__(self, status: Any = None, code: int | None = None) -> None:
        super().__init__("the first\nand another line")
        self.status = status
        if code is not None:
            self.response = type("Response", (), {"status_code": code})


class ClientPayloadError(Exception):
    pass


def test_reasons_are_in_plain_words():
    assert [
        _status(error) for error in (StatusError(404), StatusError(0, 503), StatusError(None))
    ] == [
        404,
        503,
        None,
    ]
    assert _status(StatusError("404")) is None
    assert _status(ValueError()) is None
    for error, text in (
        (FileNotFoundError(2, "gone"), "no such file"),
        (TimeoutError(), "nothing came for 60 s"),
        (ClientPayloadError("x"), "the connection dropped"),
        (StatusError(503), "the server answers 503 Service Unavailable"),
        (StatusError(522), "the server answers 522"),
        (StatusError(), "the first"),
    ):
        assert _explain(error) == text
    for error, text in (
        (FileNotFoundError(2, "gone"), "no such file"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (RecursionError(), "too many headers of long names or attributes in a row"),
        (ValueError("a  b @ c", "d"), "a b"),
        (ValueError(), "ValueError"),
    ):
        assert _reason(error) == text


class Clock:
    """Time that only pauses let pass."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tar_reading, "time", clock)
    monkeypatch.setattr(tar_reading, "_failures", {})
    return clock


class Served(_Download):
    """A download of these pieces and errors, one a read."""

    def __init__(self, *events: Any, begin: int = 0) -> None:
        super().__init__("http://h/a.tar", begin)
        self.events = list(events)
        self.opened = 0
        self.closed = 0

    def _open(self) -> None:
        self.opened += 1
        self._file = self

    def close(self) -> None:
        if self._file is not None:
            self.closed += 1
        self._file = None

    def read(self, size: int) -> bytes:
        if size != tar_reading.DOWNLOAD_BYTES:
            return super().read(size)
        event = self.events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event


@pytest.mark.parametrize(
    ("status", "again"),
    [(404, False), (499, False), (500, True), (522, True), (408, True), (425, True), (429, True)],
)
def test_a_refusal_is_final_and_a_failure_is_not(clock, status, again):
    served = Served(StatusError(status), b"abc")
    if again:
        assert (served.read(2), served.read(2)) == (b"ab", b"c")
        assert (served.opened, served.closed, clock.now) == (2, 1, 101.0)
    else:
        with pytest.raises(OSError, match=f"the server answers {status}"):
            served.read(2)
        assert (served.opened, clock.now) == (1, 100.0)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "x"), PermissionError(13, "x"), ValueError()]
)
def test_what_trying_again_can_not_help_is_final(clock, error):
    with pytest.raises(OSError, match=r"no such file|x|ValueError"):
        Served(error, b"abc").read(2)
    assert clock.now == 100.0
    assert tar_reading._failures == {}


def test_a_download_is_resumed_so_often_and_once_more_for_each_piece(clock, monkeypatch):
    monkeypatch.setattr(tar_reading, "MAX_RESUMES", 2)
    monkeypatch.setattr(tar_reading, "DOWNLOAD_BYTES", 4)
    failure = OSError("down")
    assert Served(failure, failure, b"a").read(1) == b"a"
    with pytest.raises(OSError, match="down"):
        Served(failure, failure, failure).read(1)
    assert tar_reading._failures == {"http://h": (1, clock.now)}
    # Bytes before the first that was asked for do not count.
    served = Served(b"abcd", failure, failure, failure, b"e", begin=10)
    assert [served.read(2), served.read(2), served.read(2)] == [b"ab", b"cd", b"e"]
    assert tar_reading._failures == {}
    served = Served(b"abcd", *[failure] * 4, begin=10)
    served.read(2)
    served.read(2)
    with pytest.raises(OSError, match="down"):
        served.read(2)


def test_a_store_is_left_alone_for_a_while_unless_a_shard_was_begun(clock, monkeypatch):
    failures = {"http://h": (tar_reading.FAILED_IN_A_ROW, 100.0)}
    monkeypatch.setattr(tar_reading, "_failures", failures)
    for passed in (0.0, tar_reading.RETRY_S - 0.1):
        clock.now = 100.0 + passed
        with pytest.raises(OSError, match="not tried, as 3 downloads in a row from there"):
            Served(b"a").read(1)
    clock.now = 100.0 + tar_reading.RETRY_S
    assert Served(b"a").read(1) == b"a"
    assert failures == {}
    failures["http://h"] = (tar_reading.FAILED_IN_A_ROW - 1, clock.now)
    assert Served(b"a").read(1) == b"a"
    served = Served(b"a", b"b")
    served.read(1)
    failures["http://h"] = (tar_reading.FAILED_IN_A_ROW, clock.now)
    assert served.read(1) == b"b"
