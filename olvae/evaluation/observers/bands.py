"""Observe where in the spectrum the error is: its energy per wavelet band."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor

from olvae.evaluation.cells import NONE, significant
from olvae.evaluation.html import Page
from olvae.evaluation.observers.observer import Observation, Observer
from olvae.evaluation.results import Row
from olvae.modules.wavelet import wavedec2

MEASURES = ("mse", "share_of_signal")

Energies = tuple[float, ...]
"""Of one image: LL of the last level, then LH, HL, HH of level 1, of level 2, and so on."""


class Bar(NamedTuple):
    """A bar's length, at most 100, the value as text, and whether the value is off the scale."""

    length: float
    text: str
    off: bool = False


class Bands(Observer):
    """The mean squared error of reconstructions, split among the bands of the orthonormal Haar transform.

    Pixels are 0..255, as in PSNR. A band's ``mse`` is the error's energy in it per pixel value, averaged over images;
    by Parseval the bands add up to the mean squared error. Sums are exact in float64. A key counts once. Latents are
    drawn as in the first protocol. Images of odd sides have no bands.

    Args:
        levels: how often LL is split again; fewer if the images' sides can't be halved as often.
    """

    name = "bands"
    title = "Error per wavelet band"

    def __init__(self, levels: int = 3) -> None:
        self._levels = levels
        self._energies: dict[str, dict[str, tuple[Energies, Energies]]] = {}  # by target and key; of error and input

    @torch.no_grad()
    def update(self, batch: Observation) -> None:
        levels = min(self._levels, *map(_halvings, batch.x.shape[-2:]))
        if batch.draw or not levels:
            return
        signal = batch.x.double()
        error = batch.y.double() - signal
        pairs = zip(_energies(error, levels), _energies(signal, levels), strict=True)
        known = self._energies.setdefault(batch.target, {})
        for key, pair in zip(batch.keys, pairs, strict=True):
            known.setdefault(key, pair)

    def state(self) -> Any:
        return self._energies

    def merge(self, state: Any) -> None:
        for target, energies in state.items():
            self._energies[target] = energies | self._energies.get(target, {})

    def result(self, target: str, draw: int) -> dict[str, dict[str, float | None]] | None:
        """The bands, coarse to fine: LL3, LH3, HL3, HH3, LH2, ..., HH1.

        The first letter is the filter along the height, the second that along the width: LH has the detail along the
        width, which is what vertical edges have.

        Returns:
            For each band ``mse``, and ``share_of_signal``: the energy of all errors over that of all inputs in the
            band, None if the inputs have none. The signal of LL includes the brightness, counted from black.
        """
        if target not in self._energies:
            return None
        errors, signals = zip(*self._energies[target].values(), strict=True)
        bands: dict[str, dict[str, float | None]] = {}
        for name, place in _places(len(errors[0]) // 3).items():
            error, signal = (math.fsum(image[place] for image in side) for side in (errors, signals))
            bands[name] = {"mse": error / len(errors), "share_of_signal": error / signal if signal else None}
        return bands

    def section(self, page: Page) -> Markup | None:
        rows = [row for row in page.results.rows if row.observed.get(self.name)]
        return page.render("bands.html", rows=rows, bars=_bars(rows)) if rows else None


def _bars(rows: Sequence[Row]) -> dict[str, dict[str, list[Bar]]]:
    """By band, coarse to fine, and target, two bars: the mean squared error, and its share of the input's energy.

    The longest bar of a trained model is 100: an untrained one would make all others invisible.
    """
    bands = {row.target: row.observed["bands"] for row in rows}
    every = [band for row in rows if not row.baseline for band in bands[row.target].values()]
    longest = {measure: max((band[measure] or 0.0 for band in every), default=0.0) for measure in MEASURES}

    def bar(value: float | None, measure: str) -> Bar:
        if value is None:
            return Bar(0.0, NONE)
        text = f"{significant(100.0 * value)} %" if measure == "share_of_signal" else significant(value)
        length = round(100.0 * value / longest[measure], 2) if longest[measure] else 0.0
        return Bar(min(length, 100.0), text, length > 100.0)

    return {
        name: {
            target: [bar(found[name][measure], measure) for measure in MEASURES]
            for target, found in bands.items()
            if name in found
        }
        for name in dict.fromkeys(name for found in bands.values() for name in found)
    }


def _energies(images: Tensor, levels: int) -> list[Energies]:
    """Of each image, per pixel value."""
    channels, size = images.shape[1], images[0].numel()
    sums = []
    for level in wavedec2(images, levels=levels):
        bands = level.unflatten(1, (4, channels))  # (B, 4, C, h, w)
        sums.append(bands.square().flatten(2).sum(2))  # (B, 4)
    energies = torch.cat((sums[-1][:, :1], *(details[:, 1:] for details in sums)), dim=1) / size
    return [tuple(image) for image in energies.tolist()]


def _places(levels: int) -> dict[str, int]:
    """The bands' names, coarse to fine, and their places in :data:`Energies`."""
    details = {
        f"{band}{level}": 3 * level - 2 + i
        for level in range(levels, 0, -1)
        for i, band in enumerate(("LH", "HL", "HH"))
    }
    return {f"LL{levels}": 0, **details}


def _halvings(n: int) -> int:
    """How often n can be halved."""
    return (n & -n).bit_length() - 1
