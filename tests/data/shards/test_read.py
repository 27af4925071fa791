import gzip
import http.server
import json
import random
import re
import resource
import tarfile
import threading
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olvae.data.read_errors import ReadError
from olvae.data.shards import tar_reading as opening
from olvae.data.shards.index import count_images, find_shards, with_counts
from olvae.data.shards.tar_reading import Entry, Shard, read_shard
from olvae.data.shards.webdataset import WebDatasetSource
from tests.data.images import encoded, write_shard, write_shards, write_tar


def read(path: Path | str, image_key: str | None = None) -> tuple[list[Entry], list[ReadError]]:
    items = list(read_shard(Shard(str(path)), image_key))
    return [i for i in items if isinstance(i, Entry)], [i for i in items if isinstance(i, ReadError)]


def test_images_with_their_sidecars_in_order(tmp_path):
    entries, errors = read(write_shard(tmp_path / "a.tar", range(5)))
    assert [entry.key for entry in entries] == [f"a/{n:04d}" for n in range(5)]
    assert [entry.data for entry in entries] == [encoded(n) for n in range(5)]
    assert [json.loads(entry.files["json"]) for entry in entries] == [{"n": n} for n in range(5)]
    assert not errors


def test_samples_without_an_image_are_left_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("1.txt", b"a"), ("2.txt", b"b"), ("2.png", encoded(2, "PNG"))])
    assert [entry.key for entry in read(path)[0]] == ["a/2"]
    assert count_images(path) == 1


def test_the_image_can_be_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("1.mask.png", b"m"), ("1.input.jpg", b"i"), ("2.mask.png", b"m")])
    assert [(e.key, e.data) for e in read(path, "input.jpg")[0]] == [("a/1", b"i")]
    assert count_images(path, "input.jpg") == 1
    assert count_images(path) == 0  # neither extension is an image's alone


def test_compressed_shards(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(3))
    zipped = tmp_path / "b.tar.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    entries, errors = read(zipped)
    assert len(entries) == count_images(zipped) == 3
    assert not errors
    zipped.write_bytes(zipped.read_bytes()[:-100])
    entries, errors = read(zipped)
    assert len(entries) in (2, 3)
    assert len(errors) == 1


def test_a_shard_cut_anywhere_gives_what_is_whole_before_the_cut(tmp_path):
    """1,000 random places: never an exception, never a good image lost, and always said."""
    whole = write_shard(tmp_path / "whole.tar", range(6)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = [m.offset_data + m.size for m in archive if m.name.endswith(".jpg")]
    cut = tmp_path / "cut.tar"
    shard_end = whole.rstrip(b"\0").__len__()
    rng = random.Random(0)
    for place in [0, 1, 511, 512, 513, *(rng.randrange(len(whole)) for _ in range(995))]:
        cut.write_bytes(whole[:place])
        entries, errors = read(cut)
        assert [entry.data for entry in entries] == [encoded(n) for n in range(sum(end <= place for end in ends))]
        assert errors or place > shard_end
        assert (count_images(cut) or 0) <= len(entries) + 1  # one whose header is there


def test_damage_in_the_middle_keeps_what_came_before_and_is_said(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(6))
    with tarfile.open(path) as archive:
        third = [m for m in archive if m.name.endswith(".jpg")][3]
    data = bytearray(path.read_bytes())
    data[third.offset : third.offset + 512] = bytes(range(256)) * 2
    path.write_bytes(data)
    entries, errors = read(path)
    assert [entry.key for entry in entries] == ["a/0000", "a/0001", "a/0002"]
    assert [error.name for error in errors] == [str(path)]


def test_an_empty_shard_among_others_and_a_broken_one(tmp_path, caplog):
    """One without images is said, and has none; one that can't be read has as many as the others have on average."""
    paths = [str(path) for path in write_shards(tmp_path / "s", [3, 5, 1, 1])]
    Path(paths[2]).write_bytes(bytes(10240))
    Path(paths[3]).write_bytes(b"no tar file" * 100)
    assert [shard.images for shard in with_counts(paths)] == [3, 5, 0, 3]
    (line,) = caplog.messages
    assert line.startswith(f"skipped {paths[2]}: a shard without images: no file in it is with an extension of .jpg")


@pytest.mark.parametrize("content", [b"", b"no tar file" * 100, bytes(3000)])
def test_what_is_no_shard(content, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    entries, errors = read(path)
    assert not entries
    assert len(errors) == (0 if content == bytes(3000) else 1)  # zeros are an empty archive
    with pytest.raises(ValueError, match=r"a\.tar: a shard without images"):
        with_counts([str(path)])


def test_a_missing_shard_and_a_failing_command():
    assert read("/nowhere/a.tar")[1] == [ReadError("/nowhere/a.tar", "no such file")]
    entries, (error,) = read("pipe:false")
    assert not entries
    assert error.lost


def test_a_connection_that_drops_keeps_what_came(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(6))
    url = f"pipe:head -c 9000 {path}; exit 56"
    entries, (error,) = read(url)
    assert [entry.data for entry in entries] == [encoded(n) for n in range(len(entries))]
    assert len(entries) >= 2
    assert error.name == url


@pytest.fixture
def server(tmp_path):
    """Answers /NNN.tar with that status, others with files of tmp_path, except these, which promise six images.

    /short.tar ends in the middle; /back.tar stalls there, and sends the rest when it is asked for that; /dead.tar
    stalls then, too.
    """
    data = write_shard(tmp_path / "short.tar", range(6)).read_bytes()
    half, closing = len(data) // 2, threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
            if self.path[1:4].isdigit():
                self.send_error(int(self.path[1:4]))
            elif self.path == "/short.tar":
                self.send(200, 0, data[:half])
            elif self.path in ("/back.tar", "/dead.tar"):
                rest = b"" if self.path == "/dead.tar" else data[asked:]
                self.send(206 if asked else 200, asked, rest if asked else data[:half])
                if not (asked and rest):
                    closing.wait(60)
            else:
                super().do_GET()

        def send(self, status: int, place: int, content: bytes) -> None:
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {place}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - place))
            self.end_headers()
            self.wfile.write(content)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        closing.set()
        server.shutdown()


