"""Encode and decode test images under a protocol, and measure what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.data.opening import open_test_source
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides, Size
from olvae.data.source import Source
from olvae.devices import device_name, full_float32, now, peak_memory
from olvae.evaluation.protocol import log
from olvae.files import counted, first_line
from olvae.models.autoencoder import Autoencoder
from olvae.modules.counting import count_macs, count_parameters
from olvae.modules.distributions import keyed_generator


def open_images_for(
    models: Mapping[str, Autoencoder],
    config: Config,
    data: str | None = None,
    size: Size | None = None,
    usual: Size = 256,
) -> Source:
    """Open test images as :func:`open_test_source`; ConfigError unless all models take them.

    A model of 8 bits takes the range of values that other models state.
    """
    # Range of values: models that state one must agree.
    ranges = [model.pixel_range for model in models.values() if not model.pixel_range.eight_bits]
    stated = list(dict.fromkeys(ranges))
    if len(stated) > 1:
        raise ConfigError(
            f"the targets take values of {stated[0]} and of {stated[1]}: use a command for each"
        )
    pixels = stated[0] if stated else EIGHT_BITS

    # Channels: by their number, the name of a model that takes it.
    channels = {model.in_channels: name for name, model in models.items()}
    if len(channels) > 1:
        counts = " and ".join(f"{count} ({channels[count]})" for count in sorted(channels))
        raise ConfigError(f"the targets take images of {counts} channels: use a command for each")
    count = next(iter(channels))

    # The source may ignore what was asked for: check what it gives.
    source = open_test_source(config, data, size, count, pixels, usual)
    if not pixels.eight_bits:
        pixels.check_data(source.pixel_range)
    if source.channels != count:
        raise ConfigError(
            f"the images have {counted(source.channels, 'channel')}, "
            f"and {channels[count]} takes {count}"
        )
    for name, model in models.items():
        f = model.upscale
        if not source.size.fits(f):
            raise ConfigError(
                f"{name}: a latent position stands for {f}x{f} pixels, and {source.size.short} is "
                f"not a multiple of {f}: set `size` to {source.size.multiples(f)[0].short}"
            )
    return source


class Reconstructed(NamedTuple):
    """A batch of reconstructions, with the means of their posteriors."""

    latents: Tensor  # the means, (B, n_z, H/f, W/f), on the device
    # Levels of the range, (B, C, H, W), on the CPU: uint8, or float32 for other than 8 bits.
    images: Tensor


@dataclass(frozen=True)
class Cost:
    """Cost of one image of the evaluated size. Speed and memory depend on batches and device."""

    parameters: int
    encode_macs: int | None  # multiply-accumulates; None if they can't be counted
    decode_macs: int | None
    encode_images_per_s: float | None
    decode_images_per_s: float | None
    # Of a batch, beyond weights and images, by a GPU's allocator; None on the CPU.
    peak_memory_bytes: int | None
    batch_size: int  # of the largest batch; it is smaller than requested if there are few images
    device: str  # the GPU's name, or the CPU with its threads


class RoundTrip:
    """Encode and decode images in float32, and measure what that costs.

    Where the decoder enlarges images, the encoder gets them shrunk as much, so that the two sizes
    agree.

    Reconstructions are clamped and, for 8 bits, rounded to uint8. The model, in evaluation mode,
    runs on the device; images come and go on the CPU. The latent is the posterior's mode; with a
    ``seed`` it is a sample, whose noise depends on the seed and the image's key.
    """

    def __init__(
        self,
        model: Autoencoder,
        device: str = "cpu",
        seed: int | None = None,
        name: str = "the autoencoder",
        pixel_range: PixelRange = EIGHT_BITS,
    ) -> None:
        self.model = model.to(device)
        self.device = device
        self.seed = seed
        self.pixel_range = pixel_range
        self.name = name  # for messages
        # Of each batch: its images, and the seconds to encode and to decode them.
        self._times: list[tuple[int, float, float]] = []
        # Of each batch, on a GPU: bytes beyond weights and images.
        self._peaks: list[int] = []

    @torch.inference_mode()
    def __call__(self, keys: Sequence[str], x: Tensor) -> Reconstructed:
        """Reconstruct images, (B, C, H, W); ArithmeticError if a reconstruction is not finite."""
        images = self.pixel_range.normalise(x.to(self.device))
        with full_float32(images), peak_memory(self.device, self._peaks):
            start = now(self.device)
            posterior = self.model.encode(self.model.shrink(images))
            encoded = now(self.device)

            # Sample outside both times. Noise is drawn per image: batches make no difference.
            z = posterior.mode()  # (B, n_z, H/f, W/f)
            if self.seed is not None and not posterior.deterministic:
                noise = []
                for key in keys:
                    generator = keyed_generator(f"{self.seed} {key}")
                    noise.append(torch.randn(z.shape[1:], generator=generator))
                z = z + posterior.std * torch.stack(noise).to(z)

            drawn = now(self.device)
            y = self.model.decode(z)
            self._times.append((len(images), encoded - start, now(self.device) - drawn))

        # As levels, NaN would be a valid picture.
        finite = y.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise ArithmeticError(
                f"{self.name}: its reconstruction of {keys[finite.index(False)]} is not finite"
            )
        return Reconstructed(posterior.mean, self.pixel_range.to_levels(y).cpu())

    def cost(self, size: Size) -> Cost:
        """Return the cost of reconstructions of ``size`` pixels: counted, and measured so far.

        The first batch warms up and is not counted, unless it is the only one.
        """
        counted = self._times[1:] or self._times or [(0, 0.0, 0.0)]
        images, encode_s, decode_s = (sum(column) for column in zip(*counted, strict=True))
        model = self.model
        sides = Sides.of(size)
        encoded = sides // model.enlarge
        return Cost(
            parameters=count_parameters(model),
            encode_macs=_macs(model, "encode", model.in_channels, *encoded),
            decode_macs=_macs(model, "decode", model.latent_channels, *sides // model.upscale),
            encode_images_per_s=images / encode_s if encode_s else None,
            decode_images_per_s=images / decode_s if decode_s else None,
            peak_memory_bytes=max(self._peaks[1:] or self._peaks, default=None),
            batch_size=max(batch[0] for batch in self._times or counted),
            device=device_name(self.device),
        )


def _macs(model: Autoencoder, method: str, *shape: int) -> int | None:
    """Count the multiply-accumulates of a method; None, with a warning, if that fails."""
    # A network of the user's own may do more than torch, or need values.
    try:
        return count_macs(model, 1, *shape, method=method)
    except Exception as error:
        log.warning(
            "%s: multiplications of `%s` not counted: %s",
            type(model).__name__,
            method,
            first_line(error),
        )
        return None
