"""Read the settings of a training from options and config; compare a resumed run's with its own.

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
from olvae.config.reading import ABSENT, changed_keys, merge_files
from olvae.data.places import load, with_source
from olvae.models.target_names import DIFFUSERS, check_target, place_in
from olvae.runs import Run, Settings

WANDB = "lightning.logger.wandb"
WANDB_LOGGER = "lightning.pytorch.loggers.WandbLogger"

FREE_SETTINGS = (
    "lightning",
    "run.gpus",
    "run.precision",
    "run.seed",
    "data.params.num_workers",
    "model.base_learning_rate",
    "model.params.betas",
    "model.params.decay_steps",
    "model.params.min_lr_factor",
    "model.params.scheduler",
    "model.params.warmup_steps",
    "model.params.channels_last",
    "model.params.checkpoint",
    "model.params.compile",
    "model.params.weights_dir",
    "model.params.ema_decay",
    "model.params.use_ema",
    "model.params.val_metrics",
    runs.TEACHER,  # a path; its weights have a checksum
)
"""Settings, with all below them, that a resumed run may change: no data, networks or losses."""


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``olvae train``, whose help describes them; None if not given."""

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
    """A training as described by options and config files; checks that need torch come later."""

    options: TrainOptions
    config: Config  # of the run, but without the networks that `model.from` names
    settings: Settings
    time_limit: float | None  # in seconds
    resumed: Run | None
    previous: Config | None  # the resumed run's own


