"""Make optimizers and their learning-rate schedules."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from olvae.models.parts.part import Model
from olvae.models.updates.muon import Muon


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers, different for each list of them."""
    sequence = np.random.SeedSequence((len(numbers), *numbers))
    (state,) = sequence.generate_state(1, dtype=np.uint64)
    return int(state) >> 1


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "muon": Muon,
}


def lr_factor(
    step: int, name: str, warmup_steps: int, decay_steps: int, min_factor: float
) -> float:
    """The factor of the base rate at a step, counted from 0.

    Linear from 1/warmup_steps to 1; then 1 (``constant``), or half a cosine down to ``min_factor``
    at ``decay_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def follow(schedules: Sequence[LambdaLR]) -> None:
    """After a resume, recompute learning rates from these schedules; loaded ones are the old.

    If the first schedule's rate is as saved, no setting has changed, and the others keep theirs:
    the discriminator's was computed at the step of its last update, which may be an earlier one.
    """
    for schedule in schedules:
        groups = schedule.optimizer.param_groups
        saved = groups[0]["lr"]
        for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * factor(schedule.last_epoch)
        if schedule is schedules[0] and groups[0]["lr"] == saved:
            return


def make_optimizers(model: Model) -> OptimizerLRScheduler:
    """Optimizers and schedules: the autoencoder's, then the discriminator's if there is one."""
    decay_steps = model.decay_steps or model.trainer.max_steps

    def factor(step: int) -> float:
        factor = lr_factor(
            step, model.scheduler, model.warmup_steps, decay_steps, model.min_lr_factor
        )
        return factor * model.rate_factor

    parameters = model.autoencoder_parameters()
    optimizers = [make_optimizer(model.optimizer, parameters, model.learning_rate, model.betas)]
    schedules = [LambdaLR(optimizers[0], factor)]
    if model.adversary is None:
        return optimizers, schedules
    adversary = model.adversary
    start_step = adversary.start_step

    def own_warmup(updates: int) -> float:
        # A warm-up from its own first update, times the autoencoder's schedule after warm-up.
        rise = min(1.0, (updates + 1) / max(1, model.warmup_steps))
        return rise * factor(max(model.global_step, model.warmup_steps, start_step))

    rate = model.learning_rate * adversary.learning_rate_ratio
    parameters = list(adversary.discriminator.parameters())
    optimizers.append(make_optimizer("adam", parameters, rate, adversary.betas))
    schedules.append(LambdaLR(optimizers[1], own_warmup))
    return optimizers, schedules


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter], rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """An optimizer of :data:`OPTIMIZERS`, which can skip an update without a host-device sync.

    See :class:`~olvae.models.updates.nonfinite.NonFiniteGuard`, also for mps.

    When a state is loaded, betas stay as here, and the saved rate is scaled to this base rate, so
    that what a schedule has made of it stays.
    """

    def keep_settings(loaded: torch.optim.Optimizer) -> None:
        for group in loaded.param_groups:
            before = group.get("initial_lr", group["lr"])
            group["lr"] = group["lr"] * (rate / before) if before else rate
            group["initial_lr"] = rate
            group["betas"] = betas

    optimizer = OPTIMIZERS[name](parameters, lr=rate, betas=betas)
    optimizer.register_load_state_dict_post_hook(_lay_out_moments)
    optimizer.register_load_state_dict_post_hook(keep_settings)
    return optimizer


@torch.no_grad()
def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the strides of their parameters.

    Fused kernels assume the same strides; ``channels_last`` may have changed since they were saved.
    """
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state and state[name].stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(state[name])
