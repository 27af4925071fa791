"""Optimization: seeds, rates, optimizers, loss scale, gradients' ratio, DDP, torch.compile; skip non-finite updates."""

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
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.optim.lr_scheduler import LambdaLR

from olvae.devices import this_process
from olvae.files import first_line
from olvae.models.muon import Muon
from olvae.modules.base import compile_in_place, last_convolution, mean_over_processes

log = logging.getLogger("olvae")


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers, different for each list of them."""
    return (
        int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, dtype=np.uint64)[0])
        >> 1
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "muon": Muon,
}


def lr_factor(
    step: int, name: str, warmup_steps: int, decay_steps: int, min_factor: float
) -> float:
    """The factor of the base rate at a step, counted from 0.

    Linear from 1/warmup_steps to 1; then 1 (``constant``), or half a cosine down to ``min_factor`` at ``decay_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def follow(schedule: LambdaLR) -> None:
    """Set the learning rates that a schedule has at its step, as those of a resumed run may be another schedule's."""
    rates = zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    )
    for group, base, factor in rates:
        group["lr"] = base * factor(schedule.last_epoch)


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter], rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """An optimizer of :data:`OPTIMIZERS`, which can skip an update without a host-device sync.

    When its state is loaded, it keeps its betas, and its rate with what a schedule had made of the saved one.
    """

    def keep_settings(loaded: torch.optim.Optimizer) -> None:
        for group in loaded.param_groups:
            before = group.get("initial_lr", group["lr"])
            group |= {
                "lr": group["lr"] * (rate / before) if before else rate,
                "initial_lr": rate,
                "betas": betas,
            }

    optimizer = OPTIMIZERS[name](parameters, lr=rate, betas=betas)
    optimizer.register_load_state_dict_post_hook(_lay_out_moments)
    optimizer.register_load_state_dict_post_hook(keep_settings)
    return optimizer


@torch.no_grad()
def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments their parameters' strides, which fused kernels assume: ``channels_last`` may have changed."""
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state and state[name].stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(state[name])


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def grad_scaler(module: pl.LightningModule) -> torch.amp.GradScaler | None:
    """The scaler of the losses under fp16; None in any other precision."""
    scaler: torch.amp.GradScaler | None = getattr(module.trainer.precision_plugin, "scaler", None)
    return scaler


