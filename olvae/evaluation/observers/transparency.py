"""Observe transparent images: PSNR of their colours over three backgrounds, and of alpha."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from olvae.evaluation.observers.observer import Observation, PerImageObserver
from olvae.losses.alpha import over

BACKGROUNDS = {"black": -1.0, "grey": 0.0, "white": 1.0}


class Transparency(PerImageObserver):
    """PSNR in dB of RGBA images of 8 bits over black, grey and white, and of alpha; nothing for other images.

    Means over images, of a range of 255, unrounded after compositing. Equal ones count as 100 dB, because many images
    are opaque.
    """

    name = "transparency"

    @torch.no_grad()
    def update(self, batch: Observation) -> None:
        if batch.draw or batch.x.shape[1] != 4 or not batch.pixel_range.eight_bits:
            return
        x, y = (batch.pixel_range.normalise(levels).double() for levels in (batch.x, batch.y))
        pairs = [(over(x, x.new_tensor(grey)), over(y, x.new_tensor(grey))) for grey in BACKGROUNDS.values()]
        errors = torch.stack([(a - b).square().flatten(1).mean(1) for a, b in [*pairs, (x[:, 3:], y[:, 3:])]], dim=1)
        self.add(batch, (10.0 * (4.0 / errors.clamp_min(4e-10)).log10()).tolist())

    def result(self, target: str, draw: int) -> dict[str, float] | None:
        if target not in self._rows:
            return None
        columns = zip(*self._rows[target].values(), strict=True)
        names = (*BACKGROUNDS, "alpha")
        return {name: math.fsum(column) / len(column) for name, column in zip(names, columns, strict=True)}

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        return {(name if name == "alpha" else f"over {name}"): f"{value:.2f}" for name, value in entry.items()}
