"""Optimization: seeds, rates, Adam, fp16's loss scale, a ratio of gradients, reducers of DDP, torch.compile."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from olvae.devices import this_process
from olvae.files import first_line
from olvae.modules.base import last_convolution, mean_over_processes

log = logging.getLogger("olvae")


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers, different for each list of them."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, dtype=np.uint64)[0]) >> 1


def lr_factor(step: int, name: str, warmup_steps: int, decay_steps: int, min_factor: float) -> float:
    """The factor of the base rate at a step, counted from 0.

    Linear from 1/warmup_steps to 1; then 1 (``constant``), or half a cosine down to ``min_factor`` at ``decay_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def adam(parameters: Sequence[nn.Parameter], rate: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam with fused kernels, which can skip an update without a host-device sync."""
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=betas, fused=True)
    optimizer.register_load_state_dict_post_hook(_lay_out_moments)
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
    return torch.nn.utils.get_total_norm([p.grad for p in parameters_of(optimizer) if p.grad is not None])


def gradient_ratio(module: pl.LightningModule, one: Tensor, other: Tensor, network: nn.Module | None = None) -> Tensor:
    """|gradient of one loss| / |gradient of the other| at a network's last layer, the decoder's by default; in float32.

    The gradients are those of the whole batch, over all ranks. Under fp16 both losses carry the loss scale, which the
    ratio does not, or small gradients would be lost.
    """
    measured = module.decoder if network is None else network
    assert isinstance(measured, nn.Module)
    last = last_convolution(measured)
    assert last is not None
    scaler = grad_scaler(module)

    def scaled(x: Tensor) -> Tensor:
        return x if scaler is None else scaler.scale(x)

    norms: list[Tensor] = []
    for loss in (one, other):
        (gradient,) = torch.autograd.grad(scaled(loss), last.weight, retain_graph=True)
        norms.append(mean_over_processes(gradient).float().norm())
    return norms[0] / torch.maximum(norms[1], 1e-12 * scaled(norms[1].new_ones(())))


HOOKS = {"auto": None, "ddp": None, "ddp_bf16": bf16_compress_hook}  # on the gradients, by lightning.trainer.strategy


class PlayersStrategy(DDPStrategy):
    """Lightning's DDP, with one reducer for the autoencoder and one for the discriminator.

    A backward pass reaches one player only; one reducer over both would send both players' gradients in each. The model
    is not wrapped: it names its ``players``, and calls :meth:`reduce_next` before a backward pass that completes one's.
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

    def reduce_next(self, player: str) -> None:
        """Average this player's gradients over the processes in the next backward pass; without it nothing is sent."""
        prepare_for_backward(self.reducers[player], None)


def compile_networks(networks: Sequence[nn.Module], device: torch.device) -> bool:
    """Compile networks in place, at their first use; names in their state dicts and copies of them stay plain.

    Without a C++ compiler on the machine they stay as they are, one line is logged, and the answer is False.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds: InductorError, InvalidCxxCompiler, CalledProcessError, ...
        if this_process()[0] == 0:
            log.warning("compile: the networks run uncompiled, because no compiler works here (%s)", first_line(error))
        return False
    # A ratio of gradients goes through a graph before its backward pass, which must not reuse the graph's memory.
    torch._functorch.config.donated_buffer = False
    for network in networks:
        network.compile()
    return True