def gradient_norm(module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of the true gradient of what an optimizer trains: under fp16 the scale is taken off first."""
    scaler = grad_scaler(module)
    if scaler is not None:
        scaler.unscale_(optimizer)
    return torch.nn.utils.get_total_norm(
        [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    )


def gradient_ratio(
    module: pl.LightningModule, one: Tensor, other: Tensor, network: nn.Module | None = None
) -> Tensor:
    """|gradient of one loss| / |gradient of the other| at a network's last layer, the decoder's by default; in float32.

    The gradients are those of the whole batch, over all ranks. Under fp16 both losses carry the loss scale, which the
    ratio does not, or small gradients would be lost. NaN if either gradient is not finite.
    """
    measured = module.decoder if network is None else network
    assert isinstance(measured, nn.Module)
    last = last_convolution(measured)
    assert last is not None
    scaler = grad_scaler(module)
    scaled: Callable[[Tensor], Tensor] = (lambda x: x) if scaler is None else scaler.scale
    norms: list[Tensor] = []
    for loss in (one, other):
        (gradient,) = torch.autograd.grad(scaled(loss), last.weight, retain_graph=True)
        norms.append(mean_over_processes(gradient).float().norm())
    ratio = norms[0] / torch.maximum(norms[1], 1e-12 * scaled(norms[1].new_ones(())))
    return torch.where(torch.stack(norms).isfinite().all(), ratio, torch.nan)


UNUSED = "ddp_find_unused_parameters_true"
HOOKS = {"auto": None, "ddp": None, "ddp_bf16": bf16_compress_hook, UNUSED: None}
"""On the gradients of several processes, by lightning.trainer.strategy."""


class PlayersStrategy(DDPStrategy):
    """Lightning's DDP, with one reducer for the autoencoder and one for the discriminator.

    A backward pass reaches one player only; one reducer over both would send both players' gradients in each. The model
    is not wrapped: it names its ``players``, and calls :meth:`reduce_next` before a backward pass that completes one's.
    So no forward pass sends buffers, which would hang validations of unequal length.
    """

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        # Lightning's own, before each batch, waits for the device in every process; GracefulStop agrees without it.
        epoch_loop: Any = self.lightning_module.trainer.fit_loop.epoch_loop
        epoch_loop._broadcast_sigterm_tensor = lambda: None
        players: dict[str, nn.Module] = self.lightning_module.players  # type: ignore[assignment]
        self.reducers = {name: self._setup_model(player) for name, player in players.items()}
        if self._ddp_comm_hook is not None:
            for reducer in self.reducers.values():
                reducer.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)

    def reduce_next(self, player: str, loss: Tensor) -> None:
        """Average this player's gradients over the processes in this loss's backward pass; else nothing is sent."""
        prepare_for_backward(self.reducers[player], loss)


def players_strategy(name: str, **settings: Any) -> PlayersStrategy:
    """The strategy of several processes that a name of :data:`HOOKS` stands for."""
    settings = {"ddp_comm_hook": HOOKS[name], "find_unused_parameters": name == UNUSED, **settings}
    return PlayersStrategy(gradient_as_bucket_view=True, **settings)


def compile_networks(networks: Sequence[nn.Module], device: torch.device) -> bool:
    """Compile networks in place, at their first use; names in their state dicts and copies of them stay plain.

    Without a C++ compiler on the machine they stay as they are, one line is logged, and the answer is False.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(2, device=device))
    except (
        Exception
    ) as error:  # of many kinds: InductorError, InvalidCxxCompiler, CalledProcessError, ...
        if this_process()[0] == 0:
            log.warning(
                "compile: the networks run uncompiled, because no compiler works here (%s)",
                first_line(error),
            )
        return False
    # A ratio of gradients goes through a graph before its backward pass, which must not reuse the graph's memory.
    torch._functorch.config.donated_buffer = False
    for network in networks:
        compile_in_place(network)
    return True


MAX_PENDING = 10_000  # steps that are remembered if nobody collects them
GRADIENT = "gradient of the "  # begins terms; alone infinite under fp16, it means that the loss scale was too large


class BadStep(NamedTuple):
    """A step that changed nothing, or but for a further update of the discriminator."""

    step: int  # of the autoencoder; several updates of the discriminator's warm-up have the same
    term: (
        str  # the first non-finite one in the order of computation: a loss, or a player's gradient
    )
    keys: list[
        str
    ]  # of the images of the micro-batch with that term, in this process; of all if it is a gradient
    overflow: bool  # fp16's gradients were too large for their scale, which is lowered for that: expected now and then
    whole: bool = (
        True  # or a further update of the discriminator changed nothing, those before it stand
    )


@dataclass
class _Record:
    """One step, most of it on the device."""

    step: int = 0
    keys: list[list[str]] = field(default_factory=list)  # by micro-batch
    terms: list[tuple[str, int, Tensor]] = field(
        default_factory=list
    )  # name, micro-batch and value
    finite: Tensor = field(init=False)  # by term
    bad: list[Tensor] = field(default_factory=list)  # 1.0 or 0.0, by update
    scale: Tensor | None = None  # of fp16's losses

    def read(self) -> BadStep:
        term, batch, _ = self.terms[self.finite.tolist().index(False)]
        scaled = (
            self.scale is not None and float(self.scale) >= 1
        )  # a lower one is no matter of half precision
        is_gradient = term.startswith(GRADIENT)
        keys = [key for keys in self.keys for key in keys] if is_gradient else self.keys[batch]
        return BadStep(self.step, term, keys, scaled and is_gradient, bool(self.bad[0] > 0))


