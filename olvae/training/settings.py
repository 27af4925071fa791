"""Read the settings of a training from options and config, and compare those of a resumed run with its own.

Importing this module takes no torch, so that mistakes of a config show at once.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olvae import config as cfg
from olvae import runs
from olvae.config import Config, ConfigError
from olvae.config.nodes import FROM_START
from olvae.config.reading import ABSENT, differences, merge_files
from olvae.models.spec import check_target, place_in
from olvae.runs import Run, Settings

WANDB, WANDB_LOGGER = "lightning.logger.wandb", "lightning.pytorch.loggers.WandbLogger"

FREE_SETTINGS = (
    "lightning",
    *(f"run.{key}" for key in ("gpus", "precision", "seed")),
    "data.params.num_workers",
    "model.base_learning_rate",
    *(
        f"model.params.{key}"
        for key in ("betas", "decay_steps", "min_lr_factor", "scheduler", "warmup_steps")
    ),
    *(f"model.params.{key}" for key in ("channels_last", "checkpoint", "compile", "weights_dir")),
    *(f"model.params.{key}" for key in ("ema_decay", "use_ema", "val_metrics")),
    runs.TEACHER,  # a path; its weights have a checksum
)
"""Settings, with all below them, that a resumed run may change: they are neither data, networks nor losses."""


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``olvae train``, whose help describes them; None for one that was not given."""

    base: Sequence[str | Path] = ()
    overrides: Sequence[str] = ()
    logdir: str | Path = "runs"
    name: str | None = None
    precision: str | None = None
    gpus: str | None = None
    seed: int | None = None
    resume: str | Path | None = None
    actual_resume: str | Path | None = None
    start_from: str | None = None
    teacher: str | None = None
    data: str | None = None
    allow_changes: bool = False
    time_limit: str | None = None
    profile: int | None = None
    wandb: str | None = None


@dataclass(frozen=True)
class Plan:
    """A training as its options and config files describe it, checked as far as that takes no torch."""

    options: TrainOptions
    config: Config  # of the run, but for the networks that `model.from` names
    settings: Settings
    time_limit: float | None  # in seconds
    resumed: Run | None
    previous: Config | None  # the resumed run's own


def read_plan(options: TrainOptions) -> Plan:
    """Read and check the config that some options name: a resumed run's, the files over it, then the overrides.

    A SLURM job that was queued again, or processes that torchrun started again, continue their run. ConfigError for a
    mistake; FileNotFoundError if a config, a run or an autoencoder was not found.
    """
    if (
        options.resume is None
        and options.base
        and (begun := requeued_run(Path(options.logdir), _name(options)))
    ):
        options = TrainOptions(
            resume=begun.path,
            time_limit=options.time_limit,
            gpus=options.gpus,
            profile=options.profile,
        )
    resumed = None if options.resume is None else runs.open_run(options.resume, options.logdir)
    previous = None if resumed is None else runs.config_of(resumed)
    if resumed is None and not options.base:
        raise ConfigError("`base` names the config to train, such as demo")
    if resumed is None and options.allow_changes:
        raise ConfigError("`allow_changes` is for `resume`: leave it out")
    targets = {
        "model.from": options.start_from,
        runs.TEACHER: options.teacher or _absolute_teacher(previous),
    }
    overrides = [] if options.data is None else [f"data.params.root={json.dumps(options.data)}"]
    if options.wandb is not None:
        overrides += [
            f"{WANDB}.target={WANDB_LOGGER}",
            f"{WANDB}.params.project={json.dumps(options.wandb)}",
        ]
    overrides += options.overrides
    for key, target in targets.items():
        if target is not None:
            check_target(found := str(runs.find_run(target, options.logdir)))
            overrides.append(f"{key}={json.dumps(found)}")
    config = cfg.load([*([] if resumed is None else [resumed.config]), *options.base], overrides)
    if options.teacher is not None:
        config["model"]["params"]["parts"]["teacher"].setdefault(
            "target", "olvae.models.parts.teacher.Teacher"
        )
    cfg.check(config)
    if config["model"].get("from") is None:
        config["model"].pop("from", None)
    _check_starts(options, config)
    _keep_additions(config, overrides)
    time_limit = None if options.time_limit is None else parse_time(options.time_limit)
    return Plan(
        options, config, _settings(options, config, previous), time_limit, resumed, previous
    )


def parse_time(text: str) -> float:
    """Convert a time such as 3h50m, 45m, 1d12h or 90s to seconds; ConfigError if it is not one."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not text:
        raise ConfigError(
            f"`time_limit` {text}: give days, hours, minutes or seconds, as in 3h50m, 45m or 1d12h"
        )
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _check_starts(options: TrainOptions, config: Config) -> None:
    """Check that a run starts from one place."""
    starts = {
        "`resume` continues a run": options.resume,
        "`actual_resume` starts one from weights": options.actual_resume,
        "`start_from` starts one from an autoencoder's networks and weights": options.start_from,
        "model.from names an autoencoder to start from": None
        if options.start_from
        else config["model"].get("from"),
    }
    if len(given := [what for what, value in starts.items() if value is not None]) > 1:
        raise ConfigError(f"{', '.join(given)}: give one of them")


def _keep_additions(config: Config, overrides: Sequence[str]) -> None:
    """Leave of the files' networks, which those of ``model.from`` replace, what overrides add; refuse what they set."""
    configs = config, merge_files((), overrides, resolve=False)
    params, given = (runs.entry_of(one, "model.params") or {} for one in configs)
    for key in given.keys() & set(FROM_START) if "from" in config["model"] else ():
        if not isinstance(given[key], dict) or "target" in given[key]:
            raise ConfigError(
                f"model.params.{key}: is that of {config['model']['from']}: leave it out"
            )
        if "target" in params[key]:
            params[key] = given[key]


