"""Observe what happens to colour: shifts of the channels' means, saturation and contrast, out over in."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from olvae.evaluation.observers.observer import Observation, PerImageObserver
from olvae.evaluation.results import MINUS, significant

LUMA = (0.299, 0.587, 0.114)  # of R, G and B, as in ITU-R BT.601


class Colour(PerImageObserver):
    """The colours of reconstructions beside the images', of uint8 values.

    An entry has ``shift``, the mean of reconstructions minus images per channel, in steps of 8-bit values;
    ``shift_of_images``, the same without signs: its root mean square over images, because shifts of single images
    cancel in the mean; ``saturation``, the mean difference between a pixel's largest and smallest channel, and
    ``contrast``, the standard deviation of an image's luma over positions, both as means over images, out over in:
    None if the images have none. Without three channels there is no saturation, and luma is the channels' mean.
    """

    name = "colour"

    def measure(self, batch: Observation) -> Iterable[Any]:
        """Shifts, then pairs of in and out."""
        x, y = batch.x.double(), batch.y.double()
        pairs = [measure(images) for measure in (_saturation, _contrast) for images in (x, y)]
        rows: list[Any] = torch.cat(
            ((y - x).mean((2, 3)), torch.stack(pairs, dim=1)), dim=1
        ).tolist()  # (B, C + 4)
        return rows

    def summarise(self, columns: Sequence[Any]) -> dict[str, Any]:
        n, (shifts, pairs) = (
            len(columns[0]),
            (columns[:-4], [math.fsum(column) for column in columns[-4:]]),
        )
        saturation, saturation_out, contrast, contrast_out = pairs
        return {
            "shift": [math.fsum(channel) / n for channel in shifts],
            "shift_of_images": [
                math.sqrt(math.fsum(value**2 for value in channel) / n) for channel in shifts
            ],
            "saturation": saturation_out / saturation if saturation else None,
            "contrast": contrast_out / contrast if contrast else None,
        }

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        shifts = " ".join(f"{value:+.2f}".replace("-", MINUS) for value in entry["shift"])
        ratios = {
            name: entry[name] for name in ("saturation", "contrast") if entry[name] is not None
        }
        return {
            "shift": shifts,
            **{name: f"{significant(100 * ratio)} %" for name, ratio in ratios.items()},
        }


def _saturation(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,); 0 for grey images, and where there are not three channels."""
    return (images.amax(1) - images.amin(1)).mean((1, 2)) * (images.shape[1] == len(LUMA))


def _contrast(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,)."""
    weights = LUMA if images.shape[1] == len(LUMA) else [1.0 / images.shape[1]] * images.shape[1]
    luma = (images * images.new_tensor(weights)[:, None, None]).sum(1)  # (B, H, W)
    return luma.std((1, 2), correction=0)
