"""Files of weights: written, read back, refused; published ones found and downloaded."""

import hashlib
import http.server
import pickle
import resource
import socket
import threading
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch

from olvae.checkpoint import load_weights, read_checkpoint, read_weights, write_tensors
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.pretrained_networks import (
    INCEPTION,
    VGG16,
    MissingWeights,
    WeightsFile,
    find_weights,
    provenance,
    read_weights_file,
)
from tests.conftest import tiny_config


def test_another_model_is_refused_whole():
    model = LiteAutoencoderKL(**tiny_config()["model"]["params"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    weights = {name: torch.randn_like(t) for name, t in before.items()}
    first, second, *_ = weights
    weights["encoder.extra"] = torch.zeros(1)
    weights[second] = torch.zeros(2, 2)
    del weights[first]
    message = r"1 missing .*; 1 unexpected \(encoder\.extra\); 1 of another shape .*2x2 for"
    with pytest.raises(ValueError, match=message):
        load_weights(model, weights, "file.ckpt")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_values_are_finite_in_the_dtype_that_they_get():
    model = torch.nn.BatchNorm2d(1)
    before = {**model.state_dict(), "num_batches_tracked": torch.tensor(float("nan"))}
    with pytest.raises(
        ValueError,
        match=r"1 of its tensors have non-finite values in float32 \(num_batches_tracked",
    ):
        load_weights(model, before, "file.ckpt", prefixes=("",))
    small = torch.nn.Linear(2, 2).to(torch.float8_e4m3fn)
    load_weights(small, torch.nn.Linear(2, 2).state_dict(), "file.ckpt", prefixes=("",))


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_not_run(tmp_path, capsys, legacy):
    content = {"state_dict": {}, "x": Reduced(print, "code ran")}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(
        (tmp_path / "a.ckpt").read_bytes()[:-500] if legacy else pickle.dumps(content)
    )
    with pytest.raises(ValueError, match=r"cut off, of another kind, or of torch before 1\.6"):
        read_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="it is cut off, or another kind of file"):
        read_weights_file(tmp_path / "a.ckpt", VGG16)
    assert "code ran" not in capsys.readouterr().out


def test_files_of_torch_before_1_6_are_refused_unless_they_are_published(tmp_path):
    """As torchvision's VGG16 and VGG19 are."""
    path = tmp_path / VGG16.name
    torch.save({"encoder.a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"of torch before 1\.6: load and save it with a newer one"
    ):
        read_checkpoint(path)
    assert torch.equal(read_weights_file(path, VGG16)["encoder.a"], torch.arange(3.0))


def archive(path, content: bytes, compression=zipfile.ZIP_STORED, **records: bytes):
    """A file as torch.save makes it, of a given pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {
            "a/data.pkl": content,
            "a/byteorder": b"little",
            "a/version": b"3\n",
            **records,
        }.items():
            file.writestr(name, data)
    return path


def saved(path, tensor: torch.Tensor, change=lambda content: content):
    """A file of one tensor whose pickle was changed."""
    torch.save({"encoder.a": tensor}, path)
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if name.endswith("data.pkl"))
        storage = file.read(name.replace("data.pkl", "data/0"))
        return archive(path, change(file.read(name)), **{"a/data/0": storage})


def refused(path, message: str) -> None:
    """In a line, and without taking memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"not a readable checkpoint: .*{message}"):
        read_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # in KiB


def test_tensors_larger_than_the_file_are_refused(tmp_path):
    x = torch.arange(200, dtype=torch.uint8)
    assert torch.equal(read_weights(saved(tmp_path / "whole.ckpt", x))["encoder.a"], x)
    many = b"J" + (2**31 - 1).to_bytes(4, "little")
    refused(
        saved(tmp_path / "counted.ckpt", x, lambda content: content.replace(b"K\xc8", many)), ""
    )
    refused(
        saved(
            tmp_path / "taller.ckpt",
            x,
            lambda content: content.replace(b"K\xc8\x85", many + b"\x85"),
        ),
        "",
    )
    refused(saved(tmp_path / "repeated.ckpt", x.expand(10**8, 200)), "")


CODECS = b"\x80\x02c_codecs\nencode\n"
HEXADECIMAL = CODECS + b"X\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R."
LONG = b"X" + (2**22).to_bytes(4, "little") + b"a" * 2**22
REPEATED = CODECS + b"q\x00" + LONG + b"q\x01" + b"h\x00h\x01\x85R" * 2**12 + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            pickle.dumps({"a": Reduced(bytearray, 8 * 10**9)}, protocol=2),
            "objects other than tensors",
        ),
        (
            pickle.dumps({"a": Reduced(torch.Tensor, 8 * 10**9)}, protocol=2),
            "objects other than tensors",
        ),
        (HEXADECIMAL, "decompression bomb"),
        (REPEATED, "decompression bomb"),
    ],
    ids=["bytearray", "tensor", "hexadecimal", "repeated"],
)
def test_a_pickle_that_allocates_is_refused(tmp_path, content, message):
    refused(archive(tmp_path / "a.ckpt", content), message)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    refused(
        archive(tmp_path / "a.ckpt", pickle.dumps({}), zipfile.ZIP_DEFLATED),
        "a decompression bomb perhaps",
    )


