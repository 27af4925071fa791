"""Run folders: their names, the files in them, and how one is opened again."""

import itertools
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from olvae import config as cfg
from olvae.config import Config, ConfigError
from olvae.files import check_folder

__all__ = ["Run", "check_name", "config_of", "create", "open_run", "run_of"]


@dataclass
class Run:
    """A run folder, ``<logdir>/<timestamp>_<name>_<precision>/``, and the paths in it."""

    path: Path

    def __post_init__(self) -> None:
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.images = self.path / "images"
        self.bad_steps = self.path / "bad_steps.jsonl"
        self.metrics = self.path / "metrics.json"
        self.finished = self.path / "finished.json"
        self.lock = self.path / "lock.json"


def create(logdir: str | Path, name: str, precision: str) -> Run:
    """Make a new run folder. The timestamp and the precision have no underscore, so that the name can be cut out.

    Raises:
        ConfigError: the name can't be part of a folder's name.
        OSError: the folder can't be made in logdir.
    """
    check_name(name)
    check_folder(Path(logdir))
    stamp = datetime.now().astimezone().strftime("%Y-%m-%dT%H-%M-%S")
    for attempt in itertools.count():
        suffix = f"-{attempt}" if attempt else ""
        path = Path(logdir) / f"{stamp}{suffix}_{name}_{precision}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    run = Run(path)
    run.checkpoints.mkdir()
    run.images.mkdir()
    return run


def check_name(name: str) -> None:
    """Raise ConfigError if a run folder can't have this name."""
    if not re.fullmatch(r"[\w.+=-]+", name):
        raise ConfigError(f"--name {name!r}: use letters, digits and . _ - + = only")


def run_of(checkpoint: Path) -> Run | None:
    """The run that a file is a checkpoint of; None if it lies elsewhere, be it in a folder of that name."""
    run = Run(checkpoint.parent.parent)
    return run if checkpoint.parent.name == run.checkpoints.name and run.config.is_file() else None


def open_run(path: str | Path) -> Run:
    """Open a run that exists and can be continued, by its folder or by its last checkpoint.

    Raises:
        FileNotFoundError: the folder, its config or its checkpoint is missing.
    """
    run = Run(Path(path))
    if run.path.is_file():
        around = Run(run.path.parent.parent)
        if run.path != around.last_checkpoint:
            other = run.path.parent == around.checkpoints
            raise FileNotFoundError(
                f"{path}: this is a file: name its run folder"
                + (", or start a new run from these weights with --actual_resume" if other else "")
            )
        run = around
    if not run.path.is_dir():
        raise FileNotFoundError(f"{path}: no such run folder")
    for file in (run.config, run.last_checkpoint):
        if not file.is_file():
            raise FileNotFoundError(
                f"{run.path}: not a run folder that can be continued: {file.relative_to(run.path)} is missing"
                + (f": {_without_config(run)}" if run.last_checkpoint.is_file() else "")
            )
    return run


def config_of(run: Run) -> Config:
    """The config of a run that is continued, with its section ``run``, the command's settings.

    Raises:
        ConfigError: the file is broken; the line says what to do instead.
    """
    try:
        config = cfg.load([run.config])
    except ConfigError as error:
        raise ConfigError(f"{error.mistakes[0]}: {_without_config(run)}") from error
    if missing := [section for section in ("model", "data", "run") if not isinstance(config.get(section), dict)]:
        raise ConfigError(f"{run.config}: cut off, {missing[0]} is missing: {_without_config(run)}")
    return config


def _without_config(run: Run) -> str:
    """What to do with a run that has no config any more."""
    return (
        "put a copy of that file back, or start a new run from its weights with --base CFG --actual_resume "
        f"{run.last_checkpoint}"
    )
