"""Bound on activations, for networks that should be safe in half precision."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.models.parts.part import Loss, Model, Part, Step
from olvae.modules.base import check_not_negative
from olvae.modules.counting import watch_outputs
from olvae.modules.mixed_precision import upcast


class ActivationBound(Part):
    """Penalise activations beyond a bound, in every module of the trained networks.

    The loss is the sum, over modules whose output is a tensor, of the mean of
    max(0, (|activation| - bound) / bound)^2.

    Args:
        bound: above 0, such as 8192 to be safe in fp16, which ends at 65504.
        weight: weight of the loss ``activation``, not negative.
    """

    needs_activations = True

    def __init__(self, bound: float, weight: float = 1.0) -> None:
        super().__init__()
        if bound <= 0:
            raise ValueError(f"bound must be above 0, got {bound}")
        check_not_negative(weight=weight)
        self.bound = bound
        self.weight = weight
        self._excess: list[Tensor] = []

    def conflicts(self, model: Model) -> Iterable[str]:
        if model.checkpoint:
            yield (
                f"checkpoint, parts.{self.name}: checkpointing drops the activations to bound: "
                "leave one out"
            )
        if model.compiled:
            yield (
                f"compile, parts.{self.name}: compiled networks do not show their activations: "
                "leave one out"
            )

    def watch(self, model: Model) -> AbstractContextManager[None]:
        """Collect the excess of what the trained networks compute in this context."""

        def collect(name: str, output: Tensor) -> None:  # noqa: ARG001
            self._excess.append(F.relu(upcast(output).abs() / self.bound - 1.0).square().mean())

        self._excess = []
        modules: dict[str, nn.Module] = {}
        for network in model.trained_networks:
            for module in network.modules():
                modules[str(len(modules))] = module
        return watch_outputs(modules, collect)

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        # Emptied here, so that no copy of the part holds the graph behind these tensors.
        excess = self._excess
        self._excess = []
        return {"activation": (torch.stack(excess).sum(), self.weight)}

    def describe(self) -> str:
        return f"{self.bound:g}, weight {self.weight:g}"