def test_plain_values_and_other_packages_objects_beside_the_weights(tmp_path):
    """Objects become empty dictionaries; arrays of NumPy hold bytes, and metrics may be named like encodings."""
    values = {
        "l1": 0.5,
        "raw": bytes(range(256)),
        "set": {1, 2},
        "complex": 1j,
        "none": None,
        "size": torch.Size([3]),
    }
    torch.save({"encoder.a": torch.arange(3), "array": np.arange(3), **values}, tmp_path / "a.ckpt")
    content = read_checkpoint(tmp_path / "a.ckpt")
    assert {name: content[name] for name in values} == values
    assert content["array"] == {}


def test_a_flipped_bit_is_seen(tmp_path):
    """Of a checkpoint and of a file with a checksum; torch reads it as another number."""
    x = torch.rand(1000)
    torch.save({"encoder.a": x}, tmp_path / "a.ckpt")
    write_tensors(tmp_path / "a.safetensors", {"encoder.a": x}, {"config": "{}"})
    for path, message in (
        (
            tmp_path / "a.ckpt",
            r"a\.ckpt: not a readable checkpoint: damaged: .*data/0 is not what was wr",
        ),
        (
            tmp_path / "a.safetensors",
            r"a\.safetensors: damaged: its SHA-256 is not the one in its header",
        ),
    ):
        assert torch.equal(read_checkpoint(path)["encoder.a"], x)
        content = bytearray(path.read_bytes())
        content[content.index(x.numpy().tobytes()) + 402] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)


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
    yield WeightsFile("a net", f"http://127.0.0.1:{server.server_port}/net-{digest[:8]}.pth")
    server.shutdown()
    server.server_close()


def test_the_order_of_places(tmp_path, cache, monkeypatch):
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
    with pytest.raises(NotADirectoryError, match=r"elsewhere: no such folder"):
        find_weights(VGG16, tmp_path / "elsewhere")
    (
        named / "weights-inception-2015-12-05-6726825d.pth"
    ).touch()  # torch-fidelity's name of the file
    assert find_weights(INCEPTION, named).name.startswith("weights-inception")


def test_downloads_into_the_cache(cache, published, monkeypatch):
    path = find_weights(published)
    assert path == cache / published.name
    assert torch.equal(read_weights_file(path, published)["a"], torch.arange(3.0))
    assert provenance(path, published)["published"] is True
    path.unlink()
    monkeypatch.setattr(WeightsFile, "sha256", "00000000")
    with pytest.raises(MissingWeights, match="invalid hash value"):
        find_weights(published)
    assert not list(cache.iterdir())  # a download of something else is not kept
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(MissingWeights, match="could not be downloaded"):
        find_weights(published)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf"])
def test_a_server_that_stalls(cache, monkeypatch, sent):
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
                WeightsFile("a net", f"http://127.0.0.1:{server.getsockname()[1]}/net.pth")
            )
        assert time.monotonic() - start < 4
        given_up.set()
        thread.join()
    assert socket.getdefaulttimeout() is None
    assert not list(cache.iterdir())


def test_no_network_says_what_to_put_where(tmp_path, cache, monkeypatch):
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


def test_files_of_something_else(tmp_path):
    path = tmp_path / VGG16.name
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>404</html>", b""):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="is not a file of VGG16 weights: it is cut off"
        ) as error:
            read_weights_file(path, VGG16)
        assert "\n" not in str(error.value)
    for other in ([torch.zeros(3)], {"a": 3}, {0: torch.zeros(3)}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="holds more than tensors"):
            read_weights_file(path, VGG16)
    torch.save({"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="a has non-finite values"):
        read_weights_file(path, VGG16)
    assert list(read_weights_file(path, VGG16, "b")) == ["b"]


def test_provenance_notices_another_file(tmp_path):
    path = tmp_path / "net-ba7816bf.pth"
    path.write_bytes(b"abc")
    file = WeightsFile("x", path.name)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert provenance(path, file) == {"file": path.name, "sha256": digest, "published": True}
    path.write_bytes(b"abcd")
    assert provenance(path, file)["published"] is False
