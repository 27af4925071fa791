"""Latents as LightningDiT reads them: a safetensors file for each shard, and their mean and deviation by channel.

Names and shapes are those of extract_features.py and datasets/img_latent_dataset.py of hustvl/LightningDiT
(docs/encode.md says what was read).
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from olvae.config import ConfigError
from olvae.data.read_errors import ReadError
from olvae.export.inputs import DatasetInputs, Inputs
from olvae.export.writers import Encoded, EncodeOptions, LatentWriter, check_one_latent
from olvae.files import atomic_write
from olvae.models.autoencoder import Autoencoder

__all__ = ["LIGHTNINGDIT", "LightningDiTWriter"]

LIGHTNINGDIT = "lightningdit"

STATISTICS = "latents_stats.pt"


@dataclass(frozen=True)
class LightningDiTWriter(LatentWriter):
    """``latents`` and ``latents_flip``, (N, n_z, h, w), and ``labels``, int64 (N,), for the N images of a shard."""

    extension: str = "safetensors"

    def check_options(self, model: Autoencoder, inputs: Inputs, options: EncodeOptions) -> None:  # noqa: ARG002
        check_one_latent(options)
        if not options.size:
            raise ConfigError(f"--native: {LIGHTNINGDIT} holds latents of one size: give --size")
        if not options.flip:
            raise ConfigError(f"--format {LIGHTNINGDIT}: it reads mirrored latents half of the time: add --flip")
        if isinstance(inputs, DatasetInputs) and not inputs.classes:
            raise ConfigError(
                f"--format {LIGHTNINGDIT}: every image has a label: add --classes, or give shards with .cls files"
            )

    def accept(self, encoded: Encoded) -> Encoded | ReadError:
        label = encoded.item.files.get("cls", b"")
        return encoded if label.strip().isdigit() else ReadError(encoded.item.key, "no .cls file with a number")

    def pack(self, path: Path, samples: Iterator[Encoded]) -> None:
        images = list(samples)
        if not images:
            path.touch()
            return
        own, mirrored = (torch.stack([image.latents[side].mean for image in images]) for side in (0, 1))
        labels = torch.tensor([int(image.item.files["cls"]) for image in images])
        save_file({"latents": own, "latents_flip": mirrored, "labels": labels}, path)

    def finish(self, stats: Mapping[str, Any], images: Mapping[str, int]) -> None:  # noqa: ARG002
        values = {name: torch.tensor(stats[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std")}
        content = io.BytesIO()  # a file's name would be among the bytes
        torch.save(values, content)
        with atomic_write(self.folder / STATISTICS) as partial:
            partial.write_bytes(content.getvalue())
