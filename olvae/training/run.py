"""From a config to a finished run folder."""

import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from rich.console import Console

from olvae import config as cfg
from olvae import runs
from olvae.checkpoint import load_weights, pick_weights, read_checkpoint, read_weights, state_dict_of
from olvae.config import Config, ConfigError, with_paths
from olvae.data.opening import make_absolute, moves
from olvae.data.source import Source
from olvae.devices import resolve_devices, resolve_precision
from olvae.files import no_empty_folders, remove_partials, write_json
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.teacher import set_teacher
from olvae.models.players import PlayersStrategy
from olvae.training.bad_steps import BadSteps
from olvae.training.callbacks import (
    Health,
    ImageGrids,
    KeepCheckpoints,
    SaveConfig,
    UnreadableLimit,
)
from olvae.training.changes import changes, check_changes, print_changes
from olvae.training.checks import check_memory
from olvae.training.launch import check_launcher, cluster, find_launcher, is_first, meet, process_count, process_death
from olvae.training.loggers import make_loggers
from olvae.training.origin import Found, start_from, untrained_half
from olvae.training.progress import StepProgress, is_finished, print_ending, print_finished, print_summary
from olvae.training.saving import BackgroundCheckpointIO
from olvae.training.stopping import GracefulStop, TrainingStopped, parse_time, requeue, requeued_run, slurm_job

__all__ = [
    "TrainOptions",
    "quieten",
    "train",
]


RUN_ENV = "OLVAE_RUN"
"""Environment variable with the run folder, for the processes that Lightning starts for the other devices."""


@dataclass(frozen=True)
class TrainOptions:
    """The flags of ``olvae train``; None for a flag that was not given."""

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
    """``--from``: an autoencoder whose networks and weights the run starts from."""
    teacher: str | None = None
    allow_changes: bool = False
    """``--allow-changes``: a resumed run may get other data, networks and losses."""
    time_limit: str | None = None
    """``--time-limit``: training stops after this time, such as 3h50m."""


def train(options: TrainOptions) -> runs.Run:
    """Train, and return the run folder, which is made after all of the user's input has been checked.

    Raises:
        ConfigError: a mistake in the config or the flags.
        ValueError, FileNotFoundError: data, weights or devices do not fit or were not found.
        TrainingStopped: a signal or the limit on time ended training; the checkpoint is written.
        KeyboardInterrupt: Ctrl-C before the first step, or a second one.
    """
    with runs.RunLock() as lock, no_empty_folders(Path(options.logdir)):
        return _train(options, lock)


