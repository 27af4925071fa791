"""The wavelet transform beside PyWavelets and beside a strided convolution, in one run."""

import time
from collections.abc import Callable
from typing import Any

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.modules.wavelet import dwt2

__all__ = ["bench_dwt"]

PEER = "PyWavelets"


def bench_dwt(batch_size: int, size: int, wavelet: str, device: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Time one level of the transform of RGB images, in turns; float32.

    PyWavelets runs on the CPU whatever the device. The convolution has the same filters, four outputs per channel and
    stride 2, and stands for what one would write without a library; it is there for Haar only.

    Returns:
        For each name, images_per_s, ratio (to PyWavelets), and max_difference from its coefficients.
    """
    x = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    on_device = x.to(device)
    contenders: dict[str, Callable[[], Tensor]] = {
        PEER: lambda: _pywavelets(x, wavelet),
        "olvae.modules.wavelet.dwt2": lambda: dwt2(on_device, wavelet),
    }
    if wavelet == "haar":
        filters = _haar_filters().to(device)
        contenders["strided convolution"] = lambda: _convolution(on_device, filters)
    expected = _pywavelets(x, wavelet)
    best = dict.fromkeys(contenders, float("inf"))
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                if device != "cpu":
                    torch.cuda.synchronize(device)
                if turn:
                    best[name] = min(best[name], time.perf_counter() - start)
        differences = {name: float((run().cpu() - expected).abs().max()) for name, run in contenders.items()}
    return [
        {
            "name": name,
            "images_per_s": batch_size / best[name],
            "ratio": best[PEER] / best[name],
            "max_difference": differences[name],
        }
        for name in contenders
    ]


def _pywavelets(x: Tensor, wavelet: str) -> Tensor:
    ll, (height, width, diagonal) = pywt.dwt2(x.numpy(), wavelet, mode="periodization")
    return torch.cat([torch.from_numpy(band) for band in (ll, width, height, diagonal)], dim=1)  # (B, 4C, H/2, W/2)


def _haar_filters() -> Tensor:
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    bands = torch.tensor(signs, dtype=torch.float32).reshape(4, 1, 2, 2) / 2.0
    return bands.repeat(3, 1, 1, 1)  # (12, 1, 2, 2), four for each channel


def _convolution(x: Tensor, filters: Tensor) -> Tensor:
    bands: Tensor = F.conv2d(x, filters, stride=2, groups=3)  # (B, 12, H/2, W/2), channel by channel
    ordered: Tensor = bands.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)  # band by band
    return ordered
