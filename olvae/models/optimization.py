"""Optimization: learning rates and optimizers, ratios of gradients, DDP, skipped updates."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.optim.lr_scheduler import LambdaLR

from olvae.devices import this_process
from olvae.files import first_line
from olvae.models.muon import Muon
from olvae.models.parts.part import Model
from olvae.modules.base import compile_in_place, last_convolution, mean_over_processes

log = logging.getLogger("olvae")

# Seeds, learning rates and optimizers


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers, different for each list of them."""
    sequence = np.random.SeedSequence((len(numbers), *numbers))
    return int(sequence.generate_state(1, dtype=np.uint64)[0]) >> 1  # torch takes 63 bits


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

    def own_warmup(updates: int) -> float:
        # A warm-up from its own first update, times the autoencoder's schedule after warm-up.
        rise = min(1.0, (updates + 1) / max(1, model.warmup_steps))
        return rise * factor(max(model.global_step, model.warmup_steps, adversary.start_step))

    rate = model.learning_rate * adversary.learning_rate_ratio
    parameters = list(adversary.discriminator.parameters())
    optimizers.append(make_optimizer("adam", parameters, rate, adversary.betas))
    schedules.append(LambdaLR(optimizers[1], own_warmup))
    return optimizers, schedules


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter], rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """An optimizer of :data:`OPTIMIZERS`, which can skip an update without a host-device sync.

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


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# Gradients: the loss scale of fp16, norms, and the ratio of two losses' gradients


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
    ratio = norms[0] / torch.maximum(norms[1], 1e-12 * scale)
    return torch.where(torch.stack(norms).isfinite().all(), ratio, torch.nan)


# Several processes: DDP

UNUSED = "ddp_find_unused_parameters_true"
HOOKS = {"auto": None, "ddp": None, "ddp_bf16": bf16_compress_hook, UNUSED: None}
"""On the gradients of several processes, by lightning.trainer.strategy."""


class PlayersStrategy(DDPStrategy):
    """Lightning's DDP, with one reducer for the autoencoder and one for the discriminator.

    A backward pass reaches one player only; one reducer over both would send both players'
    gradients each time. The model is not wrapped: it names its ``players``, and calls
    :meth:`reduce_next` before the backward pass that completes a player's gradients. So no forward
    pass sends buffers, which would hang validations of unequal length.
    """

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        # Before each batch, Lightning would wait for the device in every process to learn of a
        # SIGTERM in any; GracefulStop agrees on that without waiting.
        epoch_loop: Any = self.lightning_module.trainer.fit_loop.epoch_loop
        epoch_loop._broadcast_sigterm_tensor = lambda: None
        players: dict[str, nn.Module] = self.lightning_module.players  # type: ignore[assignment]
        self.reducers = {name: self._setup_model(player) for name, player in players.items()}
        if self._ddp_comm_hook is not None:
            for reducer in self.reducers.values():
                reducer.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)

    def reduce_next(self, player: str, loss: Tensor) -> None:
        """Average this player's gradients over processes in this loss's backward pass.

        Without this call a backward pass sends nothing.
        """
        prepare_for_backward(self.reducers[player], loss)


def players_strategy(name: str, **settings: Any) -> PlayersStrategy:
    """The strategy for several processes with a name of :data:`HOOKS`."""
    settings = {"ddp_comm_hook": HOOKS[name], "find_unused_parameters": name == UNUSED, **settings}
    return PlayersStrategy(gradient_as_bucket_view=True, **settings)


# torch.compile


def compile_networks(networks: Sequence[nn.Module], device: torch.device) -> bool:
    """Compile networks in place, at their first use; state dicts and copies stay uncompiled.

    Without a working C++ compiler, leave them as they are, log one line, and return False.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:
        # Of many kinds: InductorError, InvalidCxxCompiler, CalledProcessError, ...
        if this_process()[0] == 0:
            message = "compile: the networks run uncompiled, because no compiler works here (%s)"
            log.warning(message, first_line(error))
        return False
    # A ratio of gradients runs through a graph before its backward pass does: the first run must
    # not give the graph's memory away.
    torch._functorch.config.donated_buffer = False
    for network in networks:
        compile_in_place(network)
    return True


