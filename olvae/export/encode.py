"""``olvae encode``: images to shards of latents with their statistics, in one process or several, resumable."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olvae.data.errors import ReadError
from olvae.data.image import from_uint8
from olvae.data.shards.index import INDEX
from olvae.data.shards.latents import LATENT, META, STATS, Latent, latent_bytes
from olvae.data.shards.pairs import CHANNELS
from olvae.data.shards.write import ResumableShards, WebDatasetSample, shard_name
from olvae.export.inputs import Inputs, ReadImage, read_batches
from olvae.files import write_json
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.large.memory import GIB
from olvae.models.large.padding import pad_to_multiple
from olvae.models.large.streaming import encode_within
from olvae.modules.base import weights_checksum
from olvae.modules.distributions import Posterior, keyed_generator
from olvae.modules.precision import DTYPES

__all__ = ["EncodeJob", "EncodeOptions", "LatentSums"]


@dataclass
class LatentSums:
    """Counts, and sums per channel in float64, from which the moments of z = mean + std * noise are computed.

    Kept for each shard and added in the shards' order, so that interruptions don't change the last digit. As in
    ``olvae latents``, the variance of z is the variance of the means plus the mean of the variances.

    Args:
        images: number of images.
        positions: number of positions of their latents, including those of mirrored images.
        shape: of each latent, [n_z, h, w]; None if they differ.
        sums: of the means, of their squares and of the variances, n_z numbers each.
    """

    images: int = 0
    positions: int = 0
    shape: list[int] | None = None
    sums: list[list[float]] = field(default_factory=list)

    def update(self, latents: Iterable[Latent]) -> None:
        """Add one image: its latent, and that of the mirrored image if it is stored."""
        for i, latent in enumerate(latents):
            mean = latent.mean.double().flatten(1)  # (n_z, h w)
            var = torch.zeros_like(mean) if latent.std is None else latent.std.double().flatten(1).square()
            sums = torch.stack([mean.sum(1), mean.square().sum(1), var.sum(1)])
            self.add(LatentSums(int(i == 0), mean.shape[1], list(latent.mean.shape), sums.tolist()))

    def add(self, other: "LatentSums") -> None:
        self.shape = other.shape if not self.positions or other.shape == self.shape else None
        self.sums = np.add(self.sums, other.sums).tolist() if self.positions else other.sums
        self.images += other.images
        self.positions += other.positions

    def as_dict(self) -> dict[str, Any]:
        """The latents' shape, shift and scaling factors, and by channel mean and deviation, also of the means alone."""
        mean, square, var = torch.tensor(self.sums, dtype=torch.float64) / self.positions  # (n_z)
        shift = float(mean.mean())
        variance = float((square + var).mean()) - shift**2
        if not variance > 0.0:
            raise ValueError(
                "the latents are all equal: they have no scaling factor, and nothing can be learned from them"
            )
        return {
            "latent_shape": self.shape,
            "shift_factor": shift,
            "scaling_factor": variance**-0.5,
            "latents_mean": mean.tolist(),
            "latents_std": (square - mean.square() + var).clamp(min=0.0).sqrt().tolist(),
            "means_std": (square - mean.square()).clamp(min=0.0).sqrt().tolist(),
        }


STATE = ".encode"
"""The folder beside the shards of latents with the plan and what is known about each finished shard."""


@dataclass(frozen=True)
class EncodeOptions:
    """What is stored.

    Args:
        size: pixels of the square images after resizing the shorter side and cropping the centre; 0 keeps every image
            at its own size, padded at the bottom and the right to a multiple of f.
        moments: store the posterior's mean and standard deviation, else one sample of it.
        seed: of the samples' noise.
        dtype: of the latents, a name of :data:`DTYPES`.
        flip: store the mirrored image's latent as well.
        images: store the pixels that are encoded as well, as PNG.
    """

    size: int
    moments: bool = True
    seed: int = 0
    dtype: str = "float16"
    flip: bool = False
    images: bool = False


