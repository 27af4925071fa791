"""Run folders: their files and settings, where their data are, and the lock while one trains."""

import contextlib
import glob
import itertools
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from olvae import config as cfg
from olvae.config import Config, ConfigError, with_paths
from olvae.config.reading import expand_braces, is_local
from olvae.files import WEIGHT_SUFFIXES, check_folder, lock_file, nearest_path, warn_once

log = logging.getLogger("olvae.training")


@dataclass(frozen=True)
class Settings:
    """Settings of a run beside model, data and trainer: section ``run`` of its config.yaml."""

    # The middle of the run folder's name.
    name: str = ""
    # When the run's folder was made, in UTC: ISO 8601. None in runs of versions before this one.
    begun: str | None = None
    # 32, bf16 or fp16.
    precision: str = "32"
    # A number, or a list such as 0,2; None leaves it to lightning.trainer.
    gpus: str | None = None
    # Seed of data order and noise.
    seed: int = 0
    # Seed of the initial weights: it stays when a resumed run changes its seed.
    initial_seed: int = 0
    # The weights that training started from, as the user wrote them; None for fresh weights.
    weights: str | None = None
    # encoder or decoder, if that half still has its initial weights.
    untrained: str | None = None
    # Part, or adversary -> checksum of weights that it only names, such as a teacher's.
    checksums: Mapping[str, str] = field(default_factory=dict)
    # Absolute path -> path as the user wrote it, for data and TARGETs.
    paths: Mapping[str, str] = field(default_factory=dict)
    # The job of SLURM, or torchrun's rdzv_id, that trains the run.
    job: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the section ``run``; without ``job`` or ``begun`` where there is none."""
        section = asdict(self)
        for key in ("job", "begun"):
            if section[key] is None:
                del section[key]
        return section


# Words for the newest run of all.
LATEST = ("last", "latest")
TEACHER = "model.params.parts.teacher.params.autoencoder"


def entry_of(config: Any, path: str) -> Any:
    """Look up a dotted path of names in nested mappings; None if there is nothing."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Read the settings of a run from its config; the defaults for a config without a run."""
    section = config.get("run")
    known: dict[str, Any] = {}
    if isinstance(section, Mapping):
        for one in fields(Settings):
            if section.get(one.name) is not None:
                known[one.name] = section[one.name]
    known.setdefault("initial_seed", known.get("seed", 0))
    return Settings(**known)


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

    @property
    def newest_checkpoint(self) -> Path:
        """``last.ckpt``, or ``best.ckpt`` where a full disk has left that one alone."""
        best = self.checkpoints / "best.ckpt"
        if best.is_file() and not self.last_checkpoint.is_file():
            return best
        return self.last_checkpoint


# The name of a run folder, in any text but a path: its time, its NAME and its precision. It may end
# a sentence.
FOLDER_NAME = re.compile(
    r"(?<![\w/\\])(\d{4}-\d\d-\d\dT[\d-]{8}(?:-\d+)?)_([\w.+=-]+)_([A-Za-z0-9]+)"
    r"(?![\w/\\+=-])(?!\.\w)"
)


def create(logdir: str | Path, name: str, precision: str) -> Run:
    """Make a new run folder.

    Neither the timestamp nor the precision has an underscore, so that the name can be cut out.
    """
    check_name(name)
    check_folder(Path(logdir))
    stamp = datetime.now().astimezone().strftime("%Y-%m-%dT%H-%M-%S")
    # A number after the timestamp, if another run has started in the same second.
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


def utc_text(seconds: float | None = None) -> str:
    """Write a Unix time, by default now, in UTC, as :class:`Settings` has it in ``begun``."""
    if seconds is None:
        return datetime.now(UTC).isoformat()
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def begun_at(run: Run) -> float:
    """Return the Unix time at which a run began; of a run that did not note it, a file's time."""
    # The line alone, as there may be many runs, and YAML takes long.
    if run.config.is_file():
        text = run.config.read_text(encoding="utf-8", errors="replace")
        line = re.search(r"^  begun: '?([^'\n]+)'?$", text, re.MULTILINE)
        with contextlib.suppress(ValueError):
            if line is not None:
                return datetime.fromisoformat(line[1]).timestamp()
    file = run.config if run.config.is_file() else run.newest_checkpoint
    return file.stat().st_mtime


def check_name(name: str) -> None:
    """Raise ConfigError if a run folder can't have this name."""
    if not re.fullmatch(r"[\w.+=-]+", name):
        raise ConfigError(f"`name` {name!r}: use letters, digits and . _ - + = only")


def run_of(checkpoint: Path) -> Run | None:
    """Return the run that a checkpoint belongs to; None if it does not lie in a run folder."""
    run = Run(checkpoint.parent.parent)
    if checkpoint.parent.name == run.checkpoints.name and run.config.is_file():
        return run
    return None


def find_run(text: str | Path, logdir: str | Path = "runs") -> str | Path:
    """Find a run by its name: the newest of that name in ``logdir``.

    ``last`` or ``latest`` is the newest of all, and ``elsewhere/NAME`` a run in another folder. A
    file, or a folder that has a run or a model, comes first, but not a folder of images. A text
    that names no run is returned as it is.
    """
    path = Path(text)
    suffixes = (".json", *WEIGHT_SUFFIXES)
    has_model = path.is_dir() and any(
        file.name == "checkpoints" or file.suffix in suffixes for file in path.iterdir()
    )
    if path.is_file() or has_model or not path.name or ":" in str(text).removeprefix(path.drive):
        return text
    return named_runs(path, logdir).get(path.name, text)