def _train(options: TrainOptions, lock: runs.RunLock) -> runs.Run:
    stop = GracefulStop(None if options.time_limit is None else parse_time(options.time_limit))
    if (
        options.resume is None
        and options.base
        and (begun := requeued_run(Path(options.logdir), _name(options))) is not None
    ):
        options = TrainOptions(resume=begun.path, time_limit=options.time_limit, gpus=options.gpus)
    resumed = runs.open_run(options.resume) if options.resume is not None else None
    starts = {
        "--resume continues a run": options.resume,
        "--actual_resume starts one from weights": options.actual_resume,
        "--from starts one from an autoencoder's networks and weights": options.start_from,
    }
    if len(given := [what for what, value in starts.items() if value is not None]) > 1:
        raise ConfigError(f"{', '.join(given)}: give one of them")
    own: Config | None = None
    if resumed is not None:
        _take(lock, resumed)
        own = runs.config_of(resumed)
    elif options.allow_changes:
        raise ConfigError("--allow-changes is for --resume: leave it out")
    config, found = _config(options, resumed)
    settings = _settings(options, config, resumed, found)
    moved = moves(config)
    settings["paths"] |= {now: settings["paths"][before] for before, now in moved.items()}
    for one in (config,) if own is None else (config, own):
        one["data"] = with_paths(one["data"], lambda text: moved.get(text, text))
        settings["paths"] |= make_absolute(one)
    if own is not None:
        changed = changes(own, config, settings)
        if is_first():
            print_changes(changed)
        if not options.allow_changes:
            check_changes(changed)
    trainer_args = dict((config.get("lightning") or {}).get("trainer") or {})
    trainer_args.update(resolve_devices(settings["gpus"], trainer_args))
    processes = process_count(trainer_args)
    check_launcher(trainer_args)
    precision = resolve_precision(settings["precision"], trainer_args["accelerator"])

    # Data and model, from the seed alone
    source = cfg.instantiate(config["data"])
    if not isinstance(source, Source):
        raise ConfigError(f"data.target: {config['data']['target']} is not a source of images")
    settings["paths"] |= make_absolute(config)  # of what has been downloaded now
    quieten()
    pl.seed_everything(settings["seed"], workers=True, verbose=False)
    model = _model(config, trainer_args)
    model.seed = settings["seed"]
    model.check(source)
    if found is not None:
        load_weights(model, found.weights, found.target)
    start, done = _restore(model, resumed, options.actual_resume)
    before = own if own is not None else found.config if found is not None else _config_of(options.actual_resume)
    settings["untrained"] = untrained_half(model, before)
    settings["checksums"] = model.checksums
    if resumed is not None:
        _check_checksums(((before or {}).get("run") or {}).get("checksums") or {}, model.checksums)
    if model.stand_in is not None:
        config["model"]["params"].update(model.for_diffusion)

    trainer_args = _steps(trainer_args, source, model)
    last_step = trainer_args["max_steps"]
    is_over = resumed is not None and done == last_step
    if done > last_step:
        raise ConfigError(
            f"--resume: this run is at step {done}, after the last of max_steps {last_step}: to continue it, set more, "
            f"as in lightning.trainer.max_steps={2 * done}"
        )
    if is_over and options.allow_changes:
        raise ConfigError(
            f"--allow-changes: all {done} steps of this run are done, so that other settings would change nothing: set "
            f"more steps, as in lightning.trainer.max_steps={2 * done}"
        )
    if resumed is not None and is_over and is_finished(resumed, done):
        if is_first():
            print_finished(resumed, done)
        return resumed
    source.check_processes(processes)
    if model.adversary is not None:
        model.adversary.check(model, source, trainer_args["max_steps"])
    if trainer_args["accelerator"] in ("cuda", "gpu"):
        trainer_args.setdefault("sync_batchnorm", True)
    if processes > 1 and trainer_args.get("strategy", "auto") in ("auto", "ddp"):
        trainer_args["strategy"] = PlayersStrategy(gradient_as_bucket_view=True)
    run, is_ours = (resumed, False) if resumed is not None else _new_run(options.logdir, settings, lock)
    try:
        save_config = SaveConfig({**config, "run": settings}, run)
        trainer = _trainer(run, precision, trainer_args, config, save_config, [stop, UnreadableLimit()], done)
        print_summary(settings, run, trainer, model, source, done)
        if is_over and trainer.is_global_zero:
            Console(stderr=True).print(
                f"all {done} steps of this run are done: what is left is to validate the last one", highlight=False
            )
        device = trainer.strategy.root_device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            check_memory(model, source, settings["precision"], free, trainer.is_global_zero)
        if resumed is None:
            model.prepare(source, settings["seed"], trainer.strategy.root_device)
        trainer.fit(
            model,
            train_dataloaders=source.train_loader(settings["seed"], start),
            val_dataloaders=source.val_loader(),
            ckpt_path=str(run.last_checkpoint) if resumed is not None else None,
            weights_only=True,
        )
        if is_over:  # fit has only restored it; what the checkpoint has as state_dict is validated, an average perhaps
            model.load_state_dict(read_checkpoint(run.last_checkpoint)["state_dict"])
        if not stop.agreed and model.validated_at != trainer.global_step:  # the last step is off the interval
            trainer.validate(model, source.val_loader(), verbose=False)
    except SystemExit as error:  # Lightning's answer to a second Ctrl-C
        raise KeyboardInterrupt from error
    except RuntimeError as error:
        if (said := process_death(error)) is None:
            raise
        go_on = f"; continue with: olvae train --resume {run.path}" if run.last_checkpoint.is_file() else ""
        raise ChildProcessError(f"{said}{go_on}") from error
    finally:
        model.on_validation_end()  # an exception in validation skips it
        if is_ours and not any(run.checkpoints.glob("*.ckpt")):
            shutil.rmtree(run.path, ignore_errors=True)  # it failed before the first checkpoint
    if trainer.is_global_zero:
        print_ending(run, trainer)
        if not stop.agreed:
            write_json({"steps": trainer.global_step}, run.finished)
        if stop.reason == "SIGUSR1":
            requeue()
    if stop.agreed:
        raise TrainingStopped(stop.preempted)  # so that the caller, Python or make, does not go on to the next command
    return run


def _config(options: TrainOptions, resumed: runs.Run | None) -> tuple[Config, Found | None]:
    """The resumed run's config, the given files over it, then the overrides; checked.

    With an autoencoder to start from, its networks are in the config; the second value is what was found.
    """
    files = [resumed.config] if resumed is not None else []
    config = cfg.load([*files, *options.base], options.overrides)
    if options.start_from is not None and isinstance(config.get("model"), dict):
        config["model"]["from"] = options.start_from
    if options.teacher is not None and isinstance(config.get("model"), dict):
        set_teacher(config, options.teacher)
    cfg.check(config)
    if config["model"].get("from") is None:
        config["model"].pop("from", None)
        return config, None
    for flag, value in (("--resume", options.resume), ("--actual_resume", options.actual_resume)):
        if value is not None:
            raise ConfigError(f"model.from names an autoencoder to start from, {flag} another: give one of them")
    found = start_from(config)
    cfg.check(config)
    return config, found


