"""Shards by URL, from a server on this machine that cuts, stalls, refuses and changes its mind."""

import gc
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from olvae.data.read_errors import ReadError
from olvae.data.shards import tar_reading
from olvae.data.shards.index import find_shards, with_counts
from olvae.data.shards.indexing import index_shards
from olvae.data.shards.offsets import offsets_of
from olvae.data.shards.tar_reading import Entry, Shard, open_url, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from olvae.data.source import LoaderProcess
from tests.data.images import encoded, write_shard, write_shards


def read(url: str) -> tuple[list[bytes], list[str]]:
    """The images, and the reasons of the errors."""
    items = list(read_shard(Shard(url)))
    return [i.data for i in items if isinstance(i, Entry)], [
        i.reason for i in items if isinstance(i, ReadError)
    ]


IMAGES = [encoded(n) for n in range(6)]


class Server(http.server.ThreadingHTTPServer):
    """Serves one shard of six images under names that say what goes wrong, and files of a folder.

    ``/404.tar`` answers that status; ``/busy.tar`` 503 once. Others send a half at most: ``cut``
    closes the connection then, ``stall`` sends nothing more; with ``-always`` each time, else what
    is asked for follows the next time. ``-whole`` ignores Range, ``-new`` has another ETag each
    time.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content = write_shard(folder / "six.tar", range(6)).read_bytes()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def asked(self, name: str) -> list[str | None]:
        """The ranges that were asked of a file, in order."""
        return [headers.get("Range") for path, headers in self.requests if path == f"/{name}"]


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(arguments[2].folder))

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        earlier = len(self.server.asked(self.path[1:]))
        self.server.requests.append((self.path, dict(self.headers)))
        kind, *extras = self.path[1:].removesuffix(".tar").split("-")
        if kind.isdigit() or (kind == "busy" and not earlier):
            self.send_error(int(kind) if kind.isdigit() else 503)
        elif kind in ("cut", "stall", "busy"):
            self.send_six(kind, extras, earlier)
        else:
            super().do_GET()

    def send_six(self, kind: str, extras: list[str], earlier: int) -> None:
        content = self.server.content
        start = (
            0
            if "whole" in extras
            else int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        )
        broken = kind != "busy" and ("always" in extras or not earlier)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{earlier if "new" in extras else 0}"')
        self.end_headers()
        self.wfile.write(
            content[start : max(start, len(content) // 2)] if broken else content[start:]
        )
        if broken:  # aiohttp forgets what it has not given away yet when a connection closes
            self.server.closing.wait(60 if kind == "stall" else 0.1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server
        server.closing.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(tar_reading, "STALL_S", 1.0)
    monkeypatch.setattr(tar_reading, "RETRY_S", 0.9)
    monkeypatch.setattr(tar_reading, "PAUSE_S", 0.05)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("name", ["cut.tar", "stall.tar", "cut-whole.tar", "busy.tar"])
def test_a_broken_download_is_resumed_at_its_next_byte(server, name):
    """Also where the server ignores ranges and sends it all again; a busy one is asked again."""
    assert read(server.url(name)) == (IMAGES, [])
    again = None if name == "busy.tar" else f"bytes={len(server.content) // 2}-"
    assert server.asked(name) == [None, again]


def test_a_download_that_changed_in_between_is_not_mixed(server):
    assert read(server.url("cut-new.tar")) == (IMAGES[:4], ["it changed while it was read"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("404.tar", "no such file"),
        ("403.tar", "the server answers 403 Forbidden"),
        ("500.tar", "the server answers 500 Internal Server Error"),
        ("cut-always.tar", "the connection dropped"),
        ("stall-always.tar", "nothing came for 1 s"),
    ],
)
def test_images_before_the_end_of_a_download_are_kept_and_the_reason_is_a_line(
    server, name, reason
):
    begun = time.monotonic()
    assert read(server.url(name)) == (IMAGES[:4] if "always" in name else [], [reason])
    assert time.monotonic() - begun < 30
    assert (len(server.asked(name)) == 1) == name.startswith("4")  # a refusal is final


def test_a_line_breaks_the_silence_of_a_download_that_is_tried_again(server, monkeypatch, caplog):
    monkeypatch.setattr(tar_reading, "NOTE_S", 0.3)
    assert read(server.url("503.tar"))[1] == ["the server answers 503 Service Unavailable"]
    (line,) = caplog.messages
    assert line.startswith(
        f"{server.url('503.tar')}: the server answers 503 Service Unavailable; trying again, for 0 "
    )


class Clock:
    """Time that only pauses let pass, so that a slow machine changes no number of tries."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_store_that_is_down_is_waited_for_less_and_less(server, monkeypatch):
    """One that answers again is waited for as long as before."""
    clock = Clock()
    monkeypatch.setattr(tar_reading, "time", clock)
    down = "the server answers 503 Service Unavailable"
    names = [f"503-{n}.tar" for n in range(5)]
    reasons = [read(server.url(name))[1] for name in names]
    left_alone = "not tried, as 3 downloads in a row from there have failed"
    assert reasons == [[down]] * 3 + [[left_alone]] * 2
    tries = [len(server.asked(name)) for name in names]
    assert tries[0] > tries[1] > tries[2]
    assert tries[3:] == [0, 0]

    # After a while it is asked again.
    clock.now += 10 * tar_reading.RETRY_S
    assert read(server.url("six.tar")) == (IMAGES, [])
    assert read(server.url("503-5.tar"))[1] == [down]
    assert len(server.asked("503-5.tar")) == tries[0]