def named_runs(text: str | Path, logdir: str | Path = "runs") -> dict[str, Path]:
    """Map words to the runs that they name, in the folder of ``text``; see :func:`find_run`."""
    path = Path(text)
    parent = path.parent if path.parent.name else Path(logdir)
    begun = []
    for folder in parent.glob("*_*_*"):
        match = re.fullmatch(r"(\d{4}-\d\d-\d\dT[\d-]{8})(?:-(\d+))?_(.+)_[^_]+", folder.name)
        if match and Run(folder).newest_checkpoint.is_file():
            order = (begun_at(Run(folder)), match[1], int(match[2] or 0))
            begun.append((*order, folder, match[3]))
    # By an absolute time, as the one in the name is of a zone that it does not tell. So newer runs
    # overwrite older ones of the same name.
    found = {}
    for *_, folder, name in sorted(begun):
        for word in (name, *LATEST):
            found[word] = folder
    return found


def open_run(path: str | Path, logdir: str | Path = "runs") -> Run:
    """Open a run to continue, by its folder, its last checkpoint or its :func:`name <find_run>`.

    FileNotFoundError if there is no such run, or it can't be continued.
    """
    path = Path(find_run(path, logdir))
    run = Run(path)
    if run.path.is_file():
        run = Run(run.path.parent.parent)
        if path != run.newest_checkpoint:
            raise FileNotFoundError(
                f"{path}: this is a file: name its run folder, or start a new run from its "
                "weights with `actual_resume`"
            )
    if not run.path.is_dir():
        if path.name in LATEST:
            folder = logdir if path.name == str(path) else path.parent
            raise FileNotFoundError(f"{path}: no run in {folder}")
        near = nearest_path(path, named_runs(path, logdir))
        raise FileNotFoundError(f"{path}: no such run folder{near}")
    for file in (run.config, run.newest_checkpoint):
        if not file.is_file():
            # With a checkpoint there is a way out.
            remedy = f": {_without_config(run)}" if run.newest_checkpoint.is_file() else ""
            raise FileNotFoundError(
                f"{run.path}: not a run folder that can be continued: "
                f"{file.relative_to(run.path)} is missing{remedy}"
            )
    return run


def config_of(run: Run) -> Config:
    """Read the config of a run to continue; ConfigError with a remedy if it is broken."""
    try:
        config = cfg.merge_files([run.config])
    except ConfigError as error:
        raise ConfigError(f"{error.mistakes[0]}: {_without_config(run)}") from error
    for section in ("model", "data", "run"):
        if not isinstance(config.get(section), dict):
            raise ConfigError(
                f"{run.config}: cut off, {section} is missing: {_without_config(run)}"
            )
    return config


def _without_config(run: Run) -> str:
    """Return the remedy for a run whose config is lost."""
    return (
        "put a copy of that file back, or start a new run from its weights with `base` CFG and "
        f"`actual_resume` {run.newest_checkpoint}"
    )


def make_data_absolute(config: Config) -> dict[str, str]:
    """Make the relative paths of a config's data absolute, in place.

    Returns absolute path -> path as written. A relative text is a path only if it exists from this
    folder; others are URLs, commands, ids of the hub.
    """
    written: dict[str, str] = {}

    def change(text: str) -> str:
        if Path(text).expanduser().is_absolute() or not _is_present(text):
            return text
        folder = str(Path.cwd())
        if not Path(text).exists():
            # A pattern: the folder's own brackets and stars must not match others.
            folder = glob.escape(folder)
        full = str(Path(folder, text))
        written[full] = text
        return full

    config["data"] = with_paths(config["data"], change)
    return written


def present_data(config: Config) -> Config:
    """Return a config's ``data`` with new places of moved files; see :func:`find_moved_data`."""
    found = find_moved_data(config)
    return with_paths(config["data"], lambda text: found.get(text, text))


def find_moved_data(config: Config) -> dict[str, str]:
    """Map old places to new ones, for data that moved with the working folder since the run."""
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
    if not is_local(text):
        return False
    if Path(text).expanduser().exists():
        return True
    try:
        for pattern in expand_braces(text):
            # One file is enough. Path.glob would need the folder apart from the pattern.
            for _ in glob.iglob(pattern, recursive=True):  # noqa: PTH207
                return True
    except (AssertionError, ValueError):
        # An environment variable that is not set, braces that do not close.
        pass
    return False


@contextlib.contextmanager
def locked(run: Run, patience: float = 0.0) -> Iterator[None]:
    """Hold a run for one training; raise ConfigError if another process trains it.

    It is an advisory lock of the system, which ends with the process, in whatever way it ends. On
    network file systems with locks local to a machine, only processes of one machine are kept
    apart. On a file system without locks, only warn. The file's text names the holder.

    ``patience``: seconds to wait for another holder, because a network file system may free the
    locks of a dead machine late.
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

        # A forked loader process would hold the lock beyond this one's end.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=file.close)

        # The holder, for the message above.
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        file.flush()
        try:
            yield
        finally:
            # A stale handle must not hide training's own error.
            with contextlib.suppress(OSError):
                file.truncate(0)