def _settings(options: TrainOptions, config: Config, resumed: runs.Run | None, found: Found | None) -> Config:
    """The flags; for one that was not given, the resumed run's setting, then the default."""
    weights = found.target if found is not None else options.actual_resume
    before = (config.get("run") or {}) if resumed is not None else {}
    if resumed is not None and options.name not in (None, before.get("name")):
        raise ConfigError("--name: a resumed run keeps the name of its folder: leave it out")
    name = before.get("name") or _name(options)
    runs.check_name(name)
    trainer = (config.get("lightning") or {}).get("trainer") or {}
    seed = options.seed if options.seed is not None else before.get("seed", 0)
    return {
        "name": name,
        "precision": options.precision or before.get("precision") or str(trainer.get("precision", "32")),
        "gpus": options.gpus if options.gpus is not None else before.get("gpus"),
        "seed": seed,
        "initial_seed": before.get("initial_seed", seed),  # of the initial weights, if a resumed run changed the seed
        "weights": str(weights) if weights is not None else before.get("weights"),
        "paths": dict((config.get("run") or {}).get("paths") or {}),  # of the data, as they were written
        **({"slurm_job": job} if (job := slurm_job()) is not None else {}),
    }


def _name(options: TrainOptions) -> str:
    """Of a new run."""
    return options.name or re.sub(r"[^\w.+=-]", "-", Path(options.base[0]).stem)


def _model(config: Config, trainer_args: Config) -> LiteAutoencoderKL:
    node = config["model"]
    extra: Config = {}
    if trainer_args.pop("gradient_clip_algorithm", None) not in (None, "norm"):
        raise ConfigError("lightning.trainer.gradient_clip_algorithm: only norm is supported")
    for key in ("accumulate_grad_batches", "gradient_clip_val"):  # the model does both: manual optimisation
        if (value := trainer_args.pop(key, None)) is not None:
            extra[key] = value
    if "base_learning_rate" in node:
        extra["learning_rate"] = node["base_learning_rate"]
    try:
        model = cfg.instantiate(node, **extra)
    except ValueError as error:  # a constructor's: the config is what it was given
        raise ConfigError(str(error)) from error
    if not isinstance(model, LiteAutoencoderKL):
        raise ConfigError(f"model.target: {node['target']} is not a LiteAutoencoderKL")
    _ = model.objective  # raises if the config is for inference only
    model.set_up_validation()  # raises if a metric's network is missing
    return model


def _check_checksums(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that the frozen weights of the parts are those that a resumed run had."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ConfigError(
            *(
                f"model.params.parts.{name}: a resumed run keeps it, with the same weights: "
                "start a new run from its weights with --actual_resume"
                for name in changed
            )
        )


def _restore(model: LiteAutoencoderKL, resumed: runs.Run | None, weights: str | Path | None) -> tuple[int, int]:
    """Load weights, or check that the checkpoint to resume fits; returns images seen and steps done."""
    if weights is not None:
        file = runs.Run(Path(weights)).last_checkpoint if Path(weights).is_dir() else Path(weights)
        load_weights(model, read_weights(file), file)
    if resumed is None:
        return 0, 0
    file = resumed.last_checkpoint
    checkpoint = read_checkpoint(file)
    load_weights(model, pick_weights(state_dict_of(checkpoint, file), file), file)
    needed = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "images_seen", "iteration")
    if missing := [key for key in needed if not checkpoint.get(key) and checkpoint.get(key) != 0]:
        raise ValueError(
            f"{file}: training can't continue from this checkpoint, {missing[0]} is missing: start a new run from its "
            "weights with --actual_resume"
        )
    if ("averaging_state" in checkpoint) != model.use_ema:
        raise ConfigError(
            f"model.params.use_ema: {model.use_ema}, but the run to resume was trained with {not model.use_ema}: "
            "start a new run from its weights with --actual_resume"
        )
    states = (state for optimizer in checkpoint["optimizer_states"] for state in optimizer["state"].values())
    if any("exp_avg" in state for state in states) != (model.optimizer == "adam"):
        raise ConfigError(
            f"model.params.optimizer: {model.optimizer}, but the run to resume was trained with the other one: "
            "start a new run from its weights with --actual_resume"
        )
    return int(checkpoint["images_seen"]), int(checkpoint["global_step"])


def _config_of(weights: str | Path | None) -> Config | None:
    """The config of the weights that training starts from: empty for weights without one, None for fresh ones."""
    if weights is None:
        return None
    path = Path(weights).resolve()
    run = runs.Run(path) if path.is_dir() else runs.run_of(path)
    return cfg.load([run.config]) if run is not None and run.config.is_file() else {}