def _absolute_teacher(previous: Config | None) -> str | None:
    """The absolute path of a resumed run's teacher, where the one as written leads nowhere from this folder."""
    place = place_in(target := str(runs.entry_of(previous, runs.TEACHER) or ""))
    paths = {} if previous is None or Path(place).exists() else runs.settings_of(previous).paths
    found = [path for path, written in paths.items() if written == place and Path(path).exists()]
    return target.replace(place, found[0], 1) if found else None


def _name(options: TrainOptions) -> str:
    return options.name or re.sub(r"[^\w.+=-]", "-", Path(options.base[0]).stem)


def _settings(options: TrainOptions, config: Config, previous: Config | None) -> Settings:
    """The options over the resumed run's settings, over the defaults."""
    settings = runs.settings_of(config)
    named = (
        None
        if options.actual_resume is None
        else runs.find_run(options.actual_resume, options.logdir)
    )
    weights = config["model"].get("from") or named
    if previous is None:
        runs.check_name(_name(options))
        places = [
            place_in(str(target))
            for target in (weights, runs.entry_of(config, runs.TEACHER))
            if target
        ]
        paths = {
            **settings.paths,
            **{str(Path(place).absolute()): place for place in places if Path(place).exists()},
        }
        settings = Settings(_name(options), initial_seed=options.seed or 0, paths=paths)
    elif options.name not in (None, settings.name):
        raise ConfigError("`name`: a resumed run keeps the name of its folder: leave it out")
    old, new = (runs.entry_of(one, "lightning.trainer") or {} for one in (previous, config))
    given = [override.partition("=")[0] for override in options.overrides]
    changed = {k: v for k, v in new.items() if v != old.get(k) or f"lightning.trainer.{k}" in given}
    gpus = None if changed.keys() & {"devices", "accelerator"} else settings.gpus
    return replace(
        settings,
        precision=options.precision or str(changed.get("precision") or settings.precision),
        gpus=gpus if options.gpus is None else options.gpus,
        seed=settings.seed if options.seed is None else options.seed,
        weights=settings.weights if weights is None else str(weights),
        job=current_job(),
    )


def find_changes(previous: Config, config: Config, settings: Settings) -> dict[str, str]:
    """Compare a resumed run's config and settings with its saved ones: ``OLD -> NEW`` by dotted key."""

    def compared(whole: Config, own: Settings) -> Config:
        return {**whole, "run": {"precision": own.precision, "gpus": own.gpus, "seed": own.seed}}

    def text(value: Any) -> str:
        written = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
        return "not set" if value is ABSENT else written

    changes = differences(
        compared(previous, runs.settings_of(previous)), compared(config, settings)
    )
    return {key: f"{text(old)} -> {text(new)}" for key, (old, new) in changes.items()}


def check_changes(changed: Iterable[str]) -> None:
    """Raise ConfigError unless these settings may change in a resumed run, which has its data, networks and losses."""
    if keys := [
        key
        for key in changed
        if not any(f"{key}.".startswith(f"{free}.") for free in FREE_SETTINGS)
    ]:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"`resume`: {', '.join(keys[:3])}{more}: this would continue the run with other data, networks or losses: "
            "leave that out, start a new run from its weights with `actual_resume`, or add `allow_changes`"
        )


def slurm_job() -> str | None:
    """The SLURM job of this process, by the name that scontrol takes."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def current_job() -> str | None:
    """The launcher's job that this process belongs to, which it may start again: SLURM's, else torchrun's rdzv_id."""
    group = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return slurm_job() or (None if group == "none" else f"torchrun {group}")


def restarted() -> bool:
    """Whether SLURM queued this job again, or torchrun started its processes again."""
    return any(
        int(os.environ.get(f"{of}_RESTART_COUNT") or 0) > 0 for of in ("SLURM", "TORCHELASTIC")
    )


def requeued_run(logdir: Path, name: str) -> Run | None:
    """Find the run of this name that this job made before its launcher started it again; None if it did not."""
    job = current_job()
    if job is None or not restarted():
        return None
    found = [Run(path) for path in logdir.glob(f"*_{name}_*")]
    begun = [run for run in found if run.last_checkpoint.is_file() and run.config.is_file()]
    for run in sorted(begun, key=lambda run: run.config.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(ConfigError):  # of another run, perhaps
            settings = runs.settings_of(cfg.load([run.config]))
            if (settings.job, settings.name) == (job, name):
                return run
    return None
