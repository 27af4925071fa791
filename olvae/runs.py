"""Run folders: the files in one, its settings, the places of its data, and the lock that one training holds."""

import contextlib
import glob
import itertools
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from olvae import config as cfg
from olvae.config import Config, ConfigError, with_paths
from olvae.config.reading import is_local
from olvae.files import WEIGHT_SUFFIXES, check_folder, lock_file, nearest_path, warn_once

log = logging.getLogger("olvae.training")


@dataclass(frozen=True)
class Settings:
    """The settings of a run beside model, data and trainer: the section ``run`` of its config.yaml."""

    name: str = ""  # the middle of the run folder's name
    precision: str = "32"  # or bf16, fp16
    gpus: str | None = None  # a number, or a list such as 0,2; None leaves it to lightning.trainer
    seed: int = 0  # of data order and noise
    initial_seed: int = (
        0  # of the initial weights: another one where a resumed run changed its seed
    )
    weights: str | None = (
        None  # what training started from, as the user wrote it; None for fresh weights
    )
    untrained: str | None = None  # encoder or decoder, if that half still has its initial weights
    checksums: Mapping[str, str] = field(
        default_factory=dict
    )  # of weights that parts only name, a teacher's, by part
    paths: Mapping[str, str] = field(
        default_factory=dict
    )  # paths of data and TARGETs as written, by absolute ones
    job: str | None = None  # the job of SLURM, or torchrun's rdzv_id, that trains the run

    def as_dict(self) -> dict[str, Any]:
        """Return the section ``run``; outside of a launcher's job it has no ``job``."""
        return {
            key: value for key, value in asdict(self).items() if key != "job" or value is not None
        }


LATEST = ("last", "latest")  # what names the newest run of all
TEACHER = "model.params.parts.teacher.params.autoencoder"


def entry_of(config: Any, path: str) -> Any:
    """Look up a path of names in nested mappings; None if there is nothing."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Read the settings of a run from its config; the defaults for a config that is no run's."""
    section = config.get("run")
    section = section if isinstance(section, Mapping) else {}
    known = {
        one.name: section[one.name] for one in fields(Settings) if section.get(one.name) is not None
    }
    return Settings(**{"initial_seed": known.get("seed", 0), **known})


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
        self.lock = self.path / ".lock"


def create(logdir: str | Path, name: str, precision: str) -> Run:
    """Make a new run folder. The timestamp and the precision have no underscore, so that the name can be cut out."""
    check_name(name)
    check_folder(Path(logdir))
    stamp = datetime.now().astimezone().strftime("%Y-%m-%dT%H-%M-%S")
    for attempt in itertools.count():
        suffix = f"-{attempt}" if attempt else ""
        path = Path(logdir) / f"{stamp}{suffix}_{name}_{precision}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            break
    run = Run(path)
    run.checkpoints.mkdir()
    run.images.mkdir()
    return run


def check_name(name: str) -> None:
    """Raise ConfigError if a run folder can't have this name."""
    if not re.fullmatch(r"[\w.+=-]+", name):
        raise ConfigError(f"`name` {name!r}: use letters, digits and . _ - + = only")


def run_of(checkpoint: Path) -> Run | None:
    """Return the run that a file is a checkpoint of; None if it lies elsewhere, even in a folder of that name."""
    run = Run(checkpoint.parent.parent)
    return run if checkpoint.parent.name == run.checkpoints.name and run.config.is_file() else None


def find_run(text: str | Path, logdir: str | Path = "runs") -> str | Path:
    """Find the run that a word names: the newest of that name in ``logdir``, or ``last`` or ``latest`` of all.

    ``elsewhere/NAME`` is of another folder. A file, or a folder that has a run or a model, comes first: one of images
    does not. What names no run is returned as it is.
    """
    path = Path(text)
    if path.is_file() or _has_model(path) or not path.name or ":" in str(text):
        return text
    return named_runs(path, logdir).get(path.name, text)


def named_runs(text: str | Path, logdir: str | Path = "runs") -> dict[str, Path]:
    """Find the run of each word that names one in the folder that ``text`` leads to; see :func:`find_run`."""
    path, begun = Path(text), []
    for folder in (path.parent if path.parent.name else Path(logdir)).glob("*_*_*"):
        match = re.fullmatch(r"(\d{4}-\d\d-\d\dT[\d-]{8})(?:-(\d+))?_(.+)_[^_]+", folder.name)
        if match and Run(folder).last_checkpoint.is_file():
            begun.append((match[1], int(match[2] or 0), folder, match[3]))
    return {word: folder for *_, folder, name in sorted(begun) for word in (name, *LATEST)}


def _has_model(folder: Path) -> bool:
    files = folder.iterdir() if folder.is_dir() else ()
    return any(
        file.name == "checkpoints" or file.suffix in (".json", *WEIGHT_SUFFIXES) for file in files
    )


