"""Test patterns that show what photographs hide: grids on constant colours, loss of fine checkerboards and stripes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olvae.data.image import from_uint8, to_uint8
from olvae.data.source import Batch
from olvae.metrics.pixel import psnr
from olvae.models.autoencoder import Autoencoder
from olvae.modules.precision import full_float32

__all__ = ["Artefacts", "Colour", "Pattern", "amplification", "amplified", "find_artefacts", "pattern_size"]

GREYS = {"black": 0, "grey 64": 64, "grey 128": 128, "grey 192": 192, "white": 255}
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "yellow": (255, 255, 0),
}
SQUARES = (1, 2, 4, 8, 16, 32)
"""Widths in pixels of squares and stripes: half a period."""

TILES, LEAST = 16, 128
"""The side of an image of one colour, in latent positions, and at least in pixels: the inner half is far enough from
the border where networks are trained. Checkerboards and stripes have half the side."""

Watched = Callable[[Iterable[Batch], int | None], Iterable[Batch]]
"""Gets a pass's batches and the number of images over all processes, None if it is not known."""

LARGEST = 64
"""The most that deviations are amplified in pictures."""


@dataclass(frozen=True)
class Colour:
    """The reconstruction of an image of one colour. Numbers are in steps of 8-bit values, clamped but not rounded.

    The inner part is the image without a frame of a quarter of its size.

    Args:
        name: of the colour.
        shift: the mean over the inner part minus the colour, per channel.
        amplitude: standard deviation over the inner part's positions, root mean square over channels.
        grid: the part of the amplitude that repeats every f pixels: the amplitude of the mean f x f tile.
        amplitude_with_border: the amplitude over the whole image.
        x, y: input and reconstruction, uint8 (C, H, W).
        deviation: reconstruction minus its mean over the inner part, float32 (C, H, W).
    """

    name: str
    shift: tuple[float, ...]
    amplitude: float
    grid: float
    amplitude_with_border: float
    x: Tensor
    y: Tensor
    deviation: Tensor

    @property
    def largest_shift(self) -> float:
        return max(self.shift, key=abs)


@dataclass(frozen=True)
class Pattern:
    """The reconstruction of a black and white checkerboard, or of stripes.

    Args:
        name: with the width of a square or stripe.
        psnr: in dB, after clamping and rounding; may be infinite.
        x, y: input and reconstruction, uint8 (C, H, W).
    """

    name: str
    psnr: float
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Artefacts:
    """All test patterns, reconstructed by an autoencoder that downscales by ``period``.

    Images of one colour have sides of ``size`` pixels, checkerboards and stripes of half of it. Both repeat, and so do
    their reconstructions away from the border: larger ones would show the same again.
    """

    size: int
    period: int
    frame: int
    """Pixels on each side that are outside the inner part."""
    colours: list[Colour]
    patterns: list[Pattern]

    def as_dict(self) -> dict[str, object]:
        """The numbers for metrics.json; None where one is infinite or not a number."""
        return {
            "size": self.size,
            "period": self.period,
            "frame": self.frame,
            "colours": {
                colour.name: {
                    "shift": [_finite(value) for value in colour.shift],
                    "amplitude": _finite(colour.amplitude),
                    "grid": _finite(colour.grid),
                    "amplitude_with_border": _finite(colour.amplitude_with_border),
                }
                for colour in self.colours
            },
            "patterns": {pattern.name: {"psnr": _finite(pattern.psnr)} for pattern in self.patterns},
        }


