"""Where in the spectrum the error is: its energy per wavelet band."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from olvae.metrics.metric import Unavailable, check_pairs
from olvae.modules.wavelet import wavedec2

__all__ = ["BandErrors"]

Energies = tuple[float, ...]
"""Of one image: LL of the last level, then LH, HL, HH of level 1, of level 2, and so on."""


class BandErrors:
    """The mean squared error of one target's reconstructions, split among the bands of the orthonormal Haar transform.

    Pixels are 0..255, as in PSNR. A band's ``mse`` is the error's energy in it per pixel value, averaged over images;
    by Parseval the bands add up to the mean squared error. Sums are exact in float64. A key counts once.

    Args:
        levels: how often LL is split again; fewer if the images' sides can't be halved as often.
    """

    def __init__(self, levels: int = 3) -> None:
        self._levels = levels
        self._energies: dict[str, tuple[Energies, Energies]] = {}  # of the error, and of the input

    @torch.no_grad()
    def add(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Add images.

        Args:
            keys: of the B images.
            x, y: inputs and reconstructions, uint8 (B, C, H, W), on any device; all of one size.

        Raises:
            Unavailable: a side is odd.
            ValueError: x and y do not fit together.
        """
        check_pairs(keys, x, y)
        height, width = x.shape[-2:]
        levels = min(self._levels, _halvings(height), _halvings(width))
        if not levels:
            raise Unavailable(f"the error per wavelet band needs images with even sides, got {height}x{width}")
        signal = x.double()
        error = y.double() - signal
        energies = zip(_energies(error, levels), _energies(signal, levels), strict=True)
        for key, pair in zip(keys, energies, strict=True):
            self._energies.setdefault(key, pair)

    def merge(self, other: "BandErrors") -> None:
        """Add what another process has seen."""
        self._energies = other._energies | self._energies

    def compute(self) -> dict[str, dict[str, float | None]]:
        """The bands, coarse to fine: LL3, LH3, HL3, HH3, LH2, ..., HH1.

        The first letter is the filter along the height, the second that along the width: LH has the detail along the
        width, which is what vertical edges have.

        Returns:
            For each band ``mse``, and ``share_of_signal``: the energy of all errors over that of all inputs in the
            band, None if the inputs have none. The signal of LL includes the brightness, counted from black.
        """
        errors, signals = zip(*self._energies.values(), strict=True)
        bands: dict[str, dict[str, float | None]] = {}
        for name, place in _places(len(errors[0]) // 3).items():
            error, signal = (math.fsum(image[place] for image in side) for side in (errors, signals))
            bands[name] = {"mse": error / len(errors), "share_of_signal": error / signal if signal else None}
        return bands


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
