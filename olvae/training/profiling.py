"""Trace training steps with torch's profiler, and take a snapshot of a GPU's memory where it runs out."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from olvae.training.progress import notify
from olvae.training.saving import current_run

FIRST = 3  # steps before those that are traced: kernels are chosen, memory is allocated, networks are compiled


class StepTrace(Callback):
    """Trace ``steps`` steps of the first process into ``trace.json`` in the run folder, for https://ui.perfetto.dev.

    ``trace.txt`` has the operations that take most time. If a GPU's memory runs out, ``memory.pickle`` is a snapshot
    for https://docs.pytorch.org/memory_viz. Raises ValueError for fewer steps than one.
    """

    def __init__(self, steps: int = 3) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self._done = 0
        self._profile: profile | None = None

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._done == FIRST and trainer.is_global_zero:
            on_gpu = trainer.strategy.root_device.type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._done += 1
        if self._profile is not None and self._done == FIRST + self.steps:
            self._write(trainer, self._profile)
            self._profile = None

    def on_exception(self, trainer: pl.Trainer, _: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, torch.OutOfMemoryError):
            path = current_run(trainer).path / "memory.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            notify(f"a snapshot of the memory is in {path}")

    def _write(self, trainer: pl.Trainer, traced: profile) -> None:
        traced.stop()
        folder, on_gpu = current_run(trainer).path, trainer.strategy.root_device.type == "cuda"
        traced.export_chrome_trace(str(folder / "trace.json"))
        averages = traced.key_averages()
        table = averages.table(sort_by=f"self_{'cuda' if on_gpu else 'cpu'}_time_total", row_limit=50)
        (folder / "trace.txt").write_text(table, encoding="utf-8")
        kernels = sum(row.count for row in averages if row.device_type.name == "CUDA")
        launches = f", {kernels / self.steps:.0f} kernels a step" if on_gpu else ""
        notify(f"{self.steps} steps are traced in {folder / 'trace.json'}{launches}")