class NonFiniteGuard:
    """Observe the losses and gradients of each step on the device, and undo a step that has a non-finite one.

    The optimizers of a bad step get ``found_inf``, by which fused kernels and Muon skip an update. Buffers that the
    forward passes changed, such as BatchNorm's and LeCam's, are put back. After a bad first update the step's further
    ones are skipped; a bad further one is undone alone. Only :meth:`collect` waits for the device.
    """

    def __init__(self, modules: Iterable[nn.Module | None]) -> None:
        self._modules = [module for module in modules if module is not None]
        self._buffers: list[list[Tensor]] = []  # by dtype
        self._before: list[Tensor] = []  # their values before the update
        self._batch = 0  # the micro-batch of what is observed
        self._record = _Record()
        self._records: deque[_Record] = deque(maxlen=MAX_PENDING)
        self.good: Tensor | float = 1.0  # 0.0 if the last update changed nothing: on the device

    def begin_step(self) -> None:
        self._record = _Record()
        self.begin_update()

    @torch.no_grad()
    def begin_update(self) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in (b for module in self._modules for b in module.buffers()):
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())
        self._before = [torch.cat([b.flatten() for b in same]) for same in self._buffers]

    def begin_micro_batch(self, keys: Sequence[str]) -> None:
        """Begin a micro-batch of images with these keys."""
        self.return_to(len(self._record.keys))
        self._record.keys.append(list(keys))

    def return_to(self, batch: int) -> None:
        """Observe the step's micro-batch of this number, for a further update."""
        self._batch = batch

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Record scalars, in the order of their computation."""
        self._record.terms += [
            (name, self._batch, value.detach().float()) for name, value in terms.items()
        ]

    @staticmethod
    def propagate(loss: Tensor) -> Tensor:
        """Return the loss; a non-finite one gets gradients of NaN, in every parameter and so in every process."""
        finite = loss.detach().isfinite().float()
        return loss * (finite / finite)

    def is_bad(self, norms: Mapping[str, Tensor]) -> Tensor:
        """Decide from the players' gradient norms, over all processes: 1.0 or 0.0, on the device.

        A further update is bad if the step's first is. A finite gradient may be bad: Adam's moments would keep an
        infinite square for good, and freeze the weights.
        """
        squares = {f"{GRADIENT}{player}": norm.square() for player, norm in norms.items()}
        self.observe(squares)
        bad = 1.0 - torch.stack(list(squares.values())).isfinite().all().float()
        self._record.bad.append(
            torch.maximum(self._record.bad[0], bad) if self._record.bad else bad
        )
        return self._record.bad[-1]

    @staticmethod
    def skip_if(
        bad: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> None:
        """Make the optimizer's next step a no-op if ``bad`` is 1.0; it has to heed ``found_inf``."""
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
            now = torch.cat([b.flatten() for b in buffers])
            kept = torch.where(bad > 0, before, now).split([b.numel() for b in buffers])
            torch._foreach_copy_(
                buffers, [value.view_as(b) for value, b in zip(kept, buffers, strict=True)]
            )

    def end_step(self, step: int, scaler: torch.amp.GradScaler | None) -> None:
        self.good = 1.0 - self._record.bad[0]
        scale = None if scaler is None else scaler._get_scale_async()
        self._record.step = step
        self._record.finite = torch.stack([value for *_, value in self._record.terms]).isfinite()
        self._record.scale = None if scale is None else scale.clone()
        self._records.append(self._record)

    @property
    def pending(self) -> int:
        """Steps that were not collected yet."""
        return len(self._records)

    def collect(self) -> list[BadStep | None]:
        """Return the steps since the last call, None for a good one; this waits for the device.

        Collective under fp16: a step in which any process had a non-finite loss is an overflow in none.
        """
        records, self._records = self._records, deque(maxlen=MAX_PENDING)
        flags = (
            torch.stack([torch.stack(record.bad).amax() for record in records]).tolist()
            if records
            else []
        )
        steps = [
            record.read() if flag else None for flag, record in zip(flags, records, strict=True)
        ]
        if not dist.is_initialized() or not records or records[0].scale is None:
            return steps
        spoilt = [step is not None and not step.overflow for step in steps]
        agreed = torch.tensor(spoilt, dtype=torch.uint8, device=records[0].bad[0].device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return [
            s and s._replace(overflow=not flag)
            for s, flag in zip(steps, agreed.tolist(), strict=True)
        ]
