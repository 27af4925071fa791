"""Read weights from a file, and load them strictly: all of them fit, or a report says which do not.

The names of the parameters are the published ones [M]: ``encoder.*``, ``decoder.*``, ``quantizer.*``.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from olvae.checksums import check_sums, check_tensors_sum
from olvae.torchfile import RefusedError, load_torch

__all__ = [
    "APART",
    "AUTOENCODER",
    "load_weights",
    "mismatches",
    "pick_weights",
    "read_checkpoint",
    "read_weights",
    "state_dict_of",
]

AUTOENCODER = ("encoder.", "decoder.", "quantizer.")
"""Prefixes of an autoencoder's parameters; a checkpoint may also hold a loss, a discriminator, EMA copies."""

APART = "olvae."
"""In front of these prefixes in files whose names other projects' loaders must not take for their own."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a safetensors or torch file; only tensors and plain values, never code.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not a checkpoint, holds more than tensors and plain values, or is not what its checksum says.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    check_sums(Path(path))
    if Path(path).suffix == ".safetensors":
        try:
            tensors = dict(load_file(path))
            check_tensors_sum(Path(path), tensors)
            return tensors
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    try:
        content = load_torch(path)
    except RefusedError as error:
        raise ValueError(f"{path}: not a readable checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint, but a {type(content).__name__}")
    return content


def read_weights(path: str | Path, raw: bool = False) -> dict[str, Tensor]:
    """Read the autoencoder's tensors from a Lightning checkpoint, a bare state dict, or a safetensors file.

    Args:
        raw: the weights as trained, where the file also has averaged ones (EMA).

    Raises:
        FileNotFoundError, ValueError: as :func:`read_checkpoint`; also where there is no autoencoder in it.
    """
    return pick_weights(state_dict_of(read_checkpoint(path), path, raw), path)


def pick_weights(state: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """Pick the autoencoder's tensors out of the state dict that was read from ``path``; see :func:`read_weights`."""
    named = {name.removeprefix(APART): value for name, value in state.items()}
    weights = {n: t for n, t in named.items() if isinstance(t, Tensor) and n.startswith(AUTOENCODER)}
    if not weights:
        raise ValueError(f"{path}: no autoencoder in it: no name starts with {' or '.join(AUTOENCODER)}")
    return weights


def state_dict_of(checkpoint: Mapping[str, Any], path: str | Path, raw: bool = False) -> dict[str, Any]:
    """The state dict in a checkpoint, with averaged weights where it has them, unless ``raw``.

    Our averaging, and Lightning's, keep the average in ``state_dict`` and the raw weights of the averaged names, or of
    all, in ``current_model_state``; the latent-diffusion code keeps the average of ``a.b`` as ``model_ema.ab``.
    """
    parts = {"state_dict": checkpoint.get("state_dict", checkpoint)}
    if raw:
        parts["current_model_state"] = checkpoint.get("current_model_state", {})
    content: dict[str, Any] = {}
    for key, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f"{path}: not a checkpoint: its {key} is a {type(part).__name__}")
        content |= {name: value for name, value in part.items() if isinstance(name, str)}
    if raw:
        return content
    average = {name: content.get(f"model_ema.{name.replace('.', '')}") for name in content}
    return {name: value if average[name] is None else average[name] for name, value in content.items()}


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    origin: str | Path,
    allow_mismatch: bool = False,
    prefixes: tuple[str, ...] = AUTOENCODER,
) -> None:
    """Copy ``weights`` into the parameters and buffers of ``module`` of the same names: all of them, or none.

    Args:
        allow_mismatch: copy those that fit, and warn of the others.
        prefixes: of the names in ``module`` that are loaded.

    Raises:
        ValueError: names are missing, unexpected or of another shape (the message lists them), or values are
            non-finite, or integers, as quantised weights are.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(prefixes)}
    fitting = [name for name in own if name in weights and weights[name].shape == own[name].shape]
    integer = [name for name in fitting if own[name].is_floating_point() and not weights[name].is_floating_point()]
    if integer:
        kind = str(weights[integer[0]].dtype).removeprefix("torch.")
        raise ValueError(f"{origin}: {len(integer)} of its tensors are {kind}, quantised perhaps ({integer[0]}, ...)")
    broken = [name for name in fitting if not weights[name].float().isfinite().all()]
    if broken:
        raise ValueError(f"{origin}: {len(broken)} of its tensors have non-finite values ({broken[0]}, ...)")
    shapes = [
        f"{name} {_shape(weights[name])} for {_shape(tensor)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    report = mismatches([n for n in own if n not in weights], [n for n in weights if n not in own], shapes)
    if report and not (allow_mismatch and fitting):
        raise ValueError(f"{origin}: these weights are of another model: {report}")
    if report:
        warnings.warn(f"{origin}: {len(fitting)} of {len(own)} tensors are loaded: {report}", stacklevel=2)
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