@pytest.fixture
def stalls_soon(monkeypatch):
    """A download that is slower than 1 GB/s for a second has stalled, rather than one of 1 B/s for a minute."""
    monkeypatch.setattr(opening, "CURL", (*opening.CURL[:-1], str(10**9)))
    monkeypatch.setattr(opening, "STALL_S", 1)


def test_a_download_that_stalls_goes_on_after_the_last_byte(server, stalls_soon):
    entries, errors = read(f"{server}/back.tar")
    assert [entry.data for entry in entries] == [encoded(n) for n in range(6)]
    assert not errors


def test_a_download_that_stalls_is_left_at_once(server):
    stream = opening.open_url(f"{server}/dead.tar")
    assert len(stream.read(100)) == 100
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 10


def test_a_shard_on_the_hub_comes_with_the_same_limits(server, stalls_soon, monkeypatch):
    file = SimpleNamespace(repo_id="a/b", path_in_repo="back.tar", repo_type="dataset", revision="main")
    monkeypatch.setattr("huggingface_hub.HfFileSystem.resolve_path", lambda self, url: file)
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda repo, name, **_: f"{server}/{name}")
    entries, errors = read("hf://datasets/a/b/back.tar")
    assert [entry.data for entry in entries] == [encoded(n) for n in range(6)]
    assert not errors


def test_the_loader_counts_a_shard_whose_server_stalls_as_unreadable(server, stalls_soon, tmp_path):
    """Its images before that are kept; the others of its epoch come all the same."""
    write_shards(tmp_path / "s", [6, 6, 6])
    urls = [f"{server}/{name}.tar" for name in ("s/000", "dead", "s/001", "s/002")]
    loader = WebDatasetSource(
        urls, 16, 2, 2, val_shards=str(tmp_path / "s"), max_unreadable=1.0, flip=False
    ).train_loader()
    begun = time.monotonic()
    keys = [key for batch in islice(loader, 11) for key in batch["key"]]
    assert time.monotonic() - begun < 30
    assert {key.partition("/")[0] for key in keys} == {"000", "001", "002", "dead"}
    assert {key for key in keys if key.startswith("dead")} == {f"dead/{n:04d}" for n in range(4)}
    assert loader.read_errors.unreadable.reasons == {
        f"{server}/dead.tar": "curl failed with exit status 28: nothing came in time"
    }


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("404.tar", "22: the server answers with an HTTP error, 400 or above"),
        ("500.tar", "22: the server answers with an HTTP error, 400 or above"),
        ("short.tar", "33: it stopped in the middle, and the server can't send the rest alone"),
    ],
)
def test_an_error_says_what_happened_to_a_connection(server, monkeypatch, path, reason):
    monkeypatch.setattr(opening, "RETRIES", ("--retry", "1", "--retry-delay", "1"))
    entries, (error,) = read(f"{server}/{path}")
    assert len(entries) == (4 if path == "short.tar" else 0)
    assert error.lost
    assert error.reason == f"curl failed with exit status {reason}"


