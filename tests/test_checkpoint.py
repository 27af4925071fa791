import pickle
import resource
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from olvae.checkpoint import load_weights, read_checkpoint, read_weights
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


def test_code_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "x": Harmful()}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Harmful()))
    for file in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            read_checkpoint(tmp_path / file)
    assert "code ran" not in capsys.readouterr().out


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


def saved(path, tensor: torch.Tensor, old: bool, change=lambda content: content):
    """A file of one tensor whose pickle was changed, in either of torch's formats."""
    torch.save({"encoder.a": tensor}, path, _use_new_zipfile_serialization=not old)
    if old:
        path.write_bytes(change(path.read_bytes()))
        return path
    with zipfile.ZipFile(path) as file:
        (name,) = (name for name in file.namelist() if name.endswith("data.pkl"))
        storage = file.read(name.replace("data.pkl", "data/0"))
        return archive(path, change(file.read(name)), **{"a/data/0": storage})


@pytest.mark.parametrize("old", [False, True])
def test_what_says_to_be_larger_than_the_file_is_refused_before_it_takes_memory(old, tmp_path):
    x = torch.arange(200, dtype=torch.uint8)
    assert torch.equal(read_weights(saved(tmp_path / "whole.ckpt", x, old))["encoder.a"], x)
    many = b"J" + (2**31 - 1).to_bytes(4, "little")
    counted = saved(tmp_path / "counted.ckpt", x, old, lambda content: content.replace(b"K\xc8", many))
    taller = saved(tmp_path / "taller.ckpt", x, old, lambda content: content.replace(b"K\xc8\x85", many + b"\x85"))
    repeated = saved(tmp_path / "repeated.ckpt", x.expand(10**8, 200), old)
    for file in (counted, taller, repeated):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=r"not a readable checkpoint: it says that .* in the file"):
            read_checkpoint(file)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # in KiB


def test_a_pickle_that_allocates_by_number_is_refused(tmp_path):
    hexadecimal = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R."
    calls = (bytearray, 8 * 10**9), (torch.Tensor, 8 * 10**9)
    for content in (hexadecimal, *(pickle.dumps({"a": Reduced(*call)}, protocol=2) for call in calls)):
        with pytest.raises(ValueError, match="holds more than tensors"):
            read_checkpoint(archive(tmp_path / "a.ckpt", content))
        (tmp_path / "b.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match="holds more than tensors"):
            read_checkpoint(tmp_path / "b.ckpt")
    storage = pickle.dumps({"a": Reduced(torch.UntypedStorage, 8 * 10**9)}, protocol=2)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(archive(tmp_path / "a.ckpt", storage))


def test_a_checkpoint_that_unpacks_to_more_than_the_file_is_refused(tmp_path):
    torch.save({"encoder.a": torch.zeros(1000)}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in records.items():
            file.writestr(name, data)
    with pytest.raises(ValueError, match="more than the file, a decompression bomb"):
        read_checkpoint(tmp_path / "packed.ckpt")


def test_a_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    """torch reads it as another number."""
    path = tmp_path / "a.ckpt"
    x = torch.rand(1000)
    torch.save({"encoder.a": x}, path)
    content = bytearray(path.read_bytes())
    content[content.index(x.numpy().tobytes()) + 402] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["encoder.a"], x)
    with pytest.raises(ValueError, match=r"a\.ckpt: not a readable checkpoint: damaged: .*data/0 is not what was wr"):
        read_checkpoint(path)
