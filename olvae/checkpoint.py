"""Read and write files of weights: safetensors, checkpoints of torch and Lightning, and published pretrained networks.

The names of the autoencoder's parameters are the published ones [M]: ``encoder.*``, ``decoder.*``, ``quantizer.*``.

A received file must neither run code nor fill the memory. torch's reader with ``weights_only`` runs no code, but calls
constructors that take any amount of memory, and ignores checksums. So the directory, the checksums and the pickle of a
file are scanned first, and its tensors are mapped into memory.
"""

import codecs
import contextlib
import hashlib
import http.client
import json
import os
import pickletools
import re
import socket
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from olvae.files import atomic_write, file_sha256

AUTOENCODER = (
    "encoder.",
    "decoder.",
    "quantizer.",
)  # a checkpoint may also hold a loss, a discriminator, ...
PRIVATE_PREFIX = (
    "olvae."  # of these names in files that other projects' loaders should not take for their own
)
SUM_KEY = "olvae.sha256"  # of the checksum in the header of a safetensors file
PICKLE_BYTES = (
    2**23
)  # longest pickle that is read, of some 50,000 tensors; a byte may take up to 200 in memory
EXPANDED_BYTES = (
    2**30
)  # limit of all tensors beyond twice the file's size: tensors may share memory or repeat it

ALLOWED_CALLS = re.compile(
    r"collections\.(Counter|OrderedDict)|builtins\.(complex|set)|_codecs\.encode|torch\.(?!\w*Tensor$)\w+"
    r"|torch\.storage\.UntypedStorage|torch\._utils\._rebuild_(parameter|parameter_with_state|tensor|tensor_v2|tensor_v3)"
)
"""Classes and functions that a pickle may use, as far as torch knows them: it refuses others."""

EMPTY_SHELLS = re.compile(
    r"(lightning|lightning_fabric|numpy|omegaconf|pytorch_lightning|typing)\..+"
    r"|(builtins|collections)\.(bool|defaultdict|dict|float|int|list|str|tuple)"
)
"""Objects that trainers leave beside the weights: read as empty dictionaries."""

UNREADABLE = "not a readable checkpoint"
EXPANDING_CODECS = (
    "base64",
    "bz2",
    "hex",
    "quopri",
    "uu",
    "zlib",
)  # from bytes to bytes, of up to twice the length
FOLDER_VARIABLE = "OLVAE_WEIGHTS"  # of the environment: names a folder of pretrained weights
SILENCE_S = 10.0  # how long a server may be silent, before it answers or during a download


class _RefusedError(ValueError):
    """Why a pickle is not read, without its file's name."""


