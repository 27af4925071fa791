"""The training step beside one that runs the autoencoder twice, once per optimizer, as the published module does."""

import time
from collections.abc import Mapping
from functools import partial
from itertools import repeat
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from olvae.bench.timing import measure
from olvae.data.source import Batch
from olvae.models.liteautoencoder import LiteAutoencoderKL

__all__ = ["Precision", "bench_train", "time_steps"]


Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


class TwoForwards(LiteAutoencoderKL):
    """The same step after the additional forward pass that it saves."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self(self.images(batch), sample_posterior=True)
        super().training_step(batch, batch_idx)


def bench_train(
    params: Mapping[str, Any], size: int, batch_size: int, steps: int, rounds: int, device: str
) -> dict[str, float]:
    """Time both steps in turn, on the same random images.

    Args:
        params: ``model.params`` of a config with an adversary.
        steps: measured steps per round, after one that warms up.
        rounds: of both steps.

    Returns:
        Median seconds of each step, images per second, speedup (above 1 if one forward pass is faster), and on a GPU
        the peak memory in GiB.
    """
    models = {"one_forward": LiteAutoencoderKL(**params), "two_forwards": TwoForwards(**params)}
    work = {name: partial(time_steps, model, size, batch_size, steps, device) for name, model in models.items()}
    times = measure(work, device, rounds, warm_up=False)
    medians = {name: measured.median for name, measured in times.items()}
    peak = {name: measured.peak_bytes / 2**30 for name, measured in times.items() if measured.peak_bytes is not None}
    return {
        **{f"{name}_s": value for name, value in medians.items()},
        **{f"{name}_images_per_s": batch_size / value for name, value in medians.items()},
        **{f"{name}_peak_gib": value for name, value in peak.items()},
        "speedup": medians["two_forwards"] / medians["one_forward"],
    }


def time_steps(
    model: LiteAutoencoderKL, size: int, batch_size: int, steps: int, device: str, precision: Precision = "32-true"
) -> list[float]:
    """Train on random images; returns the seconds of each step but the first, which warms up."""
    stopwatch = _Stopwatch(device)
    trainer = pl.Trainer(
        accelerator="cpu" if device == "cpu" else "cuda",
        devices=1,
        precision=precision,
        max_steps=steps + 1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[stopwatch],
    )
    shape = batch_size, model.autoencoder.encoder.in_channels, size, size
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trainer.fit(model, repeat({"image": x}, steps + 1))
    return stopwatch.seconds[1:]


class _Stopwatch(pl.Callback):
    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = self._now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(self._now() - self._start)

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()
