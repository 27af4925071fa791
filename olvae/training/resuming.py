"""Resume a run: what its settings may change, and which run a SLURM job that was queued again continues."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olvae import config as cfg
from olvae import runs
from olvae.config import Config, ConfigError
from olvae.runs import Run, Settings

FREE_SETTINGS = (
    "lightning",
    *(f"run.{key}" for key in ("gpus", "precision", "seed")),
    "data.params.num_workers",
    "model.base_learning_rate",
    *(f"model.params.{key}" for key in ("betas", "decay_steps", "min_lr_factor", "scheduler", "warmup_steps")),
    *(f"model.params.{key}" for key in ("channels_last", "checkpoint", "compile", "weights_dir")),
    *(f"model.params.{key}" for key in ("ema_decay", "use_ema", "val_metrics")),
    "model.params.parts.teacher.params.autoencoder",  # a path; its weights have a checksum
)
"""Settings, with all below them, that a resumed run may change: they are neither data, networks nor losses."""

Changes = Mapping[str, tuple[Any, Any]]


def find_changes(previous: Config, config: Config, settings: Settings) -> Changes:
    """Compare a resumed run's config and settings with its saved ones: old and new value by dotted key."""

    def compared(whole: Config, own: Settings) -> Config:
        return {**whole, "run": {"precision": own.precision, "gpus": own.gpus, "seed": own.seed}}

    return cfg.differences(compared(previous, runs.settings_of(previous)), compared(config, settings))


def describe_changes(changes: Changes) -> list[str]:
    """Describe what differs, a line each after the first; nothing if nothing does."""
    lines = [f"  {key}: {_text(old)} -> {_text(new)}" for key, (old, new) in changes.items()]
    return ["settings that differ from the run's own:", *lines] if lines else []


def check_changes(changes: Changes) -> None:
    """Refuse changes that would make a resumed run a different one.

    Raises:
        ConfigError: data, networks or losses are not the run's own.
    """
    keys = [key for key in changes if not any(f"{key}.".startswith(f"{free}.") for free in FREE_SETTINGS)]
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"`resume`: {', '.join(keys[:3])}{more}: this would continue the run with other data, networks or losses: "
            "leave that out, start a new run from its weights with `actual_resume`, or add `allow_changes`"
        )


def _text(value: Any) -> str:
    if value is cfg.ABSENT:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def slurm_job() -> str | None:
    """The SLURM job of this process, by the name that scontrol takes."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeued_run(logdir: Path, name: str) -> Run | None:
    """Find the run of this name that this SLURM job made before it was queued again; None if it did not."""
    job = slurm_job()
    if job is None or not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return None
    found = [Run(path) for path in logdir.glob(f"*_{name}_*")]
    begun = [run for run in found if run.last_checkpoint.is_file() and run.config.is_file()]
    for run in sorted(begun, key=lambda run: run.config.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(ConfigError):  # of another run, perhaps
            settings = runs.settings_of(cfg.load([run.config]))
            if (settings.slurm_job, settings.name) == (job, name):
                return run
    return None
