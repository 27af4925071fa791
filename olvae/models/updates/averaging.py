"""The exponential moving average (EMA) of an autoencoder's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from olvae.checkpoint import AUTOENCODER
from olvae.library_internals import add_each, copy_each, scale_each, subtract_each
from olvae.models.updates.nonfinite import NonFiniteGuard


class WeightAverage(Callback):
    """Average the autoencoder's trained parameters, and nothing else of the model.

    The average starts as the weights after the first step, and moves by ``1 - decay`` towards them
    at every further step that is finite, as ``guard`` knows. After n steps the decay is at most
    (1 + n) / (10 + n): the average of a short run would mostly be its start. A checkpoint has the
    average in ``state_dict``, the weights as trained under the same names in
    ``current_model_state``, and the number of averaged steps in ``averaging_state``.

    Order of calls, by Lightning but for two:

    1. :meth:`on_load_checkpoint`, if a run is resumed: keeps the saved average for later, because
       the copies do not exist yet
    2. :meth:`on_fit_start`: copies the weights, and loads the saved average into the copies
    3. :meth:`on_train_batch_end`: moves the average
    4. :meth:`on_validation_epoch_start`: swaps, so that the model has the average. Within the
       validation, :meth:`weights_as_trained` swaps back and forth. :meth:`on_validation_epoch_end`
       swaps back
    5. :meth:`on_train_end`: swaps for good

    :meth:`restore` returns to an earlier average, between any of these and after an interrupt.
    """

    def __init__(self, guard: NonFiniteGuard, decay: float = 0.999) -> None:
        self.guard = guard
        self.decay = decay
        self._parameters: dict[str, nn.Parameter] = {}
        # The average; while the model has that, the weights as trained.
        self._other: dict[str, Tensor] = {}
        self._model_has_average = False
        # The model's weights during a swap: not empty after an exception within one.
        self._before: dict[str, Tensor] = {}
        self._steps = 0  # that are averaged
        self._step = 0  # the trainer's, when the average last moved
        self._loaded: dict[str, Tensor] = {}  # from a checkpoint, until `on_fit_start`

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or "averaging_state" not in checkpoint:
            return
        self._loaded = checkpoint["state_dict"]
        self._steps = int(checkpoint["averaging_state"]["n_averaged"])
        pl_module.load_state_dict({**checkpoint["state_dict"], **checkpoint["current_model_state"]})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the weights, on their device."""
        self._parameters = {}
        for name, parameter in pl_module.named_parameters():
            if name.startswith(AUTOENCODER) and parameter.requires_grad:
                self._parameters[name] = parameter
        self._other = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.restore(self._loaded)
        self._loaded = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # a micro-batch within an update
        self._step = trainer.global_step
        average: list[Tensor] = list(self._other.values())
        weights: list[Tensor] = list(self._parameters.values())
        if self._steps == 0:
            copy_each(average, weights)
        else:
            decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
            difference = subtract_each(weights, average)
            scale_each(difference, (1.0 - decay) * self.guard.good)
            add_each(average, difference)
        self._steps += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the average and the weights as trained, in each of three hooks."""
        self._swap()

    on_validation_epoch_end = on_train_end = on_validation_epoch_start

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Undo any swap, also an interrupted one, then load the average's tensors by name."""
        for name, tensor in self._before.items():
            self._parameters[name].data = tensor
        self._before = {}
        if self._model_has_average:
            self._swap()
        for name, tensor in self._other.items():
            if name in average:
                tensor.copy_(average[name])

    @contextmanager
    def weights_as_trained(self) -> Iterator[None]:
        """Swap in the weights as trained, for a part of a validation."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._before:
            raise RuntimeError(
                "interrupted while average and weights as trained changed places: nothing is saved"
            )
        state = checkpoint["state_dict"]
        average = self._other
        trained = {name: state[name] for name in self._other}
        if self._model_has_average:
            average, trained = trained, average
        checkpoint["state_dict"] = {**state, **average}
        checkpoint["current_model_state"] = trained
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._steps)}

    # In validation's inference mode the weights would become tensors that no step may change.
    @torch.inference_mode(False)
    def _swap(self) -> None:
        """Exchange the model's weights and the other ones; pointers move, nothing is copied."""
        self._before = {name: p.data for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            p.data = self._other[name]
        self._other = self._before
        self._before = {}
        self._model_has_average = not self._model_has_average


def find_average(trainer: Trainer) -> WeightAverage | None:
    """The average that ``trainer.fit`` keeps; None if there is none, or outside of fit."""
    if trainer.state.fn != TrainerFn.FITTING:
        return None
    callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009  (mypy misses it)
    for callback in callbacks:
        if isinstance(callback, WeightAverage):
            return callback
    return None