class EncodeJob:
    """Encodes the images of :data:`~olvae.export.inputs.Inputs` into a folder, in one process or several.

    Output shard i goes to process i modulo their number. Neither interruptions nor the number of processes change a
    byte; see :class:`~olvae.data.shards.write.ResumableShards`.

    Args:
        model: on its device, in evaluation mode.
        inputs: the images.
        options: what is stored.
        folder: of the shards, created if missing.
        describe: further entries of stats.json, such as the target's name.

    Raises:
        ConfigError: the folder holds latents of other options, images or weights, or something else.
        ValueError: images of this size don't suit the model, or images that are to be stored have several sizes or a
            number of channels that PNG doesn't know.
    """

    def __init__(
        self, model: Autoencoder, inputs: Inputs, options: EncodeOptions, folder: Path, describe: dict[str, Any]
    ) -> None:
        if options.size % model.downscale:
            raise ValueError(
                f"images of {options.size}x{options.size} pixels, but a latent element stands for "
                f"{model.downscale}x{model.downscale} of them: choose a --size that is a multiple of {model.downscale}"
            )
        if options.images and not options.size:
            raise ValueError("--images and --native: images that are stored beside latents have one size: give --size")
        if options.images and model.in_channels not in CHANNELS.values():
            raise ValueError(f"--images: PNG stores 1, 3 or 4 channels, but the images have {model.in_channels}")
        self.model = model
        self.inputs = inputs
        self.options = options
        self.shards = ResumableShards(folder, STATE)
        weights = weights_checksum(model)
        self.describe = {**describe, "weights": weights, "downscale": model.downscale, "channels": model.in_channels}
        self.shards.begin({"weights": weights, **inputs.plan(asdict(options))})

    def run(
        self,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 8,
        threads: int = 2,
        memory: int = 4 * GIB,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Encode this process's shards, except those that are finished.

        Args:
            batch_size: images at a time, all of one size.
            threads: that read images; 0 reads them in between.
            memory: bytes that encoding images of their own sizes may take; see :func:`encode_within`.
            advance: called with the number of further images that are done, including those of finished shards.

        Raises:
            ValueError: latents have non-finite values, or are too large for the dtype.
            OSError: a remote shard can't be read now.
        """
        for shard in range(rank, len(self.inputs), world):
            finished = self.shards.finished(shard)
            if finished is None:
                sums = LatentSums()
                samples = self._samples(shard, sums, batch_size, threads, memory, advance)
                self.shards.write(shard, samples, partial(asdict, sums))
            else:
                advance(finished.record.images + len(finished.unreadable))

    def finish(self) -> dict[str, Any]:
        """When all shards are finished: write ``index.json``, and last ``stats.json``, whose content is returned.

        Raises:
            ValueError: no image could be read.
        """
        finished = [self.shards.finished(number) for number in range(len(self.inputs))]
        sums, counts, unreadable = LatentSums(), {}, []
        for number, shard in enumerate(finished):
            assert shard is not None
            unreadable += [{"name": error.name, "reason": error.reason} for error in shard.unreadable]
            if shard.record.images:
                sums.add(LatentSums(**shard.details))
                counts[shard_name(number)] = {"images": shard.record.images}
        if not sums.images:
            for number in range(len(finished)):
                self.shards.forget(number)  # so that the same command tries again
            if not unreadable:
                raise ValueError("no images in these shards: an image is a file KEY.jpg, KEY.png, ...")
            first = unreadable[0]
            raise ValueError(f"none of the images could be read: {first['name']}: {first['reason']}")
        stats = {
            "count": sums.images,
            **sums.as_dict(),
            **asdict(self.options),
            **self.describe,
            "classes": list(self.inputs.classes),
            "unreadable": {"count": len(unreadable), "images": unreadable},
        }
        write_json({"version": 1, "images": sums.images, "shards": counts}, self.shards.folder / INDEX)
        write_json(stats, self.shards.folder / STATS)
        return stats

    def _samples(
        self,
        shard: int,
        sums: LatentSums,
        batch_size: int,
        threads: int,
        memory: int,
        advance: Callable[[int], None],
    ) -> Iterator[WebDatasetSample | ReadError]:
        """What a shard is made of, in order; its latents are added to ``sums``."""
        for batch in read_batches(self.inputs.read(shard), self.options.size, batch_size, threads, self.options.images):
            images = [one for one in batch if isinstance(one, ReadImage)]
            yield from (one for one in batch if isinstance(one, ReadError))
            if images:
                yield from self._encode(images, memory, sums)
            advance(len(batch))

    @torch.inference_mode()
    def _encode(self, images: Sequence[ReadImage], memory: int, sums: LatentSums) -> list[WebDatasetSample]:
        device = next(self.model.parameters()).device
        x = from_uint8(torch.stack([image.pixels for image in images]).to(device))  # (B, C, H, W)
        keys = [image.item.key for image in images]
        sides = [self._latents(self._posterior(x, memory), keys)]
        if self.options.flip:
            sides.append(self._latents(self._posterior(x.flip(-1), memory), [f"{key}\nflip" for key in keys]))
        samples = []
        for image, *latents in zip(images, *sides, strict=True):
            sums.update(latents)
            meta = {
                "key": image.item.key,
                "width": image.size[0],
                "height": image.size[1],
                "image": [image.pixels.shape[2], image.pixels.shape[1]],
            }
            files = {META: json.dumps(meta).encode(), LATENT: latent_bytes(*latents)}
            samples.append(WebDatasetSample(image.item.name, {**image.item.files, **files}))
        return samples

    def _posterior(self, x: Tensor, memory: int) -> Posterior:
        if self.options.size:
            return self.model.encode(x)
        x = pad_to_multiple(x, self.model.downscale)
        return encode_within(self.model, x, memory) if isinstance(self.model, LiteVAE) else self.model.encode(x)

    def _latents(self, posterior: Posterior, keys: Sequence[str]) -> list[Latent]:
        """Latents in the stored dtype, on the CPU."""
        means = posterior.mean.float().cpu()
        stds = [None] * len(keys) if posterior.deterministic else posterior.std.float().cpu()
        latents = []
        for key, mean, std in zip(keys, means, stds, strict=True):
            if not self.options.moments:
                mean, std = Latent(mean, std).draw(keyed_generator(f"{self.options.seed}\n{key}")), None
            latents.append(Latent(self._stored(mean), None if std is None else self._stored(std)))
        return latents

    def _stored(self, exact: Tensor) -> Tensor:
        rounded = exact.to(DTYPES[self.options.dtype])
        if not exact.isfinite().all():
            raise ValueError("the latents have non-finite values: the training run may have diverged")
        if not rounded.isfinite().all():
            raise ValueError(f"latents of up to {exact.abs().max():.3g} are too large for {self.options.dtype}")
        return rounded
