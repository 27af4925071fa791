"""Validation during training: metrics of the averaged weights, and of the weights as trained. Logs of steps."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.source import Batch
from olvae.devices import gather
from olvae.metrics import MakeMetrics, build_metrics
from olvae.metrics.metric import MetricSet
from olvae.models.autoencoder import LiteVAE, Quantizer
from olvae.models.averaging import WeightAverage, find_average
from olvae.models.parts.part import Part, StandIn
from olvae.modules.base import HALVES, Decoder, Encoder, mean_over_processes
from olvae.modules.distributions import Posterior


class ValidatedModule(pl.LightningModule):
    """An autoencoder with parts that Lightning validates, and logs of its steps; see :class:`LiteAutoencoderKL`."""

    encoder: Encoder
    decoder: Decoder
    quantizer: Quantizer | None
    parts: nn.ModuleDict
    for_diffusion: dict[str, Any]
    use_ema: bool
    freeze_encoder: bool
    freeze_decoder: bool
    channels_last: bool
    pixel_range: PixelRange = EIGHT_BITS  # of the source's images
    reports = (
        False  # whether the last training step logged its values: every log_every_n_steps-th does
    )

    def __init__(self, val_metrics: Sequence[str] = (), weights_dir: str | None = None) -> None:
        super().__init__()
        self.val_metrics = list(val_metrics)
        self.weights_dir = weights_dir
        self.logged: dict[str, Tensor | float] = {}  # the values of the last step that logged any
        self._reported: dict[str, Tensor | float] = {}  # to be logged
        self.validation_values: dict[
            str, float
        ] = {}  # of the last one, as val/psnr; empty if no image could be read
        self._make_metrics: tuple[torch.device, MakeMetrics] | None = None
        self._metrics: dict[
            str, MetricSet
        ] = {}  # by the weights, val (averaged) or val_raw (as trained)
        self._sums: dict[
            tuple[str, str], Any
        ] = {}  # by part and name: sum over images and their number

    @property
    def autoencoder(self) -> LiteVAE:
        """The plain module over the same weights (a view: cheap to make, nothing is copied)."""
        vae = LiteVAE(self.encoder, self.decoder, self.quantizer).set_for_diffusion(
            self.for_diffusion
        )
        vae.pixel_range = self.pixel_range
        return vae

    @property
    def _average(self) -> WeightAverage | None:
        return find_average(self.trainer) if self.use_ema else None

    @property
    def each_part(self) -> list[Part]:
        """The parts, in the order of the config."""
        return [cast("Part", part) for part in self.parts.values()]

    @property
    def stand_in(self) -> "StandIn | None":
        """The autoencoder that the decoder learns from, and that takes the place of a frozen half, if there is one."""
        return next((part.stand_in for part in self.each_part if part.stand_in is not None), None)

    @property
    def frozen_halves(self) -> list[str]:
        """Those of :data:`HALVES` that are not trained."""
        return [half for half in HALVES if getattr(self, f"freeze_{half}")]

    def images(self, batch: Batch) -> Tensor:
        """The batch's images in [-1, 1], (B, C, H, W)."""
        x = self.pixel_range.normalise(batch["image"])
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def encode(self, x: Tensor) -> Posterior:
        """See :meth:`LiteVAE.encode`."""
        return self.autoencoder.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """See :meth:`LiteVAE.decode`."""
        return self.autoencoder.decode(z)

    def decode_trained(self, z: Tensor) -> Tensor:
        """Decode, with the stand-in if the decoder is frozen."""
        stand_in = self.stand_in if self.freeze_decoder else None
        return self.decode(z) if stand_in is None else stand_in.decode(z)

    def forward(
        self, x: Tensor, sample_posterior: bool = False, moments: Tensor | None = None
    ) -> tuple[Tensor, Posterior]:
        """See :meth:`LiteVAE.forward`; a stand-in, whose moments may be known, takes the place of a frozen half."""
        stand_in = self.stand_in if self.freeze_encoder else None
        posterior = self.encode(x) if stand_in is None else stand_in.posterior(x, moments)
        return self.decode_trained(
            posterior.sample() if sample_posterior else posterior.mode()
        ), posterior

    def report(self, values: Mapping[str, Tensor | float], rare: bool = False) -> None:
        """Log the values of a step that the loggers take, as means over the processes; the same names in each of them.

        At the other steps nothing waits for the device. ``rare`` ones, which not each step has, are logged at the next.
        """
        if self.reports or rare:
            self._reported |= {
                name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()
            }

    def _log_reported(self) -> None:
        results = self.trainer.fit_loop.epoch_loop._results
        for name in [
            name for name in results if name.startswith(("training_step.", "on_train_batch_end."))
        ]:
            del results[name]  # or Lightning logs an earlier step's again, as of this one
        if not self.reports:
            return
        values, self._reported = self._reported, {}
        if self.trainer.world_size > 1:  # one message for all of them
            flat = torch.stack(
                [
                    torch.as_tensor(v, dtype=torch.float32, device=self.device)
                    for v in values.values()
                ]
            )
            values = dict(zip(values, mean_over_processes(flat).unbind(), strict=True))
        self.logged = values
        # The step, or Lightning counts micro-batches on the logger's axis.
        self.log_dict({**values, "step": float(self.global_step)})

    def set_up_validation(self) -> MakeMetrics:
        """Prepare the metrics on the module's device; FileNotFoundError if a pretrained network is missing."""
        if self._make_metrics is None or self._make_metrics[0] != self.device:
            make = build_metrics(("psnr", "ssim", *self.val_metrics), self.weights_dir, self.device)
            if missing := make().skipped:
                raise FileNotFoundError(
                    "; ".join(f"val_metrics: {name}: {reason}" for name, reason in missing.items())
                )
            self._make_metrics = self.device, make
        return self._make_metrics[1]

    def on_validation_epoch_start(self) -> None:
        make = self.set_up_validation()
        self._metrics, self._sums = {"val": make()}, {}
        if self._average is not None:
            self._metrics["val_raw"] = make()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, x = self.images(batch), self.pixel_range.levels(batch["image"])
        keys = batch.get("key") or [f"{self.global_rank} {batch_idx} {i}" for i in range(len(x))]
        moments = batch.get("moments")
        for weights, metrics in self._metrics.items():
            average = self._average if weights == "val_raw" else None
            with nullcontext() if average is None else average.weights_as_trained():
                metrics.update(
                    keys, x, self.pixel_range.to_levels(self(images, moments=moments)[0])
                )
        for part in self.each_part:
            for name, mean in part.validate(cast("Any", self), images, moments).items():
                summed = np.array([float(mean) * len(x), len(x)])
                self._sums[part.name, name] = self._sums.get((part.name, name), 0.0) + summed

    def on_validation_epoch_end(self) -> None:
        """Log the values over all processes, without those that are infinite or not available."""
        states = gather(({key: part.state() for key, part in self._metrics.items()}, self._sums))
        values = [
            {} if states is None else self._summarise(states[1:])
        ]  # rFID's features go to one process alone
        if dist.is_initialized():
            dist.broadcast_object_list(values)
        self.validation_values = (
            {} if self.trainer.sanity_checking else values[0]
        )  # of its two batches
        self._metrics = {}
        self.log_dict(values[0])
        self.log("step", float(self.global_step))

    def _summarise(self, others: Sequence[Any]) -> dict[str, float]:
        """The values of this process' validation and of the others'."""
        for metrics, sums in others:
            for weights, state in metrics.items():
                self._metrics[weights].merge(state)
            for key, summed in sums.items():
                self._sums[key] = self._sums.get(key, 0.0) + summed
        values = {
            f"{weights}/{name}": value
            for weights, metrics in self._metrics.items()
            for name, value in metrics.compute().items()
            if math.isfinite(value)
        }
        for part in self.each_part:
            means = {
                name: float(total / n)
                for (of, name), (total, n) in self._sums.items()
                if of == part.name
            }
            values |= {f"val/{name}": value for name, value in part.summarise(means).items()}
        return values
