"""Where a run's scalars and pictures go: TensorBoard's files in its folder, and the loggers of ``lightning.logger``."""

import csv
import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from olvae import config as cfg
from olvae.config import Config, ConfigError
from olvae.files import reason
from olvae.runs import Run

__all__ = ["log_picture", "make_loggers"]

log = logging.getLogger("olvae.training")


def make_loggers(nodes: Mapping[str, Config], run: Run, done: int) -> list[Logger]:
    """TensorBoard's, then those of the nodes, each of which goes on where it was if the run is resumed.

    CSVLogger and WandbLogger get what they need for that, unless the node says otherwise: a place in the run's folder,
    and the run's name as W&B's id.

    Args:
        done: steps that the run has had.

    Raises:
        ConfigError: a logger can't be made, for example because its package is missing.
    """
    found: list[Logger] = [TensorBoardLogger(run.path, name="", version="", sub_dir="tensorboard")]
    for name, node in nodes.items():
        params = _ours(node["target"].rpartition(".")[2], run) | dict(node.get("params") or {})
        try:
            logger = cfg.instantiate({**node, "params": params})
        except (ModuleNotFoundError, ConfigError) as error:
            raise ConfigError(f"lightning.logger.{name}: {error}") from error
        if not isinstance(logger, Logger):
            raise ConfigError(f"lightning.logger.{name}: {node['target']} is no logger of Lightning")
        if isinstance(logger, CSVLogger):
            _keep_rows(logger, done)
        found.append(logger)
    _quieten_threads()
    for logger in found:
        for method in ("log_metrics", "log_hyperparams", "save", "finalize"):
            setattr(logger, method, partial(_attempt, logger, getattr(logger, method)))
    return found


_failed: WeakSet[Logger] = WeakSet()


def _attempt(logger: Logger, action: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Let a logger write; a full disk, or a folder that is gone, ends what it writes, and not the training."""
    if logger in _failed:
        return None
    try:
        return action(*args, **settings)
    except OSError as error:
        _failed.add(logger)
        log.warning("%s: nothing more is logged there: %s", type(logger).__name__, reason(error))
        return None


@cache
def _quieten_threads() -> None:
    """TensorBoard's thread hands its error on to the next call, and prints a traceback besides: leave that out."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (type(args.thread).__module__.startswith("tensorboard") and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook


def _ours(kind: str, run: Run) -> dict[str, Any]:
    name = run.path.resolve().name
    return {
        "CSVLogger": {"save_dir": str(run.path), "name": "", "version": "csv"},
        "WandbLogger": {"save_dir": str(run.path), "name": name, "id": name, "resume": "allow"},
    }.get(kind, {})


@rank_zero_only
def _keep_rows(logger: CSVLogger, done: int) -> None:
    """Lightning removes the file of an earlier piece of the run: give its rows to the new writer."""
    path, kept = Path(logger.log_dir) / "metrics.csv", []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                try:
                    values = {name: float(value) for name, value in row.items() if value}
                    step = int(row["step"])
                except (TypeError, ValueError):  # a kill has torn the line
                    continue
                if step <= done:  # later ones were logged between the last checkpoint and a kill
                    kept.append({**values, "step": step})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")  # that the rows will be lost
        writer = logger.experiment
    writer.metrics.extend(kept)
    writer.save()


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Give a picture to TensorBoard or W&B; the other loggers of Lightning take none, or in ways of their own."""
    if isinstance(logger, TensorBoardLogger):
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        image = pixels.view(picture.height, picture.width, 3)
        _attempt(logger, lambda: logger.experiment.add_image(name, image, step, dataformats="HWC"))
    elif isinstance(logger, WandbLogger):
        _attempt(logger, lambda: logger.log_image(name, [picture], step))
