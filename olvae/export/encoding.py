"""Encode images to shards of latents with their statistics; resumable, in one process or several."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from olvae.checkpoint import tensors_sum
from olvae.data.image import from_uint8
from olvae.data.read_errors import ReadError
from olvae.data.shards.index import INDEX
from olvae.data.shards.latent_source import LATENT, META, STATS, Latent, latent_bytes
from olvae.data.shards.pairs import CHANNELS
from olvae.data.shards.write import ResumableShards, WebDatasetSample
from olvae.devices import DTYPES, FULL, autocast
from olvae.export.inputs import Batch, Inputs, Item, Numbered, ReadImage, in_order, read_batches
from olvae.files import write_json
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import GIB, pad_to_multiple
from olvae.modules.distributions import Posterior, in_float32, keyed_generator
from olvae.modules.scaling_factors import Moments

STATE = ".encode"
"""Folder beside the shards of latents, with the plan and a description of each finished shard."""


@dataclass(frozen=True)
class EncodeOptions:
    """Settings of encoding.

    Args:
        size: side in pixels after resizing and cropping the centre; 0 keeps every image's size, padded to a multiple
            of f at the bottom and the right.
        moments: store the posterior's mean and standard deviation, else one sample of it, with noise by ``seed``.
        dtype: of the latents, a name of :data:`~olvae.devices.DTYPES`.
        flip, images: store the mirrored image's latent, and the pixels that are encoded as PNG, as well.
        precision: that the encoder computes in, a name of :data:`~olvae.devices.PRECISIONS`.
    """

    size: int
    moments: bool = True
    seed: int = 0
    dtype: str = "float16"
    flip: bool = False
    images: bool = False
    precision: str = FULL

    def check(self, model: Autoencoder) -> None:
        """Raise ValueError unless images of a model can be stored like this."""
        if self.size % (f := model.downscale):
            raise ValueError(f"`size` {self.size}: choose a multiple of {f}, the model's downscaling factor")
        if self.images and not self.size:
            raise ValueError("`images`: images that are stored beside latents have one size: give `size`")
        if self.images and model.in_channels not in CHANNELS.values():
            raise ValueError(f"`images`: PNG stores 1, 3 or 4 channels, but the images have {model.in_channels}")


class Encoded(NamedTuple):
    """An image's latent, then the mirrored image's if it is stored; width and height before and after resizing."""

    item: Item
    original: tuple[int, int]
    size: tuple[int, int]
    latents: Sequence[Latent]


@dataclass
class _Statistics:
    """Moments of latents, and their shape, None if it varies; added shard by shard, so that any process may finish."""

    moments: Moments | None = None
    shape: list[int] | None = None

    def add(self, moments: Moments, shape: list[int] | None) -> None:
        self.shape = shape if self.moments is None or shape == self.shape else None
        self.moments = moments if self.moments is None else self.moments + moments

    def details(self) -> dict[str, Any]:
        positions, sums = (0, []) if self.moments is None else self.moments.state()
        return {"positions": positions, "shape": self.shape, "sums": sums}


class EncodeJob:
    """Encode images into a folder of shards, in one process or several.

    Shard i goes to process i modulo their number. Neither interruptions nor the number of processes change a byte; see
    :class:`~olvae.data.shards.write.ResumableShards`. The model is on its device, in evaluation mode; ``describe`` has
    further entries of stats.json, such as the target's name.

    Raises:
        ConfigError: the folder holds latents of other options, images or weights, or something else.
        ValueError: the options do not suit the model, see :meth:`EncodeOptions.check`.
    """

    def __init__(
        self, model: Autoencoder, inputs: Inputs, options: EncodeOptions, folder: Path, describe: Mapping[str, Any]
    ) -> None:
        options.check(model)
        self.model = model
        self.inputs = inputs
        self.options = options
        self.shards = ResumableShards(folder, STATE)
        weights = tensors_sum(model.state_dict())
        self.describe = {**describe, "weights": weights, "downscale": model.downscale, "channels": model.in_channels}
        self.shards.begin({"weights": weights, **inputs.plan(asdict(options))})

    def notes(self, world: int) -> Iterator[str]:
        """Yield what makes this job slower than it could be in so many processes."""
        if next(self.model.parameters()).device.type == "cpu" and self.options.precision == "fp16":
            yield "fp16 is slow on a CPU: set `precision` to bf16, or `device` to cuda"
        if (n := len(self.inputs)) < world:
            remedy = "a smaller `shard_size` gives them work, unless the images come in shards"
            yield f"{n} shard{'s' * (n > 1)} of latents for {world} processes: the others have nothing to do; {remedy}"

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
            memory: bytes that encoding images of their own sizes may take; see :meth:`Autoencoder.encode_within`.
            advance: called with the number of further images that are done, including those of finished shards.

        Raises:
            ValueError: latents have non-finite values, or are too large for the dtype.
            OSError: a remote shard can't be read now.
        """
        for shard in range(rank, len(self.inputs), world):
            if finished := self.shards.finished(shard):
                advance(finished.record.images + len(finished.unreadable))
                continue
            statistics, size, images = _Statistics(), self.options.size, self.options.images
            items = self.inputs.read(shard)
            batches = read_batches(items, size, self.model.downscale, batch_size, threads, keep_pixels=images)
            encoded = in_order(one for batch in batches for one in self._encode(batch, memory))
            self.shards.write(shard, _samples(encoded, statistics, advance), statistics.details)

    def finish(self) -> dict[str, Any]:
        """Write index.json and last stats.json, whose content is returned; raise ValueError if no image was readable.

        All shards have to be finished, by :meth:`run` of every process.
        """
        finished = [self.shards.finished(number) for number in range(len(self.inputs))]
        statistics, index, unreadable = _Statistics(), dict[str, Any](), []
        for number, shard in enumerate(finished):
            assert shard is not None
            unreadable += [{"name": error.name, "reason": error.reason} for error in shard.unreadable]
            if positions := shard.details["positions"]:
                statistics.add(Moments.from_state(positions, shard.details["sums"]), shard.details["shape"])
                index[self.shards.path(number).name] = {"images": shard.record.images}
        moments, count = statistics.moments, sum(shard["images"] for shard in index.values())
        if moments is None:
            for number in range(len(finished)):
                self.shards.forget(number)  # so that the same command tries again
            if unreadable:
                raise ValueError("none of the images could be read: {name}: {reason}".format(**unreadable[0]))
            raise ValueError("no images in these shards: an image is a file KEY.jpg, KEY.png, ...")
        scaling_factor, shift_factor = moments.factors()
        stats = {
            "count": count,
            "latent_shape": statistics.shape,
            "shift_factor": shift_factor,
            "scaling_factor": scaling_factor,
            "latents_mean": moments.mean.tolist(),
            "latents_std": moments.std.tolist(),
            "means_std": moments.std_of_means.tolist(),
            **asdict(self.options),
            **self.describe,
            "classes": list(self.inputs.classes),
            "unreadable": {"count": len(unreadable), "images": unreadable},
        }
        self.shards.remove_partials()
        write_json({"version": 1, "images": count, "shards": index}, self.shards.folder / INDEX)
        write_json(stats, self.shards.folder / STATS)
        return stats

    @torch.inference_mode()
    def _encode(self, batch: Batch, memory: int) -> list[Numbered[Encoded | ReadError]]:
        done: list[Numbered[Encoded | ReadError]] = [(n, one) for n, one in batch if isinstance(one, ReadError)]
        if not (images := [(number, image) for number, image in batch if isinstance(image, ReadImage)]):
            return done
        keys, pixels = [image.item.key for _, image in images], [image.pixels for _, image in images]
        sides = [self._latents(self._posterior(pixels, memory), keys)]
        if self.options.flip:
            mirrored = [one.flip(-1) for one in pixels]
            sides.append(self._latents(self._posterior(mirrored, memory), [f"{key}\nflip" for key in keys]))
        for (number, image), *latents in zip(images, *sides, strict=True):
            size = image.pixels.shape[2], image.pixels.shape[1]
            done.append((number, Encoded(image.item, image.size, size, latents)))
        return done

    def _posterior(self, images: Sequence[Tensor], memory: int) -> Posterior:
        """Encode uint8 images that have one size once they are padded; the posterior is in float32."""
        device = next(self.model.parameters()).device
        padded = torch.stack([pad_to_multiple(image, self.model.downscale) for image in images])
        x = from_uint8(padded.to(device))  # (B, C, H, W)
        with autocast(device.type, self.options.precision):
            posterior = self.model.encode(x) if self.options.size else self.model.encode_within(x, memory)
        return in_float32(posterior)

    def _latents(self, posterior: Posterior, keys: Sequence[str]) -> list[Latent]:
        """Round latents to the stored dtype, on the CPU."""
        means = posterior.mean.cpu()
        stds = [None] * len(keys) if posterior.deterministic else posterior.std.cpu()
        latents = []
        for key, mean, std in zip(keys, means, stds, strict=True):
            if not self.options.moments:
                mean, std = Latent(mean, std).draw(keyed_generator(f"{self.options.seed}\n{key}")), None
            latents.append(Latent(self._rounded(mean), None if std is None else self._rounded(std)))
        return latents

    def _rounded(self, exact: Tensor) -> Tensor:
        precision, rounded = self.options.precision, exact.to(DTYPES[self.options.dtype])
        if not exact.isfinite().all():
            why = "the training run may have diverged" if precision == FULL else f"set `precision` to {FULL}"
            raise ValueError(f"the latents have non-finite values in {precision}: {why}")
        if not rounded.isfinite().all():
            raise ValueError(f"latents of up to {exact.abs().max():.3g} are too large for {self.options.dtype}")
        return rounded


def _samples(
    encoded: Iterator[Encoded | ReadError], statistics: _Statistics, advance: Callable[[int], None]
) -> Iterator[WebDatasetSample | ReadError]:
    """Turn latents into files of a shard, and add them to the statistics."""
    for one in encoded:
        if isinstance(one, ReadError):
            yield one
        else:
            for mean, std in one.latents:
                variance = None if std is None else std.double().square()
                statistics.add(Moments.of(mean, variance), list(mean.shape))
            width, height = one.original
            meta = {"key": one.item.key, "width": width, "height": height, "image": list(one.size)}
            files = {META: json.dumps(meta).encode(), LATENT: latent_bytes(*one.latents)}
            yield WebDatasetSample(one.item.name, {**one.item.files, **files})
        advance(1)


def encoder_of(model: Autoencoder) -> nn.Module:
    """Find the network that encodes, of ours or of diffusers; raise ValueError if there is none."""
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"`compile`: {type(model).__name__} has no encoder that can be compiled: leave it out")
    return encoder
