"""Train from a plan to a finished run folder: prepare, fit, finish."""

import copy
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from olvae import config as cfg
from olvae import runs
from olvae.checkpoint import load_weights, read_checkpoint, read_weights, state_dict_of
from olvae.config import Config, ConfigError, with_paths
from olvae.data.source import Source
from olvae.devices import resolve_devices, resolve_precision
from olvae.files import first_line, no_empty_folders, remove_partials, warn_once
from olvae.models.footprint import MARGIN, advice, footprint
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.optimization import HOOKS, players_strategy
from olvae.models.weight_files import locate_weights
from olvae.modules.base import HALVES
from olvae.runs import Run, Settings, find_moved_data, locked, make_data_absolute
from olvae.training import processes
from olvae.training.callbacks import (
    BadSteps,
    GracefulStop,
    Health,
    ImageGrids,
    StepTrace,
    UnreadableLimit,
)
from olvae.training.origin import start_from
from olvae.training.processes import Lockstep
from olvae.training.progress import (
    StepProgress,
    describe_gain,
    make_loggers,
    notify,
    print_ending,
    print_summary,
)
from olvae.training.saving import BackgroundCheckpointIO, KeepCheckpoints
from olvae.training.settings import (
    Plan,
    TrainOptions,
    check_changes,
    find_changes,
    read_plan,
    restarted,
)

KEPT = (
    "checkpoints/*.ckpt",
    "bad_steps.jsonl",
    "memory.pickle",
    "trace.json",
)  # what a run may leave after an error
RUN_ENV = (
    "OLVAE_RUN"  # the run folder, for the processes that Lightning starts for the other devices
)
RELEASE_S = 120.0  # within which a network file system frees the locks of a machine that died: NFS after 90 s


class TrainingStopped(KeyboardInterrupt):
    """Training of ``run`` ended after a step, with a checkpoint; ``preempted`` by anything but Ctrl-C."""

    def __init__(self, run: Run, preempted: bool = False) -> None:
        super().__init__()
        self.run = run
        self.preempted = preempted


class ProcessDiedError(ChildProcessError):
    """A loader process, or another process of the training of ``run``, was killed."""

    def __init__(self, cause: str, run: Run) -> None:
        super().__init__(cause)
        self.run = run


@dataclass(frozen=True)
class Prepared:
    """A training that can begin: everything is checked, and nothing is written yet."""

    plan: Plan
    settings: Settings
    config: Config  # of the run, complete
    source: Source
    model: LiteAutoencoderKL
    trainer_args: Config
    stop: GracefulStop
    images_seen: int  # by the resumed run
    steps_done: int
    checkpoint: dict[str, Any]  # the resumed run's, until Lightning has taken it
    fresh: Collection[str]  # the halves with initial weights


def train(options: TrainOptions | Plan) -> Run:
    """Train with the options of ``olvae train``, or with the plan that ``read_plan`` has made of them.

    Returns the run folder, which is made after all of the user's input has been checked.

    Raises:
        ConfigError: a mistake in the config or the options.
        ValueError, FileNotFoundError: data, weights or devices do not fit or were not found.
        TrainingStopped: a signal or the time limit ended training; the checkpoint is written.
        ProcessDiedError: a loader process, or another process of this training, was killed.
        KeyboardInterrupt: Ctrl-C before the first step, or a second one.
    """
    plan = options if isinstance(options, Plan) else read_plan(options)
    with ExitStack() as held, no_empty_folders(Path(plan.options.logdir)):
        prepared = prepare(plan, held)
        done = prepared.steps_done
        if plan.resumed is not None and done == prepared.trainer_args["max_steps"]:
            if processes.is_first():
                print_ending(
                    plan.resumed, f"all {done} steps of this run are done: set more to continue"
                )
            return plan.resumed
        with _run_folder(prepared, held) as run:
            trainer = fit(prepared, run)
        finish(prepared, run, trainer)
    return run


