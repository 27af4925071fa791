"""Read and write weights: safetensors, torch and Lightning checkpoints, pretrained networks.

The names of the autoencoder's parameters are the published ones [M]: ``encoder.*``, ``decoder.*``,
``quantizer.*``.

A received file must neither run code nor fill the memory. torch's reader with ``weights_only`` runs
no code, but calls constructors that take any amount of memory, and ignores checksums. So the
directory, the checksums and the pickle of a file are scanned first, and its tensors are mapped into
memory.
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

# A checkpoint may also hold a loss, a discriminator and so on.
AUTOENCODER = ("encoder.", "decoder.", "quantizer.")

# Prefix of tensor names in files that other projects' loaders should not take for their own.
PRIVATE_PREFIX = "olvae."

# The key of the checksum in the header of a safetensors file.
SUM_KEY = "olvae.sha256"

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

# The environment variable with a folder of pretrained weights.
FOLDER_VARIABLE = "OLVAE_WEIGHTS"

# Seconds that a server may be silent, before it answers or during a download.
SILENCE_S = 10.0


class _RefusedError(ValueError):
    """The reason why a pickle is not read, without its file's name."""


def read_checkpoint(path: str | Path, check: bool = True) -> dict[str, Any]:
    """Read a safetensors or torch file: only tensors and plain values, never code.

    ``check`` compares checksums, which reads the whole file; without it, the tensors are mapped
    from the file, which is enough for names and shapes. ValueError if it is not a checkpoint, holds
    more than tensors and plain values, or does not match its checksum.
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
    """Read the autoencoder's tensors from a Lightning checkpoint, a state dict, or safetensors.

    ``raw``: the weights as trained, where the file also has averaged ones (EMA). Errors as
    :func:`read_checkpoint`, and ValueError if it has no autoencoder.
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
    """Return the tensors in a checkpoint's state dict, averaged ones where it has them.

    ``raw``: the weights as trained. Our averaging, and Lightning's, keep the average in
    ``state_dict``, and in ``current_model_state`` the raw weights of the averaged tensors, or of
    all. The latent-diffusion code keeps the average of ``a.b`` as ``model_ema.ab``.
    """
    parts = {"state_dict": checkpoint.get("state_dict", checkpoint)}
    if raw:
        # Last, so that it overwrites what has the same names.
        parts["current_model_state"] = checkpoint.get("current_model_state", {})
    content: dict[str, Tensor] = {}
    for key, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f"{path}: not a checkpoint: its {key} is a {type(part).__name__}")
        for name, value in part.items():
            if isinstance(name, str) and isinstance(value, Tensor):
                content[name] = value
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
    """Copy ``weights`` into the module's tensors of the same names, if they begin with a prefix.

    All of them, or none: ValueError if names are missing, unexpected or of another shape (the
    message lists them), or values are non-finite, or integers, as quantised weights are. With
    ``allow_mismatch``, copy those that fit, and warn.
    """
    state = module.state_dict()
    own = {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}
    fitting = [name for name in own if name in weights and weights[name].shape == own[name].shape]

    # Values: floating-point numbers, finite also in the module's precision.
    integer = [
        name
        for name in fitting
        if own[name].is_floating_point() and not weights[name].is_floating_point()
    ]
    if integer:
        kind = _dtype_name(weights[integer[0]].dtype)
        raise ValueError(
            f"{origin}: {len(integer)} of its tensors are {kind}, quantised perhaps "
            f"({integer[0]}, ...)"
        )
    broken = []
    for name in fitting:
        dtype = own[name].dtype if own[name].is_floating_point() else weights[name].dtype
        if not weights[name].to(dtype).float().isfinite().all():
            broken.append((name, dtype))
    if broken:
        name, dtype = broken[0]
        raise ValueError(
            f"{origin}: {len(broken)} of its tensors have non-finite values in "
            f"{_dtype_name(dtype)} ({name}, ...)"
        )

    # Names and shapes.
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    misshapen = []
    for name in own:
        if name in weights and name not in fitting:
            misshapen.append(f"{name} {_shape(weights[name])} for {_shape(own[name])}")
    report = mismatches(missing, unexpected, misshapen)
    if report and not (allow_mismatch and fitting):
        raise ValueError(f"{origin}: these weights are of another model: {report}")
    if report:
        loaded = f"{len(fitting)} of {len(own)} tensors are loaded"
        warnings.warn(f"{origin}: {loaded}: {report}", stacklevel=2)

    with torch.no_grad():
        for name in fitting:
            own[name].copy_(weights[name])


