"""Observe colours: shifts of the channels' means, saturation and contrast."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from olvae.evaluation.cells import MINUS, significant
from olvae.evaluation.observers.observer import Observation, PerImageObserver
from olvae.modules.mixed_precision import in_float64

LUMA = (0.299, 0.587, 0.114)  # of R, G and B, as in ITU-R BT.601


class Colour(PerImageObserver):
    """The colours of reconstructions compared with the images', of uint8 values.

    An entry has:

    - ``shift``, the mean of reconstructions minus images per channel, in steps of 8-bit values;
    - ``shift_of_images``, its root mean square over images, because the shifts of single images
      cancel in the mean;
    - ``saturation``, the mean difference between a pixel's largest and smallest channel, and
      ``contrast``, the standard deviation of an image's luma over positions, both as means over
      images, out over in: None if the images have none.

    Without three channels there is no saturation, and luma is the channels' mean.
    """

    name = "colour"

    def measure(self, batch: Observation) -> Iterable[Any]:
        """Shifts, then pairs of in and out."""
        x = in_float64(batch.x)
        y = in_float64(batch.y)
        shifts = (y - x).mean((2, 3))  # (B, C)
        pairs = [_saturation(x), _saturation(y), _contrast(x), _contrast(y)]
        rows: list[Any] = torch.cat((shifts, torch.stack(pairs, dim=1)), dim=1).tolist()
        return rows

    def summarise(self, columns: Sequence[Any]) -> dict[str, Any]:
        n = len(columns[0])
        shift = []
        shift_of_images = []
        for channel in columns[:-4]:
            shift.append(math.fsum(channel) / n)
            shift_of_images.append(math.sqrt(math.fsum(value**2 for value in channel) / n))
        saturation, saturation_out, contrast, contrast_out = map(math.fsum, columns[-4:])
        return {
            "shift": shift,
            "shift_of_images": shift_of_images,
            "saturation": saturation_out / saturation if saturation else None,
            "contrast": contrast_out / contrast if contrast else None,
        }

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        shifts = " ".join(f"{value:+.2f}".replace("-", MINUS) for value in entry["shift"])
        cells = {"shift": shifts}
        for name in ("saturation", "contrast"):
            if entry[name] is not None:
                cells[name] = f"{significant(100 * entry[name])} %"
        return cells


def _saturation(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,); 0 for grey images, and where there are not three channels."""
    return (images.amax(1) - images.amin(1)).mean((1, 2)) * (images.shape[1] == len(LUMA))


def _contrast(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,)."""
    weights = LUMA if images.shape[1] == len(LUMA) else [1.0 / images.shape[1]] * images.shape[1]
    luma = (images * images.new_tensor(weights)[:, None, None]).sum(1)  # (B, H, W)
    return luma.std((1, 2), correction=0)