def test_shards_and_their_index_over_http(server, tmp_path):
    write_shards(tmp_path / "s", [3, 5])
    urls = find_shards(f"{server}/s/{{000..001}}.tar")
    entries = [entry for url in urls for entry in read(url)[0]]
    assert [entry.data for entry in entries] == [encoded(n) for n in range(8)]
    assert entries[3].key == "001/0003"
    (tmp_path / "s" / "index.json").write_text(json.dumps({"shards": {f"00{i}.tar": {"images": 4} for i in (0, 1)}}))
    assert [shard.images for shard in with_counts(urls, f"{server}/s/index.json")] == [4, 4]
    assert [shard.images for shard in with_counts(urls)] == [None, None]


def test_nobody_listens():
    (error,) = read("http://127.0.0.1:1/a.tar")[1]
    assert error.reason == "curl failed with exit status 7: no connection"


def test_an_error_says_what_happened_to_a_command(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", range(6))
    for command, reason in {
        "false": "the command failed with exit status 1",
        f"head -c 9000 {path}; exit 56": "the command failed with exit status 56",
        "kill -9 $$": "the command was ended by SIGKILL",
    }.items():
        assert [error.reason for error in read(f"pipe:{command}")[1]] == [reason]
    assert read(f"pipe:cat {path}; head -c 1000000 /dev/zero")[1] == []  # is left when the archive has ended
    monkeypatch.setenv("PATH", str(tmp_path))
    for url, command in {"http://a/0.tar": "curl", "s3://a/0.tar": "aws", "gs://a/0.tar": "gsutil"}.items():
        (error,) = read(url)[1]
        assert error.reason == f"it needs the command {command}, which is not installed"


def test_a_command_that_is_left_at_damage_is_not_blamed(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(6))
    damaged = bytearray(path.read_bytes())
    damaged[512 * 8 : 512 * 60] = b"x" * 512 * 52
    path.write_bytes(damaged)
    (error,) = read(f"pipe:for i in 1 2 3 4 5 6 7 8 9; do cat {path} {path} {path} || exit 1; done")[1]
    assert "exit status" not in error.reason


def test_an_index_that_cannot_be_read_says_why(server):
    with pytest.raises(ValueError, match=r"index\.json: not a readable index of shards: curl failed .*22"):
        with_counts(["http://a/0.tar"], f"{server}/404/index.json")


def test_pipes_are_shards_and_may_be_left_early(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(40))
    items = read_shard(Shard(f"pipe:cat {path}"))
    assert isinstance(next(items), Entry)
    items.close()


def test_ways_to_name_shards(tmp_path, monkeypatch):
    paths = [str(path) for path in write_shards(tmp_path / "s", [1, 1, 1])]
    (tmp_path / "s" / "notes.txt").write_text("")
    folder = str(tmp_path / "s")
    assert find_shards(folder) == paths
    assert find_shards(f"{folder}/{{000..002}}.tar") == paths
    assert find_shards(f"{folder}/*.tar") == paths
    assert find_shards([f"{folder}/000.tar", f"{folder}/00{{1,2}}.tar"]) == paths
    assert find_shards("http://a/{00..01}.tar") == ["http://a/00.tar", "http://a/01.tar"]
    assert find_shards("pipe:cat {1..2}.tar") == ["pipe:cat 1.tar", "pipe:cat 2.tar"]
    assert find_shards(f"{folder}/00{{2..4}}.tar")[1:] == [f"{folder}/003.tar", f"{folder}/004.tar"]  # missing ones
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_shards("~/s") == paths
    for nothing in (str(tmp_path), f"{folder}/x*.tar", f"{folder}/{{7..9}}.tar", []):
        with pytest.raises(FileNotFoundError, match="no shards"):
            find_shards(nothing)


def test_counts_from_an_index_or_by_counting(tmp_path):
    paths = [str(path) for path in write_shards(tmp_path / "s", [3, 5])]
    assert [shard.images for shard in with_counts(paths)] == [3, 5]
    missing = str(tmp_path / "s" / "002.tar")
    assert [shard.images for shard in with_counts([*paths, missing])] == [3, 5, 4]  # as many as the others have
    assert with_counts(["http://a/0.tar"])[0].images is None
    index = tmp_path / "s" / "index.json"
    index.write_text(json.dumps({"shards": {"000.tar": {"images": 30}, "001.tar": {"images": 50}}}))
    assert [shard.images for shard in with_counts(paths)] == [30, 50]  # believed
    assert with_counts(["http://a/000.tar"], str(index))[0].images == 30
    with pytest.raises(ValueError, match=r"does not list .*002\.tar"):
        with_counts([missing], str(index))
    index.write_text("{")
    with pytest.raises(ValueError, match="not a readable index"):
        with_counts(paths)


@pytest.mark.parametrize(
    "url",
    [
        "https://a.b/c/000.tar",
        "https://a.b/c/000.tar?X-Signature=abc&name=x",
        "pipe:aws s3 cp s3://bucket/c/000.tar -",
        "pipe:curl -s 'https://a.b/000.tar'",
        "pipe:cat /x.tar/000.tar | cat",
        "pipe:hadoop fs -cat hdfs:///d/000.tar",
    ],
)
def test_an_index_knows_shards_whatever_brings_them(tmp_path, url):
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"shards": {"000.tar": {"images": 30}}}))
    (shard,) = with_counts([url], str(index))
    assert shard.images == 30
    assert shard.name == "000"


