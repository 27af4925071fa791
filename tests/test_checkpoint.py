"""Weights: loaded into a model, and the checksums of their files."""

import hashlib
import struct

import pytest
import torch

from olvae.checkpoint import load_weights, read_checkpoint, tensors_sum, write_tensors
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import tiny_config


def test_weights_of_another_model_are_refused_whole():
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


def test_weights_are_finite_in_the_dtype_that_they_get():
    model = torch.nn.BatchNorm2d(1)
    before = {**model.state_dict(), "num_batches_tracked": torch.tensor(float("nan"))}
    with pytest.raises(
        ValueError,
        match=r"non-finite values in float32 \(num_batches_tracked",
    ):
        load_weights(model, before, "file.ckpt", prefixes=("",))
    small = torch.nn.Linear(2, 2).to(torch.float8_e4m3fn)
    load_weights(small, torch.nn.Linear(2, 2).state_dict(), "file.ckpt", prefixes=("",))


def test_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    """Of a checkpoint and of a file with a checksum; torch reads it as another number."""
    x = torch.rand(1000)
    torch.save({"encoder.a": x}, tmp_path / "a.ckpt")
    write_tensors(tmp_path / "a.safetensors", {"encoder.a": x}, {"config": "{}"})
    for path, message in (
        (
            tmp_path / "a.ckpt",
            r"a\.ckpt: .* damaged: .*data/0",
        ),
        (
            tmp_path / "a.safetensors",
            r"a\.safetensors: damaged: its SHA-256",
        ),
    ):
        assert torch.equal(read_checkpoint(path)["encoder.a"], x)
        content = bytearray(path.read_bytes())
        content[content.index(x.numpy().tobytes()) + 402] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)


def test_the_checksum_of_tensors_is_the_one_in_encoded_folders():
    """By hand, and as written down: another one would orphan every folder of latents."""
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor([1, -1], dtype=torch.int8)}
    digest = hashlib.sha256(b"[('f', '8')]")
    digest.update(b"a (2,) torch.int8\n" + struct.pack("2b", 1, -1))
    digest.update(b"b (3, 2) torch.float32\n" + struct.pack("<6f", 0, 3, 1, 4, 2, 5))
    assert tensors_sum(tensors, {"f": "8"}) == digest.hexdigest()
    assert (
        tensors_sum(tensors) == "b11e22fd33e1f8de98f929a36c638038ce7eafb29ceb711d0ca7e1e8e3f727dd"
    )
