"""Log scalars and pictures of a run: TensorBoard in its folder, and the loggers of ``lightning.logger``."""

import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from olvae import config as cfg
from olvae.config import Config, ConfigError
from olvae.files import reason
from olvae.runs import Run

log = logging.getLogger("olvae.training")

_failed: WeakSet[Logger] = WeakSet()


def make_loggers(nodes: Mapping[str, Config], run: Run) -> list[Logger]:
    """Make TensorBoard's logger, then those of the nodes.

    Unless the node says otherwise, CSVLogger writes into ``csv`` in the run's folder, a file for each start of the run,
    and WandbLogger continues the W&B run of the folder's name.

    Raises:
        ConfigError: a logger can't be made, for example because its package is missing.
    """
    loggers: list[Logger] = [TensorBoardLogger(run.path, name="", version="", sub_dir="tensorboard")]
    for name, node in nodes.items():
        params = _defaults(node["target"].rpartition(".")[2], run) | dict(node.get("params") or {})
        try:
            logger = cfg.instantiate({**node, "params": params})
        except (ModuleNotFoundError, ConfigError) as error:
            raise ConfigError(f"lightning.logger.{name}: {error}") from error
        if not isinstance(logger, Logger):
            raise ConfigError(f"lightning.logger.{name}: {node['target']} is no logger of Lightning")
        loggers.append(logger)
    _silence_tensorboard()
    for logger in loggers:
        for method in ("log_metrics", "log_hyperparams", "save", "finalize"):
            setattr(logger, method, partial(_attempt, logger, getattr(logger, method)))
    return loggers


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Log a picture to TensorBoard or W&B; Lightning's other loggers have no common way to take one."""
    if isinstance(logger, TensorBoardLogger):
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        image = pixels.view(picture.height, picture.width, 3)
        _attempt(logger, lambda: logger.experiment.add_image(name, image, step, dataformats="HWC"))
    elif isinstance(logger, WandbLogger):
        _attempt(logger, lambda: logger.log_image(name, [picture], step))


def _defaults(kind: str, run: Run) -> dict[str, Any]:
    name = run.path.resolve().name
    return {
        "CSVLogger": {"save_dir": str(run.path), "name": "csv"},
        "WandbLogger": {"save_dir": str(run.path), "name": name, "id": name, "resume": "allow"},
    }.get(kind, {})


def _attempt(logger: Logger, action: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Let a logger write; a full disk or a missing folder ends its logging, not the training."""
    if logger in _failed:
        return None
    try:
        return action(*args, **settings)
    except OSError as error:
        _failed.add(logger)
        log.warning("%s: nothing more is logged there: %s", type(logger).__name__, reason(error))
        return None


@cache
def _silence_tensorboard() -> None:
    """Leave out the traceback of TensorBoard's thread, whose error is raised by the next call as well."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (type(args.thread).__module__.startswith("tensorboard") and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook
