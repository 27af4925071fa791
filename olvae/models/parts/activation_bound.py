"""Bound on activations, for networks that should be safe in half precision."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.models.parts.part import Loss, Model, Part, Step
from olvae.modules.base import check_not_negative, upcast, watch_outputs


class ActivationBound(Part):
    """Penalise activations beyond a bound in every module of the trained networks whose output is a tensor.

    The loss is the sum over modules of the mean of ((|activation| - bound) / bound)^2 where that is positive.

    Args:
        bound: above 0, such as 8192 to be safe in fp16, which ends at 65504.
        weight: of the loss ``activation``, not negative.
    """

    needs_activations = True

    def __init__(self, bound: float, weight: float = 1.0) -> None:
        super().__init__()
        if bound <= 0:
            raise ValueError(f"bound must be above 0, got {bound}")
        check_not_negative(weight=weight)
        self.bound, self.weight = bound, weight
        self._excess: list[Tensor] = []

    def conflicts(self, model: Model) -> Iterable[str]:
        if model.checkpoint:
            yield f"checkpoint, parts.{self.name}: checkpointing drops the activations to bound: leave one out"
        if model.compiled:
            yield f"compile, parts.{self.name}: compiled networks do not show their activations: leave one out"

    def watch(self, model: Model) -> AbstractContextManager[None]:
        """Collect the excess of what the trained networks compute in this context."""

        def collect(name: str, output: Tensor) -> None:  # noqa: ARG001
            self._excess.append(F.relu(upcast(output).abs() / self.bound - 1.0).square().mean())

        self._excess = []
        modules = [module for network in model.trained_networks for module in network.modules()]
        return watch_outputs({str(i): module for i, module in enumerate(modules)}, collect)

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        excess, self._excess = self._excess, []  # no copy of the part may hold the graph behind it
        return {"activation": (torch.stack(excess).sum(), self.weight)}

    def describe(self) -> str:
        return f"{self.bound:g}, weight {self.weight:g}"