# Updates with non-finite values

MAX_PENDING = 10_000  # steps that are remembered if nobody collects them
# Begins terms. Under fp16, if gradients alone are infinite, the loss scale was too large.
GRADIENT = "gradient of the "


class BadStep(NamedTuple):
    """A step that changed nothing, or only lost a further update of the discriminator."""

    step: int  # of the autoencoder; all updates of the discriminator's warm-up have the same
    # The first non-finite one in the order of computation: a loss, or a player's gradient.
    term: str
    # Of the images in this process' micro-batch with that term; of all if it is a gradient.
    keys: list[str]
    # fp16's gradients were too large for their scale, which is then lowered: expected now and then.
    overflow: bool
    # Whether the whole step changed nothing; else a further update of the discriminator did.
    whole: bool = True


@dataclass
class _Record:
    """What was observed of one step, most of it on the device."""

    step: int = 0
    keys: list[list[str]] = field(default_factory=list)  # by micro-batch
    terms: list[tuple[str, int, Tensor]] = field(default_factory=list)  # name, micro-batch, value
    finite: Tensor = field(init=False)  # by term
    bad: list[Tensor] = field(default_factory=list)  # 1.0 or 0.0, by update
    scale: Tensor | None = None  # of fp16's losses

    def read(self) -> BadStep:
        """Name the first non-finite term; this waits for the device."""
        term, batch, _ = self.terms[self.finite.tolist().index(False)]
        is_gradient = term.startswith(GRADIENT)
        keys = self.keys[batch]
        if is_gradient:
            keys = [key for batch_keys in self.keys for key in batch_keys]
        # A scale below 1 has been lowered so often that half precision is not the reason.
        scaled = self.scale is not None and float(self.scale) >= 1
        return BadStep(self.step, term, keys, scaled and is_gradient, bool(self.bad[0] > 0))