def open_run(path: str | Path, logdir: str | Path = "runs") -> Run:
    """Open a run to continue, by folder, last checkpoint or :func:`name <find_run>`; FileNotFoundError if it can't."""
    run = Run(path := Path(find_run(path, logdir)))
    if run.path.is_file():
        run = Run(run.path.parent.parent)
        if path != run.last_checkpoint:
            other = "start a new run from its weights with `actual_resume`"
            raise FileNotFoundError(f"{path}: this is a file: name its run folder, or {other}")
    if not run.path.is_dir():
        if path.name in LATEST:
            raise FileNotFoundError(
                f"{path}: no run in {logdir if path.name == str(path) else path.parent}"
            )
        raise FileNotFoundError(
            f"{path}: no such run folder{nearest_path(path, named_runs(path, logdir))}"
        )
    if missing := [file for file in (run.config, run.last_checkpoint) if not file.is_file()]:
        wrong = f"{run.path}: not a run folder that can be continued: {missing[0].relative_to(run.path)} is missing"
        raise FileNotFoundError(
            f"{wrong}: {_without_config(run)}" if run.last_checkpoint.is_file() else wrong
        )
    return run


def config_of(run: Run) -> Config:
    """Read the config of a run to continue; raise ConfigError, which says what to do instead, if it is broken."""
    try:
        config = cfg.load([run.config])
    except ConfigError as error:
        raise ConfigError(f"{error.mistakes[0]}: {_without_config(run)}") from error
    if missing := [
        section for section in ("model", "data", "run") if not isinstance(config.get(section), dict)
    ]:
        raise ConfigError(f"{run.config}: cut off, {missing[0]} is missing: {_without_config(run)}")
    return config


def _without_config(run: Run) -> str:
    again = f"start a new run from its weights with `base` CFG and `actual_resume` {run.last_checkpoint}"
    return f"put a copy of that file back, or {again}"


def make_data_absolute(config: Config) -> dict[str, str]:
    """Make the relative paths of a config's data absolute, in place; returns them as written, by their absolute ones.

    Only those that lead somewhere from this folder are paths here: others are URLs, commands, ids of the hub.
    """
    written: dict[str, str] = {}

    def change(text: str) -> str:
        if Path(text).expanduser().is_absolute() or not _is_present(text):
            return text
        folder = str(Path.cwd()) if Path(text).exists() else glob.escape(str(Path.cwd()))
        written[full := str(Path(folder, text))] = text
        return full

    config["data"] = with_paths(config["data"], change)
    return written


def present_data(config: Config) -> Config:
    """The ``data`` of a config with the present places of its files; see :func:`find_moved_data`."""
    found = find_moved_data(config)
    return with_paths(config["data"], lambda text: found.get(text, text))


def find_moved_data(config: Config) -> dict[str, str]:
    """Find data that moved together with the working folder since the run was started: new places by old ones."""
    written = settings_of(config).paths
    found: dict[str, str] = {}

    def note(text: str) -> str:
        if text in written and not _is_present(text) and _is_present(written[text]):
            found[text] = str(Path.cwd() / written[text])
            warn_once(f"{text}: this run's data are not there any more: taken from {found[text]}")
        return text

    with_paths(config["data"], note)
    return found


def _is_present(text: str) -> bool:
    """Whether a path or a pattern, of files or of shards, exists."""
    if not is_local(text) or Path(text).expanduser().exists():
        return is_local(text)
    from webdataset.shardlists import expand_urls

    try:
        for pattern in expand_urls(text):
            for _ in glob.iglob(pattern, recursive=True):  # noqa: PTH207  (a Path's own needs the folder apart)
                return True
        return False
    except (
        AssertionError,
        ValueError,
    ):  # an environment variable that is not set, braces that do not close
        return False


@contextlib.contextmanager
def locked(run: Run, patience: float = 0.0) -> Iterator[None]:
    """Hold a run for one training; raise ConfigError if another process trains it.

    It is an advisory lock of the system, which ends with the process, however that ends; on network file systems whose
    locks are local to a machine it keeps the processes of one machine apart. On a file system without locks, only warn.
    The file's text names the holder.

    ``patience``: seconds to wait for its end: a network file system frees the locks of a machine that died late.
    """
    with run.lock.open("a+", encoding="utf-8") as file:
        try:
            lock_file(file, patience)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"{run.path}: is being trained by {holder}: wait for its end, or stop it"
            ) from error
        except OSError as error:
            remedy = "make sure that nothing else trains this run"
            log.warning("%s: no lock here (%s): %s", run.path, error.strerror or error, remedy)
        if hasattr(
            os, "register_at_fork"
        ):  # a forked loader process would hold the lock beyond this one's end
            os.register_at_fork(after_in_child=file.close)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a stale handle must not hide training's own error
                file.truncate(0)
