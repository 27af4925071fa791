"""The end of a training step: gradients are there, and both optimisers use them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from olvae.models.adversary import Adversary
from olvae.models.step import grad_scaler

if TYPE_CHECKING:
    from olvae.models.liteautoencoder import LiteAutoencoderKL

__all__ = ["update"]


def update(module: "LiteAutoencoderKL", adversary: Adversary | None, autoencoder: bool) -> None:
    """One update of the autoencoder, and ``updates_per_step`` of the discriminator if the adversary plays.

    Under fp16 both gradients carry the same loss scale, so it may change only after both were used: the
    discriminator steps first, through the bare scaler; the autoencoder through Lightning, which then updates
    the scale, and counts the step.
    """
    optimizers, schedules = _as_list(module.optimizers()), _as_list(module.lr_schedulers())
    scaler = grad_scaler(module)
    if adversary is not None:
        _step_discriminator(module, adversary, optimizers[1].optimizer)
    if autoencoder:
        optimizer = optimizers[0]
        module.log("train/lr", optimizer.param_groups[0]["lr"])
        _clip(module, optimizer.optimizer, module.autoencoder_parameters(), "train/grad_norm")
        optimizer.step()
        optimizer.zero_grad()
        schedules[0].step()
    elif scaler is not None:
        scaler.update()
    if adversary is not None:
        for _ in range(adversary.updates_per_step - 1):
            for pair in module.pairs:
                module.discriminator_backward(adversary, *pair)
            _step_discriminator(module, adversary, optimizers[1].optimizer)
            if scaler is not None:
                scaler.update()
        schedules[1].step()
        module.pairs.clear()


def _step_discriminator(module: "LiteAutoencoderKL", adversary: Adversary, optimizer: torch.optim.Optimizer) -> None:
    parameters = list(adversary.discriminator.parameters())
    _clip(module, optimizer, parameters, "train/grad_norm_discriminator")
    scaler = grad_scaler(module)
    if scaler is not None:
        scaler.step(optimizer)
    else:
        optimizer.step()
    optimizer.zero_grad()
    adversary.updated()


def _clip(
    module: "LiteAutoencoderKL", optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], name: str
) -> None:
    """Clip the norm of the true gradient: under fp16 the scale is taken off first."""
    if not module.gradient_clip_val:
        return
    scaler = grad_scaler(module)
    if scaler is not None:
        scaler.unscale_(optimizer)
    module.log(name, torch.nn.utils.clip_grad_norm_(parameters, module.gradient_clip_val))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
