"""PatchGAN: a plain convolutional discriminator of overlapping patches (Isola et al. 2017)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.library_internals import BatchNormBase
from olvae.modules.base import check_counts, mean_over_processes
from olvae.modules.mixed_precision import casts_together, upcast


class PatchGAN(nn.Module):
    """4x4 convolutions, BatchNorm, LeakyReLU 0.2; one logit per patch of the image [R].

    ``n_layers`` convolutions of stride 2 and two of stride 1; the width doubles from
    ``base_channels`` with every layer, up to eight times. The first and the last convolution have
    no BatchNorm; the others have no bias. Weights start from N(0, 0.02), BatchNorm's from
    N(1, 0.02). At the defaults a logit sees 70x70 pixels.

    BatchNorm makes a sample's logits depend on its batch: in training, use separate batches for
    real and fake images. Under torch.distributed its statistics are over all processes, which must
    have equally many images each.

    Args:
        in_channels: of the images.
        base_channels: the width of the first layer.
        n_layers: convolutions of stride 2.
    """

    num_outputs = 1

    def __init__(self, in_channels: int = 3, base_channels: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        check_counts(1, base_channels=base_channels, n_layers=n_layers)
        self.min_size = 4 * 2**n_layers
        widths = [base_channels * min(2**i, 8) for i in range(n_layers + 1)]
        self.first = nn.Conv2d(in_channels, widths[0], kernel_size=4, stride=2, padding=1)
        # All but the last of these have stride 2, as the first convolution has.
        self.layers = nn.ModuleList(
            _Layer(widths[i], widths[i + 1], stride=2 if i + 1 < n_layers else 1)
            for i in range(n_layers)
        )
        self.last = nn.Conv2d(widths[-1], 1, kernel_size=4, stride=1, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, SharedBatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    @casts_together
    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> [logits of patches (B, 1, ~H/2^n - 2, ~W/2^n - 2)].

        Sides have at least 4 * 2^n pixels.
        """
        if x.ndim != 4 or min(x.shape[-2:]) < self.min_size:
            raise ValueError(
                f"PatchGAN with {len(self.layers)} layers takes images (B, C, H, W) of at least "
                f"{self.min_size}x{self.min_size} pixels, got {tuple(x.shape)}"
            )
        h = F.leaky_relu(self.first(x), 0.2)  # (B, base, H/2, W/2)
        for layer in self.layers:
            h = layer(h)
        return [self.last(h)]  # (B, 1, H/2^n - 2, W/2^n - 2)


class SharedBatchNorm(BatchNormBase):
    """BatchNorm2d with statistics over all processes in training.

    torch's SyncBatchNorm has no second derivative, which R1 takes, and waits for the device twice
    in each call.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        running = self.running_mean, self.running_var
        assert self.momentum is not None

        # One process, or evaluation: torch's own.
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return F.batch_norm(
                x, *running, self.weight, self.bias, self.training, self.momentum, self.eps
            )

        # Mean and variance over all processes. Not as the mean of squares less the squared mean,
        # which in float32 would lose its digits.
        h = upcast(x)
        var, own = torch.var_mean(h, dim=(0, 2, 3), correction=0)
        mean = mean_over_processes(own)
        var = mean_over_processes(var + (own - mean).square())

        # Running statistics, with the unbiased variance, as torch has it.
        with torch.no_grad():
            count = x.numel() / x.shape[1] * dist.get_world_size()
            unbiased = var * (count / (count - 1))
            for buffer, value in zip(running, (mean, unbiased), strict=True):
                assert buffer is not None
                buffer.lerp_(value.to(buffer.dtype), self.momentum)

        mean = mean[:, None, None]
        scale = ((var + self.eps).rsqrt() * self.weight)[:, None, None]
        return ((h - mean) * scale + self.bias[:, None, None]).to(x.dtype)


class _Layer(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size=4, stride=stride, padding=1, bias=False
        )
        self.norm = SharedBatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)
