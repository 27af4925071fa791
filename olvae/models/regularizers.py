"""Regularizers of fine-tuning: an anchor that keeps old latents usable, equivariance, bounded activations."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.models.autoencoder import Quantizer
from olvae.modules.base import Encoder
from olvae.modules.distributions import DiagonalGaussian
from olvae.modules.precision import island

__all__ = ["SCALES", "ActivationBound", "Anchor", "transform_alike"]


class Anchor(nn.Module):
    """A frozen copy of an encoder, and of the 1x1 convolution after it where there is one.

    The copy is part of the module's state, so that a resumed run keeps the latents it started from.
    """

    def __init__(self, encoder: Encoder, quantizer: Quantizer | None) -> None:
        super().__init__()
        parts = [encoder] if quantizer is None else [encoder, quantizer.quant_conv]
        self.moments = nn.Sequential(*copy.deepcopy(parts))
        self.requires_grad_(False).eval()

    def set(self, encoder: Encoder, quantizer: Quantizer | None) -> None:
        """Copy the weights of an encoder of the same shape."""
        parts: list[nn.Module] = [encoder] if quantizer is None else [encoder, quantizer.quant_conv]
        for mine, theirs in zip(self.moments, parts, strict=True):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, x: Tensor, posterior: DiagonalGaussian) -> Tensor:
        """Mean squared distance of the posterior's means from the old ones, for the same images; a scalar."""
        with torch.no_grad():
            old = DiagonalGaussian(self.moments(x))
        return (island(posterior.mean) - island(old.mean)).square().mean()


SCALES = (0.25, 0.5, 0.75, 1.0)


def transform_alike(z: Tensor, x: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Scale and rotate a latent, and the image that it should decode to, in the same way.

    The scale is one of those :data:`SCALES` that keep latent positions whole, the rotation a multiple of 90 degrees;
    both are the same for the whole batch. Scaling is bilinear and antialiased, in float32.

    Args:
        z: (B, n_z, h, w).
        x: (B, C, f h, f w).
        generator: of the scale and the rotation.

    Returns:
        z and x at (s h, s w) and (s f h, s f w), turned; x has no gradient.
    """
    h, w = z.shape[-2:]
    scales = [s for s in SCALES if (s * h).is_integer() and (s * w).is_integer()]
    scale = scales[generator.integers(len(scales))]
    turns = int(generator.integers(4))

    def transform(t: Tensor) -> Tensor:
        if scale != 1.0:
            size = [round(scale * side) for side in t.shape[-2:]]
            t = F.interpolate(t.float(), size=size, mode="bilinear", antialias=True)
        return t.rot90(turns, dims=(-2, -1))

    return transform(z), transform(x)


class ActivationBound:
    """A penalty on activations beyond a bound, of every module of a network whose output is a tensor.

    Args:
        bound: above 0.
    """

    def __init__(self, bound: float) -> None:
        if bound <= 0:
            raise ValueError(f"activation_bound must be above 0, got {bound}")
        self.bound = bound
        self._excess: list[Tensor] = []

    @contextmanager
    def watch(self, *networks: nn.Module) -> Iterator[None]:
        """Collect the excess of what the networks compute in this context."""

        def look(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001  (torch's signature)
            if isinstance(output, Tensor):
                self._excess.append(F.relu(island(output).abs() / self.bound - 1.0).square().mean())

        self._excess = []
        hooks = [module.register_forward_hook(look) for network in networks for module in network.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def penalty(self) -> Tensor:
        """The sum over modules of the mean of ((|activation| - bound) / bound)^2 where that is positive; a scalar.

        What was collected is let go, and the graph behind it, which no copy of the object may hold.
        """
        excess, self._excess = self._excess, []
        return torch.stack(excess).sum()
