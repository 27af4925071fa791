import pickle
import resource
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from olvae.checkpoint import VGG16, load_weights, read_checkpoint, read_weights, read_weights_file, write_tensors
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import tiny_config


def model() -> LiteAutoencoderKL:
    return LiteAutoencoderKL(**tiny_config()["model"]["params"])


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.fixture
def weights():
    return {name: torch.randn_like(t) for name, t in model().state_dict().items()}


def test_every_format_loads(weights, tmp_path):
    extra = {"loss.discriminator.weight": torch.zeros(3), "model_ema.decay": torch.zeros(())}
    torch.save({"state_dict": weights | extra, "epoch": 3}, tmp_path / "lightning.ckpt")
    torch.save(weights, tmp_path / "bare.pt")
    save_file(weights, tmp_path / "model.safetensors")
    for file in ("lightning.ckpt", "bare.pt", "model.safetensors"):
        m = model()
        load_weights(m, read_weights(tmp_path / file), file)
        assert all(torch.equal(t, weights[name]) for name, t in m.state_dict().items())


def test_another_model_is_refused_whole(weights):
    m = model()
    before = {name: t.clone() for name, t in m.state_dict().items()}
    first, second, *_ = weights
    weights["encoder.extra"] = torch.zeros(1)
    weights[second] = torch.zeros(2, 2)
    del weights[first]
    with pytest.raises(
        ValueError, match=r"1 missing .*; 1 unexpected \(encoder\.extra\); 1 of another shape .*2x2 for"
    ):
        load_weights(m, weights, "file.ckpt")
    assert all(torch.equal(before[name], t) for name, t in m.state_dict().items())


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_not_run(tmp_path, capsys, legacy):
    torch.save({"state_dict": {}, "x": Harmful()}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="it is cut off, or another kind of file"):
        read_weights_file(tmp_path / "a.ckpt", VGG16)
    assert "code ran" not in capsys.readouterr().out


def test_files_of_torch_before_1_6_are_refused(tmp_path):
    torch.save({"encoder.a": torch.zeros(3)}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"of torch before 1\.6: load and save it with a newer one"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_broken_files(weights, tmp_path):
    torch.save(weights, tmp_path / "whole.ckpt")
    save_file(weights, tmp_path / "whole.safetensors")
    for name, message in (("ckpt", "not a readable checkpoint"), ("safetensors", "not a readable safetensors")):
        cut = tmp_path / f"cut.{name}"
        cut.write_bytes((tmp_path / f"whole.{name}").read_bytes()[:-1000])
        with pytest.raises(ValueError, match=message):
            read_weights(cut)
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            read_weights(tmp_path / f"missing.{name}")


def test_no_autoencoder_in_it(tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no autoencoder in it"):
        read_weights(tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="but a list"):
        read_weights(tmp_path / "list.ckpt")


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def archive(path, content: bytes, compression=zipfile.ZIP_STORED, **records: bytes):
    """A file as torch.save makes it, of a given pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"a/data.pkl": content, "a/byteorder": b"little", "a/version": b"3\n", **records}.items():
            file.writestr(name, data)
    return path


def saved(path, tensor: torch.Tensor, change=lambda content: content):
    """A file of one tensor whose pickle was changed."""
    torch.save({"encoder.a": tensor}, path)
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if name.endswith("data.pkl"))
        storage = file.read(name.replace("data.pkl", "data/0"))
        return archive(path, change(file.read(name)), **{"a/data/0": storage})


def test_tensors_larger_than_the_file_are_refused_before_they_take_memory(tmp_path):
    x = torch.arange(200, dtype=torch.uint8)
    assert torch.equal(read_weights(saved(tmp_path / "whole.ckpt", x))["encoder.a"], x)
    many = b"J" + (2**31 - 1).to_bytes(4, "little")
    counted = saved(tmp_path / "counted.ckpt", x, lambda content: content.replace(b"K\xc8", many))
    taller = saved(tmp_path / "taller.ckpt", x, lambda content: content.replace(b"K\xc8\x85", many + b"\x85"))
    repeated = saved(tmp_path / "repeated.ckpt", x.expand(10**8, 200))
    for file in (counted, taller, repeated):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match="not a readable checkpoint: "):
            read_checkpoint(file)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # in KiB


CODECS = b"\x80\x02c_codecs\nencode\n"
HEXADECIMAL = CODECS + b"X\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R."
LONG = b"X" + (2**22).to_bytes(4, "little") + b"a" * 2**22
REPEATED = CODECS + b"q\x00" + LONG + b"q\x01" + b"h\x00h\x01\x85R" * 2**12 + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": Reduced(bytearray, 8 * 10**9)}, protocol=2), "objects other than tensors"),
        (pickle.dumps({"a": Reduced(torch.Tensor, 8 * 10**9)}, protocol=2), "objects other than tensors"),
        (HEXADECIMAL, "decompression bomb"),
        (REPEATED, "decompression bomb"),
    ],
    ids=["bytearray", "tensor", "hexadecimal", "repeated"],
)
def test_a_pickle_that_allocates_is_refused(tmp_path, content, message):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"not a readable checkpoint: .*{message}"):
        read_checkpoint(archive(tmp_path / "a.ckpt", content))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17


def test_plain_values_and_other_packages_objects_beside_the_weights(tmp_path):
    """Objects become empty dictionaries; arrays of NumPy hold bytes, and metrics may be named like encodings."""
    values = {"l1": 0.5, "raw": bytes(range(256)), "set": {1, 2}, "complex": 1j, "none": None, "size": torch.Size([3])}
    torch.save({"encoder.a": torch.arange(3), "array": np.arange(3), **values}, tmp_path / "a.ckpt")
    content = read_checkpoint(tmp_path / "a.ckpt")
    assert {name: content[name] for name in values} == values
    assert content["array"] == {}


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"encoder.a": torch.zeros(1000)}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in records.items():
            file.writestr(name, data)
    with pytest.raises(ValueError, match="compressed, a decompression bomb perhaps"):
        read_checkpoint(tmp_path / "packed.ckpt")


def test_a_flipped_bit_is_seen(tmp_path):
    """Of a checkpoint and of a file with a checksum; torch reads it as another number."""
    x = torch.rand(1000)
    torch.save({"encoder.a": x}, tmp_path / "a.ckpt")
    write_tensors(tmp_path / "a.safetensors", {"encoder.a": x}, {"config": "{}"})
    for path, message in (
        (tmp_path / "a.ckpt", r"a\.ckpt: not a readable checkpoint: damaged: .*data/0 is not what was wr"),
        (tmp_path / "a.safetensors", r"a\.safetensors: damaged: its SHA-256 is not the one in its header"),
    ):
        assert torch.equal(read_checkpoint(path)["encoder.a"], x)
        content = bytearray(path.read_bytes())
        content[content.index(x.numpy().tobytes()) + 402] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)
