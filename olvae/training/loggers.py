"""Make the loggers of a run, log pictures to them, and read TensorBoard's curves back."""

import threading
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from olvae import config as cfg
from olvae.config import Config, ConfigError
from olvae.files import reason
from olvae.runs import Run
from olvae.training.progress import log


def read_curves(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Read steps and values of every scalar of training and validation from TensorBoard's files."""
    folder = run.path / "tensorboard"
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 2000})
    events.Reload()
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for tag in sorted(events.Tags()["scalars"]):
        if tag.startswith(("train/", "val/")):
            # A step may be there twice, before and after a resume: the later one counts.
            written = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
            value_at = {float(event.step): event.value for event in written}
            steps = sorted(value_at)
            curves[tag] = (steps, [value_at[step] for step in steps])
    return curves


def make_loggers(nodes: Mapping[str, Config], run: Run) -> list[Logger]:
    """Make TensorBoard's logger, then the loggers of ``lightning.logger``.

    By default CSVLogger writes into ``csv`` in the run's folder, a file for each start of the run,
    and WandbLogger continues the W&B run of the folder's name. ConfigError if one can't be made.
    """
    loggers: list[Logger] = [
        TensorBoardLogger(run.path, name="", version="", sub_dir="tensorboard")
    ]
    unique = run.path.resolve().name
    defaults: dict[str, Config] = {
        "CSVLogger": {"save_dir": str(run.path), "name": "csv"},
        "WandbLogger": {"save_dir": str(run.path), "name": unique, "id": unique, "resume": "allow"},
    }
    for name, node in nodes.items():
        class_name = node["target"].rpartition(".")[2]
        params = {**defaults.get(class_name, {}), **(node.get("params") or {})}
        try:
            logger = cfg.instantiate({**node, "params": params})
        except (ModuleNotFoundError, ConfigError) as error:
            raise ConfigError(f"lightning.logger.{name}: {error}") from error
        if not isinstance(logger, Logger):
            target = node["target"]
            raise ConfigError(f"lightning.logger.{name}: {target} is no logger of Lightning")
        loggers.append(logger)

    # A logger whose disk is full must not end the training: wrap what writes.
    _silence_tensorboard()
    for logger in loggers:
        for method in ("log_metrics", "log_hyperparams", "save", "finalize"):
            setattr(logger, method, partial(_attempt, logger, getattr(logger, method)))
    return loggers


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Log a picture to TensorBoard or W&B; Lightning's other loggers have no common method."""
    if isinstance(logger, TensorBoardLogger):
        pixels = np.asarray(picture)
        _attempt(logger, lambda: logger.experiment.add_image(name, pixels, step, dataformats="HWC"))
    elif isinstance(logger, WandbLogger):
        _attempt(logger, lambda: logger.log_image(name, [picture], step))


@cache
def _silence_tensorboard() -> None:
    """Print no traceback of TensorBoard's thread: the next call raises its error as well."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        writes = type(args.thread).__module__.startswith("tensorboard")
        if not (writes and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook


_failed: WeakSet[Logger] = WeakSet()  # loggers that can't write any more


def _attempt(logger: Logger, action: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Call a logger; a full disk or a missing folder ends its logging, not the training."""
    if logger in _failed:
        return None
    try:
        return action(*args, **settings)
    except (OSError, ValueError) as error:
        cause = error.__cause__ or error  # Lightning puts TensorBoard's into a ValueError
        if not isinstance(cause, OSError):
            raise
        _failed.add(logger)
        log.warning("%s: nothing more is logged there: %s", type(logger).__name__, reason(cause))
        return None
