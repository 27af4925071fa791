"""Pickles that run code, allocate or are compressed are refused before torch reads them."""

import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
import torch

from olvae.checkpoint import read_checkpoint, read_weights
from olvae.pretrained_networks import (
    VGG16,
    read_weights_file,
)


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_not_run(tmp_path, capsys, legacy):
    content = {"state_dict": {}, "x": Reduced(print, "code ran")}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="readable checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(
        (tmp_path / "a.ckpt").read_bytes()[:-500] if legacy else pickle.dumps(content)
    )
    with pytest.raises(ValueError, match=r"torch before 1\.6"):
        read_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="cut off"):
        read_weights_file(tmp_path / "a.ckpt", VGG16)
    assert "code ran" not in capsys.readouterr().out


def test_files_of_torch_before_1_6_are_refused_unless_they_are_published(tmp_path):
    """As torchvision's VGG16 and VGG19 are."""
    path = tmp_path / VGG16.name
    torch.save({"encoder.a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"torch before 1\.6: "):
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
    with pytest.raises(ValueError, match=rf"checkpoint: .*{message}"):
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


NAMED = CODECS + b"X\x01\x00\x00\x00aU\x05asciiU\x0bnamereplace\x87R."

REPEATED = CODECS + b"q\x00" + LONG + b"q\x01" + b"h\x00h\x01\x85R" * 2**12 + b"."


def called_again(name: str, shared: bytes, call: bytes, times: int = 20_000) -> bytes:
    """A pickle that calls a function on one shared argument: five bytes for each call."""
    module, _, last = name.rpartition(".")
    function = f"c{module}\n{last}\n".encode() + b"q\x01"
    return b"\x80\x02](" + shared + b"q\x00" + function + (b"h\x01h\x00" + call) * times + b"e."


NUMBERS = b"](" + b"".join(b"M" + n.to_bytes(2, "little") for n in range(20_000)) + b"e"
PAIRS = b"](" + b"".join(b"M" + n.to_bytes(2, "little") + b"N\x86" for n in range(20_000)) + b"e"
STATE = b"}(" + b"".join(b"X\x04\x00\x00\x00%04dN" % n for n in range(9_999)) + b"u"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(U\x07storagectorch\nByteStorage\nU\x010U\x03cpuK\x01tQ"
SHAPE = b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85"
SPREAD = TENSOR + b"(" + STORAGE + SHAPE + b"\x89ccollections\nOrderedDict\n)RtR"


@pytest.mark.parametrize(
    "content",
    [
        called_again("builtins.set", NUMBERS + b"\x85", b"R"),
        called_again("collections.Counter", NUMBERS + b"\x85", b"R"),
        called_again("collections.OrderedDict", PAIRS + b"\x85", b"R"),
        called_again("torch.Size", NUMBERS + b"\x85", b"R"),
        called_again("torch.Size", NUMBERS + b"\x85", b"\x81"),
        called_again("collections.OrderedDict", STATE, b"").replace(
            b"h\x01h\x00", b"h\x01)Rh\x00b"
        ),
        called_again("builtins.set", SPREAD + b"\x85", b"R", times=1),
        called_again("builtins.set", SPREAD, b"R", times=1),
        called_again("torch.storage.UntypedStorage", b"J\xff\xff\xff\x7f\x85", b"R"),
    ],
    ids=[
        *("set", "counter", "ordered-dict", "size", "new-size", "state", "tensor"),
        *("unpacked-tensor", "storage"),
    ],
)
def test_calls_on_one_shared_argument_are_counted(tmp_path, content):
    """Each takes some bytes of the file, and as much memory as the argument has."""
    refused(archive(tmp_path / "a.ckpt", content, **{"a/data/0": b"0"}), "a decompression bomb")


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
        (NAMED, "decompression bomb"),
        (REPEATED, "decompression bomb"),
    ],
    ids=["bytearray", "tensor", "hexadecimal", "named", "repeated"],
)
def test_a_pickle_that_allocates_is_refused(tmp_path, content, message):
    refused(archive(tmp_path / "a.ckpt", content), message)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    refused(
        archive(tmp_path / "a.ckpt", pickle.dumps({}), zipfile.ZIP_DEFLATED),
        "a decompression bomb perhaps",
    )


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_a_zip_with_two_directories_is_refused(tmp_path, wide):
    """Python reads the directory before the end record, torch the one at the stated offset."""
    first = archive(tmp_path / "first.ckpt", pickle.dumps({"a": "torch reads this"}, 2))
    path = archive(tmp_path / "a.ckpt", pickle.dumps({"a": "Python reads this"}, 2))
    inner = first.read_bytes()
    content = inner[:-22] + path.read_bytes()[:-22]
    if wide:
        # The end record with 64 bits, and its locator
        size, offset = map(int.from_bytes, (inner[-10:-6][::-1], inner[-6:-2][::-1]))
        record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 3, 3, size, offset)
        content += record + b"PK\6\7" + struct.pack("<IQI", 0, len(content), 1)
    path.write_bytes(content + inner[-22:])
    assert torch.load(path) == {"a": "torch reads this"}
    # Python 3.13.5 finds no zip file in the second one.
    two = "readers of zip files would find other directories in it"
    refused(path, f"{two}|cut off, of another kind")
    path.write_bytes(inner + b"PK\5\6" + bytes(18))
    refused(path, two)


def test_plain_values_and_other_packages_objects_beside_the_weights(tmp_path):
    """Objects become empty dictionaries; arrays of NumPy hold bytes, and metrics may be named like
    encodings.
    """
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
