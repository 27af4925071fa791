"""Files of ``torch.save``, read without running code from them, and in no more memory than their size explains.

torch's reader of tensors and plain values runs no code, but it believes what a file says of its sizes and never looks
at its checksums. So a file is gone through before: its directory, its checksums, and its pickle with a stand-in for
every object.
"""

import codecs
import io
import math
import pickle
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["RefusedError", "check_torch", "load_torch"]

INERT = ("lightning", "lightning_fabric", "numpy", "omegaconf", "pytorch_lightning", "typing")
"""Packages whose objects trainers leave in checkpoints beside the weights: each object is read as an empty shell."""

INERT_TYPES = ("Any", "bool", "defaultdict", "dict", "float", "int", "list", "str", "tuple")

PICKLE_BYTES = 2**23
"""The longest pickle that is read: some 50,000 tensors. An object of one byte takes up to 200 in memory."""

EXPANDED_BYTES = 2**30
"""What tensors may have in all beyond twice the file's size, because tensors may share memory or repeat it."""

ENCODINGS = ("ascii", "latin1", "utf-8")
"""How pickles have bytes encoded; of others some make it longer at each turn."""

MORE = "it holds more than tensors, code perhaps, which is not run; ask for its weights as safetensors"


class RefusedError(ValueError):
    """Why a file is not read, in a few words, without its name."""


def load_torch(path: str | Path) -> Any:
    """Read a file of ``torch.save``, zip or older: tensors, on the CPU, and plain values.

    Raises:
        RefusedError: it is damaged or of another kind, holds more than that, or says that it has more than it has.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol|TypedStorage is deprecated")
            shells: list[Any] = [_shell(name) for name in _survey(Path(path))]
            with torch.serialization.safe_globals(shells):
                return torch.load(path, map_location="cpu", weights_only=True)
    except RefusedError:
        raise
    except Exception as error:  # torch and pickle raise all kinds
        unknown = isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or "operand" in str(error))
        raise RefusedError(MORE if unknown else "cut off, or of another kind") from error


def check_torch(path: Path) -> None:
    """Check a file that another library will read with ``weights_only``; raises as :func:`load_torch`."""
    try:
        _survey(path)
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError("cut off, or of another kind") from error


def _survey(path: Path) -> set[str]:
    """Go through a file; returns the names of the objects that are to be empty shells.

    Raises:
        RefusedError: see :func:`load_torch`; broken files raise other kinds as well.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch tells
            file.seek(0)
            return _walk(file.read(PICKLE_BYTES), size, pickles=5)  # the third is the content, storages follow
    with zipfile.ZipFile(path) as archive:
        records = {info.filename.lower(): info.file_size for info in archive.infolist()}  # torch ignores the case
        if len(records) < len(archive.infolist()) or sum(records.values()) > size:
            raise RefusedError("its directory has more than the file, a decompression bomb perhaps")
        if (damaged := archive.testzip()) is not None:
            raise RefusedError(f"damaged: {damaged} is not what was written, by its checksum")
        folder = archive.infolist()[0].filename.partition("/")[0]
        content = archive.open(f"{folder}/data.pkl").read(PICKLE_BYTES)
    return _walk(content, size, {name.partition("/data/")[2]: length for name, length in records.items()})


def _walk(content: bytes, size: int, records: Mapping[str, int] | None = None, pickles: int = 1) -> set[str]:
    file = io.BytesIO(content)
    shells: set[str] = set()
    for _ in range(pickles):
        walker = _Walker(file, size, records)
        walker.load()
        shells |= walker.shells
    return shells


class _Stored(NamedTuple):
    """A storage of so many bytes, in elements of so many."""

    nbytes: int
    itemsize: int


class _Walker(pickle._Unpickler):  # in Python: the one in C allocates as much as an index says
    """Unpickles stand-ins, and compares what the pickle says of tensors with the file.

    Args:
        file: the pickle.
        size: of the whole file in bytes.
        records: bytes of each storage; None where only all together are known, by the size.
    """

    def __init__(self, file: io.BytesIO, size: int, records: Mapping[str, int] | None) -> None:
        super().__init__(file, encoding="utf-8")
        self.records = records
        self.size = size
        self.storages: dict[str, int] = {}
        self.tensors = 0  # bytes
        self.shells: set[str] = set()
        self.known: dict[str, Any] = {
            "collections.Counter": Counter,
            "collections.OrderedDict": OrderedDict,
            "torch.Size": tuple,
            "torch.device": _nothing,
            "torch._utils._rebuild_parameter": _nothing,
            "torch._utils._rebuild_parameter_with_state": _nothing,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of,
            "_codecs.encode": _encode,
            "builtins.complex": complex,
            "builtins.set": set,
        }

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's
        full = f"{module}.{name}"
        if full in self.known:
            return self.known[full]
        if full == "torch.storage.UntypedStorage":
            return 1
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found.itemsize
        if name.endswith("Storage") and isinstance(dtype := getattr(found, "dtype", None), torch.dtype):
            return dtype.itemsize
        if not _is_inert(full):
            raise RefusedError(MORE)
        self.shells.add(full)
        return _shell(full)

    def persistent_load(self, pid: Any) -> _Stored:
        _, itemsize, key, _, count, *_ = pid
        nbytes = count * itemsize
        self.storages[key] = nbytes
        room = self.size if self.records is None else self.records.get(key, -1)
        if not 0 <= nbytes <= room or sum(self.storages.values()) > self.size:
            raise RefusedError(f"it says that a tensor has {nbytes} bytes, more than it has in the file")
        return _Stored(nbytes, itemsize)

    def _tensor(self, storage: _Stored, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> None:
        self._tensor_of(storage, offset, size, stride, False, None, storage.itemsize)

    def _tensor_of(
        self, storage: _Stored, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
    ) -> None:
        itemsize = rest[2]
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        self.tensors += math.prod(size) * itemsize
        fits = 0 in size or (last + 1) * itemsize <= storage.nbytes
        if min(offset, *size, *stride, 0) < 0 or not fits or self.tensors > 2 * self.size + EXPANDED_BYTES:
            raise RefusedError("it says that its tensors are larger than they are in the file")


def _nothing(*_: Any) -> None:
    pass


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ENCODINGS:
        raise RefusedError(MORE)
    return codecs.encode(text, encoding)


def _is_inert(name: str) -> bool:
    package, *_, last = name.split(".")
    return package in INERT or (package in ("builtins", "collections") and last in INERT_TYPES)


def _shell(name: str) -> type:
    """A class of this name that does nothing."""
    module, _, last = name.rpartition(".")
    nothing: dict[str, Callable[..., None]] = {"__init__": _nothing, "__setstate__": _nothing}
    return type(last, (dict,), {"__module__": module, **nothing})
