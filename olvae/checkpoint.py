"""Read and write weights: safetensors, torch and Lightning checkpoints.

The names of the autoencoder's parameters are the published ones [M]: ``encoder.*``, ``decoder.*``,
``quantizer.*``.

A received file must neither run code nor fill the memory. torch's reader with ``weights_only`` runs
no code, but calls constructors that take any amount of memory, and ignores checksums. So the
directory, the checksums and the pickle of a file are scanned first, and its tensors are mapped into
memory.
"""

import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from olvae.files import ON_WINDOWS, atomic_write
from olvae.pickle_scan import EXPANDED_BYTES, UNREADABLE, scan_pickle

# A checkpoint may also hold a loss, a discriminator and so on.
AUTOENCODER = ("encoder.", "decoder.", "quantizer.")

# Prefix of tensor names in files that other projects' loaders should not take for their own.
PRIVATE_PREFIX = "olvae."

# The key of the checksum in the header of a safetensors file.
SUM_KEY = "olvae.sha256"


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
    # MAR's checkpoint has it as `model`.
    whole = checkpoint.get("model")
    if not isinstance(whole, Mapping):
        whole = checkpoint
    parts = {"state_dict": checkpoint.get("state_dict", whole)}
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
        scan_pickle(path)


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

    On Windows they are read into memory, because a file that is mapped can't be replaced there.

    ``legacy`` accepts files that torch before 1.6 wrote, which are not scanned; only for known
    files.
    """
    is_zip = not legacy or zipfile.is_zipfile(path)
    names = scan_pickle(path, check) if is_zip else set()
    mapped = is_zip and not ON_WINDOWS
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


def _shell(name: str) -> type | tuple[Callable[..., Any], str]:
    """Make a class of this name that does nothing; torch fills no dictionary but its own kinds."""
    if name == "collections.defaultdict":
        return (lambda *_: {}), name
    module, _, last = name.rpartition(".")

    def ignore(*_: object) -> None: ...

    return type(last, (dict,), {"__module__": module, "__init__": ignore, "__setstate__": ignore})
