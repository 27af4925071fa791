"""The linear code: principal components of patches, decoded by least squares from 3x3 positions.

Both are computed in closed form. The two networks alone are a baseline; as linear paths beside
others they are where training begins.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from time import monotonic

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.source import Source
from olvae.files import counted
from olvae.metrics.metric import psnr
from olvae.models.autoencoder import LiteVAE
from olvae.modules.base import HALVES, Decoder, Encoder, Enlarge, Stage, device_of
from olvae.modules.distributions import deterministic_moments

POSITIONS = 2**16  # latent positions to fit on, hundreds for each unknown of an f8 code
CROPS = (256, 4096)  # the fewest and the most training crops to take for them
CROP_BYTES = 2**28  # of crops in memory, at most
POSITIONS_AT_A_TIME = 2**13  # positions that are summed at a time
LARGEST_PATCH = 2**12  # values, at most, whose covariances are computed: up to f32 in colour
MEASURED_IMAGES = 256  # of validation, on which a fitted code is measured

LEAST_VARIANCE = (2 / 255) ** 2 / 12
"""Variance of rounding to 8 bits, in [-1, 1]: smaller components are not enlarged to variance 1."""

Means = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [-1, 1] to latents (B, n_z, H/f, W/f)."""


class LinearEncoder(Encoder):
    """An encoder that is a linear path alone, with the smallest log-variances there are.

    Arguments as LiteVAE_Encoder's; ``downscale`` is the side of a patch in pixels, ``image_size``
    by default the side of 32 patches.

    Shapes: (B, in_channels, H, W) in [-1, 1] -> (B, latent_dim, H/downscale, W/downscale).
    """

    def __init__(
        self,
        latent_dim: int = 24,
        in_channels: int = 3,
        downscale: int = 8,
        image_size: int | None = None,
    ) -> None:
        super().__init__(latent_dim, in_channels, downscale, image_size or 32 * downscale)
        self.add_linear_path()

    def forward(self, x: Tensor) -> Tensor:
        assert self.linear is not None
        return deterministic_moments(self.linear(x))  # (B, latent_dim, H/f, W/f)


class LinearDecoder(Decoder):
    """A decoder that is a linear path alone: a 3x3 convolution of latents, rearranged to pixels.

    Arguments as LiteVAE_Decoder's; ``upscale`` is the side of a patch in pixels, before the image
    is enlarged.

    Shapes: (B, z_channels, h, w) -> (B, out_channels, f h, f w), f = enlarge upscale.
    """

    def __init__(
        self, z_channels: int = 12, out_channels: int = 3, upscale: int = 8, enlarge: Enlarge = 1
    ) -> None:
        super().__init__(z_channels, out_channels, upscale, enlarge)
        self.add_linear_path()

    def forward(self, z: Tensor) -> Tensor:
        return self.linear_path(z)

    def paths(self) -> list[list[Stage]]:
        return [[Stage(self.linear_path, 1, self.upscale)]]


