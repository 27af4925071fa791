"""Weights: loaded into a model, and the checksums of their files."""

import hashlib
import json
import struct
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from olvae import checkpoint
from olvae.checkpoint import (
    add_sums,
    check_file,
    header_of,
    load_weights,
    mismatches,
    read_checkpoint,
    read_weights,
    state_dict_of,
    tensors_sum,
    write_tensors,
)
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


ONE, TWO, THREE = torch.ones(1), torch.full((1,), 2.0), torch.full((1,), 3.0)


@pytest.mark.parametrize(
    ("content", "averaged", "trained"),
    [
        ({"a": ONE, "n": 3, 4: ONE}, {"a": ONE}, {"a": ONE}),
        ({"state_dict": {"a": ONE}, "b": TWO}, {"a": ONE}, {"a": ONE}),
        ({"model": {"a": ONE}, "b": TWO}, {"a": ONE}, {"a": ONE}),
        ({"model": ONE, "b": TWO}, {"model": ONE, "b": TWO}, {"model": ONE, "b": TWO}),
        (
            {"state_dict": {"a": ONE, "b": TWO}, "current_model_state": {"a": THREE}},
            {"a": ONE, "b": TWO},
            {"a": THREE, "b": TWO},
        ),
        (
            {"state_dict": {"a.b": ONE, "c": TWO, "model_ema.ab": THREE}},
            {"a.b": THREE, "c": TWO, "model_ema.ab": THREE},
            {"a.b": ONE, "c": TWO, "model_ema.ab": THREE},
        ),
    ],
)
def test_weights_of_a_checkpoint_are_the_averaged_or_those_as_trained(content, averaged, trained):
    """Of ours, Lightning's and the latent-diffusion code's averages."""
    assert state_dict_of(content, "x") == averaged
    assert state_dict_of(content, "x", raw=True) == trained


@pytest.mark.parametrize("raw", [False, True])
def test_a_checkpoint_whose_parts_are_no_mappings_is_refused(raw):
    wrong = "current_model_state" if raw else "state_dict"
    content = {"state_dict": {"a": ONE}, wrong: [1]}
    with pytest.raises(ValueError, match=rf"file\.ckpt: .*{wrong} .*list"):
        state_dict_of(content, "file.ckpt", raw)


def test_an_autoencoders_weights_are_read_without_the_rest(tmp_path):
    """Under the names of another project's files too; of a file without any, by its path."""
    state = {"encoder.a": ONE, "olvae.decoder.b": TWO, "quantizer.c": THREE, "loss.d": ONE}
    torch.save({"state_dict": state, "current_model_state": {"encoder.a": TWO}}, tmp_path / "a.pt")
    own = {"encoder.a": ONE, "decoder.b": TWO, "quantizer.c": THREE}
    assert read_weights(tmp_path / "a.pt") == own
    assert read_weights(str(tmp_path / "a.pt"), raw=True) == {**own, "encoder.a": TWO}
    save_file({"encoder.a": ONE, "loss.d": TWO}, tmp_path / "a.safetensors")
    assert read_weights(tmp_path / "a.safetensors") == {"encoder.a": ONE}
    torch.save({"loss.d": ONE}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"none\.pt: "):
        read_weights(tmp_path / "none.pt")


