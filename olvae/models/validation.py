"""Validation during training: metrics of the averaged weights and of the weights as trained."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from olvae.data.source import Batch
from olvae.devices import tf32
from olvae.launcher import gather, gather_parts
from olvae.metrics import MakeMetrics, build_metrics
from olvae.metrics.metric import MetricSet
from olvae.models.parts.part import Model, Part
from olvae.models.updates.averaging import find_average


class Validation:
    """The metrics of a validation, and sums over its images of what the parts measure.

    Order of calls:

    1. :meth:`begin`
    2. :meth:`update` with each batch
    3. :meth:`summarise`, in every process, for the values over all of them
    """

    def __init__(self, names: Sequence[str], weights_dir: str | None) -> None:
        self.names = names
        self.weights_dir = weights_dir
        # By weights: "val" with the average (if there is one), "val_raw" as trained beside it.
        self.metrics: dict[str, MetricSet] = {}
        # (part, name) -> array of the sum over images and their number.
        self.sums: dict[tuple[str, str], Any] = {}
        self._make: dict[torch.device, MakeMetrics] = {}  # for the device of the last set_up

    def set_up(self, device: torch.device) -> MakeMetrics:
        """Prepare the metrics on a device; FileNotFoundError if a pretrained network is missing."""
        if device not in self._make:
            make = build_metrics(("psnr", "ssim", *self.names), self.weights_dir, device)
            missing = [f"val_metrics: {name}: {why}" for name, why in make().skipped.items()]
            if missing:
                raise FileNotFoundError("; ".join(missing))
            self._make = {device: make}
        return self._make[device]

    def begin(self, model: Model) -> None:
        make = self.set_up(model.device)
        self.metrics = {"val": make()}
        self.sums = {}
        if model.use_ema and find_average(model.trainer) is not None:
            self.metrics["val_raw"] = make()

    @tf32(False)
    def update(self, model: Model, batch: Batch, number: int) -> None:
        """Add a batch; ``number`` counts the batches of this process.

        Without TF32, whatever training computes in.
        """
        images = model.images(batch)
        levels = model.pixel_range.levels(batch["image"])
        moments = batch.get("moments")
        keys = batch.get("key")
        if not keys:
            keys = [f"{model.global_rank} {number} {i}" for i in range(len(levels))]

        # Metrics: the model holds the average during validation, and swaps it for "val_raw".
        for weights, metrics in self.metrics.items():
            average = find_average(model.trainer) if weights == "val_raw" else None
            with nullcontext() if average is None else average.weights_as_trained():
                reconstruction = model(images, moments=moments)[0]
                metrics.update(keys, levels, model.pixel_range.to_levels(reconstruction))
                del reconstruction  # before the next pass needs the memory

        # Parts: means over the batch, weighted by its images, which they get as the encoder does.
        encoded = model.autoencoder.shrink(images)
        for part in model.each_part:
            for name, mean in part.validate(model, encoded, moments).items():
                summed = np.array([float(mean) * len(levels), len(levels)])
                self.sums[part.name, name] = self.sums.get((part.name, name), 0.0) + summed

    def summarise(self, parts: Sequence[Part]) -> dict[str, float]:
        """The values over all processes, without infinite and unavailable ones; collective."""
        # One process computes the values, because rFID's features are large; then all get them.
        states = (
            (weights, state)
            for weights, metrics in self.metrics.items()
            for state in metrics.states()
        )
        for weights, state in gather_parts(states):
            self.metrics[weights].merge(state)
        gathered = gather(self.sums)
        values: list[dict[str, float]] = [{}]
        if gathered is not None:
            values = [self._merge(gathered[1:], parts)]
        if dist.is_initialized():
            dist.broadcast_object_list(values)
        self.metrics = {}
        return values[0]

    def _merge(
        self, others: Sequence[Mapping[tuple[str, str], Any]], parts: Sequence[Part]
    ) -> dict[str, float]:
        """The values of this process and the others together, whose metrics are merged."""
        for sums in others:
            for key, summed in sums.items():
                self.sums[key] = self.sums.get(key, 0.0) + summed

        values: dict[str, float] = {}
        for weights, metrics in self.metrics.items():
            for name, value in metrics.compute().items():
                if math.isfinite(value):
                    values[f"{weights}/{name}"] = value
        for part in parts:
            means: dict[str, float] = {}
            for (owner, name), (total, images) in self.sums.items():
                if owner == part.name:
                    means[name] = float(total / images)
            for name, value in part.summarise(means).items():
                values[f"val/{name}"] = value
        return values