def start_linearly(
    model: LiteVAE,
    source: Source,
    seed: int,
    device: torch.device,
    teacher: Means | None = None,
    fresh: Collection[str] = HALVES,
    frozen: Collection[str] = (),
) -> tuple[float | None, str]:
    """Fit the linear paths on the first training crops, and measure the code they make.

    The crops are the same in every process. A teacher, if there is one, replaces frozen halves; if
    the data carry its latents, those are used instead of running it. See :func:`fit_linear_paths`.

    Returns the mean PSNR in dB over the images that training validates on, and a line for the
    summary. The mean is None if no path of a trained decoder was fitted, or if there are more than
    :data:`MEASURED_IMAGES` images; then the line has the mean of the first ones.
    """
    began = monotonic()
    pixels = source.pixel_range
    crops, known = crops_and_means(source, seed, model.upscale)
    model.to(device)
    fit_linear_paths(model, crops, teacher if known is None else known, pixels, fresh)

    # Measure on one image more than needed, to know whether there are more.
    latents = _means(model, fresh)
    if teacher is not None and "encoder" in frozen:
        latents = teacher
    found: list[float] = []
    if model.decoder.linear is not None and "decoder" in fresh and "decoder" not in frozen:
        for sample in source.validated():
            if sample.image is None:
                continue
            image = sample.image[None]
            with torch.no_grad():
                if latents is teacher and sample.moments is not None:
                    z = sample.moments[None].chunk(2, dim=1)[0].to(device)
                else:
                    z = latents(model.shrink(pixels.normalise(image.to(device))))
                y = model.decoder.linear_path(model.decoder_input(z))
            found.append(float(psnr(pixels.levels(image), pixels.to_levels(y).cpu())))
            if len(found) > MEASURED_IMAGES:
                break

    # The mean, without images that come back exactly, as in validation.
    measured = found[:MEASURED_IMAGES]
    finite = [value for value in measured if value != math.inf]
    line = f"fitted on {len(crops):,} training crops in {monotonic() - began:.1f} s"
    mean: float | None = None
    if finite:
        mean = sum(finite) / len(finite)
        line = f"{mean:.2f} dB on {counted(len(measured), 'validation image')}, {line}"
    if len(found) > MEASURED_IMAGES:
        mean = None
    return mean, f"linear code: {line}"


