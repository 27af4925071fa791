"""What a shard of latents holds for each image, as bytes, and what lies beside the shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from olvae.data.reading import UnreadableImageError
from olvae.data.shards import Entry

__all__ = ["FLIP", "LATENT", "META", "STATS", "Latent", "latent_bytes", "read_latent", "read_stats"]

LATENT = "latent.safetensors"
"""The extension of the tensors: ``mean`` and ``std`` of the posterior, or one ``latent``, each (n_z, h, w)."""

META = "latent.json"
"""The extension of an image's ``key``, its ``width`` and ``height`` before it was resized, and the size of the
``image`` that the latent stands for, [width, height]: where it is no multiple of f, the image was padded."""

FLIP = "_flip"
"""What the names of the mirrored image's tensors end with."""

STATS = "stats.json"
"""The file beside the shards that describes them; it is written last, so what has none is not complete."""


class Latent(NamedTuple):
    """Of one image: a Gaussian's ``mean`` and ``std``, or a latent as it is, whose std is None; (n_z, h, w)."""

    mean: Tensor
    std: Tensor | None = None

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """A sample of the Gaussian, or without a generator its mode; float32."""
        mean = self.mean.float()
        if self.std is None or generator is None:
            return mean
        return mean + self.std.float() * torch.randn(mean.shape, generator=generator)


def latent_bytes(latent: Latent, flipped: Latent | None) -> bytes:
    """The file of an image's tensors, and of those of the mirrored image, if there are any."""
    tensors: dict[str, Tensor] = {}
    for ending, one in (("", latent), (FLIP, flipped)):
        if one is None:
            continue
        if one.std is None:
            tensors[f"latent{ending}"] = one.mean.contiguous()
        else:
            tensors[f"mean{ending}"], tensors[f"std{ending}"] = one.mean.contiguous(), one.std.contiguous()
    return save(tensors)


def read_latent(entry: Entry) -> tuple[Latent, Latent | None, dict[str, Any]]:
    """An image's latent, the mirrored image's if it is there, and what ``latent.json`` says.

    Raises:
        UnreadableImageError: the files are broken, or none of :func:`latent_bytes`.
    """
    try:
        tensors = load(entry.data)
        meta = json.loads(entry.files[META])
        flipped = _latent(tensors, FLIP) if any(name.endswith(FLIP) for name in tensors) else None
        width, height = meta["image"]
        return _latent(tensors, ""), flipped, {**meta, "key": str(meta["key"]), "image": [int(width), int(height)]}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UnreadableImageError(entry.name, f"not a latent of `olvae encode`: {error}") from error


def _latent(tensors: Mapping[str, Tensor], ending: str) -> Latent:
    if f"latent{ending}" in tensors:
        return Latent(tensors[f"latent{ending}"])
    return Latent(tensors[f"mean{ending}"], tensors[f"std{ending}"])


def read_stats(folder: str | Path) -> dict[str, Any]:
    """The description of a folder of latents.

    Raises:
        FileNotFoundError: there is none: the folder is not one of latents, or not complete.
        ValueError: it is not readable.
    """
    path = Path(folder).expanduser() / STATS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {STATS}, so these are no latents, or not all of them yet: run `olvae encode` (again)"
        )
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        numbers = {name: float(stats[name]) for name in ("shift_factor", "scaling_factor")}
        return {**stats, **numbers, "count": int(stats["count"]), "size": int(stats["size"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a description of latents: {error!r}") from error
