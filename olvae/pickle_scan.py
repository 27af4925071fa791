"""Scan a checkpoint's pickles before torch loads it: allowed calls only, no decompression bomb."""

import io
import pickletools
import re
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The longest pickle that is read, of some 50,000 tensors. Each of its bytes may take 200 in memory.
PICKLE_BYTES = 2**23

# All tensors together may take twice the file's size and this: they may share memory or repeat it.
EXPANDED_BYTES = 2**30

ALLOWED_CALLS = re.compile(
    r"collections\.(Counter|OrderedDict)|builtins\.(complex|set)|_codecs\.encode"
    r"|torch\.(?!\w*Tensor$)\w+|torch\.storage\.UntypedStorage"
    r"|torch\._utils\._rebuild_(parameter|parameter_with_state|tensor|tensor_v2|tensor_v3)"
)
"""Classes and functions that a pickle may use, as far as torch knows them: it refuses others."""

EMPTY_SHELLS = re.compile(
    r"(lightning|lightning_fabric|numpy|omegaconf|pytorch_lightning|typing)\..+"
    r"|(builtins|collections)\.(bool|defaultdict|dict|float|int|list|str|tuple)"
)
"""Objects that trainers leave beside the weights: read as empty, but for a defaultdict."""

# Pickles name this class, and never call it: it would allocate.
STORAGE = "torch.storage.UntypedStorage"

COPYING_CALLS = ("builtins.set", "collections.Counter", "collections.OrderedDict", "torch.Size")
"""Calls whose result holds what their arguments hold."""

# How deep a call copies: its arguments, the parts of one, their entries.
COPIED_DEPTH = 3

# Opcodes that torch reads. Those in EXTENDING add values to a container, a storage is in PLAIN.
CALLS = ("REDUCE", "NEWOBJ")
CONTAINERS = (
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
)
EXTENDING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS")
TEXTS = ("BINUNICODE", "SHORT_BINSTRING")
PLAIN = (
    *("BINFLOAT", "BININT", "BININT1", "BININT2", "BINPERSID", "LONG1"),
    *("NEWFALSE", "NEWTRUE", "NONE"),
)
MEMO_PUT = ("BINPUT", "LONG_BINPUT")
MEMO_GET = ("BINGET", "LONG_BINGET")

# The ends of a zip: marks, the directory's size and offset, the place of the other record.
END = struct.Struct("<4s8xIIH")  # the last field is the length of a comment
LOCATOR = struct.Struct("<4s4xQ4x")
END_64 = struct.Struct("<4s36xQQ")

UNREADABLE = "not a readable checkpoint"
BOMB = "its pickle is a decompression bomb"


class _RefusedError(ValueError):
    """The reason why a pickle is not read, without its file's name."""


@dataclass(frozen=True)
class _Global:
    """A class or function that a pickle names."""

    name: str


class _Shell(list[Any]):
    """An object that is read as an empty dictionary, whatever its state."""