def read_plan(options: TrainOptions) -> Plan:
    """Read and check the config that the options describe.

    Later ones win: a resumed run's config, the config files, overrides, and an autoencoder or
    teacher given by an option. A SLURM job that was queued again, or processes that torchrun
    started again, continue their run.

    ConfigError for a mistake; FileNotFoundError if a config, run or autoencoder was not found.
    """
    # A run that this job has begun is resumed with its own config, whatever the files say now.
    if options.resume is None and options.base:
        begun = requeued_run(Path(options.logdir), _name(options))
        if begun is not None:
            options = TrainOptions(
                resume=begun.path,
                time_limit=options.time_limit,
                gpus=options.gpus,
                profile=options.profile,
            )

    # Files: the resumed run's config, then the files of `base`, which a new run must have.
    resumed = None
    previous = None
    files = list(options.base)
    if options.resume is not None:
        resumed = runs.open_run(options.resume, options.logdir)
        previous = with_source(runs.config_of(resumed))
        files.insert(0, resumed.config)
    elif not options.base:
        raise ConfigError("`base` names the config to train, such as demo")
    elif options.allow_changes:
        raise ConfigError("`allow_changes` is for `resume`: leave it out")

    # Config: the files, then all overrides.
    overrides = _overrides(options, previous)
    config = load(files, overrides)
    if options.teacher is not None:
        teacher = config["model"]["params"]["parts"]["teacher"]
        teacher.setdefault("target", "olvae.models.parts.teacher.Teacher")
    if config.get("run", ABSENT) != ({} if previous is None else previous).get("run", ABSENT):
        raise ConfigError(
            "run: training writes this section itself: leave it out, and give `seed`, `precision`, "
            "`gpus` or `name` instead, or continue the run by `resume`"
        )
    cfg.check(config)
    if config["model"].get("from") is None:
        config["model"].pop("from", None)

    # A run starts from one place.
    starts = {
        "`resume` continues a run": options.resume,
        "`actual_resume` starts one from weights": options.actual_resume,
        "`start_from` starts one from an autoencoder's networks and weights": options.start_from,
    }
    if not options.start_from:  # which has set model.from
        starts["model.from names an autoencoder to start from"] = config["model"].get("from")
    given = [what for what, value in starts.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{', '.join(given)}: give one of them")
    _check_additions(config, overrides)

    time_limit = None if options.time_limit is None else parse_time(options.time_limit)
    settings = _settings(options, config, previous)
    if resumed is not None:
        # Of a run that did not note it, before its config, whose time stands for it, is replaced.
        settings = replace(settings, begun=runs.utc_text(runs.begun_at(resumed)))
    return Plan(options, config, settings, time_limit, resumed, previous)


def _overrides(options: TrainOptions, previous: Config | None) -> list[str]:
    """Write options as overrides: data and W&B before the user's own, which may refine them."""
    overrides = []
    if options.data is not None:
        overrides.append(f"data.params.root={json.dumps(options.data)}")
    if options.wandb is not None:
        overrides.append(f"{WANDB}.target={WANDB_LOGGER}")
        overrides.append(f"{WANDB}.params.project={json.dumps(options.wandb)}")
    overrides += options.overrides

    # Autoencoders last. Each may be named by its run.
    targets = {
        "model.from": options.start_from,
        runs.TEACHER: options.teacher or _absolute_teacher(previous),
    }
    for key, target in targets.items():
        if target is not None:
            found = str(runs.find_run(target, options.logdir))
            check_target(found)
            overrides.append(f"{key}={json.dumps(found)}")
    return overrides


def parse_time(text: str) -> float:
    """Convert a time such as 3h50m, 45m, 1d12h or 90s to seconds; ConfigError if it is not one."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not text:
        raise ConfigError(
            f"`time_limit` {text}: give days, hours, minutes or seconds, as in 3h50m, 45m or 1d12h"
        )
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _check_additions(config: Config, overrides: Sequence[str]) -> None:
    """With ``model.from``, raise ConfigError for an override that replaces a network."""
    if "from" not in config["model"]:
        return
    overriding = merge_files((), overrides, resolve=False)
    given = runs.entry_of(overriding, "model.params") or {}
    for key in given.keys() & set(FROM_START):
        if not isinstance(given[key], dict) or "target" in given[key]:
            raise ConfigError(
                f"model.params.{key}: comes from {config['model']['from']}: leave it out"
            )


def _absolute_teacher(previous: Config | None) -> str | None:
    """Return a resumed run's teacher by its absolute path, if it is not found as it was written."""
    target = str(runs.entry_of(previous, runs.TEACHER) or "")
    place = place_in(target)
    if previous is None or Path(place).exists():
        return None
    kind = DIFFUSERS if target.startswith(DIFFUSERS) else ""
    subfolder = target.removeprefix(kind + place)
    for path, written in runs.settings_of(previous).paths.items():
        if written == place and Path(path).exists():
            return kind + path + subfolder
    return None


def _name(options: TrainOptions) -> str:
    return options.name or re.sub(r"[^\w.+=-]", "-", Path(options.base[0]).stem)


def _settings(options: TrainOptions, config: Config, previous: Config | None) -> Settings:
    """Settle the settings: defaults, then the resumed run's, then ``lightning``'s, then options."""
    settings = runs.settings_of(config)
    weights = config["model"].get("from") or None
    if options.actual_resume is not None:
        weights = runs.find_run(options.actual_resume, options.logdir)

    # A new run has a name and a first seed, and notes paths as the user wrote them.
    if previous is None:
        name = _name(options)
        runs.check_name(name)
        paths = dict(settings.paths)
        for target in (weights, runs.entry_of(config, runs.TEACHER)):
            if target:
                place = place_in(str(target))
                if Path(place).exists():
                    paths[str(Path(place).absolute())] = place
        settings = Settings(name, initial_seed=options.seed or 0, paths=paths)
    elif options.name not in (None, settings.name):
        raise ConfigError("`name`: a resumed run keeps the name of its folder: leave it out")

    # Precision and devices given in `lightning.trainer`, new or by an override, count as options.
    old = runs.entry_of(previous, "lightning.trainer") or {}
    new = runs.entry_of(config, "lightning.trainer") or {}
    given = [override.partition("=")[0] for override in options.overrides]
    changed = {k: v for k, v in new.items() if v != old.get(k) or f"lightning.trainer.{k}" in given}
    gpus = settings.gpus
    if options.gpus is not None:
        gpus = options.gpus
    elif changed.keys() & {"devices", "accelerator"}:
        gpus = None
    return replace(
        settings,
        precision=options.precision or str(changed.get("precision") or settings.precision),
        gpus=gpus,
        seed=settings.seed if options.seed is None else options.seed,
        weights=settings.weights if weights is None else str(weights),
        job=current_job(),
    )


def find_changes(previous: Config, config: Config, settings: Settings) -> dict[str, str]:
    """Compare a resumed run's config and settings with its saved ones: ``OLD -> NEW`` by key."""

    def compared(whole: Config, own: Settings) -> Config:
        return {**whole, "run": {"precision": own.precision, "gpus": own.gpus, "seed": own.seed}}

    def text(value: Any) -> str:
        if value is ABSENT:
            return "not set"
        if isinstance(value, str):
            return value
        return json.dumps(value, ensure_ascii=False, default=str)

    before = compared(previous, runs.settings_of(previous))
    changes = changed_keys(before, compared(config, settings))
    return {key: f"{text(old)} -> {text(new)}" for key, (old, new) in changes.items()}


def check_changes(changed: Iterable[str]) -> None:
    """Raise ConfigError unless a resumed run may change these settings; see FREE_SETTINGS."""
    free = tuple(f"{setting}." for setting in FREE_SETTINGS)
    keys = [key for key in changed if not f"{key}.".startswith(free)]
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"`resume`: {', '.join(keys[:3])}{more}: this would continue the run with other data, "
            "networks or losses: leave that out, start a new run from its weights with "
            "`actual_resume`, or add `allow_changes`"
        )


def slurm_job() -> str | None:
    """The SLURM job of this process, by the name that scontrol takes."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")


def current_job() -> str | None:
    """This process' job, which its launcher may start again: SLURM's, or torchrun's rdzv_id."""
    job = slurm_job()
    if job:
        return job
    group = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if group == "none" else f"torchrun {group}"


def restarted() -> bool:
    """Whether SLURM queued this job again, or torchrun started its processes again."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(int(os.environ.get(count) or 0) > 0 for count in counts)


def requeued_run(logdir: Path, name: str) -> Run | None:
    """Find the newest run of this name that this job made before its launcher started it again."""
    job = current_job()
    if job is None or not restarted():
        return None
    found = [Run(path) for path in logdir.glob(f"*_{name}_*")]
    begun = [run for run in found if run.newest_checkpoint.is_file() and run.config.is_file()]
    for run in sorted(begun, key=lambda run: run.config.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(ConfigError):  # of another run, perhaps
            settings = runs.settings_of(load([run.config]))
            if (settings.job, settings.name) == (job, name):
                return run
    return None
