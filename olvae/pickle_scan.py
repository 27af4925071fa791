"""Scan a checkpoint's pickles before torch loads it: allowed calls only, no decompression bomb."""

import codecs
import contextlib
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path

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
"""Objects that trainers leave beside the weights: read as empty dictionaries."""

UNREADABLE = "not a readable checkpoint"

# Codecs from bytes to bytes: their output is up to twice as long, and can be encoded again.
EXPANDING_CODECS = ("base64", "bz2", "hex", "quopri", "uu", "zlib")


class _RefusedError(ValueError):
    """The reason why a pickle is not read, without its file's name."""


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
            names = _globals_of(archive.open(f"{folder}/data.pkl").read(PICKLE_BYTES))
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


def _globals_of(content: bytes) -> set[str]:
    """Return the full names, in Python 3, of the classes and functions that a pickle uses."""
    names = set()
    texts = {""}
    calls = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            moved = (IMPORT_MAPPING.get(module, module), name)
            module, name = NAME_MAPPING.get((module, name), moved)
            names.add(f"{module}.{name}")
        elif opcode.name == "REDUCE":
            calls += 1
        elif isinstance(argument, str):
            texts.add(argument)

    # Pickles of bytes call _codecs.encode(text, "latin1"). Each call copies a text of the file,
    # and could name a codec that expands it.
    if "_codecs.encode" in names:
        longest = max(map(len, texts))
        if calls * longest > EXPANDED_BYTES or any(map(_expands, texts)):
            raise _RefusedError("its pickle is a decompression bomb")
    return names


def _expands(text: str) -> bool:
    """Whether a text is a name of an expanding codec."""
    with contextlib.suppress(LookupError, ValueError):
        return codecs.lookup(text).name in EXPANDING_CODECS
    return False
