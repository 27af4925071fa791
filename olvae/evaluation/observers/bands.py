"""Observe where in the spectrum the error is: its energy per wavelet band."""

import math
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from olvae.evaluation.observers.observer import Observation, Observer
from olvae.evaluation.page import Page
from olvae.modules.wavelet import wavedec2

Energies = tuple[float, ...]  # of one image: LL of the last level, then LH, HL, HH of level 1, of level 2, and so on


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
        even = math.gcd(2**self._levels, *batch.x.shape[-2:])
        if batch.draw or even == 1:
            return
        levels, signal = even.bit_length() - 1, batch.x.double()
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

        Each has its ``mse``, and ``share_of_signal``: the energy of all errors over that of all inputs in the band,
        None if the inputs have none. The signal of LL includes the brightness, counted from black.
        """
        if target not in self._energies:
            return None
        errors, signals = zip(*self._energies[target].values(), strict=True)
        levels = len(errors[0]) // 3
        places = {f"LL{levels}": 0}
        for level in range(levels, 0, -1):
            places |= {f"{band}{level}": 3 * level - 2 + i for i, band in enumerate(("LH", "HL", "HH"))}
        bands: dict[str, dict[str, float | None]] = {}
        for name, place in places.items():
            error, signal = (math.fsum(image[place] for image in side) for side in (errors, signals))
            bands[name] = {"mse": error / len(errors), "share_of_signal": error / signal if signal else None}
        return bands

    def section(self, page: Page) -> Markup | None:
        """Bars; the longest of a trained model is 100, as an untrained one would make all others invisible."""
        rows = [row for row in page.results.rows if row.observed.get(self.name)]
        bands = [band for row in rows if not row.baseline for band in row.observed[self.name].values()]
        measures = ("mse", "share_of_signal")
        longest = {measure: max((band[measure] or 0.0 for band in bands), default=0.0) for measure in measures}
        names = dict.fromkeys(name for row in rows for name in row.observed[self.name])
        return page.render("bands.html", rows=rows, names=list(names), longest=longest) if rows else None


def _energies(images: Tensor, levels: int) -> list[Energies]:
    """Of each image, per pixel value."""
    channels, size = images.shape[1], images[0].numel()
    sums = []
    for level in wavedec2(images, levels=levels):
        bands = level.unflatten(1, (4, channels))  # (B, 4, C, h, w)
        sums.append(bands.square().flatten(2).sum(2))  # (B, 4)
    energies = torch.cat((sums[-1][:, :1], *(details[:, 1:] for details in sums)), dim=1) / size
    return [tuple(image) for image in energies.tolist()]
