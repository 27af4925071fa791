"""Measure gradients: their norm, and the ratio of two losses' gradients at the last layer."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from olvae.modules.base import last_convolution, mean_over_processes


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def grad_scaler(module: pl.LightningModule) -> torch.amp.GradScaler | None:
    """The scaler of the losses under fp16; None in any other precision."""
    scaler: torch.amp.GradScaler | None = getattr(module.trainer.precision_plugin, "scaler", None)
    return scaler


def gradient_norm(module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of the gradients of an optimizer's parameters, without fp16's loss scale."""
    scaler = grad_scaler(module)
    if scaler is not None:
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def gradient_ratio(
    module: pl.LightningModule, one: Tensor, other: Tensor, network: nn.Module | None = None
) -> Tensor:
    """|gradient of one loss| / |gradient of the other| at a network's last layer, in float32.

    By default the decoder's. Gradients are averaged over all ranks, so they are the whole batch's.
    Under fp16 both losses are scaled, or small gradients would be lost; the ratio is not. NaN if
    either gradient is not finite.
    """
    measured = module.decoder if network is None else network
    assert isinstance(measured, nn.Module)
    last = last_convolution(measured)
    assert last is not None
    scaler = grad_scaler(module)
    norms: list[Tensor] = []
    for loss in (one, other):
        scaled = loss if scaler is None else scaler.scale(loss)
        (gradient,) = torch.autograd.grad(scaled, last.weight, retain_graph=True)
        norms.append(mean_over_processes(gradient).float().norm())
    scale = norms[1].new_ones(())
    if scaler is not None:
        scale = scaler.scale(scale)
    ratio = norms[0] / norms[1].maximum(1e-12 * scale)
    return torch.where(torch.stack(norms).isfinite().all(), ratio, torch.nan)