def test_a_download_where_nobody_listens():
    images, (reason,) = read("http://127.0.0.1:1/a.tar")
    assert not images
    assert reason.startswith("Cannot connect to host 127.0.0.1:1")


def test_a_stalled_download_is_left_at_once(server, monkeypatch):
    monkeypatch.setattr(tar_reading, "STALL_S", 60.0)
    with closing(open_url(server.url("stall-always.tar"))) as stream:
        assert len(stream.read(100)) == 100
        begun = time.monotonic()
    assert time.monotonic() - begun < 5


def test_downloads_go_through_a_proxy_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url(""))
    monkeypatch.delenv("no_proxy")
    assert read("http://nowhere.invalid/six.tar") == ([], ["no such file"])
    assert [path for path, _ in server.requests] == ["http://nowhere.invalid/six.tar"]


def test_a_private_file_of_the_hub_is_downloaded_by_token(server, monkeypatch, tmp_path):
    """By the user's token, which is in a header and in no command."""
    file = SimpleNamespace(
        repo_id="a/b", path_in_repo="cut.tar", repo_type="dataset", revision="main"
    )
    monkeypatch.setattr("huggingface_hub.HfFileSystem.resolve_path", lambda self, url: file)
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda repo, name, **_: server.url(name))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert read("hf://datasets/a/b/cut.tar") == (IMAGES, [])
    assert [headers["Authorization"] for _, headers in server.requests] == ["Bearer hf_secret"] * 2


def test_downloads_of_other_file_systems_are_resumed_as_well(server, monkeypatch):
    """As s3:// and gs://, by a file system that any package may register with fsspec."""
    fsspec.filesystem("memory").pipe("/bucket/six.tar", server.content)
    whole, failures = MemoryFile.read, iter([ConnectionResetError(104, "Connection reset by peer")])

    def cut(self, size=-1):
        if self.tell() and (failure := next(failures, None)):
            raise failure
        return whole(self, min(size, 20000))

    monkeypatch.setattr(MemoryFile, "read", cut)
    assert read("memory://bucket/six.tar") == (IMAGES, [])
    assert next(failures, None) is None
    assert read("memory://bucket/none.tar")[1] == ["no such file"]
    assert "nowhere" in read("nowhere://bucket/six.tar")[1][0]


def test_loader_processes_after_the_main_one_has_downloaded(server, tmp_path):
    """Its event loop is not theirs."""
    gc.collect()  # or the loader's processes would close other tests' downloads, for a second each
    write_shards(tmp_path / "s", [6, 6, 6])
    (tmp_path / "s" / "index.json").write_text(
        json.dumps(
            {
                "shards": {f"00{i}.tar": {"images": 6} for i in range(3)}
                | {"stall-always.tar": {"images": 6}}
            }
        )
    )
    names = ("s/000.tar", "stall-always.tar", "s/001.tar", "s/002.tar")
    with closing(open_url(server.url("six.tar"))) as open_in_the_main_process:
        open_in_the_main_process.read(100)
        source = WebDatasetSource(
            [server.url(name) for name in names],
            *(16, 2, 2),
            index=server.url("s/index.json"),
            val_shards=str(tmp_path / "s"),
            max_unreadable=1.0,
        )
        loader = source.train_loader()
        begun = time.monotonic()
        keys = [key for batch in islice(loader, 12) for key in batch["key"]]
        assert time.monotonic() - begun < 60
    assert {key.partition("/")[0] for key in keys} == {"000", "001", "002", "stall-always"}
    assert loader.read_errors.unreadable.reasons == {
        server.url("stall-always.tar"): "nothing came for 1 s"
    }


