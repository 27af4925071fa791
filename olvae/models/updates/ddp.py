"""Lightning's DDP with one reducer for each player of the adversarial game."""

from typing import Any

from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from olvae.library_internals import leave_signals_alone, reducer_of

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
        leave_signals_alone(self.lightning_module.trainer)
        players: dict[str, nn.Module] = self.lightning_module.players  # type: ignore[assignment]
        self.reducers = {name: reducer_of(self, player) for name, player in players.items()}

    def reduce_next(self, player: str, loss: Tensor) -> None:
        """Average this player's gradients over processes in this loss's backward pass.

        Without this call a backward pass sends nothing.
        """
        prepare_for_backward(self.reducers[player], loss)


def players_strategy(name: str, **settings: Any) -> PlayersStrategy:
    """The strategy for several processes with a name of :data:`HOOKS`."""
    settings = {"ddp_comm_hook": HOOKS[name], "find_unused_parameters": name == UNUSED, **settings}
    return PlayersStrategy(gradient_as_bucket_view=True, **settings)