def read_checkpoint(path: str | Path, check: bool = True) -> dict[str, Any]:
    """Read a safetensors or torch file; only tensors and plain values, never code.

    ``check``: compare checksums, which reads the whole file; otherwise its tensors are mapped, for names and shapes.
    ValueError if it is not a checkpoint, holds more than tensors and plain values, or is not what its checksum says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, check)
    content = _read_torch(path, check=check)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint, but a {type(content).__name__}")
    return content


def read_weights(path: str | Path, raw: bool = False) -> dict[str, Tensor]:
    """Read the autoencoder's tensors from a Lightning checkpoint, a bare state dict, or a safetensors file.

    ``raw`` are the weights as trained, where the file also has averaged ones (EMA). Errors as :func:`read_checkpoint`,
    and ValueError if it has no autoencoder.
    """
    state = state_dict_of(read_checkpoint(path), path, raw)
    named = {name.removeprefix(PRIVATE_PREFIX): value for name, value in state.items()}
    weights = {name: tensor for name, tensor in named.items() if name.startswith(AUTOENCODER)}
    if not weights:
        raise ValueError(
            f"{path}: no autoencoder in it: no name starts with {' or '.join(AUTOENCODER)}"
        )
    return weights


def state_dict_of(
    checkpoint: Mapping[str, Any], path: str | Path, raw: bool = False
) -> dict[str, Tensor]:
    """Return the tensors in a checkpoint's state dict, averaged ones where it has them, unless ``raw``.

    Our averaging, and Lightning's, keep the average in ``state_dict`` and the raw weights of the averaged names, or of
    all, in ``current_model_state``; the latent-diffusion code keeps the average of ``a.b`` as ``model_ema.ab``.
    """
    parts = {"state_dict": checkpoint.get("state_dict", checkpoint)}
    if raw:
        parts["current_model_state"] = checkpoint.get("current_model_state", {})
    content: dict[str, Tensor] = {}
    for key, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f"{path}: not a checkpoint: its {key} is a {type(part).__name__}")
        content |= {
            name: t for name, t in part.items() if isinstance(name, str) and isinstance(t, Tensor)
        }
    if raw:
        return content
    return {
        name: content.get(f"model_ema.{name.replace('.', '')}", value)
        for name, value in content.items()
    }


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    origin: str | Path,
    allow_mismatch: bool = False,
    prefixes: tuple[str, ...] = AUTOENCODER,
) -> None:
    """Copy ``weights`` into the tensors of ``module`` of the same names, which begin with one of ``prefixes``.

    All of them, or none: ValueError if names are missing, unexpected or of another shape (the message lists them), or
    values are non-finite, or integers, as quantised weights are. With ``allow_mismatch`` those that fit, and a warning.
    """
    own = {
        name: tensor for name, tensor in module.state_dict().items() if name.startswith(prefixes)
    }
    fitting = [name for name in own if name in weights and weights[name].shape == own[name].shape]
    integer = [
        name
        for name in fitting
        if own[name].is_floating_point() and not weights[name].is_floating_point()
    ]
    if integer:
        kind = str(weights[integer[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{origin}: {len(integer)} of its tensors are {kind}, quantised perhaps ({integer[0]}, ...)"
        )
    kinds = {
        name: own[name].dtype if own[name].is_floating_point() else weights[name].dtype
        for name in fitting
    }
    broken = [
        name for name, kind in kinds.items() if not weights[name].to(kind).float().isfinite().all()
    ]
    if broken:
        kind = str(kinds[broken[0]]).removeprefix("torch.")
        raise ValueError(
            f"{origin}: {len(broken)} of its tensors have non-finite values in {kind} ({broken[0]}, ...)"
        )
    misshapen = [name for name in own if name in weights and name not in fitting]
    shapes = [f"{name} {_shape(weights[name])} for {_shape(own[name])}" for name in misshapen]
    report = mismatches(
        [n for n in own if n not in weights], [n for n in weights if n not in own], shapes
    )
    if report and not (allow_mismatch and fitting):
        raise ValueError(f"{origin}: these weights are of another model: {report}")
    if report:
        warnings.warn(
            f"{origin}: {len(fitting)} of {len(own)} tensors are loaded: {report}", stacklevel=2
        )
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(weights[name])


def mismatches(missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> str:
    """Count and name the tensors that do not fit; empty if everything fits."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds
        if names
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, the same bytes every time, with a checksum of all it holds in its header."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {"format": "pt", **(metadata or {})}
    save_file(weights, path, metadata={**entries, SUM_KEY: tensors_sum(weights, entries)})
    path.chmod(0o644)  # safetensors makes it readable by the owner alone
    with path.open("r+b") as file:  # safetensors writes metadata in random order
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(
            json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        )


def add_sums(folder: Path) -> None:
    """Put checksums into the headers of a folder's safetensors files, which another library wrote."""
    for file in sorted(folder.glob("[!.]*.safetensors")):
        with atomic_write(file) as partial:
            write_tensors(partial, load_file(file))