def test_files_that_are_no_checkpoints_are_refused_by_their_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_checkpoint(tmp_path)
    torch.save([ONE], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list\.ckpt: .*list"):
        read_checkpoint(tmp_path / "list.ckpt")
    for name in ("text.ckpt", "text.safetensors"):
        (tmp_path / name).write_text("text")
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        header_of(tmp_path / "text.safetensors")


def damage(path: Path, tensor: torch.Tensor) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_may_be_read_without_its_checksums(tmp_path):
    """As for its names and shapes."""
    x = torch.rand(100)
    torch.save({"a": x}, tmp_path / "a.ckpt")
    write_tensors(tmp_path / "a.safetensors", {"a": x})
    for path in sorted(tmp_path.iterdir()):
        damage(path, x)
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(path)
        assert (read_checkpoint(path, check=False)["a"] != x).sum() == 1


def test_files_that_another_library_reads_are_checked(tmp_path):
    """Against a checksum where there is one, and a pickle for code."""
    x = torch.rand(100)
    write_tensors(tmp_path / "sum.safetensors", {"a": x})
    save_file({"a": x}, tmp_path / "plain.safetensors")
    torch.save({"a": x}, tmp_path / "a.bin")
    torch.save({"a": Path("x")}, tmp_path / "code.bin")
    for name in ("sum.safetensors", "plain.safetensors", "a.bin"):
        check_file(tmp_path / name)
    with pytest.raises(ValueError, match=r"code\.bin"):
        check_file(tmp_path / "code.bin")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        check_file(tmp_path / "text.safetensors")
    damage(tmp_path / "plain.safetensors", x)
    check_file(tmp_path / "plain.safetensors")
    damage(tmp_path / "sum.safetensors", x)
    with pytest.raises(ValueError, match="damaged"):
        check_file(tmp_path / "sum.safetensors")


def test_a_safetensors_file_is_always_the_same_bytes(tmp_path):
    """Its header is sorted, and padded to its length; everybody may read it."""
    metadata = {name: name * 3 for name in "zkabwé"}
    tensors = {"b": torch.rand(3, 2).T, "a": torch.rand(4, requires_grad=True)}
    path = tmp_path / "a.safetensors"
    contents = set()
    for _ in range(8):
        write_tensors(path, tensors, metadata)
        contents.add(path.read_bytes())
    (content,) = contents
    length = struct.unpack("<Q", content[:8])[0]
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    entries = {**metadata, "format": "pt"}
    expected = {**entries, "olvae.sha256": tensors_sum(tensors, entries)}
    assert list(header["__metadata__"].items()) == sorted(expected.items())
    assert header_of(path) == expected
    assert path.stat().st_mode & 0o777 == 0o644
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_checksums_are_added_to_all_files_of_a_folder(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.rand(3)}, tmp_path / f"{name}.safetensors")
    save_file({"x": ONE}, tmp_path / ".hidden.safetensors")
    before = {path: load_file(path) for path in tmp_path.glob("[ab].safetensors")}
    add_sums(tmp_path)
    for path, tensors in before.items():
        assert header_of(path)["olvae.sha256"] == tensors_sum(tensors, {"format": "pt"})
        assert torch.equal(load_file(path)["x"], tensors["x"])
    assert header_of(tmp_path / ".hidden.safetensors") == {}
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("mismatch", ["missing", "unexpected", "shape"])
def test_what_fits_is_loaded_with_a_warning_where_that_is_allowed(mismatch):
    module = torch.nn.Linear(2, 3)
    weights = {"weight": torch.rand(3, 2), "bias": torch.rand(3)}
    before = module.bias.detach().clone()
    if mismatch == "missing":
        del weights["bias"]
    elif mismatch == "unexpected":
        weights["other"] = ONE
    else:
        weights["bias"] = torch.rand(4)
    with pytest.raises(ValueError, match="model: 1 "):
        load_weights(module, weights, "file", prefixes=("",))
    assert not torch.equal(module.weight, weights["weight"])
    count = 2 if mismatch == "unexpected" else 1
    with pytest.warns(UserWarning, match=rf"file: {count} of 2 .*1 ") as seen:
        load_weights(module, weights, "file", allow_mismatch=True, prefixes=("",))
    assert seen[0].filename == __file__
    assert torch.equal(module.weight, weights["weight"])
    assert torch.equal(module.bias, weights["bias"] if mismatch == "unexpected" else before)


def test_weights_of_which_nothing_fits_are_refused_in_any_case():
    with pytest.raises(ValueError, match=r"2 missing \(weight, bias\); 1 unexpected \(a\)"):
        load_weights(torch.nn.Linear(2, 3), {"a": ONE}, "file", allow_mismatch=True, prefixes=("",))


