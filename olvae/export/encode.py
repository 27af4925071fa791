"""``olvae encode``: images to shards of latents with their statistics, in one process or several, resumable."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from olvae.config import ConfigError
from olvae.data.image import from_uint8
from olvae.data.read_errors import ReadError
from olvae.data.shards.latent_source import SHARDS, STATS, Latent
from olvae.data.shards.pairs import CHANNELS
from olvae.export.inputs import Inputs, Numbered, ReadImage, in_order, read_batches
from olvae.export.kohya import KOHYA, KohyaWriter
from olvae.export.lightningdit import LIGHTNINGDIT, LightningDiTWriter
from olvae.export.writers import Encoded, EncodeOptions, LatentWriter, ShardWriter
from olvae.files import write_json
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import GIB, pad_to_multiple
from olvae.modules.base import weights_checksum
from olvae.modules.distributions import Posterior, in_float32, keyed_generator
from olvae.modules.precision import DTYPES, FULL, in_precision

__all__ = ["FORMATS", "EncodeJob", "LatentSums", "encoder_of"]


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


FORMATS = (SHARDS, LIGHTNINGDIT, *KOHYA)
"""What files latents can be written to."""


class EncodeJob:
    """Encodes the images of :data:`~olvae.export.inputs.Inputs` into a folder, in one process or several.

    Output shard i goes to process i modulo their number. Neither interruptions nor the number of processes change a
    byte; see :class:`~olvae.data.shards.write.Resumable`.

    Args:
        model: on its device, in evaluation mode.
        inputs: the images.
        options: what is stored.
        folder: of the shards, created if missing.
        describe: further entries of stats.json, such as the target's name.

    Raises:
        ConfigError: the folder holds latents of other options, images or weights, or something else; or the format
            can't express what is to be stored.
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
        self.shards = _writer(options.format, folder, model)
        self.shards.check_options(model, inputs, options)
        weights = weights_checksum(model)
        self.describe = {**describe, "weights": weights, "downscale": model.downscale, "channels": model.in_channels}
        self.shards.begin({"weights": weights, **self.shards.plan(), **inputs.plan(asdict(options))})

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
            memory: bytes that encoding images of their own sizes may take; see :meth:`Autoencoder.encode_within`.
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
        """When all shards are finished: write what describes them, and last ``stats.json``, whose content is returned.

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
                counts[self.shards.path(number).name] = shard.record.images
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
        self.shards.remove_partials()
        self.shards.finish(stats, counts)
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
    ) -> Iterator[Encoded | ReadError]:
        """What a shard is made of, in order; its latents are added to ``sums``."""
        multiple = self.model.downscale
        batches = read_batches(
            self.inputs.read(shard), self.options.size, multiple, batch_size, threads, self.options.images
        )
        for encoded in in_order(one for batch in batches for one in self._encode(batch, memory)):
            accepted = encoded if isinstance(encoded, ReadError) else self.shards.accept(encoded)
            if isinstance(accepted, Encoded):
                sums.update(accepted.latents)
            yield accepted
            advance(1)

    @torch.inference_mode()
    def _encode(
        self, batch: Sequence[Numbered[ReadImage | ReadError]], memory: int
    ) -> list[Numbered[Encoded | ReadError]]:
        done: list[Numbered[Encoded | ReadError]] = [(n, one) for n, one in batch if isinstance(one, ReadError)]
        images = [(number, image) for number, image in batch if isinstance(image, ReadImage)]
        if not images:
            return done
        keys = [image.item.key for _, image in images]
        pixels = [image.pixels for _, image in images]
        sides = [self._latents(self._posterior(pixels, memory), keys)]
        if self.options.flip:
            mirrored = [one.flip(-1) for one in pixels]
            sides.append(self._latents(self._posterior(mirrored, memory), [f"{key}\nflip" for key in keys]))
        for (number, image), *latents in zip(images, *sides, strict=True):
            size = image.pixels.shape[2], image.pixels.shape[1]
            done.append((number, Encoded(image.item, image.size, size, latents, image.turned)))
        return done

    def _posterior(self, images: Sequence[Tensor], memory: int) -> Posterior:
        """In float32, of uint8 images that have one size once they are padded."""
        device = next(self.model.parameters()).device
        padded = torch.stack([pad_to_multiple(image, self.model.downscale) for image in images])
        x = from_uint8(padded.to(device))  # (B, C, H, W)
        with in_precision(device.type, self.options.precision):
            posterior = self.model.encode(x) if self.options.size else self.model.encode_within(x, memory)
        return in_float32(posterior)

    def _latents(self, posterior: Posterior, keys: Sequence[str]) -> list[Latent]:
        """Latents in the stored dtype, on the CPU."""
        means = posterior.mean.cpu()
        stds = [None] * len(keys) if posterior.deterministic else posterior.std.cpu()
        latents = []
        for key, mean, std in zip(keys, means, stds, strict=True):
            if not self.options.moments:
                mean, std = Latent(mean, std).draw(keyed_generator(f"{self.options.seed}\n{key}")), None
            latents.append(Latent(self._stored(mean), None if std is None else self._stored(std)))
        return latents

    def _stored(self, exact: Tensor) -> Tensor:
        rounded = exact.to(DTYPES[self.options.dtype])
        if not exact.isfinite().all():
            raise ValueError(
                "the latents have non-finite values: the training run may have diverged"
                if self.options.precision == FULL
                else f"the latents have non-finite values in {self.options.precision}: use --precision {FULL}"
            )
        if not rounded.isfinite().all():
            raise ValueError(f"latents of up to {exact.abs().max():.3g} are too large for {self.options.dtype}")
        return rounded


def _writer(name: str, folder: Path, model: Autoencoder) -> LatentWriter:
    """The writer of a format.

    Raises:
        ConfigError: there is no such format.
    """
    if name in KOHYA:
        return KohyaWriter(
            folder, STATE, architecture=KOHYA[name], shift=model.shift_factor, scale=model.scaling_factor
        )
    writers = {SHARDS: ShardWriter, LIGHTNINGDIT: LightningDiTWriter}
    if name not in writers:
        raise ConfigError(f"--format {name}: choose from {', '.join(FORMATS)}")
    return writers[name](folder, STATE)


def encoder_of(model: Autoencoder) -> nn.Module:
    """The network that encodes, of ours or of diffusers.

    Raises:
        ValueError: the autoencoder has none of its own.
    """
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"--compile: {type(model).__name__} has no encoder that can be compiled: leave it out")
    return encoder