def _steps(trainer_args: Config, source: Source, model: LiteAutoencoderKL) -> Config:
    """Convert epochs to steps, since the stream has no end, and intervals of steps to Lightning's, of batches."""
    args = dict(trainer_args)
    per_step = source.batch_size * model.accumulate_grad_batches * process_count(args)
    limits = {key: args.pop(key, None) for key in ("max_steps", "max_epochs")}
    limits = {key: limit for key, limit in limits.items() if limit not in (None, -1)}  # -1 is Lightning's "no limit"
    if not limits:
        raise ConfigError("lightning.trainer.max_steps: missing: the number of steps to train")
    if "max_epochs" in limits:
        if source.samples_per_epoch is None:
            raise ConfigError("lightning.trainer.max_epochs: the length of an epoch is not known: use max_steps")
        limits["max_epochs"] *= max(1, source.samples_per_epoch // per_step)
    args["max_steps"] = min(limits.values())
    if args["max_steps"] < 1:
        raise ConfigError(f"lightning.trainer.max_steps: must be at least 1, got {args['max_steps']}")
    every = args.pop("val_check_interval", None) or 1000
    if not isinstance(every, int):
        raise ConfigError(f"lightning.trainer.val_check_interval: expected a number of steps, got {every!r}")
    # Lightning counts batches in both, and refuses an interval longer than the run.
    args["val_check_interval"] = min(every, args["max_steps"]) * model.accumulate_grad_batches
    args["log_every_n_steps"] = (args.get("log_every_n_steps") or 20) * model.accumulate_grad_batches
    return args


def _trainer(
    run: runs.Run,
    precision: str,
    trainer_args: Config,
    config: Config,
    save_config: SaveConfig,
    ours: Sequence[pl.Callback],
    done: int,
) -> pl.Trainer:
    nodes = (config.get("lightning") or {}).get("callbacks") or {}
    callbacks = [*(cfg.instantiate(node) for node in nodes.values()), *ours, save_config]
    for default in (BadSteps, KeepCheckpoints, ImageGrids, Health, StepProgress):
        if not any(isinstance(callback, default) for callback in callbacks):
            callbacks.append(default())
    settings: Config = {
        "check_val_every_n_epoch": None,
        "deterministic": trainer_args["accelerator"] == "cpu",
        "benchmark": trainer_args["accelerator"] != "cpu",  # cuDNN tries its algorithms once for each shape
        "enable_model_summary": False,
        "max_epochs": -1,
        "plugins": [BackgroundCheckpointIO(save_config.on_saved), *cluster()],
        **trainer_args,
        "precision": precision,
        "callbacks": callbacks,
        "logger": make_loggers((config.get("lightning") or {}).get("logger") or {}, run, done),
        "default_root_dir": run.path,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**settings)


def _take(lock: runs.RunLock, run: runs.Run) -> None:
    """Lock a run that is resumed, in the first process of all; the others learn whether it could."""
    refusal: list[str | None] = [None]
    if is_first():
        try:
            lock.take(run)
            for folder in (run.path, run.checkpoints, run.images):  # what a killed process left half-written
                remove_partials(folder.glob(".partial-*"))
        except (ConfigError, OSError) as error:
            refusal = [str(error)]
    if meet()[1] > 1:
        dist.broadcast_object_list(refusal)
    if refusal[0] is not None:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise ConfigError(refusal[0])


def _new_run(logdir: str | Path, settings: Config, lock: runs.RunLock) -> tuple[runs.Run, bool]:
    """Make the run folder in the first process of all, lock it, and pass its path to the others.

    Lightning starts the other processes from the first one, with its environment; under torchrun and srun they all run
    already, and get the path through the process group.

    Returns:
        The run, and whether this process made its folder.
    """
    if RUN_ENV in os.environ and "LOCAL_RANK" in os.environ and find_launcher() is None:
        return runs.Run(Path(os.environ[RUN_ENV])), False
    rank, processes = meet()
    path = [""]
    if rank == 0:
        run = runs.create(logdir, settings["name"], settings["precision"])
        lock.take(run)
        path = [str(run.path)]
    if processes > 1:
        dist.broadcast_object_list(path)
    os.environ[RUN_ENV] = path[0]
    return runs.Run(Path(path[0])), rank == 0


def quieten() -> None:
    """Silence Lightning's notices that our summary replaces, or that are wrong for an endless stream."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*Your `IterableDataset` has `__len__` defined.*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # the anchor, a frozen encoder
        ".*You defined a `validation_step` but have no `val_dataloader`.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*lr_scheduler.step\\(\\).*before.*optimizer.step\\(\\).*",
    ):
        warnings.filterwarnings("ignore", message=message)