def crops_and_means(source: Source, seed: int, factor: int) -> tuple[Tensor, Tensor | None]:
    """The first training crops of a seed, (N, C, H, W), and their latents' means.

    The means are None if the source has none. N is such that the crops have :data:`POSITIONS`
    latent positions, within :data:`CROPS` and :data:`CROP_BYTES`. The data are read once.
    """
    least, most = CROPS
    count = min(most, max(least, POSITIONS // math.prod(source.size // factor)))
    value_bytes = 1 if source.pixel_range.eight_bits else 4
    crop_bytes = value_bytes * source.channels * math.prod(source.size)
    count = min(count, max(1, CROP_BYTES // crop_bytes))
    samples = list(source.first_samples(seed, count))
    means = [sample.moments.chunk(2)[0] for sample in samples if sample.moments is not None]
    crops = torch.stack([sample.image for sample in samples if sample.image is not None])
    return crops, torch.stack(means) if len(means) == len(crops) else None


@torch.no_grad()
def fit_linear_paths(
    model: LiteVAE,
    crops: Tensor,
    teacher: Means | Tensor | None = None,
    pixel_range: PixelRange = EIGHT_BITS,
    fresh: Collection[str] = HALVES,
) -> None:
    """Fit the linear paths of ``fresh`` halves; the others have weights already.

    The encoder's path becomes whitened principal components, the decoder's least squares from 3x3
    latents. A fresh encoder with a linear path has no other output yet. Crops are as read,
    (N, C, H, W). With a teacher, or its means (N, n, h, w), the encoder's path is least squares to
    these, and the decoder's path is fitted from them.
    """
    device = device_of(model)
    f = model.downscale
    large = model.upscale
    n = model.latent_channels
    values = model.in_channels * large**2  # of a patch
    if values > LARGEST_PATCH:
        raise ValueError(
            f"linear: covariances of patches of {large}x{large} pixels are too large: leave it out"
        )

    # Crops in batches; a teacher's means for them are computed once, for both halves.
    together = max(1, POSITIONS_AT_A_TIME * large**2 // crops[0, 0].numel())

    def batches() -> Iterator[Tensor]:
        return (pixel_range.normalise(part.to(device)) for part in crops.split(together))

    def encoded() -> Iterator[Tensor]:
        return map(model.shrink, batches())

    means: Sequence[Tensor] = ()
    if isinstance(teacher, Tensor):
        means = teacher.to(device).split(together)
    elif teacher is not None:
        means = [teacher(x) for x in encoded()]

    # The encoder, before the decoder, which is fitted from the encoder's latents.
    path = model.encoder.linear
    if path is not None and "encoder" in fresh:
        if teacher is None:
            patches = (_vectors(F.pixel_unshuffle(x, f)) for x in encoded())
            _set(path, *principal_components(*mean_and_covariance(patches), n))
        else:
            both = zip(encoded(), means, strict=True)
            pairs = (torch.cat((_vectors(_windows(x, path)), _vectors(z)), dim=1) for x, z in both)
            _set(path, *least_squares(*mean_and_covariance(pairs), n))

    # The decoder: a patch from its latent position and the ones around, without the border, unless
    # there is nothing else.
    path = model.decoder.linear
    if path is not None and "decoder" in fresh:

        def pair(x: Tensor, z: Tensor) -> Tensor:
            around = _windows(model.decoder_input(z), path)
            patches = F.pixel_unshuffle(x, large)
            height, width = around.shape[-2:]
            if min(height, width) > 2:
                around = around[..., 1:-1, 1:-1]
                patches = patches[..., 1:-1, 1:-1]
            return _vectors(torch.cat((around, patches), dim=1))

        latents: Iterable[Tensor] = means
        if teacher is None:
            latents = map(_means(model, fresh), encoded())
        _set(path, *least_squares(*mean_and_covariance(map(pair, batches(), latents)), values))


def _means(model: LiteVAE, fresh: Collection[str]) -> Means:
    """The encoder's means; a fresh encoder is its linear path, if it has one."""
    path = model.encoder.linear
    if path is not None and "encoder" in fresh:
        return path
    return lambda x: model.encode(x).mean


def _windows(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a linear path sees at each of its positions: (B, C, H, W) -> (B, C k k, h, w)."""
    margin = (conv.kernel_size[0] - conv.stride[0]) // 2
    padded = F.pad(x, (margin,) * 4, mode="replicate")
    windows = F.unfold(padded, conv.kernel_size, stride=conv.stride)
    height, width = (side // conv.stride[0] for side in x.shape[-2:])
    return windows.view(*windows.shape[:2], height, width)


def _vectors(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C)."""
    return x.movedim(1, -1).flatten(0, 2)


@torch.no_grad()
def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Set a convolution to weight x + bias of its inputs, in the order (channel, row, column).

    A weight for fewer rows and columns is put in the middle, between zeros.
    """
    assert conv.bias is not None
    weight = weight.unflatten(1, (conv.in_channels, -1))
    side = math.isqrt(weight.shape[2])
    margin = (conv.kernel_size[0] - side) // 2
    conv.weight.copy_(F.pad(weight.unflatten(2, (side, side)), (margin,) * 4))
    conv.bias.copy_(bias)


def mean_and_covariance(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (p) and covariance (p, p) over batches (n, p), summed in float64 on the CPU."""
    count = 0
    total = torch.zeros(())
    products = torch.zeros(())
    for batch in batches:
        x = batch.detach().cpu().double()
        count += len(x)
        total = total + x.sum(0)
        products = products + x.T @ x
    if not products.isfinite().all():
        raise ValueError(
            "the linear code: not finite: images, or a teacher's latents (set its `dtype` to "
            "float32)"
        )
    mean = total / count
    return mean, products / count - mean.outer(mean)


def least_squares(mean: Tensor, covariance: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Weight (q, p) and bias (q) from a vector's first p values to its last q.

    The smallest weight, if several are best.
    """
    p = len(mean) - outputs
    weight = covariance[p:, :p] @ torch.linalg.pinv(covariance[:p, :p], rtol=1e-12, hermitian=True)
    return weight, mean[p:] - weight @ mean[:p]


def principal_components(mean: Tensor, covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Weight (count, p) and bias (count) to the first principal components, whitened.

    Each has mean 0 and variance 1. Its largest weight is positive, so that its sign is defined.
    Components beyond p are 0.
    """
    variances, axes = torch.linalg.eigh(covariance)  # ascending; axes in columns
    axes = axes.flip(1)[:, :count].T  # (count, p)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    weight = axes / variances.flip(0)[:count, None].clamp(min=LEAST_VARIANCE).sqrt()
    weight = F.pad(weight, (0, 0, 0, count - len(weight)))
    return weight, -weight @ mean