def prepare(plan: Plan, held: ExitStack) -> Prepared:
    """Lock a resumed run until ``held`` ends, build data and model, load weights, and check that everything fits."""
    stop = GracefulStop(plan.time_limit)
    processes.meet()
    processes.check_same("" if plan.resumed is None else str(plan.resumed.path))
    if plan.resumed is not None:
        _lock_resumed(plan.resumed, held)
    config, settings = _locate_data(plan)
    weights, before = start_from(config) if "from" in config["model"] else (None, plan.previous)
    trainer_args = dict(runs.entry_of(config, "lightning.trainer") or {})
    trainer_args |= resolve_devices(settings.gpus, trainer_args)
    count = processes.process_count(trainer_args)
    trainer_args["precision"] = resolve_precision(settings.precision, trainer_args["accelerator"])

    source = cfg.instantiate(config["data"])
    if not isinstance(source, Source):
        raise ConfigError(f"data.target: {config['data']['target']} is not a source of images")
    if plan.resumed is None:
        processes.choose_workers(
            source, config["data"], count, int(trainer_args.get("num_nodes", 1))
        )
    settings = replace(
        settings, paths={**settings.paths, **make_data_absolute(config)}
    )  # of fresh downloads
    quieten()
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    model = build_model(config, trainer_args)
    model.set_up_validation()  # raises if a metric's network is missing
    model.seed = settings.seed
    model.check(source)
    fresh: Collection[str] = HALVES if settings.weights is None else ()
    if weights is not None:
        loaded = {name.partition(".")[0] for name in weights}  # without a decoder that starts fresh
        load_weights(
            model, weights, str(settings.weights), prefixes=tuple(f"{half}." for half in loaded)
        )
        fresh = tuple(half for half in HALVES if half not in loaded)
    if plan.options.actual_resume is not None:
        before = _load_other_run(
            model, runs.find_run(plan.options.actual_resume, plan.options.logdir)
        )
    checkpoint = {} if plan.resumed is None else _restore(model, plan.resumed, settings)
    images_seen, steps_done = (
        int(checkpoint.get(name, 0)) for name in ("images_seen", "global_step")
    )
    settings = replace(settings, untrained=untrained_half(model, before), checksums=model.checksums)
    if model.stand_in is not None:
        config["model"]["params"].update(model.for_diffusion)

    trainer_args = _in_batches(trainer_args, model)
    if steps_done > trainer_args["max_steps"]:
        raise ConfigError(
            f"`resume`: this run is at step {steps_done}, after the last of max_steps {trainer_args['max_steps']}: to "
            f"continue it, set more, as in lightning.trainer.max_steps={2 * steps_done}"
        )
    source.check_processes(count)
    if model.adversary is not None:
        model.adversary.check(model, source, trainer_args["max_steps"])
    if trainer_args["accelerator"] in ("cuda", "gpu"):
        trainer_args.setdefault("sync_batchnorm", True)
    strategy = strategy_of(trainer_args)
    trainer_args["strategy"] = "auto" if count == 1 else players_strategy(strategy)
    config["run"] = settings.as_dict()
    return Prepared(
        plan,
        settings,
        config,
        source,
        model,
        trainer_args,
        stop,
        images_seen,
        steps_done,
        checkpoint,
        fresh,
    )


def fit(prepared: Prepared, run: Run) -> pl.Trainer:
    """Train to the last step or to a stop; return the trainer."""
    model, source, resumed = prepared.model, prepared.source, prepared.plan.resumed
    trainer = _trainer(prepared, run)
    first, device = trainer.is_global_zero, trainer.strategy.root_device
    if first:
        done, seen = prepared.steps_done, prepared.images_seen
        print_summary(prepared.settings, run, trainer, model, source, done, seen)
    if device.type == "cuda":
        free = min(
            processes.of_each(torch.cuda.mem_get_info(device)[0])
        )  # so that all processes decide alike
        model.flop = check_memory(model, source, prepared.settings.precision, free, first)
    if resumed is None:
        for line in model.prepare(source, prepared.settings.seed, device, prepared.fresh):
            if first:
                notify(line)
    for logger in trainer.loggers:
        logger.log_hyperparams(prepared.config)
        if resumed is None and model.linear_psnr is not None:
            logger.log_metrics({"val/psnr": model.linear_psnr}, step=0)
    processes.watch_processes(run)
    try:
        with (
            torch.compiler.set_stance("default") if model.compiled else nullcontext()
        ):  # validation changes it
            trainer.fit(
                model,
                train_dataloaders=source.train_loader(prepared.settings.seed, prepared.images_seen),
                val_dataloaders=source.val_loader(),
                ckpt_path=None if resumed is None else str(run.last_checkpoint),
                weights_only=True,
            )
    except SystemExit as error:  # Lightning's answer to a second Ctrl-C
        raise (
            TrainingStopped(run) if run.last_checkpoint.is_file() else KeyboardInterrupt
        ) from error
    except (RuntimeError, ConnectionError, EOFError, TypeError) as error:
        if (cause := processes.process_death(error)) is None:
            raise
        raise ProcessDiedError(cause, run) from error
    return trainer


