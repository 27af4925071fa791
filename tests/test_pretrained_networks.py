"""Published files of weights: found, downloaded, refused."""

import hashlib
import http.server
import socket
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from olvae.modules.frozen import LITE0, installed_lite0
from olvae.pretrained_networks import (
    ALEXNET,
    DINOV2,
    INCEPTION,
    VGG16,
    VGG19,
    MissingWeights,
    WeightsFile,
    find_weights,
    provenance,
    read_weights_file,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("OLVAE_WEIGHTS", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def published(tmp_path):
    """A file, and a server on this machine that publishes it."""
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save({"a": torch.arange(3.0)}, folder / "net.pth")
    digest = hashlib.sha256((folder / "net.pth").read_bytes()).hexdigest()
    (folder / "net.pth").rename(folder / f"net-{digest[:8]}.pth")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    url = f"http://127.0.0.1:{server.server_port}/net-{digest[:8]}.pth"
    yield WeightsFile("a net", url, digest)
    server.shutdown()
    server.server_close()


def test_weights_are_searched_in_the_order_of_places(tmp_path, cache, monkeypatch):
    named, variable = tmp_path / "named", tmp_path / "variable"
    for folder in (named, variable, cache):
        folder.mkdir(parents=True)
        (folder / VGG16.name).touch()
    monkeypatch.setenv("OLVAE_WEIGHTS", str(variable))
    assert find_weights(VGG16, named) == named / VGG16.name
    assert find_weights(VGG16) == variable / VGG16.name
    (named / VGG16.name).unlink()
    assert find_weights(VGG16, named) == variable / VGG16.name
    monkeypatch.delenv("OLVAE_WEIGHTS")
    assert find_weights(VGG16, named) == cache / VGG16.name
    with pytest.raises(NotADirectoryError, match="elsewhere: "):
        find_weights(VGG16, tmp_path / "elsewhere")
    # torch-fidelity's name of the file.
    (named / "weights-inception-2015-12-05-6726825d.pth").touch()
    assert find_weights(INCEPTION, named).name.startswith("weights-inception")


def test_weights_are_downloaded_into_the_cache(cache, published):
    path = find_weights(published)
    assert path == cache / published.name
    assert torch.equal(read_weights_file(path, published)["a"], torch.arange(3.0))
    assert provenance(path, published)["published"] is True
    path.unlink()
    # All digits count, not only the eight that are in the name.
    last = "1" if published.sha256.endswith("0") else "0"
    other = replace(published, sha256=published.sha256[:-1] + last)
    with pytest.raises(MissingWeights, match="invalid hash"):
        find_weights(other)
    assert not list(cache.iterdir())  # a download of something else is not kept
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(MissingWeights, match="be downloaded"):
        find_weights(published)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf"])
def test_download_from_a_stalled_server_times_out(cache, monkeypatch, sent):
    """Before its answer, and in the middle of the file."""
    monkeypatch.setattr("olvae.pretrained_networks.SILENCE_S", 0.2)
    given_up = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(sent)
                given_up.wait(30)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        start = time.monotonic()
        with pytest.raises(MissingWeights, match="timed out"):
            find_weights(
                WeightsFile("a net", f"http://127.0.0.1:{server.getsockname()[1]}/net.pth", "0")
            )
        assert time.monotonic() - start < 4
        given_up.set()
        thread.join()
    assert socket.getdefaulttimeout() is None
    assert not list(cache.iterdir())


def test_missing_weights_without_network_say_what_to_put_where(tmp_path, cache, monkeypatch):
    def unresolved(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setenv("OLVAE_WEIGHTS", str(tmp_path / "variable"))
    with pytest.raises(MissingWeights) as error:
        find_weights(INCEPTION, tmp_path)
    text = str(error.value)
    assert "\n" not in text
    for part in (
        INCEPTION.name,
        INCEPTION.url,
        str(cache),
        str(tmp_path / "variable"),
        "`weights_dir`",
        "not known",
    ):
        assert part in text


def test_weights_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / VGG16.name
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>404</html>", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"VGG16 weights: .*cut off") as error:
            read_weights_file(path, VGG16)
        assert "\n" not in str(error.value)
    for other in ([torch.zeros(3)], {"a": 3}, {0: torch.zeros(3)}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="than tensors"):
            read_weights_file(path, VGG16)
    torch.save({"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="a has non-finite"):
        read_weights_file(path, VGG16)
    assert list(read_weights_file(path, VGG16, "b")) == ["b"]


@pytest.mark.parametrize("file", [ALEXNET, DINOV2, INCEPTION, VGG16, VGG19])
def test_published_sums_are_whole(file):
    """Their first eight digits are in the names that the publishers gave the files."""
    assert len(bytes.fromhex(file.sha256)) == 32
    assert file is DINOV2 or f"-{file.sha256[:8]}." in file.name


def test_lite0_of_pypi_is_the_published_file():
    assert provenance(installed_lite0(), LITE0)["published"] is True


def test_provenance_notices_another_file(tmp_path):
    path = tmp_path / "net-ba7816bf.pth"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    file = WeightsFile("x", path.name, digest)
    assert provenance(path, file) == {"file": path.name, "sha256": digest, "published": True}
    other = replace(file, sha256=digest[:8] + "0" * 56)
    assert provenance(path, other)["published"] is False
    path.write_bytes(b"abcd")
    assert provenance(path, file)["published"] is False
