"""Test patterns that show what photographs hide: grids on constant colours, loss of fine checkerboards and stripes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from olvae.data.image import from_uint8, to_uint8
from olvae.figures import ERROR_RANGE, error_map, labelled_grid
from olvae.metrics.pixel import psnr
from olvae.models.autoencoder import Autoencoder
from olvae.modules.precision import full_float32

__all__ = ["Artefacts", "Colour", "Pattern", "amplification", "amplified", "draw_artefacts", "find_artefacts"]

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
"""Widths in pixels of what alternates between black and white: half a period."""
LARGEST = 64
"""The most that deviations are amplified in pictures."""


@dataclass(frozen=True)
class Colour:
    """What became of an image of one colour. In steps of 8-bit values, of the reconstruction clamped, not rounded.

    Args:
        name: of the colour.
        shift: the mean over the inner part minus the colour, per channel.
        amplitude: the standard deviation over positions, root mean square over channels, in the inner part: what
            is left without a frame of a quarter of the size.
        grid: of the amplitude the part that repeats every f pixels: that of the mean over all f x f tiles.
        amplitude_with_border: the amplitude of the whole image.
        x, y: input and reconstruction, uint8 (C, H, W).
        deviation: of the reconstruction from its mean over the inner part, float32 (C, H, W).
    """

    name: str
    shift: tuple[float, ...]
    amplitude: float
    grid: float
    amplitude_with_border: float
    x: Tensor
    y: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class Pattern:
    """What became of a checkerboard or of stripes, black and white.

    Args:
        name: with the width of a square or stripe.
        psnr: in dB, of the reconstruction clamped and rounded; may be infinite.
        x, y: input and reconstruction, uint8 (C, H, W).
    """

    name: str
    psnr: float
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Artefacts:
    """All patterns, of ``size`` pixels, through one autoencoder of the factor ``period``."""

    size: int
    period: int
    frame: int
    """Pixels on each side that are not of the inner part."""
    colours: list[Colour]
    patterns: list[Pattern]

    def as_dict(self) -> dict[str, object]:
        """The numbers, ready for JSON; an infinite PSNR is None."""
        return {
            "size": self.size,
            "period": self.period,
            "frame": self.frame,
            "colours": {
                colour.name: {
                    "shift": list(colour.shift),
                    "amplitude": colour.amplitude,
                    "grid": colour.grid,
                    "amplitude_with_border": colour.amplitude_with_border,
                }
                for colour in self.colours
            },
            "patterns": {
                pattern.name: {"psnr": pattern.psnr if math.isfinite(pattern.psnr) else None}
                for pattern in self.patterns
            },
        }


@torch.inference_mode()
def find_artefacts(
    model: Autoencoder, size: int = 256, device: str | torch.device = "cpu", batch_size: int = 8
) -> Artefacts:
    """Reconstruct constant colours, checkerboards and stripes from the posterior's mode, in full float32.

    With other than three channels the colours are greys, and each channel alone.

    Args:
        model: in evaluation mode; it is moved to the device.
        size: of the square patterns.

    Raises:
        ValueError: the size is no multiple of the model's factor f.
    """
    f = model.downscale
    if size < f or size % f:
        raise ValueError(f"test patterns of {size} pixels, but the latent's positions have {f}: take a multiple of {f}")
    constants, patterns = _constants(model.in_channels, size), _patterns(model.in_channels, size)
    x = torch.stack([*constants.values(), *patterns.values()])
    y = _reconstruct(model.to(device), x, torch.device(device), batch_size)
    pairs = list(zip(x, y, strict=True))
    frame = size // (4 * f) * f
    count = len(constants)
    return Artefacts(
        size,
        f,
        frame,
        [_colour(name, *pair, f, frame) for name, pair in zip(constants, pairs[:count], strict=True)],
        [_pattern(name, *pair) for name, pair in zip(patterns, pairs[count:], strict=True)],
    )


def amplification(results: Iterable[Artefacts]) -> int:
    """The power of two, 64 at most, at which 99 % of the worst contender's deviations stay within the picture.

    One for all, so that their pictures compare.
    """
    deviations = (np.concatenate([colour.deviation.flatten() for colour in found.colours]) for found in results)
    largest = max(float(np.quantile(np.abs(values), 0.99)) for values in deviations)
    factor = LARGEST
    while factor > 1 and factor * largest > 127.0:
        factor //= 2
    return factor


def amplified(deviation: Tensor, factor: int) -> Tensor:
    """A deviation in steps of 8-bit values -> a picture, uint8: grey 128 is none."""
    return (128.0 + factor * deviation).round().clamp(0, 255).to(torch.uint8)


def draw_artefacts(results: Mapping[str, Artefacts]) -> Image.Image:
    """A labelled grid: the patterns as put in, and for each contender what came out and the error, amplified.

    Args:
        results: by contender, all of one size and of images of as many channels.
    """
    factor = amplification(results.values())
    first = next(iter(results.values()))
    rows = {f"colours: {', '.join(colour.name for colour in first.colours)}": _stack(first.colours)}
    for name, found in results.items():
        deviation = torch.stack([amplified(colour.deviation, factor) for colour in found.colours])
        rows[f"{name}: reconstruction"] = torch.stack([colour.y for colour in found.colours])
        rows[f"{name}: deviation from the mean colour x{factor}, around grey"] = deviation
    names = ", ".join(pattern.name.removesuffix(" px").replace(" stripes", "") for pattern in first.patterns)
    rows[f"squares and stripes, pixels wide: {names}"] = _stack(first.patterns)
    for name, found in results.items():
        y = torch.stack([pattern.y for pattern in found.patterns])
        rows[f"{name}: reconstruction of the patterns"] = y
        rows[f"{name}: error, black 0 to white {ERROR_RANGE} of 255"] = error_map(_stack(found.patterns), y)
    return labelled_grid(rows)


def _stack(items: Iterable[Colour | Pattern]) -> Tensor:
    return torch.stack([item.x for item in items])


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
            patterns[f"upright stripes {width} px"] = odd[None, :].expand(size, size)
            patterns[f"level stripes {width} px"] = odd[:, None].expand(size, size)
    return {name: (255 * odd).to(torch.uint8).repeat(channels, 1, 1) for name, odd in patterns.items()}


def _reconstruct(model: Autoencoder, x: Tensor, device: torch.device, batch_size: int) -> Tensor:
    """uint8 -> what the network gives, float32, nominally in [-1, 1], on the CPU."""
    parts = []
    for part in x.split(batch_size):
        images = from_uint8(part.to(device))
        with full_float32(images):
            parts.append(model.decode(model.encode(images).mode()).float().cpu())
    return torch.cat(parts)


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


def _amplitude(values: Tensor) -> float:
    """Standard deviation over positions, root mean square over channels."""
    return math.sqrt(values.var((1, 2), correction=0).mean())


def _pattern(name: str, x: Tensor, y: Tensor) -> Pattern:
    rounded = to_uint8(y)
    return Pattern(name, float(psnr(x[None], rounded[None])), x, rounded)