def finish(prepared: Prepared, run: Run, trainer: pl.Trainer) -> None:
    """Draw the curves and print where the results are; raise TrainingStopped if training was stopped."""
    stop = prepared.stop
    if trainer.is_global_zero:
        stopped = trainer.global_step < trainer.max_steps
        print_ending(
            run,
            f"{'stopped' if stopped else 'done'} after {trainer.global_step} steps{describe_gain(prepared.model)}",
        )
        if stop.requeues:
            processes.requeue()
    if stop.agreed:  # the caller, Python or make, must not begin what comes after a training
        raise TrainingStopped(run, stop.preempted)


def check_memory(
    model: LiteAutoencoderKL, source: Source, precision: str, free: int, warns: bool = True
) -> int:
    """Warn where a step needs most of the bytes that are free on a GPU; raise ConfigError if not one image fits.

    Returns the operations of an image, 0 if they could not be counted.
    """
    try:
        plain = footprint(model, source.size, precision)
        bounded = any(part.needs_activations for part in model.each_part)
        fits = MARGIN * plain.total(source.batch_size) <= free
        checkpointed = (
            plain if fits or bounded else footprint(model, source.size, precision, checkpoint=True)
        )
    except Exception as error:  # networks of the user's own may need tensors with values: an estimate stops nothing
        sentence: str | None = f"not counted: {first_line(error)}"
        flop = 0
    else:
        flop = plain.flop
        sentence = advice(
            free, source.batch_size, model.accumulate_grad_batches, plain, checkpointed
        )
        if plain.total(1) > free:
            raise ConfigError(f"data.params.batch_size: not even one image fits: {sentence}")
    if warns and sentence is not None:
        notify(f"warning: memory: {sentence}", "yellow")
    return flop


def _locate_data(plan: Plan) -> tuple[Config, Settings]:
    """Make the data's paths absolute, where they are now, and check what a resumed run's config and settings change."""
    config, settings = copy.deepcopy(plan.config), plan.settings
    previous = copy.deepcopy(plan.previous)
    moved, paths = find_moved_data(config), dict(settings.paths)
    paths |= {now: paths[before] for before, now in moved.items()}
    for one in (config, previous):
        if one is not None:
            one["data"] = with_paths(one["data"], lambda text: moved.get(text, text))
            paths |= make_data_absolute(one)
    settings = replace(settings, paths=paths)
    if previous is not None:
        changes = find_changes(previous, config, settings)
        if changes and processes.is_first():
            lines = (f"  {key}: {change}" for key, change in changes.items())
            notify("\n".join(["settings that differ from the run's own:", *lines]))
        if not plan.options.allow_changes:
            check_changes(changes)
    return config, settings


