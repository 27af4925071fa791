"""Reconstruct images with an autoencoder under a protocol's choices, and measure what that costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.data.opening import open_test_source
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides, Size
from olvae.data.source import Source
from olvae.devices import now, peak_memory
from olvae.models.autoencoder import Autoencoder
from olvae.modules.base import count_macs, count_parameters, full_float32
from olvae.modules.distributions import keyed_generator


def open_images_for(
    models: Mapping[str, Autoencoder], config: Config, data: str | None = None, size: Size | None = None
) -> Source:
    """Open the test images of models, as :func:`open_test_source`; ConfigError unless all models take them.

    Models without a range of values take the others'.
    """
    stated = list(dict.fromkeys(m.pixel_range for m in models.values() if not m.pixel_range.eight_bits))
    if len(stated) > 1:
        raise ConfigError(f"the targets take values of {stated[0]} and of {stated[1]}: use a command for each")
    pixels = stated[0] if stated else EIGHT_BITS
    if len(channels := {model.in_channels: name for name, model in models.items()}) > 1:
        counts = " and ".join(f"{count} ({channels[count]})" for count in sorted(channels))
        raise ConfigError(f"the targets take images of {counts} channels: use a command for each")
    source = open_test_source(config, data, size, next(iter(channels)), pixels)
    if not pixels.eight_bits:
        pixels.check_data(source.pixel_range)
    for name, model in models.items():
        if not source.size.fits(f := model.downscale):
            why = f"a latent position stands for {f}x{f} pixels, and {source.size.short} is not a multiple of {f}"
            raise ConfigError(f"{name}: {why}: set `size` to {source.size.multiples(f)[0].short}")
    return source


class Reconstructed(NamedTuple):
    latents: Tensor  # the posterior's means, (B, n_z, H/f, W/f), on the device
    images: Tensor  # levels of the range, (B, C, H, W), on the CPU: uint8, or float32 for other than 8 bits


@dataclass(frozen=True)
class Cost:
    """What one image of the evaluated size costs. Speed and memory are those of this run's batches and device."""

    parameters: int
    encode_macs: int  # multiply-accumulates
    decode_macs: int
    encode_images_per_s: float | None
    decode_images_per_s: float | None
    peak_memory_bytes: int | None  # of a batch, beyond weights and images, by a GPU's allocator; None on the CPU
    batch_size: int  # of the largest batch; it is smaller than requested if there are few images
    device: str  # the GPU's name, or the CPU with its threads


class RoundTrip:
    """Encode and decode in float32, clamp and, for 8 bits, round to uint8, and measure what that costs.

    The model, in evaluation mode, runs on the device; images come and go on the CPU. Without a seed the latent is the
    posterior's mode, with one a sample, whose noise depends on it and on the image's key.
    """

    def __init__(
        self,
        model: Autoencoder,
        device: str = "cpu",
        seed: int | None = None,
        name: str = "the autoencoder",
        pixel_range: PixelRange = EIGHT_BITS,
    ) -> None:
        self.model, self.device, self.seed = model.to(device), device, seed
        self.pixel_range = pixel_range
        self.name = name  # for messages
        self._times: list[tuple[int, float, float]] = []  # images of a batch, seconds to encode and to decode them
        self._peaks: list[int] = []

    @torch.inference_mode()
    def __call__(self, keys: Sequence[str], x: Tensor) -> Reconstructed:
        """Reconstruct a batch's images, (B, C, H, W); ArithmeticError for a non-finite result, which levels hide."""
        images = self.pixel_range.normalise(x.to(self.device))
        with full_float32(images), peak_memory(self.device, self._peaks):
            start = now(self.device)
            posterior = self.model.encode(images)
            encoded = now(self.device)
            z = posterior.mode()  # (B, n_z, H/f, W/f)
            if self.seed is not None and not posterior.deterministic:
                generators = [keyed_generator(f"{self.seed} {key}") for key in keys]
                noise = [torch.randn(z.shape[1:], generator=generator) for generator in generators]
                z = z + posterior.std * torch.stack(noise).to(z)
            drawn = now(self.device)
            y = self.model.decode(z)
            self._times.append((len(images), encoded - start, now(self.device) - drawn))
        finite = y.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise ArithmeticError(f"{self.name}: its reconstruction of {keys[finite.index(False)]} is not finite")
        return Reconstructed(posterior.mean, self.pixel_range.to_levels(y).cpu())

    def cost(self, size: Size) -> Cost:
        """What images of ``size`` pixels cost: as counted, and as measured so far.

        The first batch warms up and is not counted, unless it is the only one.
        """
        model, sides = self.model, Sides.of(size)
        threads = torch.get_num_threads()
        cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        counted = self._times[1:] or self._times or [(0, 0.0, 0.0)]
        images, encode_s, decode_s = (sum(column) for column in zip(*counted, strict=True))
        return Cost(
            parameters=count_parameters(model),
            encode_macs=count_macs(model, 1, model.in_channels, *sides, method="encode"),
            decode_macs=count_macs(model, 1, model.latent_channels, *sides // model.downscale, method="decode"),
            encode_images_per_s=images / encode_s if encode_s else None,
            decode_images_per_s=images / decode_s if decode_s else None,
            peak_memory_bytes=max(self._peaks[1:] or self._peaks, default=None),
            batch_size=max(batch[0] for batch in self._times or counted),
            device=torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else cpu,
        )