def test_a_local_shard_may_have_any_name():
    assert Shard("a b/my photos.v2.tar").name == "my photos"
    assert Shard("pipe:make-images").name == "pipe:make-images"


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        (["a.1.tar", "a.2.tar.gz", "b.3.tar"], ["a.1", "a.2", "b"]),
        (["a.1.tar", "b.2.tar", "b.2.tar"], ["a", "b", "b"]),
        (["http://h/0.tar?s=1", "http://h/1.tar?s=2"], ["0", "1"]),
    ],
)
def test_shards_have_the_shortest_names_that_tell_them_apart(tmp_path, urls, names):
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"shards": {Path(u.partition("?")[0]).name: {"images": 1} for u in urls}}))
    assert [shard.name for shard in with_counts(urls, str(index))] == names


@pytest.mark.parametrize(
    "urls",
    [
        ["a/000.tar", "b/001.tar", "b/000.tar"],
        ["x/a/0.tar", "x/b/0.tar.gz"],
        ["http://h/a/0.tar?s=1", "http://h/b/0.tar?s=2"],
        ["pipe:cat /a/0.tar", "pipe:cat /b/0.tar"],
        ["../0.tar", "0.tar"],
    ],
)
def test_shards_of_one_name_are_refused(urls):
    message = rf"{re.escape(urls[0])} and {re.escape(urls[-1])}: shards of the same name.*: rename one of them, .*Mix"
    with pytest.raises(ValueError, match=message):
        with_counts(urls)


def test_images_alone_are_the_same_images(tmp_path):
    path = str(write_shard(tmp_path / "a.tar", range(5)))
    alone = [entry for entry in read_shard(Shard(path), sidecars=False) if isinstance(entry, Entry)]
    assert [(e.key, e.name, e.data) for e in alone] == [(e.key, e.name, e.data) for e in read(path)[0]]
    assert all(entry.files == {} for entry in alone)


def zeros(path: Path, gib: float, name: str = "0000.jpg") -> Path:
    """A shard of an image, then a file that unpacks to so many GiB of zeros."""
    member = tarfile.TarInfo(name)
    member.size = round(gib * 2**30)
    with gzip.open(path, "wb", compresslevel=1) as packed:
        packed.write(write_tar(path.with_name("before.tar"), [("before.jpg", encoded(0))]).read_bytes().rstrip(b"\0"))
        packed.write(bytes(-packed.tell() % 512) + member.tobuf())
        for _ in range(round(gib * 1024)):
            packed.write(bytes(2**20))
    return path


def test_a_shard_that_unpacks_to_much_more_than_its_size_ends_there(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("0000.jpg", "0000.txt"):
        path = zeros(tmp_path / "a.tar.gz", 0.1, name)
        (entry,), (error,) = read(path)
        assert entry.key == "a/before"
        assert "decompression bomb" in error.reason
        assert count_images(path) <= 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # in KiB


def test_a_file_of_a_shard_that_says_it_is_huge_is_not_read(tmp_path):
    image = encoded(0)
    first = tarfile.TarInfo("a.jpg")
    first.size = len(image)
    for kind, reason in ((tarfile.REGTYPE, "larger than 1 GiB"), (tarfile.GNUTYPE_SPARSE, "a sparse file")):
        huge = tarfile.TarInfo("b.jpg")
        huge.size, huge.type = 2**33, kind
        path = tmp_path / "a.tar"
        path.write_bytes(first.tobuf() + image + bytes(-len(image) % 512) + huge.tobuf() + bytes(1024))
        (entry,), (error,) = read(path)
        assert entry.key == "a/a"
        assert f"b.jpg: {reason}" in error.reason


def test_the_files_of_a_sample_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "LARGEST", 3000)
    files = [("a.jpg", bytes(2000)), ("a.json", bytes(900)), ("b.jpg", bytes(2000)), ("b.json", bytes(1001))]
    entries, (error,) = read(write_tar(tmp_path / "a.tar", files))
    assert [entry.key for entry in entries] == ["a/a", "a/b"]
    assert list(entries[1].files) == []
    assert "b.json: larger" in error.reason
