"""Observe where in the spectrum the error is, and what goes soft: energies of error and image per wavelet band."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from olvae.evaluation.observers.observer import Observation, PerImageObserver
from olvae.evaluation.report import Page
from olvae.evaluation.results import significant
from olvae.modules.wavelet import wavedec2

NO_SIGNAL: Mapping[str, float | None] = {"share_of_signal": None, "energy_ratio": None}
Energies = tuple[
    float, ...
]  # of one image: LL of the last level, then LH, HL, HH of level 1, of level 2, and so on


class Bands(PerImageObserver):
    """The mean squared error and the energy of reconstructions, by the bands of the orthonormal Haar transform.

    Pixels are 0..255, as in PSNR. A band's ``mse`` is the error's energy in it per pixel value, averaged over images;
    by Parseval the bands add up to the mean squared error. Sums are exact in float64. Images of odd sides have no
    bands. The tables' column, ``fine detail``, is the energy of the finest level's three detail bands, out over in:
    below 100 % the reconstructions are soft.

    Args:
        levels: how often LL is split again; fewer if the images' sides can't be halved as often.
    """

    name = "bands"
    title = "Error per wavelet band"

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self._levels = levels

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        """Energies of error, input and reconstruction."""
        even = math.gcd(2**self._levels, *batch.x.shape[-2:])
        if even == 1:
            return None
        signal, out = (
            wavedec2(images.double(), levels=even.bit_length() - 1) for images in (batch.x, batch.y)
        )
        error = [b - a for a, b in zip(signal, out, strict=True)]
        return zip(
            *(_energies(bands, batch.x[0].numel()) for bands in (error, signal, out)), strict=True
        )

    def summarise(self, columns: Sequence[Any]) -> dict[str, dict[str, float | None]]:
        """The bands, coarse to fine: LL3, LH3, HL3, HH3, LH2, ..., HH1.

        The first letter is the filter along the height, the second that along the width: LH has the detail along the
        width, which is what vertical edges have.

        Each has its ``mse``; ``signal``, the same of the inputs; ``share_of_signal``, the energy of all errors over
        that of all inputs in the band; and ``energy_ratio``, that of all reconstructions over it; both None if the
        inputs have none. The signal of LL includes the brightness, counted from black.
        """
        n, levels = len(columns[0]), len(columns[0][0]) // 3
        places = {f"LL{levels}": 0}
        for level in range(levels, 0, -1):
            places |= {
                f"{band}{level}": 3 * level - 2 + i for i, band in enumerate(("LH", "HL", "HH"))
            }
        bands: dict[str, dict[str, float | None]] = {}
        for name, place in places.items():
            error, signal, out = (math.fsum(image[place] for image in side) for side in columns)
            shares = (
                {"share_of_signal": error / signal, "energy_ratio": out / signal}
                if signal
                else NO_SIGNAL
            )
            bands[name] = {"mse": error / n, "signal": signal / n, **shares}
        return bands

    def columns(self, entry: Mapping[str, Mapping[str, float | None]]) -> Mapping[str, str]:
        finest = [entry.get(name, {}) for name in ("LH1", "HL1", "HH1")]
        signal = math.fsum(band.get("signal") or 0.0 for band in finest)
        out = math.fsum(
            (band.get("signal") or 0.0) * (band.get("energy_ratio") or 0.0) for band in finest
        )
        return {"fine detail": f"{significant(100 * out / signal)} %"} if signal else {}

    def section(self, page: Page) -> Markup | None:
        """Bars; the longest of a trained model is 100, as an untrained one would make all others invisible."""
        rows = [row for row in page.results.rows if row.observed.get(self.name)]
        bands = [
            band for row in rows if not row.baseline for band in row.observed[self.name].values()
        ]
        measures = ("mse", "share_of_signal")
        longest = {
            measure: max((band[measure] or 0.0 for band in bands), default=0.0)
            for measure in measures
        }
        names = dict.fromkeys(name for row in rows for name in row.observed[self.name])
        return (
            page.render("bands.html", rows=rows, names=list(names), longest=longest)
            if rows
            else None
        )


def _energies(levels: Sequence[Tensor], size: int) -> list[Energies]:
    """Of each image of a transform, whose levels are (B, 4 C, h, w), per each of its ``size`` pixel values."""
    sums = [level.unflatten(1, (4, -1)).square().flatten(2).sum(2) for level in levels]  # (B, 4)
    energies = torch.cat((sums[-1][:, :1], *(details[:, 1:] for details in sums)), dim=1) / size
    return [tuple(image) for image in energies.tolist()]