def tensors_sum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of the names, shapes, dtypes and values of tensors, and of metadata, in hexadecimal."""
    digest = hashlib.sha256(b"" if metadata is None else repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_file(path: Path) -> None:
    """Check a file of weights that another library will read; raise ValueError as :func:`read_checkpoint` does."""
    if path.suffix == ".safetensors":
        if SUM_KEY in header_of(path):
            _read_safetensors(path)
    else:
        _scan(path)


def _read_safetensors(path: Path, check: bool = True) -> dict[str, Tensor]:
    metadata = header_of(path)
    tensors = load_file(path)
    expected = metadata.pop(SUM_KEY, None)
    if check and expected is not None and tensors_sum(tensors, metadata) != expected:
        raise ValueError(f"{path}: damaged: its SHA-256 is not the one in its header")
    return tensors


def header_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; ValueError if it is none."""
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def _read_torch(path: Path, legacy: bool = False, check: bool = True) -> Any:
    """Read a file of ``torch.save``: plain values, and tensors on the CPU, mapped from the file.

    ``legacy`` accepts files that torch before 1.6 wrote, which are not scanned; only for known files.
    """
    mapped = not legacy or zipfile.is_zipfile(path)
    names = _scan(path, check) if mapped else set()
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([_shell(name) for name in names]),
        ):
            warnings.filterwarnings(
                "ignore", message="Detected pickle protocol|TypedStorage is deprecated"
            )
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch and pickle raise all kinds
        raise ValueError(f"{path}: {UNREADABLE}: cut off, or of another kind") from error
    if (
        sum(tensor.numel() * tensor.itemsize for tensor in _tensors(content))
        > 2 * path.stat().st_size + EXPANDED_BYTES
    ):
        raise ValueError(f"{path}: {UNREADABLE}: its tensors are larger than they are in the file")
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers, each container once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def _scan(path: Path, check: bool = True) -> set[str]:
    """Check the directory, the checksums and the pickle of a file; returns the names to read as empty shells."""
    try:
        if not zipfile.is_zipfile(path):
            raise _RefusedError(
                "cut off, of another kind, or of torch before 1.6: load and save it with a newer one"
            )
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if len({record.filename.lower() for record in records}) < len(
                records
            ):  # torch ignores the case
                raise _RefusedError("two of its records have one name")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise _RefusedError("its records are compressed, a decompression bomb perhaps")
            if check and (damaged := archive.testzip()) is not None:
                raise _RefusedError(f"damaged: {damaged} is not what was written, by its checksum")
            folder = records[0].filename.partition("/")[0]
            names = _globals_of(archive.open(f"{folder}/data.pkl").read(PICKLE_BYTES))
        shells = {name for name in names if EMPTY_SHELLS.fullmatch(name)}
        if not all(ALLOWED_CALLS.fullmatch(name) for name in names - shells):
            other = "it holds objects other than tensors, code perhaps, which is not run"
            raise _RefusedError(f"{other}: ask for safetensors")
    except Exception as error:  # of many kinds, by what is broken
        why = error if isinstance(error, _RefusedError) else "cut off, or of another kind"
        raise ValueError(f"{path}: {UNREADABLE}: {why}") from error
    return shells


def _globals_of(content: bytes) -> set[str]:
    """Return the full names, in Python 3, of the classes and functions that a pickle uses."""
    names, texts, calls = set(), {""}, 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
            names.add(f"{module}.{name}")
        elif isinstance(argument, str):
            texts.add(argument)
        calls += opcode.name == "REDUCE"
    if "_codecs.encode" in names and (
        calls * max(map(len, texts)) > EXPANDED_BYTES or any(map(_expands, texts))
    ):
        raise _RefusedError("its pickle is a decompression bomb")
    return names


def _expands(text: str) -> bool:
    with contextlib.suppress(LookupError, ValueError):
        return codecs.lookup(text).name in EXPANDING_CODECS
    return False


def _shell(name: str) -> type:
    """Make a class of this name that does nothing."""
    module, _, last = name.rpartition(".")
    ignore = {method: lambda *_: None for method in ("__init__", "__setstate__")}
    return type(last, (dict,), {"__module__": module, **ignore})


@dataclass(frozen=True)
class WeightsFile:
    """A published file of pretrained weights."""

    what: str  # the network, for messages
    url: str
    alias: str | None = None  # another name under which the same file is published
    digits: str | None = None  # the first ones of its SHA-256, if they do not end its name

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def sha256(self) -> str:
        return self.digits or self.name.removesuffix(".pth")[-8:]