class _Machine:
    """Follows a pickle's stack as torch does, but calls nothing: it counts what calls would copy.

    Where arguments are shared, a call costs a few bytes of the file, whatever it copies: all calls
    together may copy as many entries as the pickle has bytes. A container is a list of its values
    here; None stands for numbers, storages and tensors.
    """

    def __init__(self, content: bytes) -> None:
        self.names: set[str] = set()  # of the classes and functions that the pickle uses
        self.left = len(content)  # entries that calls may still copy
        self.memo: dict[Any, Any] = {}
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "MARK":
                self.outer.append(self.stack)
                self.stack = []
            elif opcode.name in MEMO_PUT:
                self.memo[argument] = self.stack[-1]
            elif opcode.name not in ("PROTO", "STOP"):
                # Take what the opcode takes from the stack, the values after a mark last.
                count = len(opcode.stack_before)
                marked = []
                if pickletools.stackslice in opcode.stack_before:
                    marked = self.stack
                    self.stack = self.outer.pop()
                    count -= 2  # the mark, and what is after it
                start = len(self.stack) - count
                taken = self.stack[start:] + marked
                del self.stack[start:]
                self.stack.append(self._value(opcode.name, argument, taken))

    def _value(self, opcode: str, argument: Any, taken: list[Any]) -> Any:
        """Return the value that an opcode puts on the stack."""
        if opcode in CALLS:
            return self._result(*taken)
        if opcode == "BUILD":
            instance, state = taken
            if not isinstance(instance, _Shell):
                self._count(state)
            return instance
        if opcode in EXTENDING:
            taken[0].extend(taken[1:])
            return taken[0]
        if opcode in CONTAINERS:
            return taken
        if opcode == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            moved = (IMPORT_MAPPING.get(module, module), name)
            found = _Global(".".join(NAME_MAPPING.get((module, name), moved)))
            self.names.add(found.name)
            return found
        if opcode in MEMO_GET:
            return self.memo[argument]
        if opcode in TEXTS:
            return argument
        if opcode not in PLAIN:
            raise _RefusedError(f"its pickle has an opcode that torch does not read: {opcode}")
        return None

    def _result(self, called: _Global, given: Any) -> Any:
        """Return the result of a call."""
        if EMPTY_SHELLS.fullmatch(called.name):
            return _Shell()
        self._count(given)
        if called.name == "_codecs.encode":
            # Pickles of bytes are such calls. Another codec could expand the text.
            if given[1:] != ["latin1"]:
                raise _RefusedError(BOMB)
            self._count(list(given[0]))
            return [None] * len(given[0])
        if called.name in COPYING_CALLS:
            if not all(isinstance(part, list) for part in given):
                raise _RefusedError(BOMB)
            return [entry for part in given for entry in part]
        if called.name == STORAGE:
            raise _RefusedError(BOMB)
        return None

    def _count(self, given: Any) -> None:
        """Count what a call or an object's state copies. A tensor would be unpacked."""
        if not isinstance(given, list):
            raise _RefusedError(BOMB)
        for _ in _entries(given, COPIED_DEPTH):
            self.left -= 1
            if self.left < 0:
                raise _RefusedError(BOMB)


def _entries(value: Any, depth: int) -> Iterator[Any]:
    """Yield the entries of a container, and of those in it, down to a depth."""
    if isinstance(value, list) and depth:
        for entry in value:
            yield entry
            yield from _entries(entry, depth - 1)


def scan_pickle(path: Path, check: bool = True) -> set[str]:
    """Check the directory, the checksums and the pickle of a file.

    Returns the names of the classes to read as empty shells.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise _RefusedError(
                "cut off, of another kind, or of torch before 1.6: "
                "load and save it with a newer one"
            )
        if not _one_directory(path):
            raise _RefusedError("readers of zip files would find other directories in it")
        with zipfile.ZipFile(path) as archive:
            # The directory. torch ignores the case of names, and could read another record.
            records = archive.infolist()
            if len({record.filename.lower() for record in records}) < len(records):
                raise _RefusedError("two of its records have one name")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise _RefusedError("its records are compressed, a decompression bomb perhaps")
            damaged = archive.testzip() if check else None
            if damaged is not None:
                raise _RefusedError(f"damaged: {damaged} is not what was written, by its checksum")

            # The pickle: the classes and functions that it uses.
            folder = records[0].filename.partition("/")[0]
            names = _Machine(archive.open(f"{folder}/data.pkl").read(PICKLE_BYTES)).names
        shells = {name for name in names if EMPTY_SHELLS.fullmatch(name)}
        if not all(ALLOWED_CALLS.fullmatch(name) for name in names - shells):
            raise _RefusedError(
                "it holds objects other than tensors, code perhaps, which is not run: "
                "ask for safetensors"
            )
    except Exception as error:
        # Which kind of error depends on what is broken.
        why = error if isinstance(error, _RefusedError) else "cut off, or of another kind"
        raise ValueError(f"{path}: {UNREADABLE}: {why}") from error
    return shells


def _one_directory(path: Path) -> bool:
    """Whether the directory of a zip ends where its end record begins, by what the record states.

    Python takes the directory before the end record, torch the one at the stated offset. The same
    holds for the end record with 64 bits, which torch.save writes, and its locator.
    """
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END) - END.size
        start = max(end - LOCATOR.size - END_64.size, 0)
        file.seek(start)
        tail = file.read()
    mark, size, offset, comment = END.unpack(tail[end - start :])
    if mark != b"PK\5\6" or comment:
        return False
    if tail[-END.size - LOCATOR.size :].startswith(b"PK\6\7"):
        _, end = LOCATOR.unpack(tail[-END.size - LOCATOR.size : -END.size])
        mark, size, offset = END_64.unpack(tail[: END_64.size])
        if mark != b"PK\6\6" or end != start:
            return False
    return bool(offset + size == end)