class NonFiniteGuard:
    """Observe the losses and gradients of each step on the device; undo a step with a bad one.

    The optimizers of a bad step get ``found_inf``, by which fused kernels and Muon skip an update.
    Buffers that the forward passes changed, such as BatchNorm's and LeCam's, are put back. After a
    bad first update the step's further ones are skipped; a bad further one is undone alone.

    Order of calls in a step:

    1. :meth:`begin_step`
    2. for each micro-batch: :meth:`begin_micro_batch`; for each loss: :meth:`observe`, and a
       backward pass of what :meth:`propagate` returns
    3. :meth:`is_bad` with the norms of all gradients; for each optimizer: :meth:`skip_if`, and its
       step; then :meth:`end_update`
    4. for each further update of the discriminator: :meth:`begin_update`; for each micro-batch
       again: :meth:`return_to`, then its losses as in 2; then 3
    5. :meth:`end_step`

    Between steps, when a wait for the device is acceptable: :meth:`collect`. Nothing else waits.
    """

    def __init__(self, modules: Iterable[nn.Module | None]) -> None:
        self._modules = [module for module in modules if module is not None]
        self._buffers: list[list[Tensor]] = []  # by dtype
        self._before: list[Tensor] = []  # their values before the update, in one tensor a dtype
        self._batch = 0  # the micro-batch that is observed
        self._record = _Record()
        self._records: deque[_Record] = deque(maxlen=MAX_PENDING)
        self.good: Tensor | float = 1.0  # 0.0 if the last step changed nothing; on the device

    def begin_step(self) -> None:
        self._record = _Record()
        self.begin_update()

    @torch.no_grad()
    def begin_update(self) -> None:
        """Keep the buffers' values, in few launches: one for each dtype."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for module in self._modules:
            for buffer in module.buffers():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())
        self._before = [_joined(buffers) for buffers in self._buffers]

    def begin_micro_batch(self, keys: Sequence[str]) -> None:
        """Begin a micro-batch of images with these keys."""
        self.return_to(len(self._record.keys))
        self._record.keys.append(list(keys))

    def return_to(self, batch: int) -> None:
        """Observe the step's micro-batch of this number again, for a further update."""
        self._batch = batch

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Record scalars, in the order of their computation."""
        for name, value in terms.items():
            self._record.terms.append((name, self._batch, value.detach().float()))

    @staticmethod
    def propagate(loss: Tensor) -> Tensor:
        """Return the loss; a non-finite one gets NaN gradients in every parameter.

        So the averaged gradients are NaN in every process, and all of them skip the update.
        """
        finite = loss.detach().isfinite().float()
        return loss * (finite / finite)

    def is_bad(self, norms: Mapping[str, Tensor]) -> Tensor:
        """Decide from the players' gradient norms, over all processes: 1.0 or 0.0, on the device.

        A further update is bad if the step's first is. The square of a norm has to be finite, too:
        Adam's moments would keep an infinite square for good, and freeze the weights.
        """
        squares = {f"{GRADIENT}{player}": norm.square() for player, norm in norms.items()}
        self.observe(squares)
        bad = 1.0 - torch.stack(list(squares.values())).isfinite().all().float()
        if self._record.bad:
            bad = torch.maximum(self._record.bad[0], bad)
        self._record.bad.append(bad)
        return bad

    @staticmethod
    def skip_if(
        bad: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> None:
        """Make the optimizer's next step a no-op if ``bad`` is 1.0; it must heed ``found_inf``."""
        if scaler is None:
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            return
        for found in scaler._found_inf_per_device(optimizer).values():
            found.copy_(torch.maximum(found, bad))

    @torch.no_grad()
    def end_update(self) -> None:
        """Put buffers back if the last update was bad."""
        bad = self._record.bad[-1]
        for buffers, before in zip(self._buffers, self._before, strict=True):
            kept = torch.where(bad > 0, before, _joined(buffers))
            values = kept.split([buffer.numel() for buffer in buffers])
            shaped = [v.view_as(buffer) for v, buffer in zip(values, buffers, strict=True)]
            torch._foreach_copy_(buffers, shaped)

    def end_step(self, step: int, scaler: torch.amp.GradScaler | None) -> None:
        """Keep the step's record for :meth:`collect`."""
        record = self._record
        self.good = 1.0 - record.bad[0]
        record.step = step
        record.finite = torch.stack([value for *_, value in record.terms]).isfinite()
        if scaler is not None:
            scale = scaler._get_scale_async()
            record.scale = None if scale is None else scale.clone()
        self._records.append(record)

    @property
    def pending(self) -> int:
        """Steps that were not collected yet."""
        return len(self._records)

    def collect(self) -> list[BadStep | None]:
        """Return the steps since the last call, None for a good one; this waits for the device.

        Collective under fp16: if any process had a non-finite loss, the step is no overflow in any.
        """
        records = self._records
        self._records = deque(maxlen=MAX_PENDING)
        if not records:
            return []
        flags = torch.stack([torch.stack(record.bad).amax() for record in records]).tolist()
        steps: list[BadStep | None] = []
        for flag, record in zip(flags, records, strict=True):
            steps.append(record.read() if flag else None)
        if not dist.is_initialized() or records[0].scale is None:
            return steps

        # Under fp16: a step is spoilt if a loss was not finite in any process.
        spoilt = [step is not None and not step.overflow for step in steps]
        agreed = torch.tensor(spoilt, dtype=torch.uint8, device=records[0].bad[0].device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        for i, (step, flag) in enumerate(zip(steps, agreed.tolist(), strict=True)):
            if step is not None:
                steps[i] = step._replace(overflow=not flag)
        return steps


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
