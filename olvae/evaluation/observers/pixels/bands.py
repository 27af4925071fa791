"""Observe errors and sharpness by frequency: energies of error and image per wavelet band."""

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter, mul
from typing import Any

import torch
from markupsafe import Markup

from olvae.evaluation.cells import significant
from olvae.evaluation.observers.observer import Observation, PerImageObserver
from olvae.evaluation.page import Page
from olvae.modules.mixed_precision import in_float64
from olvae.modules.wavelet import wavedec2

NO_SIGNAL: Mapping[str, float | None] = {"share_of_signal": None, "energy_ratio": None}

# Of one image: LL of the last level, then LH, HL, HH of level 1, of level 2, and so on.
Energies = tuple[float, ...]


class Bands(PerImageObserver):
    """The mean squared error and the energy of reconstructions, per band of the Haar transform.

    The transform is orthonormal. Pixels are 0..255, as in PSNR. A band's ``mse`` is the error's
    energy in it per pixel value, averaged over images; by Parseval the bands add up to the mean
    squared error. Sums are exact in float64. Images of odd sides have no bands. The tables' column,
    ``fine detail``, is the energy of the finest level's three detail bands, out over in: below
    100 % the reconstructions are soft.

    Args:
        levels: number of times that LL is split; fewer if the images' sides can't be halved as
            often.
    """

    name = "bands"
    title = "Error per wavelet band"

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self._levels = levels

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        """Energies of error, input and reconstruction."""
        even = math.gcd(2**self._levels, *batch.x.shape[-2:])  # 2^levels that the sides allow
        if even == 1:
            return None
        levels = even.bit_length() - 1
        size = batch.x[0].numel()
        signal = wavedec2(in_float64(batch.x), levels=levels)
        out = wavedec2(in_float64(batch.y), levels=levels)
        error = [b - a for a, b in zip(signal, out, strict=True)]

        # Energies per pixel value; each level's bands are (B, 4 C, h, w), with LL first.
        columns: list[list[Energies]] = []
        for bands in (error, signal, out):
            sums = [level.unflatten(1, (4, -1)).square().flatten(2).sum(2) for level in bands]
            parts = (sums[-1][:, :1], *(details[:, 1:] for details in sums))  # (B, 1), (B, 3), ...
            energies = torch.cat(parts, dim=1) / size
            columns.append([tuple(image) for image in energies.tolist()])
        return zip(*columns, strict=True)

    def summarise(self, columns: Sequence[Any]) -> dict[str, dict[str, float | None]]:
        """The bands, coarse to fine: LL3, LH3, HL3, HH3, LH2, ..., HH1.

        The first letter is the filter along the height, the second the filter along the width: LH
        has the detail along the width, as at vertical edges.

        Each has its ``mse``; ``signal``, the same of the inputs; ``share_of_signal``, the energy of
        all errors over the energy of all inputs in the band; and ``energy_ratio``, the energy of
        all reconstructions over the same. Both are None if the inputs have none. The signal of LL
        includes the brightness, counted from black.
        """
        # The place of each band in an image's Energies, from coarse to fine.
        errors, *_ = columns
        levels = len(errors[0]) // 3
        places = {f"LL{levels}": 0}
        for level in range(levels, 0, -1):
            for i, band in enumerate(("LH", "HL", "HH")):
                places[f"{band}{level}"] = 3 * level - 2 + i

        # Sums over images; columns are the Energies of error, input and reconstruction.
        n = len(errors)
        bands: dict[str, dict[str, float | None]] = {}
        for name, place in places.items():
            in_band = itemgetter(place)
            error, signal, out = [math.fsum(map(in_band, images)) for images in columns]
            shares = NO_SIGNAL
            if signal:
                shares = {"share_of_signal": error / signal, "energy_ratio": out / signal}
            bands[name] = {"mse": error / n, "signal": signal / n, **shares}
        return bands

    def columns(self, entry: Mapping[str, Mapping[str, float | None]]) -> Mapping[str, str]:
        finest = [entry.get(name, {}) for name in ("LH1", "HL1", "HH1")]
        signals = [band.get("signal") or 0.0 for band in finest]
        ratios = [band.get("energy_ratio") or 0.0 for band in finest]
        signal = math.fsum(signals)
        if not signal:
            return {}
        out = math.fsum(map(mul, signals, ratios))
        return {"fine detail": f"{significant(100 * out / signal)} %"}

    def section(self, page: Page) -> Markup | None:
        """Bars, scaled to a trained model's longest: an untrained one's would hide the others."""
        rows = [row for row in page.results.rows if row.observed.get(self.name)]
        if not rows:
            return None
        names = [name for row in rows for name in row.observed[self.name]]
        lengths: dict[str, list[float]] = {"mse": [], "share_of_signal": []}
        for row in rows:
            if row.baseline:
                continue
            for band in row.observed[self.name].values():
                for measure, values in lengths.items():
                    values.append(band[measure] or 0.0)
        longest = {measure: max(values, default=0.0) for measure, values in lengths.items()}
        unique = list(dict.fromkeys(names))
        return page.render("bands.html", rows=rows, names=unique, longest=longest)
