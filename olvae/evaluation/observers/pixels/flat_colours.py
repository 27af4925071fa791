"""Observe reconstructions of constant colours: they show grids that photographs hide."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from markupsafe import Markup

from olvae.data.pixels.size_and_range import from_uint8
from olvae.devices import full_float32
from olvae.evaluation.cells import number, texts
from olvae.evaluation.observers.observer import Observer, Subject
from olvae.evaluation.page import Page
from olvae.models.autoencoder import Autoencoder

GREYS = {"black": 0, "grey 64": 64, "grey 128": 128, "grey 192": 192, "white": 255}
HUES = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "yellow": (255, 255, 0),
}

TILES = 16
SMALLEST = 128
"""The side of an image of one colour, in latent positions, and its least side in pixels.

So large, the inner half is far enough from the border where networks are trained."""


class FlatColours(Observer):
    """Reconstruct constant colours with every target in float32, and measure the deviations.

    An entry has the colours' ``size``, the ``period`` of the grid, both in pixels, the width of the
    ``frame`` outside the inner part, and the numbers of each of the ``colours``: see
    :func:`reconstruct_colours`.
    """

    name = "test_patterns"
    tells_apart = False
    title = "Artefacts on constant colours"

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] = {}  # by target

    def examine(self, subjects: Mapping[str, Subject], size: int, device: str) -> None:
        models: dict[str, Autoencoder] = {}
        for name, subject in subjects.items():
            if subject.baseline:
                continue
            if all(p.dtype == torch.float32 for p in subject.model.parameters()):
                models[name] = subject.model
        size = colour_size([model.upscale for model in models.values()], size)
        for name, model in models.items():
            side = model.side or size  # some models take one size alone
            self._entries[name] = {
                "size": side,
                "period": model.upscale,
                "frame": _frame(side, model.upscale),
                "colours": reconstruct_colours(model, side, device),
            }

    def result(self, target: str, draw: int) -> dict[str, Any] | None:
        return self._entries.get(target)

    def section(self, page: Page) -> Markup | None:
        # The cells of each target over all its colours, by heading; none if nothing is finite.
        summary: dict[str, dict[str, str]] = {}
        for target, entry in self._entries.items():
            colours = entry["colours"].values()
            shifts = [abs(v) for colour in colours for v in colour["shift"] if v is not None]
            known = {}
            for name in ("grid", "amplitude", "amplitude_with_border"):
                known[name] = [colour[name] for colour in colours if colour[name] is not None]
            summary[target] = {}
            if all((shifts, *known.values())):
                summary[target] = {
                    "grid, mean": number(fmean(known["grid"]), 2),
                    "grid, largest": number(max(known["grid"]), 2),
                    "amplitude, mean": number(fmean(known["amplitude"]), 2),
                    "with border, mean": number(fmean(known["amplitude_with_border"]), 2),
                    "shift, largest": number(max(shifts), 1),
                }
        caption = (
            "Reconstructions of single-colour images show any pattern that the autoencoder adds. "
            "Numbers are in steps of 8-bit values, over all colours: amplitude is the standard "
            "deviation over positions without the border, grid the part of it that repeats with "
            "every position of the latent, shift the largest change of a channel's mean."
        )
        return page.table(texts(summary), "artefacts", caption) or None


def colour_size(downscales: Sequence[int], largest: int) -> int:
    """The side in pixels of images of one colour, for autoencoders that downscale by these factors.

    ``largest`` is the side of the images that are evaluated, a multiple of every factor; colours
    are no larger.
    """
    wanted = max(SMALLEST, TILES * max(downscales, default=1))
    step = math.lcm(*downscales)
    return min(-(-wanted // step) * step, largest)  # rounded up to a multiple


@torch.inference_mode()
def reconstruct_colours(
    model: Autoencoder, size: int, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Reconstruct constant colours from the posterior's mode, in float32, and measure deviations.

    If there are not three channels, the colours are greys and each channel alone. The square
    images' side is a multiple of the model's factor f. The model is in evaluation mode; it is
    moved to the device.

    Returns:
        For each colour, in steps of 8-bit values, clamped but not rounded, None where one is not
        finite: ``shift``, the mean minus the colour, per channel; ``amplitude``, the standard
        deviation over positions, root mean square over channels; ``grid``, the part of it that
        repeats every f pixels: the amplitude of the mean f x f tile; all three without a frame of
        a quarter of the size; and ``amplitude_with_border``, over the whole image.
    """
    model.to(device)
    f = model.upscale
    frame = _frame(size, f)
    inner = slice(frame, size - frame)

    # The colours: greys, and the hues of RGB, or each channel alone.
    channels = model.in_channels
    colours: dict[str, tuple[int, ...]] = {}
    for name, value in GREYS.items():
        colours[name] = (value,) * channels
    if channels == 3:
        colours |= HUES
    elif channels > 1:
        for i in range(channels):
            colours[f"channel {i + 1}"] = tuple(255 * (i == j) for j in range(channels))

    found: dict[str, dict[str, Any]] = {}
    for name, colour in colours.items():
        x = torch.tensor(colour, dtype=torch.uint8, device=device)[None, :, None, None]
        images = from_uint8(x.expand(-1, -1, size, size))
        with full_float32(images):
            y = model.decode(model.encode(model.shrink(images)).mode()).float().cpu()
        image = ((y.clamp(-1.0, 1.0) + 1.0) * 127.5)[0].double()  # (C, H, W) in 0..255

        # The inner part, and its mean tile: what repeats with every position of the latent.
        inside = image[:, inner, inner]
        tile = inside.unfold(1, f, f).unfold(2, f, f).mean((1, 2))  # (C, f, f)
        shift = (inside.mean((1, 2)) - torch.tensor(colour)).tolist()
        deviations: dict[str, Any] = {"shift": list(map(_finite, shift))}
        parts = {"amplitude": inside, "grid": tile, "amplitude_with_border": image}
        for part, values in parts.items():
            deviations[part] = _finite(math.sqrt(values.var((1, 2), correction=0).mean()))
        found[name] = deviations
    return found


def _frame(size: int, f: int) -> int:
    """The width of the border that is left out: a quarter of the size, in whole f x f tiles."""
    return size // (4 * f) * f


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
