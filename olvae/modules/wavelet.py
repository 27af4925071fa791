"""Differentiable, orthonormal 2-D discrete wavelet transform, exact inverse, several levels.

Bands lie C channels at a time in the order of the published code [M]: approximation (LL), then the
details along the width, along the height, and along both: PyWavelets' cA, cV, cH, cD. For Haar and
a 2x2 block of pixels a b / c d these are (a+b+c+d)/2, (a-b+c-d)/2, (a+b-c-d)/2, (a-b-c+d)/2.

The signal is continued periodically (PyWavelets' mode "periodization"), so that N samples give N/2
coefficients per band and the transform stays orthonormal for every filter length. An odd side is
first made even by repeating its last row or column, as PyWavelets does.

Everything is computed in float32 (float64 for float64), under autocast too, and never in TF32,
neither backwards nor compiled: on CUDA, filters other than Haar's are applied in float64.
Half-precision input comes back as float32 inside an autocast region, like torch's own float32
operations there, and in its own dtype outside.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from olvae.library_internals import assume_constant, is_traced
from olvae.modules.mixed_precision import autocast_enabled, no_autocast, upcast, without_tf32


def dwt2(x: Tensor, wavelet: str = "haar") -> Tensor:
    """One level of the transform, by an orthogonal wavelet of PyWavelets.

    "haar", "db2", "sym4", ...: (B, C, H, W), any real dtype, any H and W from 1 up -> (B, 4C,
    ceil(H/2), ceil(W/2)): LL, width, height and diagonal details, C channels each.
    """
    if x.ndim != 4:
        raise ValueError(f"dwt2 takes images of shape (B, C, H, W), got {tuple(x.shape)}")
    y = upcast(x)
    odd_h = y.shape[-2] % 2
    odd_w = y.shape[-1] % 2
    if odd_h or odd_w:
        y = F.pad(y, (0, odd_w, 0, odd_h), mode="replicate")  # (B, C, 2h, 2w)
    if wavelet == "haar":
        bands = _haar_analysis(y)
    else:
        low_w, high_w = _analyse_rows(y, wavelet)  # each (B, C, 2h, w)
        low_h, high_h = _analyse_rows(torch.cat((low_w, high_w), dim=1).mT, wavelet)
        ll, lh = low_h.mT.chunk(2, dim=1)
        hl, hh = high_h.mT.chunk(2, dim=1)
        bands = torch.cat((ll, lh, hl, hh), dim=1)
    return _in_dtype_of(bands, x)  # (B, 4C, h, w)


def idwt2(y: Tensor, wavelet: str = "haar", size: tuple[int, int] | None = None) -> Tensor:
    """Invert :func:`dwt2`: (B, 4C, h, w) in its order -> (B, C, *size).

    The default size is (2h, 2w), which for an odd-sized image holds one repeated row or column too
    many.
    """
    if y.ndim != 4 or y.shape[1] % 4:
        raise ValueError(f"idwt2 takes bands of shape (B, 4C, h, w), got {tuple(y.shape)}")
    h, w = y.shape[-2:]
    if size is not None and ((size[0] + 1) // 2 != h or (size[1] + 1) // 2 != w):
        raise ValueError(f"bands of {h}x{w} do not belong to an image of {size[0]}x{size[1]}")
    bands = upcast(y)
    if wavelet == "haar":
        x = _haar_synthesis(bands)
    else:
        ll, lh, hl, hh = bands.chunk(4, dim=1)  # each (B, C, h, w)
        low_h = torch.cat((ll, lh), dim=1).mT  # (B, 2C, w, h)
        high_h = torch.cat((hl, hh), dim=1).mT
        rows = _synthesise_rows(low_h, high_h, wavelet).mT  # (B, 2C, 2h, w)
        low_w, high_w = rows.chunk(2, dim=1)
        x = _synthesise_rows(low_w, high_w, wavelet)
    if size is not None:
        x = x[..., : size[0], : size[1]]
    return _in_dtype_of(x, y)


def wavedec2(x: Tensor, wavelet: str = "haar", levels: int = 3) -> list[Tensor]:
    """Several levels: level l+1 transforms the LL band of level l.

    Return a list, finest first; its l-th tensor (from 1) is (B, 4C, ~H/2^l, ~W/2^l) in dwt2's
    order.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    channels = x.shape[1]
    out: list[Tensor] = []
    for _ in range(levels):
        x = dwt2(x, wavelet)
        out.append(x)
        x = x[:, :channels]  # LL
    return out