def build_model(config: Config, trainer_args: Config) -> LiteAutoencoderKL:
    """Build the model; it takes what Lightning leaves to manual optimisation out of the trainer's arguments."""
    node = config["model"]
    if trainer_args.pop("gradient_clip_algorithm", None) not in (None, "norm"):
        raise ConfigError("lightning.trainer.gradient_clip_algorithm: only norm is supported")
    given = {
        key: trainer_args.pop(key, None) for key in ("accumulate_grad_batches", "gradient_clip_val")
    }
    given["learning_rate"] = node.get("base_learning_rate")
    try:
        model = cfg.instantiate(
            node, **{key: value for key, value in given.items() if value is not None}
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(model, LiteAutoencoderKL):
        raise ConfigError(f"model.target: {node['target']} is not a LiteAutoencoderKL")
    _ = model.objective  # raises if the config is for inference only
    return model


def _load_other_run(model: LiteAutoencoderKL, path: str | Path) -> Config | None:
    """Load the weights of another run, a checkpoint or an export; return its config, empty for what has none."""
    file = locate_weights(path)
    load_weights(model, read_weights(file), file)
    run = runs.run_of(file.resolve())
    before = {} if run is None else cfg.load([run.config])
    learned = runs.settings_of(before).checksums
    for name, checksum in model.checksums.items() if model.frozen_halves else ():
        if learned.get(name, checksum) != checksum:
            frozen = f"the {model.frozen_halves[0]} of {path}, frozen here, learned from another model than"
            warn_once(f"{frozen} model.params.parts.{name}: are their latents the same?")
    return before


def untrained_half(model: LiteAutoencoderKL, before: Config | None) -> str | None:
    """Find the half that keeps its initial weights: frozen, and not trained with the weights that training starts from.

    ``before``: the config of those weights; None if they are fresh.
    """
    fresh = model.frozen_halves if before is None else [runs.settings_of(before).untrained]
    return next(
        (half for half in model.frozen_halves if half in fresh and not _is_whole(model, half)), None
    )


def _is_whole(model: LiteAutoencoderKL, half: str) -> bool:
    """Whether a half needs no training: it has no parameters, or its linear path is fitted, to images."""
    network = getattr(model, half)
    if network.linear is not None:
        return model.stand_in is None
    return model.quantizer is None and next(network.parameters(), None) is None


def _restore(model: LiteAutoencoderKL, run: Run, settings: Settings) -> dict[str, Any]:
    """Load the weights of a resumed run, check that it can be continued, and return its checkpoint."""
    file = run.last_checkpoint
    checkpoint = read_checkpoint(file)
    other = "start a new run from its weights with `actual_resume`"
    if not checkpoint.get("optimizer_states") or "images_seen" not in checkpoint:
        raise ValueError(
            f"{file}: has weights only, without what training needs to continue: {other}"
        )
    if ("averaging_state" in checkpoint) != model.use_ema:
        raise ConfigError(
            f"model.params.use_ema: {model.use_ema}, but the run has {not model.use_ema}: {other}"
        )
    before, now = settings.checksums, model.checksums
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        why = f"a resumed run keeps it, with the same weights: {other}"
        raise ConfigError(*(f"model.params.parts.{name}: {why}" for name in changed))
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    if len(groups) != (2 if model.optimizer == "muon" else 1):
        raise ConfigError(
            f"model.params.optimizer: {model.optimizer}, but the run has another: {other}"
        )
    if sum(len(group["params"]) for group in groups) != len(model.autoencoder_parameters()):
        raise ConfigError(
            f"model.params: these settings train other weights, as of a frozen half: {other}"
        )
    load_weights(model, state_dict_of(checkpoint, file), file, prefixes=("",))
    return checkpoint


def strategy_of(trainer_args: Config) -> str:
    """The name in lightning.trainer.strategy; ConfigError unless it is one of :data:`HOOKS`."""
    name = trainer_args.get("strategy") or "auto"
    if not isinstance(name, str) or name not in HOOKS:
        raise ConfigError(f"lightning.trainer.strategy: {name}: choose from {', '.join(HOOKS)}")
    return name


def _in_batches(trainer_args: Config, model: LiteAutoencoderKL) -> Config:
    """Convert intervals of steps to Lightning's, of batches, and check them; the stream of images has no epochs."""
    args = dict(trainer_args)
    if args.pop("max_epochs", None) not in (None, -1):
        raise ConfigError(
            "lightning.trainer.max_epochs: a stream of images has no epochs: set max_steps"
        )
    usual = {"val_check_interval": 1000, "log_every_n_steps": 20}
    args |= {name: number for name, number in usual.items() if args.get(name) is None}
    for name, least, hint in (
        ("max_steps", 1, ""),
        ("val_check_interval", 1, "; limit_val_batches=0 leaves validation out"),
        ("log_every_n_steps", 0, "; 0 logs none"),
    ):
        if type(steps := args.get(name)) is not int or steps < least:
            raise ConfigError(
                f"lightning.trainer.{name}: {steps}: expected a number of steps from {least} on{hint}"
            )
    # Lightning counts batches in both, and refuses an interval longer than the run.
    args["val_check_interval"] = min(args["val_check_interval"], args["max_steps"])
    return args | {name: args[name] * model.accumulate_grad_batches for name in usual}


def _trainer(prepared: Prepared, run: Run) -> pl.Trainer:
    lightning = prepared.config.get("lightning") or {}
    nodes = lightning.get("callbacks") or {}
    callbacks = [
        prepared.stop,
        *(cfg.instantiate(node) for node in nodes.values()),
        UnreadableLimit(),
    ]
    for default in (BadSteps, KeepCheckpoints, ImageGrids, Health, StepProgress, Lockstep):
        if not any(isinstance(callback, default) for callback in callbacks):
            callbacks.append(default())
    if prepared.plan.options.profile:
        callbacks.append(StepTrace(prepared.plan.options.profile))
    on_cpu = prepared.trainer_args["accelerator"] == "cpu"
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # as nothing reads it
    resumed_config = None if prepared.plan.resumed is None else (prepared.config, run.config)
    settings: Config = {
        "check_val_every_n_epoch": None,
        "deterministic": on_cpu,
        "benchmark": not on_cpu,  # cuDNN tries its algorithms once for each shape
        "enable_model_summary": False,
        "max_epochs": -1,
        "plugins": [
            BackgroundCheckpointIO(resumed_config, prepared.checkpoint),
            *processes.cluster(),
        ],
        **prepared.trainer_args,
        "callbacks": callbacks,
        "logger": make_loggers(lightning.get("logger") or {}, run),
        "default_root_dir": run.path,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**settings)


def _lock_resumed(run: Run, held: ExitStack) -> None:
    """Lock a run in the first process of all; the others raise the same error."""
    refusal = ""
    if processes.is_first():
        try:
            held.enter_context(locked(run, patience=RELEASE_S if restarted() else 0.0))
            for folder in (
                run.path,
                run.checkpoints,
                run.images,
            ):  # what a killed process left half-written
                remove_partials(folder.glob(".partial-*"))
        except (ConfigError, OSError) as error:
            refusal = str(error)
    if refusal := processes.of_each(refusal)[0]:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise ConfigError(refusal)


@contextmanager
def _run_folder(prepared: Prepared, held: ExitStack) -> Iterator[Run]:
    """Make and lock a new run's folder in the first process of all; remove it after an end that left nothing in it.

    Processes that Lightning starts get its path by the environment, those of torchrun and srun by the process group.
    """
    if prepared.plan.resumed is not None:
        yield prepared.plan.resumed
    elif RUN_ENV in os.environ and "LOCAL_RANK" in os.environ and processes.find_launcher() is None:
        yield Run(Path(os.environ[RUN_ENV]))
    elif processes.meet()[0] > 0:
        yield Run(Path(processes.of_each("")[0]))
    else:
        run = runs.create(
            prepared.plan.options.logdir, prepared.settings.name, prepared.settings.precision
        )
        held.enter_context(locked(run))
        os.environ[RUN_ENV] = processes.of_each(str(run.path))[0]
        try:
            cfg.save(prepared.config, run.config)
            yield run
        finally:
            if not any(path for kept in KEPT for path in run.path.glob(kept)):
                shutil.rmtree(run.path, ignore_errors=True)
                if sys.exc_info()[0] is KeyboardInterrupt:
                    notify(f"{run.path}: removed: nothing was saved yet")


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
        ".*nn.functional.all_reduce is deprecated.*",  # no other has a gradient
        ".*It is recommended to use `self.log\\(.*sync_dist=True\\)`.*",  # values of validation are of all processes
    ):
        warnings.filterwarnings("ignore", message=message)
