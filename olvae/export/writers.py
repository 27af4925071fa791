"""What `olvae encode` stores of an image, and the writer of our own shards."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from olvae.config import ConfigError
from olvae.data.read_errors import ReadError
from olvae.data.shards.index import INDEX
from olvae.data.shards.latent_source import LATENT, META, SHARDS, Latent, latent_bytes
from olvae.data.shards.write import Resumable, WebDatasetSample, write_tar
from olvae.export.inputs import Inputs, Item
from olvae.files import write_json
from olvae.models.autoencoder import Autoencoder

__all__ = ["EncodeOptions", "Encoded", "LatentWriter", "ShardWriter"]


@dataclass(frozen=True)
class EncodeOptions:
    """What is stored.

    Args:
        size: pixels of the square images after resizing the shorter side and cropping the centre; 0 keeps every image
            at its own size, padded at the bottom and the right to a multiple of f.
        moments: store the posterior's mean and standard deviation, else one sample of it.
        seed: of the samples' noise.
        dtype: of the latents, a name of :data:`~olvae.modules.precision.DTYPES`.
        flip: store the mirrored image's latent as well.
        images: store the pixels that are encoded as well, as PNG.
        precision: that the encoder computes in, a name of :data:`~olvae.modules.precision.PRECISIONS`.
        format: of the files, a name of :data:`~olvae.export.encode.FORMATS`.
    """

    size: int
    moments: bool = True
    seed: int = 0
    dtype: str = "float16"
    flip: bool = False
    images: bool = False
    precision: str = "32"
    format: str = SHARDS


class Encoded(NamedTuple):
    """An image's latent, then the mirrored image's if it is stored; width and height before and after resizing; whether
    the file's pixels were turned upright."""

    item: Item
    original: tuple[int, int]
    size: tuple[int, int]
    latents: Sequence[Latent]
    turned: bool = False


@dataclass(frozen=True)
class LatentWriter(Resumable[Encoded]):
    """Writes latents in one format."""

    def check_options(self, model: Autoencoder, inputs: Inputs, options: EncodeOptions) -> None:
        """Before anything is encoded.

        Raises:
            ConfigError: the format can't express what is to be stored.
        """

    def plan(self) -> Mapping[str, Any]:
        """What the files depend on beside weights, images and options."""
        return {}

    def accept(self, encoded: Encoded) -> Encoded | ReadError:
        """The image, or why the format can't express it."""
        return encoded

    @abstractmethod
    def finish(self, stats: Mapping[str, Any], images: Mapping[str, int]) -> None:
        """Write what describes all shards, given the content of stats.json and the images in each shard's file."""


@dataclass(frozen=True)
class ShardWriter(LatentWriter):
    """WebDataset shards with everything that there is."""

    def pack(self, path: Path, samples: Iterator[Encoded]) -> None:
        write_tar(path, map(_sample, samples))

    def finish(self, stats: Mapping[str, Any], images: Mapping[str, int]) -> None:
        shards = {name: {"images": count} for name, count in images.items()}
        write_json({"version": 1, "images": stats["count"], "shards": shards}, self.folder / INDEX)


def _sample(encoded: Encoded) -> WebDatasetSample:
    meta = {
        "key": encoded.item.key,
        "width": encoded.original[0],
        "height": encoded.original[1],
        "image": list(encoded.size),
    }
    files = {META: json.dumps(meta).encode(), LATENT: latent_bytes(*encoded.latents)}
    return WebDatasetSample(encoded.item.name, {**encoded.item.files, **files})


def check_one_latent(options: EncodeOptions) -> None:
    """For formats with one latent per image and no place for anything else.

    Raises:
        ConfigError: moments or images are to be stored.
    """
    if options.moments:
        raise ConfigError(f"--moments: {options.format} holds one latent per image: leave it out, or use --sample")
    if options.images:
        raise ConfigError(f"--images: {options.format} has no place for pixels: leave it out")