VGG16 = WeightsFile("VGG16", "https://download.pytorch.org/models/vgg16-397923af.pth")
VGG19 = WeightsFile("VGG19", "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth")
ALEXNET = WeightsFile("AlexNet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth")
INCEPTION = WeightsFile(
    "Inception",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    alias="weights-inception-2015-12-05-6726825d.pth",  # torch-fidelity's
)

DINOV2 = WeightsFile(
    "DINOv2",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    digits="d5383ea8f4877b2472eb973e0fd72d55",
)


class MissingWeights(FileNotFoundError):  # noqa: N818  (it reads as what it says)
    """Weights were not found and can't be downloaded; one line, with the remedy."""


def find_weights(
    file: WeightsFile,
    weights_dir: str | Path | None = None,
    remedy: str = "name its folder in `weights_dir`",
) -> Path:
    """Look for a file in ``weights_dir``, in the folder that OLVAE_WEIGHTS names, and in torch hub's cache; if it is in
    none of them, download it into the cache, which fails soon where there is no internet.

    MissingWeights if that fails; ``remedy`` is what else the user can do.
    """
    if weights_dir is not None and not Path(weights_dir).is_dir():
        raise NotADirectoryError(f"{weights_dir}: no such folder of weights")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    places = [
        *(Path(place) for place in (weights_dir, os.environ.get(FOLDER_VARIABLE)) if place),
        cache,
    ]
    for path in (
        place / name for place in places for name in (file.name, file.alias) if name is not None
    ):
        if path.is_file():
            return path
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)  # torch's download sets none
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(cache / file.name), hash_prefix=file.sha256)
    except (
        OSError,
        http.client.HTTPException,
        RuntimeError,
    ) as error:  # RuntimeError: wrong checksum
        why = " ".join(str(getattr(error, "reason", error)).split())
        raise MissingWeights(
            f"{file.name} is not in {', '.join(map(str, places))} and could not be downloaded ({why}): "
            f"download {file.url} into {cache}, or {remedy}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return cache / file.name


def read_weights_file(path: Path, file: WeightsFile, prefix: str = "") -> dict[str, Tensor]:
    """Read a published file's tensors by ``prefix``; raise ValueError if it is cut off, of another kind, non-finite."""
    wrong, again = f"{path} is not a file of {file.what} weights", f"download {file.url} again"
    try:
        content = _read_torch(path, legacy=True)  # torchvision's VGG is of that format
    except ValueError as error:
        raise ValueError(f"{wrong}: it is cut off, or another kind of file; {again}") from error
    named = content if isinstance(content, dict) else {}
    if not named or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in named.items()
    ):
        raise ValueError(f"{wrong}: it holds more than tensors; {again}")
    chosen = {name: tensor for name, tensor in named.items() if name.startswith(prefix)}
    if broken := [name for name, tensor in chosen.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{wrong}: {broken[0]} has non-finite values; {again}")
    return chosen


def load_weights_file(
    path: Path, file: WeightsFile, prefix: str, tensors: Mapping[str, Tensor]
) -> None:
    """Copy a file's values into ``tensors``, by their names after ``prefix``; raise ValueError if they do not fit."""
    state = read_weights_file(path, file, prefix)
    for name, own in sorted((prefix + name, own) for name, own in tensors.items()):
        found = state.get(name)
        if found is None or found.shape != own.shape:
            wrong = (
                "is missing" if found is None else f"is {tuple(found.shape)} for {tuple(own.shape)}"
            )
            raise ValueError(f"{path} is not a file of {file.what} weights: {name} {wrong}")
        own.copy_(found)


def provenance(path: Path, file: WeightsFile) -> dict[str, object]:
    """Describe a file beside a result: its name, its SHA-256, and whether that is the published file's."""
    state = path.stat()
    digest = _sha256(path.resolve(), state.st_size, state.st_mtime_ns)
    return {"file": path.name, "sha256": digest, "published": digest.startswith(file.sha256)}


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001  (they invalidate the cache)
    return file_sha256(path)
