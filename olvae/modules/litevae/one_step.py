"""A decoder that generates in one step: LiteVAE's, which also sees a noised picture and its time.

A one-step diffusion decoder, as in SSDD (arXiv 2510.04961) and DiTo (arXiv 2501.18593). The
picture enters every block by a convolution that is 0 at first, so that it begins as the plain
decoder whose weights it starts from.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import GeneratingDecoder, Stage
from olvae.modules.litevae.decoder_model import (
    LiteVAE_Decoder,
    Upsample,
    Variant,
    inverse_wavelet,
    reach_of,
)
from olvae.modules.litevae.encoder_model import conv3
from olvae.modules.mixed_precision import casts_together, upcast

# Latent positions, along each side, after which the noise of `decode` repeats.
NOISE_POSITIONS = 32

# Cosines and sines of the time, 0.5 to 8 periods from 0 to 1.
HARMONICS = 16


class Injection(nn.Module):
    """Add the noised picture, scaled by its time, and a bias of the time to a block's input.

    Nothing at first: convolution and linear layer are 0.

    Shapes: h (B, width, H, W), picture (B, picture_channels, H, W), harmonics (B or 1, 2 HARMONICS)
    -> (B, width, H, W).
    """

    def __init__(self, picture_channels: int, width: int) -> None:
        super().__init__()
        self.conv = conv3(picture_channels, width)
        self.time = nn.Linear(2 * HARMONICS, 2 * width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor, picture: Tensor, harmonics: Tensor) -> Tensor:
        gain, bias = self.time(harmonics)[..., None, None].chunk(2, dim=1)  # (B or 1, width, 1, 1)
        out: Tensor = h + (1 + gain) * self.conv(picture) + bias
        return out


class NoisyWindows:
    """Windows of a latent, each with the noise of its place: (B, z_channels + C f^2, h, w)."""

    def __init__(self, decoder: "OneStepDecoder", z: Any) -> None:
        self.decoder = decoder
        self.z = z
        self.shape = z.shape

    def __getitem__(self, window: tuple[Any, slice, slice]) -> Tensor:
        _, rows, columns = window
        return self.decoder.with_noise(self.z[window], rows.start, columns.start)


class OneStepDecoder(GeneratingDecoder, LiteVAE_Decoder):
    """Latent and noise to image, in one step.

    The first picture is the linear path's, or 0 without one. Noise is added to it, x_1 = first
    picture + noise_std noise, and the network estimates the image x: the plain decoder's picture at
    first, whatever the noise. On the line x_t = (1 - t) x + t x_1 the estimate is

        first picture + t / s network + (1 - t) / s^2 (x_t - first picture), s^2 = (1 - t)^2 + t^2

    so that the network's own target has one size at every time, if the image differs from the first
    picture by about ``noise_std``.

    ``forward(z)`` has noise that depends on the place alone: equal in every call, on any size and
    in tiles. It repeats after 32 latent positions. In training its place is random, so that all of
    it is learned.

    Args:
        channels, z_channels, out_channels, channel_mult, num_res_blocks, variant, output, dropout,
            linear: LiteVAE_Decoder's.
        noise_std: standard deviation of the noise, above 0: about the first picture's error, in
            [-1, 1]. Without a linear path it is the images', about 0.5.
        noise_seed: of the noise that ``forward(z)`` has, which is saved with the weights.

    Shapes: as LiteVAE_Decoder's; ``noised`` (B, out_channels, f h, f w), ``t`` (B,) in (0, 1].
    """

    noise: Tensor

    def __init__(
        self,
        channels: int = 128,
        z_channels: int = 12,
        out_channels: int = 3,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        variant: Variant = "open_litevae",
        output: Literal["image", "wavelet", "packets"] = "image",
        dropout: float = 0.0,
        linear: bool = False,
        noise_std: float = 0.08,
        noise_seed: int = 0,
    ) -> None:
        if not noise_std > 0:
            raise ValueError(f"noise_std must be above 0, got {noise_std}")
        super().__init__(
            channels,
            z_channels,
            out_channels,
            channel_mult,
            num_res_blocks,
            variant,
            output,
            dropout,
            linear,
        )
        self.noise_std = noise_std

        # An injection for each block, in the order they run: the middle, then the levels.
        # The picture is folded to the block's resolution, by pixels per side.
        widths = [channels * channel_mult[-1]] * (len(self.mid) + 1)
        folds = [self.upscale] * len(self.mid)
        for index, mult in reversed(list(enumerate(channel_mult))):
            widths += [channels * mult] * (num_res_blocks + 1)
            folds += [2 ** max(index, self.wavelet_levels)] * (num_res_blocks + 1)
        self.injections = nn.ModuleList()
        for width, fold in zip(widths, folds, strict=False):  # the last width is an output's
            self.injections.append(Injection(out_channels * fold**2, width))

        # The noise, folded to latent positions. Drawn on the CPU, so that it is equal everywhere.
        generator = torch.Generator().manual_seed(noise_seed)
        shape = (out_channels * self.upscale**2, NOISE_POSITIONS, NOISE_POSITIONS)
        noise = torch.randn(shape, generator=generator, device="cpu")
        self.register_buffer("noise", noise.to(self.conv_out.weight.device))

    @property
    def output_layer(self) -> nn.Conv2d:
        """The last convolution, though others are defined after it."""
        return self.conv_out

    @property
    def sees_noise(self) -> bool:
        return any(injection.conv.weight.any() for injection in self._injections())

    def _injections(self) -> list[Injection]:
        return [cast("Injection", injection) for injection in self.injections]

    def first_picture(self, z: Tensor) -> Tensor:
        """Return the linear path's picture (B, out_channels, f h, f w) in float32, or zeros."""
        if self.linear is not None:
            return upcast(self.linear_path(z))
        sides = [self.upscale * side for side in z.shape[-2:]]
        return z.new_zeros(z.shape[0], self.out_channels, *sides, dtype=upcast(z).dtype)

    def start(self, z: Tensor, noise: Tensor) -> Tensor:
        return self.first_picture(z) + self.noise_std * noise

    def with_noise(self, z: Tensor, top: int | Tensor = 0, left: int | Tensor = 0) -> Tensor:
        """Add the noise of a window at this place: (B, n, h, w) -> (B, n + C f^2, h, w)."""
        height, width = z.shape[-2:]
        rows = (top + torch.arange(height, device=z.device)) % NOISE_POSITIONS
        columns = (left + torch.arange(width, device=z.device)) % NOISE_POSITIONS
        noise = self.noise[:, rows][:, :, columns].to(z.dtype)
        # Not len(z), which the export to ONNX takes for a constant.
        return torch.cat((z, noise.expand(z.shape[0], -1, -1, -1)), dim=1)

    def fold(self, picture: Tensor) -> Tensor:
        """Fold to latent positions, as each upsampling unfolds: (B, C, f h, f w), (B, C f^2, h, w).

        By twos: f at once would give another order of channels.
        """
        for _ in range(self.upscale.bit_length() - 1):
            picture = F.pixel_unshuffle(picture, 2)
        return picture

    def unfold(self, folded: Tensor) -> Tensor:
        """Undo :meth:`fold`: (B, C f^2, h, w) -> (B, C, f h, f w)."""
        for _ in range(self.upscale.bit_length() - 1):
            folded = F.pixel_shuffle(folded, 2)
        return folded

    @casts_together
    def forward(self, z: Tensor, noised: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        self.check_latent(z)
        first = self.first_picture(z)
        if noised is None:
            # One step from the noise of its place, in training of a random one.
            if self.training:
                top, left = torch.randint(NOISE_POSITIONS, (2, 1), device=z.device)
                h = self.with_noise(z, top, left)
            else:
                h = self.with_noise(z)
        else:
            difference = (upcast(noised) - first) / self.noise_std
            h = _beside(z, self.fold(difference))
        for stage in self._stages(t):
            h = self.step(stage.run, h)
        return first.to(h.dtype) + h

    def windows(self, z: Any) -> NoisyWindows:
        return NoisyWindows(self, z)

    def paths(self) -> list[list[Stage]] | None:
        """List the chains of steps that start at windows of latent and noise."""
        network = self.stages()
        if network is None:
            return None
        if self.linear is None:
            return [network]

        def path(window: Tensor) -> Tensor:
            return self.linear_path(window[:, : self.z_channels])

        return [network, [Stage(path, 1, self.upscale)]]

    def _stages(self, t: Tensor | None = None) -> list[Stage]:
        """List the steps at these times (B,), by default 1; each hands the picture on, folded."""
        at = self.noise.new_ones(1) if t is None else t
        orders = torch.arange(1, HARMONICS + 1, device=at.device) * math.pi
        angles = orders * at[:, None]
        harmonics = torch.cat((angles.cos(), angles.sin()), dim=1).to(self.noise.dtype)

        # The first convolution, the blocks and upsamplings.
        out: list[Stage] = []
        injections = iter(self._injections())
        fold = self.upscale
        for module in self.blocks():
            if module is self.conv_in:
                run = partial(self._features, module, fold)
                out.append(Stage(run, reach_of(module)))
            elif isinstance(module, Upsample):
                out.append(Stage(partial(self._enlarge, module, fold), reach_of(module), scale=2))
                fold //= 2
            else:
                injection = next(injections)
                run = partial(self._block, module, injection, harmonics, fold)
                out.append(Stage(run, reach_of(module, injection)))

        # The last convolution, inverse wavelets, and the estimate.
        run = partial(self._features, self.head, fold)
        out.append(Stage(run, reach_of(self.conv_norm, self.conv_out)))
        for _ in range(self.wavelet_levels):
            out.append(Stage(partial(self._enlarge, inverse_wavelet, fold), 0, scale=2))
            fold //= 2
        return [*out, Stage(partial(self._estimate, t), 0)]

    def _split(self, h: Tensor, fold: int) -> tuple[Tensor, Tensor]:
        """Part features from the picture, which is folded to this many pixels per side."""
        picture = self.out_channels * fold**2
        return h[:, :-picture], h[:, -picture:]

    def _features(self, run: Any, fold: int, h: Tensor) -> Tensor:
        features, picture = self._split(h, fold)
        return _beside(run(features), picture)

    def _block(
        self, block: nn.Module, injection: nn.Module, harmonics: Tensor, fold: int, h: Tensor
    ) -> Tensor:
        features, picture = self._split(h, fold)
        return _beside(block(injection(features, picture, harmonics)), picture)

    def _enlarge(self, run: Any, fold: int, h: Tensor) -> Tensor:
        features, picture = self._split(h, fold)
        return _beside(run(features), F.pixel_shuffle(picture, 2))

    def _estimate(self, t: Tensor | None, h: Tensor) -> Tensor:
        """Return the estimate beside the first picture: the network's alone at the time 1."""
        image, picture = self._split(h, 1)
        if t is None:
            return image
        t = t[:, None, None, None]
        size = (1 - t).square() + t.square()
        skip = (1 - t) / size * self.noise_std
        return t / size.sqrt() * upcast(image) + skip * upcast(picture)


def _beside(features: Tensor, picture: Tensor) -> Tensor:
    """Concatenate; under autocast features may have another dtype than the picture."""
    return torch.cat((features, picture.to(features.dtype)), dim=1)