def waverec2(
    coefficients: list[Tensor], wavelet: str = "haar", size: tuple[int, int] | None = None
) -> Tensor:
    """Invert :func:`wavedec2`; every LL but the coarsest is recomputed, not read."""
    if not coefficients:
        raise ValueError("waverec2 needs at least one level")
    # The size of each level's image: the given one, then the bands' of each finer level.
    sizes = [size]
    *finer, coarsest = coefficients
    for level in finer:
        sizes.append((level.shape[-2], level.shape[-1]))
    x = idwt2(coarsest, wavelet, sizes.pop())
    for level in reversed(finer):
        x = idwt2(torch.cat((x, level[:, x.shape[1] :]), dim=1), wavelet, sizes.pop())
    return x


def _in_dtype_of(y: Tensor, like: Tensor) -> Tensor:
    if autocast_enabled(like) or not like.dtype.is_floating_point:
        return y
    return y.to(like.dtype)


# Haar, the fast path: eight additions per 2x2 block, in two forms.
#
# In graphs (compiled, exported, traced) plain operations, which a compiler fuses. Eagerly these
# would be bound by fresh memory, hence the two autograd functions: they allocate little beside
# their output, and work on a part of the batch at a time that stays in the processor's cache. The
# transform is orthonormal, so the gradient of each is the other.

# Elements of the batch that are transformed at a time on a CPU; at least one image.
VALUES_AT_A_TIME = 2**18


def _in_a_graph() -> bool:
    return torch.compiler.is_compiling() or is_traced()