def pattern_size(downscales: Iterable[int], largest: int) -> int:
    """The side in pixels of images of one colour, for all autoencoders that downscale by these factors.

    Args:
        largest: the side of the images that are evaluated, a multiple of every factor; patterns are no larger.
    """
    factors = list(downscales)
    step = math.lcm(*factors)
    return min(-(-max(LEAST, TILES * max(factors)) // step) * step, largest)


@torch.inference_mode()
def find_artefacts(
    model: Autoencoder,
    size: int,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    watched: Watched = lambda batches, _: batches,
) -> Artefacts:
    """Reconstruct constant colours, checkerboards and stripes from the posterior's mode, in full float32.

    If there are not three channels, the colours are greys and each channel alone.

    Args:
        model: in evaluation mode; it is moved to the device.
        size: side of the square patterns, in pixels; a multiple of the model's downscale factor f.
        watched: wraps the batches of patterns, to show progress.
    """
    f = model.downscale
    assert size % f == 0
    constants = _constants(model.in_channels, size)
    patterns = _patterns(model.in_channels, max(1, size // (2 * f)) * f)
    batches = [
        Batch(image=torch.stack(list(some.values())[i : i + batch_size]), key=list(some)[i : i + batch_size])
        for some in (constants, patterns)
        for i in range(0, len(some), batch_size)
    ]
    model.to(device)
    found: dict[str, Tensor] = {}
    for batch in watched(batches, len(constants) + len(patterns)):
        found |= zip(batch["key"], _reconstruct(model, batch["image"].to(device)), strict=True)
    frame = size // (4 * f) * f
    colours = [_colour(name, x, found[name], f, frame) for name, x in constants.items()]
    return Artefacts(
        size, f, frame, colours, [_pattern(name, x, to_uint8(found[name])) for name, x in patterns.items()]
    )


def amplification(results: Iterable[Artefacts]) -> int:
    """The power of two, 64 at most, at which 99 % of the worst target's deviations stay within a picture's range.

    It is one factor for all targets, so that their pictures compare.
    """
    deviations = (np.concatenate([colour.deviation.flatten() for colour in found.colours]) for found in results)
    largest = max(float(np.quantile(np.abs(values), 0.99)) for values in deviations)
    factor = LARGEST
    while factor > 1 and factor * largest > 127.0:
        factor //= 2
    return factor


def amplified(deviation: Tensor, factor: int) -> Tensor:
    """A deviation in steps of 8-bit values -> a picture, uint8; no deviation is grey 128."""
    return (128.0 + factor * deviation).round().clamp(0, 255).to(torch.uint8)


def _constants(channels: int, size: int) -> dict[str, Tensor]:
    values = {name: (value,) * channels for name, value in GREYS.items()}
    if channels == 3:
        values |= COLOURS
    elif channels > 1:
        values |= {f"channel {i + 1}": tuple(255 * (i == j) for j in range(channels)) for i in range(channels)}
    return {
        name: torch.tensor(value, dtype=torch.uint8).view(-1, 1, 1).repeat(1, size, size)
        for name, value in values.items()
    }


def _patterns(channels: int, size: int) -> dict[str, Tensor]:
    place = torch.arange(size)
    patterns = {}
    for width in SQUARES:
        if 2 * width > size:
            continue
        odd = place // width % 2 == 1
        patterns[f"squares {width} px"] = odd[:, None] ^ odd[None, :]
        if width <= SQUARES[3]:
            patterns[f"vertical stripes {width} px"] = odd[None, :].expand(size, size)
            patterns[f"horizontal stripes {width} px"] = odd[:, None].expand(size, size)
    return {name: (255 * odd).to(torch.uint8).repeat(channels, 1, 1) for name, odd in patterns.items()}


def _reconstruct(model: Autoencoder, x: Tensor) -> Tensor:
    """uint8 -> the network's output, float32, nominally in [-1, 1], on the CPU."""
    images = from_uint8(x)
    with full_float32(images):
        return model.decode(model.encode(images).mode()).float().cpu()


def _pattern(name: str, x: Tensor, y: Tensor) -> Pattern:
    return Pattern(name, float(psnr(x[None], y[None])), x, y)


def _colour(name: str, x: Tensor, y: Tensor, f: int, frame: int) -> Colour:
    values = (y.clamp(-1.0, 1.0) + 1.0) * 127.5  # (C, H, W) in 0..255
    inner = slice(frame, values.shape[-1] - frame)
    inside = values[:, inner, inner].double()
    mean = inside.mean((1, 2))
    tiles = inside.unfold(1, f, f).unfold(2, f, f).mean((1, 2))  # (C, f, f)
    return Colour(
        name,
        tuple((mean - x[:, 0, 0]).tolist()),
        _amplitude(inside),
        _amplitude(tiles),
        _amplitude(values.double()),
        x,
        to_uint8(y),
        values - mean.float().view(-1, 1, 1),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _amplitude(values: Tensor) -> float:
    """Standard deviation over positions, root mean square over channels."""
    return math.sqrt(values.var((1, 2), correction=0).mean())
