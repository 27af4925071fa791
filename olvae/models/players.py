"""Gradients over several processes: each player's parameters have a reducer of their own."""

from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["PlayersStrategy"]


class PlayersStrategy(DDPStrategy):
    """Lightning's DDP, with one reducer for the autoencoder and one for the discriminator.

    A backward pass reaches the parameters of one player only. One reducer over both would send both players' gradients
    in each of them, and search the graph for those that have none. The model itself is not wrapped: it names its
    ``players``, and says by :meth:`reduce_next` which of them the next backward pass completes.
    """

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        players: dict[str, nn.Module] = self.lightning_module.players  # type: ignore[assignment]
        self.reducers: dict[str, DistributedDataParallel] = {
            name: self._setup_model(player) for name, player in players.items()
        }

    def reduce_next(self, player: str) -> None:
        """Average the gradients of this player over the processes in the next backward pass.

        Without it a backward pass sends nothing: gradients of micro-batches add up in each process.
        """
        prepare_for_backward(self.reducers[player], None)