def test_tensors_without_the_prefix_are_left_alone():
    module = torch.nn.ModuleDict({"encoder": torch.nn.Linear(1, 1), "loss": torch.nn.Linear(1, 1)})
    before = module["loss"].weight.item()
    weights = {"encoder.weight": torch.full((1, 1), 5.0), "encoder.bias": TWO}
    load_weights(module, weights, "file")
    assert (module["encoder"].weight.item(), module["encoder"].bias.item()) == (5.0, 2.0)
    assert module["loss"].weight.item() == before


def test_quantised_and_infinite_weights_are_refused_by_name():
    module = torch.nn.Linear(2, 3)
    weights = {"weight": torch.rand(3, 2), "bias": torch.ones(3, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"file: 1 .*int8.*\(bias, "):
        load_weights(module, weights, "file", prefixes=("",))
    for value in (float("inf"), float("nan")):
        weights["bias"] = torch.tensor([0.0, value, 0.0])
        with pytest.raises(ValueError, match=r"1 of .*float32 \(bias, "):
            load_weights(module, weights, "file", prefixes=("",))
    # 70,000 is beyond half precision.
    large = {"weight": torch.rand(3, 2), "bias": torch.full((3,), 7e4)}
    load_weights(module, large, "file", prefixes=("",))
    with pytest.raises(ValueError, match=r"float16 \(bias, "):
        load_weights(module.half(), large, "file", prefixes=("",))
    # A counter is an integer of the module's own.
    norm = torch.nn.BatchNorm1d(1)
    norm.num_batches_tracked += 3
    counted = torch.nn.BatchNorm1d(1)
    load_weights(counted, norm.state_dict(), "file", prefixes=("",))
    assert counted.num_batches_tracked == 3


def test_mismatches_are_counted_and_the_first_three_named():
    assert mismatches([], [], []) == ""
    assert mismatches(["a"], [], ["b 1x2 for scalar"]) == (
        "1 missing (a); 1 of another shape (b 1x2 for scalar)"
    )
    assert mismatches([], list("abc"), []) == "3 unexpected (a, b, c)"
    assert mismatches([], list("abcd"), []) == "4 unexpected (a, b, c, ...)"


def test_every_tensor_of_a_file_counts_to_its_size_once(tmp_path, monkeypatch):
    """However deep; a view of a small storage may not become larger than the file."""
    path = tmp_path / "a.ckpt"
    shared = [ONE, (TWO, {"x": THREE})]
    content = {"a": shared, "b": shared, "c": OrderedDict(d=ONE), "n": 1}
    assert len(list(checkpoint._tensors(content))) == 4
    torch.save({"a": ONE.expand(10_000)}, path)
    assert read_checkpoint(path)["a"].shape == (10_000,)
    size = path.stat().st_size
    monkeypatch.setattr(checkpoint, "EXPANDED_BYTES", 40_000 - 2 * size)
    read_checkpoint(path)
    monkeypatch.setattr(checkpoint, "EXPANDED_BYTES", 39_999 - 2 * size)
    with pytest.raises(ValueError, match=r"a\.ckpt: .*larger than"):
        read_checkpoint(path)


def test_classes_in_a_checkpoint_become_empty_ones(tmp_path):
    """Those that trainers leave, under their names; a defaultdict keeps what it holds."""
    counts = defaultdict(list, {"b": [1, TWO]})
    torch.save({"a": ONE, "counts": counts, "dtype": np.dtype("f4")}, tmp_path / "a.ckpt")
    content = read_checkpoint(tmp_path / "a.ckpt")
    assert content["a"] == ONE
    kind = type(content["dtype"])
    assert (kind.__name__, kind.__module__, content["dtype"]) == ("dtype", "numpy", {})
    assert type(content["counts"]) is dict
    assert content["counts"] == {"b": [1, TWO]}


def test_a_known_file_of_an_old_torch_is_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": TWO}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pth"):
        read_checkpoint(path)
    assert checkpoint._read_torch(path, legacy=True) == {"a": TWO}
    torch.save({"a": TWO}, path)
    assert checkpoint._read_torch(path, legacy=True) == {"a": TWO}