def mismatches(missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> str:
    """Count and name the tensors that do not fit; empty if everything fits."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    texts = []
    for kind, names in kinds:
        if names:
            more = ", ..." if len(names) > 3 else ""
            texts.append(f"{len(names)} {kind} ({', '.join(names[:3])}{more})")
    return "; ".join(texts)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, always the same bytes, with a checksum of all in its header."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {"format": "pt", **(metadata or {})}
    save_file(weights, path, metadata={**entries, SUM_KEY: tensors_sum(weights, entries)})
    # safetensors makes the file readable by its owner alone.
    path.chmod(0o644)

    # safetensors writes the metadata in random order: sort it in place. The header's length stays.
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.seek(8)
        file.write(text.encode().ljust(length))


def add_sums(folder: Path) -> None:
    """Put checksums into the headers of safetensors files that another library wrote."""
    for file in sorted(folder.glob("[!.]*.safetensors")):
        with atomic_write(file) as partial:
            write_tensors(partial, load_file(file))


def tensors_sum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of tensors' names, shapes, dtypes and values, and of metadata, in hex."""
    digest = hashlib.sha256(b"" if metadata is None else repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_file(path: Path) -> None:
    """Check weights that another library will read; ValueError as :func:`read_checkpoint`."""
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
    """Return the metadata of a safetensors file; ValueError if it is not one."""
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def _read_torch(path: Path, legacy: bool = False, check: bool = True) -> Any:
    """Read a file of ``torch.save``: plain values, and tensors on the CPU, mapped from the file.

    ``legacy`` accepts files that torch before 1.6 wrote, which are not scanned; only for known
    files.
    """
    mapped = not legacy or zipfile.is_zipfile(path)
    names = _scan(path, check) if mapped else set()
    ignored = "Detected pickle protocol|TypedStorage is deprecated"
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([_shell(name) for name in names]),
        ):
            warnings.filterwarnings("ignore", message=ignored)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # torch and pickle raise all kinds.
        raise ValueError(f"{path}: {UNREADABLE}: cut off, or of another kind") from error
    size = sum(tensor.numel() * tensor.itemsize for tensor in _tensors(content))
    if size > 2 * path.stat().st_size + EXPANDED_BYTES:
        raise ValueError(f"{path}: {UNREADABLE}: its tensors are larger than they are in the file")
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers, each container once."""
    waiting = [content]
    seen = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def _scan(path: Path, check: bool = True) -> set[str]:
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


def _shell(name: str) -> type:
    """Make a class of this name that does nothing."""
    module, _, last = name.rpartition(".")

    def ignore(*_: object) -> None: ...

    return type(last, (dict,), {"__module__": module, "__init__": ignore, "__setstate__": ignore})


@dataclass(frozen=True)
class WeightsFile:
    """A published file of pretrained weights."""

    # The network, for messages.
    what: str
    url: str
    # Another name under which the same file is published.
    alias: str | None = None
    # The first digits of its SHA-256, if they do not end its name.
    digits: str | None = None

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
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    # torch-fidelity's name.
    alias="weights-inception-2015-12-05-6726825d.pth",
)
DINOV2 = WeightsFile(
    "DINOv2",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    digits="d5383ea8f4877b2472eb973e0fd72d55",
)


class MissingWeights(FileNotFoundError):  # noqa: N818  (it reads as what it says)
    """Weights that were not found and can't be downloaded; one line, with the remedy."""


def find_weights(
    file: WeightsFile,
    weights_dir: str | Path | None = None,
    remedy: str = "name its folder in `weights_dir`",
) -> Path:
    """Find a file of pretrained weights, or download it.

    It is looked for in ``weights_dir``, in the folder that OLVAE_WEIGHTS names, and in torch hub's
    cache, which a download goes to. Without internet a download fails soon: MissingWeights, with
    ``remedy``, what else the user can do.
    """
    if weights_dir is not None and not Path(weights_dir).is_dir():
        raise NotADirectoryError(f"{weights_dir}: no such folder of weights")

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    places = [Path(place) for place in (weights_dir, os.environ.get(FOLDER_VARIABLE)) if place]
    places.append(cache)
    for place in places:
        for name in (file.name, file.alias):
            if name is not None and (place / name).is_file():
                return place / name

    # torch's download sets no timeout of its own.
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(cache / file.name), hash_prefix=file.sha256)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        # RuntimeError: a wrong checksum.
        why = " ".join(str(getattr(error, "reason", error)).split())
        raise MissingWeights(
            f"{file.name} is not in {', '.join(map(str, places))} and could not be downloaded "
            f"({why}): download {file.url} into {cache}, or {remedy}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return cache / file.name


def read_weights_file(path: Path, file: WeightsFile, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a published file whose names start with ``prefix``.

    ValueError if the file is cut off, of another kind, or has non-finite values.
    """
    wrong = f"{path} is not a file of {file.what} weights"
    again = f"download {file.url} again"
    try:
        # torchvision's VGG is of the legacy format.
        content = _read_torch(path, legacy=True)
    except ValueError as error:
        raise ValueError(f"{wrong}: it is cut off, or another kind of file; {again}") from error
    named = content if isinstance(content, dict) else {}
    if not named or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in named.items()
    ):
        raise ValueError(f"{wrong}: it holds more than tensors; {again}")
    chosen = {name: tensor for name, tensor in named.items() if name.startswith(prefix)}
    for name, tensor in chosen.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{wrong}: {name} has non-finite values; {again}")
    return chosen


def load_weights_file(
    path: Path, file: WeightsFile, prefix: str, tensors: Mapping[str, Tensor]
) -> None:
    """Copy a file's values into ``tensors``, by their names after ``prefix``.

    ValueError if a tensor is missing or of another shape.
    """
    state = read_weights_file(path, file, prefix)
    wrong = f"{path} is not a file of {file.what} weights"
    for own_name, own in sorted(tensors.items()):
        name = prefix + own_name
        found = state.get(name)
        if found is None:
            raise ValueError(f"{wrong}: {name} is missing")
        if found.shape != own.shape:
            raise ValueError(f"{wrong}: {name} is {tuple(found.shape)} for {tuple(own.shape)}")
        own.copy_(found)


def provenance(path: Path, file: WeightsFile) -> dict[str, object]:
    """Describe a file beside a result: its name and SHA-256, and if it is the published file."""
    state = path.stat()
    digest = _sha256(path.resolve(), state.st_size, state.st_mtime_ns)
    return {"file": path.name, "sha256": digest, "published": digest.startswith(file.sha256)}


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001
    """Return a file's SHA-256, cached until its size or time changes."""
    return file_sha256(path)