def test_shards_by_url_and_their_index(server, tmp_path):
    write_shards(tmp_path / "s", [3, 5])
    urls = find_shards(server.url("s/{000..001}.tar"))
    assert [image for url in urls for image in read(url)[0]] == [encoded(n) for n in range(8)]
    assert next(iter(read_shard(Shard(urls[1])))).key == "001/0003"
    (tmp_path / "s" / "index.json").write_text(
        json.dumps({"shards": {f"00{i}.tar": {"images": 4} for i in (0, 1)}})
    )
    assert [shard.images for shard in with_counts(urls, server.url("s/index.json"))] == [4, 4]
    assert [shard.images for shard in with_counts(urls)] == [None, None]
    with pytest.raises(ValueError, match=r"index\.json: "):
        with_counts(["http://a/0.tar"], server.url("404/index.json"))


def test_offsets_are_read_again_after_a_failure(server):
    offsets = offsets_of(Shard("http://127.0.0.1:9/a.tar", 6, (server.url("busy.tar"), 2)))
    assert offsets.tobytes() == server.content[8:32]
    assert offsets_of(Shard("http://127.0.0.1:9/b.tar", 6, (server.url("404.tar"), 0))) is None
    assert offsets_of(Shard("http://127.0.0.1:9/c.tar", 6, (server.url("404.tar"), 6))) is None
    assert len(server.asked("404.tar")) == 1


def test_a_shard_may_be_resumed_more_often_the_more_of_it_came(server, monkeypatch):
    """As one of many that are read at once, whose server does not wait for a slow reader."""
    monkeypatch.setattr(tar_reading, "MAX_RESUMES", 0)
    monkeypatch.setattr(tar_reading, "DOWNLOAD_BYTES", 1024)
    assert read(server.url("cut.tar")) == (IMAGES, [])
    images, reasons = read(server.url("404.tar"))
    assert (images, len(reasons)) == ([], 1)


def test_a_store_that_is_down_is_left_alone_from_the_middle_of_shards_too(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", (20, 20, 20, 20))
    write_shards(tmp_path / "val", (4,))
    index_shards(str(tmp_path / "shards"), tmp_path / "index")
    opened: list[str] = []
    monkeypatch.setattr(tar_reading._Download, "_open", failing(opened))
    source = WebDatasetSource(
        "http://nowhere.invalid/{000..003}.tar",
        size=16,
        batch_size=2,
        val_shards=str(tmp_path / "val"),
        index=tmp_path / "index" / "index.json",
        shuffle=10,
    )
    with pytest.raises(ValueError, match="none of"):
        next(source.stream(0, 0, LoaderProcess(1, 2)))
    assert len(opened) < 20


def test_pauses_double_until_they_would_end_after_a_minute(monkeypatch, caplog):
    """1 + 2 + 4 + 8 + 16 are 31 s, and 32 more are too many; a line before the fourth."""
    clock = Clock()
    opened: list[str] = []
    monkeypatch.setattr(tar_reading, "time", clock)
    monkeypatch.setattr(tar_reading, "PAUSE_S", 1.0)
    monkeypatch.setattr(tar_reading, "RETRY_S", 60.0)
    monkeypatch.setattr(tar_reading._Download, "_open", failing(opened))
    with pytest.raises(OSError, match="down"):
        open_url("http://paused.invalid/0.tar").read(1)
    assert (clock.now, len(opened)) == (31.0, 6)
    (line,) = caplog.messages
    assert line.endswith("trying again, for 7 s so far (60 s at most)")


def failing(opened: list[str]) -> Any:
    def fail(self: Any) -> None:
        opened.append(self._url)
        raise ConnectionRefusedError("down")

    return fail
