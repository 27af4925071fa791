"""What a run that is resumed gets of new settings: named, and refused where it would be another run."""

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from olvae import config as cfg
from olvae.config import Config, ConfigError

__all__ = ["Changes", "changes", "check_changes", "print_changes"]

Changes = Mapping[str, tuple[Any, Any]]
"""By dotted key: the run's own value and the new one, :data:`olvae.config.ABSENT` for none."""

SETTINGS = ("precision", "gpus", "seed")
"""Of the section ``run``: the flags that may change."""

FREE = (
    "lightning",
    "run",
    "data.params.num_workers",
    "model.base_learning_rate",
    "model.params.betas",
    "model.params.channels_last",
    "model.params.checkpoint",
    "model.params.compile",
    "model.params.decay_steps",
    "model.params.ema_decay",
    "model.params.min_lr_factor",
    "model.params.optimizer",
    "model.params.scheduler",
    "model.params.parts.teacher.params.autoencoder",  # where it is; a checksum says that it is the same
    "model.params.use_ema",
    "model.params.val_metrics",
    "model.params.warmup_steps",
    "model.params.weights_dir",
)
"""Settings that are neither data, networks nor loss, with all below them."""


def changes(before: Config, config: Config, settings: Mapping[str, Any]) -> Changes:
    """What differs.

    Args:
        before: the run's config.
        config, settings: the new one, and its section ``run``.
    """
    sections: list[Config] = [
        {**given, "run": {key: run.get(key) for key in SETTINGS}}
        for given, run in ((before, before["run"]), (config, settings))
    ]
    return cfg.differences(*sections)


def print_changes(found: Changes) -> None:
    """Print what differs, a line each; nothing if nothing does."""
    if not found:
        return
    console = Console(stderr=True)
    console.print("settings that differ from the run's own:", highlight=False)
    for key, (old, new) in found.items():
        console.print(f"  {key}: {_text(old)} -> {_text(new)}", highlight=False, soft_wrap=True, markup=False)


def check_changes(found: Changes) -> None:
    """Check that data, networks and loss are the run's own.

    Raises:
        ConfigError: they are not.
    """
    keys = [key for key in found if not any(_is_below(key, free) for free in FREE)]
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"--resume: {', '.join(keys[:3])}{more}: the run would go on with other data, networks or losses: leave "
            "that out, start a new run from its weights with --actual_resume, or add --allow-changes"
        )


def _is_below(key: str, free: str) -> bool:
    return key == free or key.startswith(f"{free}.")


def _text(value: Any) -> str:
    if value is cfg.ABSENT:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