def _haar_analysis(x: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> bands (B, 4C, h, w)."""
    bands: Tensor = _plain_haar_analysis(x) if _in_a_graph() else _HaarAnalysis.apply(x)
    return bands


def _haar_synthesis(bands: Tensor) -> Tensor:
    """Bands (B, 4C, h, w) -> (B, C, 2h, 2w)."""
    x: Tensor = _plain_haar_synthesis(bands) if _in_a_graph() else _HaarSynthesis.apply(bands)
    return x


def _plain_haar_analysis(x: Tensor) -> Tensor:
    # The pixels a b / c d of each 2x2 block.
    a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
    c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    top, bottom = a + b, c + d  # lowpass along the width
    top_w, bottom_w = a - b, c - d  # highpass along the width
    return 0.5 * torch.cat((top + bottom, top_w + bottom_w, top - bottom, top_w - bottom_w), dim=1)


def _plain_haar_synthesis(bands: Tensor) -> Tensor:
    ll, dw, dh, dd = bands.chunk(4, dim=1)
    top, bottom = ll + dh, ll - dh
    top_w, bottom_w = dw + dd, dw - dd
    pixels = (top + top_w, top - top_w, bottom + bottom_w, bottom - bottom_w)  # a, b, c, d
    blocks = 0.5 * torch.stack(pixels, dim=2)  # (B, C, 4, h, w)
    return F.pixel_shuffle(blocks.flatten(1, 2), 2)  # (B, C, 2h, 2w)


class _HaarAnalysis(Function):
    """:func:`_plain_haar_analysis` with little fresh memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  (torch's signature)
        # The bands keep the memory format of the images.
        b, c, h, w = x.shape
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        bands = torch.empty(
            (b, 4 * c, h // 2, w // 2), dtype=x.dtype, device=x.device, memory_format=layout
        )

        # Along the width into two fresh tensors, then along the height into the bands.
        n = _images_at_a_time(x)
        for part, out in zip(x.split(n), bands.split(n), strict=True):
            ll, dw, dh, dd = out.chunk(4, dim=1)
            left, right = part[..., 0::2], part[..., 1::2]
            low = (left + right).mul_(0.5)  # (n, C, 2h, w)
            high = (left - right).mul_(0.5)
            for rows, added, subtracted in ((low, ll, dh), (high, dw, dd)):
                top, bottom = rows[..., 0::2, :], rows[..., 1::2, :]
                torch.add(top, bottom, out=added)
                torch.sub(top, bottom, out=subtracted)
        return bands

    @staticmethod
    def backward(ctx: Any, bands: Tensor) -> Tensor:  # noqa: ARG004
        return _haar_synthesis(bands)


class _HaarSynthesis(Function):
    """:func:`_plain_haar_synthesis` with little fresh memory."""

    @staticmethod
    def forward(ctx: Any, bands: Tensor) -> Tensor:  # noqa: ARG004
        b, c4, h, w = bands.shape
        x = bands.new_empty(b, c4 // 4, 2 * h, 2 * w)

        # Along the height into two fresh tensors, then along the width into the image.
        n = _images_at_a_time(x)
        for part, out in zip(bands.split(n), x.split(n), strict=True):
            ll, dw, dh, dd = part.chunk(4, dim=1)
            low = x.new_empty(*out.shape[:-1], w)  # (n, C, 2h, w)
            high = torch.empty_like(low)
            for rows, added, subtracted in ((low, ll, dh), (high, dw, dd)):
                torch.add(added, subtracted, out=rows[..., 0::2, :])
                torch.sub(added, subtracted, out=rows[..., 1::2, :])
                rows.mul_(0.5)
            torch.add(low, high, out=out[..., 0::2])
            torch.sub(low, high, out=out[..., 1::2])
        return x

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return _haar_analysis(x)


def _images_at_a_time(x: Tensor) -> int:
    images = len(x)
    if x.device.type != "cpu":
        return max(1, images)
    return max(1, images * VALUES_AT_A_TIME // max(1, x.numel()))


# Any orthogonal filter: one axis at a time, as a convolution over the periodic signal.


def _filters(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lowpass and highpass analysis filters, reversed."""
    import pywt

    try:
        filters = pywt.Wavelet(wavelet)
    except ValueError:
        raise ValueError(
            f"unknown wavelet {wavelet!r}: take haar, or one of db2 ..., sym2 ..., coif1 ..."
        ) from None
    if not filters.orthogonal:
        raise ValueError(
            f"wavelet {wavelet!r} is not orthogonal: choose one of the db, sym or coif families"
        )
    return tuple(filters.rec_lo), tuple(filters.rec_hi)


# A compiler does not look into pywt.
assume_constant(_filters)


def _periodic(x: Tensor, reach: int) -> Tensor:
    """Continue the last axis periodically on both sides; the padding may exceed the signal."""
    n = x.shape[-1]
    places = torch.arange(-reach, n + reach, device=x.device)
    # The remainder by a tensor, not by a number: ONNX has only that.
    return x.index_select(-1, places.remainder(torch.full_like(places, n)))


def _analyse_rows(x: Tensor, wavelet: str) -> tuple[Tensor, Tensor]:
    """(..., 2n) -> low (..., n), high (..., n).

    out[k] = sum_j f[j] x[2k + F/2 - j], indices modulo 2n.
    """
    weight = torch.tensor(_filters(wavelet), dtype=x.dtype, device=x.device)[:, None]  # (2, 1, F)
    rows = _periodic(x.reshape(-1, 1, x.shape[-1]), weight.shape[-1] // 2 - 1)
    with no_autocast(x):
        bands = F.conv1d(without_tf32(rows), without_tf32(weight), stride=2).to(x.dtype)
    low, high = bands.unbind(1)  # each (rows, n)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return low.reshape(shape), high.reshape(shape)


def _synthesise_rows(low: Tensor, high: Tensor, wavelet: str) -> Tensor:
    """The transpose of :func:`_analyse_rows`, (..., n) twice -> (..., 2n)."""
    filters = torch.tensor(_filters(wavelet), dtype=low.dtype, device=low.device)
    weight = filters[:, None]  # (2, 1, F)
    n = low.shape[-1]
    half = weight.shape[-1] // 2

    # Continue both bands by F/2 coefficients: a pixel depends on up to half of them at either end.
    bands = torch.stack((low.reshape(-1, n), high.reshape(-1, n)), dim=1)  # (rows, band, n)
    bands = _periodic(bands, half)
    with no_autocast(low):
        x = F.conv_transpose1d(without_tf32(bands), without_tf32(weight), stride=2)
    x = x.to(low.dtype)  # (rows, 1, ...)

    # Its first pixel has the index 1 - F/2 - F.
    start = 3 * half - 1
    return x[..., start : start + 2 * n].reshape(*low.shape[:-1], 2 * n)
