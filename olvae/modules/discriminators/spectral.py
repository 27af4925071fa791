"""Convolutions with spectral norm, and control over its power iteration (Miyato et al. 2018)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from olvae.modules.precision import no_autocast

__all__ = ["SpectralConv2d", "fixed_spectral_norm", "power_iteration"]


class SpectralConv2d(nn.Conv2d):
    """A convolution divided by its largest singular value (Miyato et al. 2018); orthogonal init, zero bias.

    The arguments are Conv2d's. The weight is taken as a matrix (out_channels, in_channels k k). One power iteration per
    forward pass in training, none in evaluation. The normalised weight is computed in float32 under autocast too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x):
            weight = self.weight  # runs the power iteration
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


@contextmanager
def fixed_spectral_norm(module: nn.Module) -> Iterator[None]:
    """Run no power iteration inside, not even in training mode, so that all forward passes use the same weights.

    Then the gradients of k micro-batches add up to those of one batch k times as large. Call :func:`power_iteration`
    once per update instead.
    """
    norms = [norm for norm in _spectral_norms(module) if norm.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


@torch.no_grad()
def power_iteration(module: nn.Module) -> None:
    """Run one power iteration of every :class:`SpectralConv2d` in ``module``, in any mode."""
    for norm in _spectral_norms(module):
        training = norm.training
        norm.train()()  # computing the weight runs it
        norm.train(training)


def _spectral_norms(module: nn.Module) -> list[nn.Module]:
    """The parametrizations of the weights of each SpectralConv2d."""
    return [m.get_submodule("parametrizations.weight") for m in module.modules() if isinstance(m, SpectralConv2d)]
