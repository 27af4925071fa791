"""Weights in: what is in a file, and a strict report where it does not fit.

The names of the parameters are the published ones [M]: ``encoder.*``, ``decoder.*``, ``quantizer.*``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AUTOENCODER", "load_weights", "pick_weights", "read_checkpoint", "read_weights"]

AUTOENCODER = ("encoder.", "decoder.", "quantizer.")
"""Prefixes of an autoencoder's parameters; a checkpoint may carry a loss, a discriminator, EMA copies besides."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A torch file as a dictionary; only tensors and plain values are read, never code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable checkpoint (cut off, of another kind, or a pickle with code)"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint, but a {type(content).__name__}")
    return content


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The autoencoder's tensors by their published names, from a Lightning checkpoint (EMA weights where it has
    them), a bare state dict, or a safetensors file.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_checkpoint`; also where there is no autoencoder in it.
    """
    if Path(path).suffix == ".safetensors":
        return pick_weights(_read_safetensors(path), path)
    return pick_weights(read_checkpoint(path), path)


def pick_weights(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The autoencoder's tensors of what was read from ``path``; see :func:`read_weights`."""
    content = checkpoint.get("state_dict", checkpoint)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: not a checkpoint: its state_dict is a {type(content).__name__}")
    weights = {n: t for n, t in content.items() if isinstance(t, Tensor) and n.startswith(AUTOENCODER)}
    if not weights:
        raise ValueError(f"{path}: no autoencoder in it: no name starts with {' or '.join(AUTOENCODER)}")
    return weights


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], origin: str | Path) -> None:
    """Copy ``weights`` into the parameters and buffers of ``module`` of the same names: all of them, or none.

    Raises:
        ValueError: names are missing, unexpected or of another shape; the message lists them.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(AUTOENCODER)}
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    misshapen = [
        f"{name} {_shape(weights[name])} for {_shape(own[name])}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    broken = [name for name, tensor in weights.items() if name in own and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{origin}: {len(broken)} of its tensors have values that are not finite ({broken[0]}, ...)")
    report = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if report:
        raise ValueError(f"{origin}: these weights are of another model: {'; '.join(report)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
