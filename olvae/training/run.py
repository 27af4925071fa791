"""Train from a plan to a finished run folder: prepare, fit, finish."""

import copy
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from olvae import config as cfg
from olvae import runs
from olvae.config import Config, ConfigError, with_paths
from olvae.data.shards.index import share_indexes
from olvae.data.source import LoaderLayout, Source, continued
from olvae.devices import PRECISIONS, precision_name, resolve_devices, resolve_precision, tf32
from olvae.files import (
    counted,
    first_line,
    no_empty_folders,
    reason,
    remove_partials,
    unread_output,
)
from olvae.launcher import leave, of_each
from olvae.models.footprint import MARGIN, advice, footprint
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.ddp import HOOKS, players_strategy
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
from olvae.training.loggers import make_loggers
from olvae.training.processes import Lockstep
from olvae.training.progress import StepProgress, notify
from olvae.training.saving import BackgroundCheckpointIO, KeepCheckpoints
from olvae.training.settings import (
    Plan,
    TrainOptions,
    check_changes,
    find_changes,
    read_plan,
    restarted,
)
from olvae.training.start_from import start_from
from olvae.training.starting_weights import (
    load_networks,
    load_other_run,
    load_resumed,
    untrained_half,
)
from olvae.training.summary import (
    describe_gain,
    describe_new_rate,
    print_ending,
    print_summary,
)

# What a run may leave after an error: without any of these its folder is removed.
KEPT = ("checkpoints/*.ckpt", "bad_steps.jsonl", "memory.pickle", "trace.json")

# The run folder, for the processes that Lightning starts for the other devices.
RUN_ENV = "OLVAE_RUN"

# Seconds until a network file system frees the locks of a machine that died: NFS after 90 s.
RELEASE_S = 120.0


class TrainingStopped(KeyboardInterrupt):
    """Training of ``run`` ended after a step, with a checkpoint.

    ``preempted``: by anything but Ctrl-C.
    """

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
    config: Config  # the run's complete config, which its folder gets
    source: Source
    model: LiteAutoencoderKL
    trainer_args: Config
    stop: GracefulStop
    images_seen: int  # by the resumed run; 0 in a new one
    steps_done: int  # likewise
    checkpoint: dict[str, Any]  # the resumed run's, until Lightning has taken it
    fresh: Collection[str]  # the halves (encoder, decoder) with initial weights


@unread_output()
def train(options: TrainOptions | Plan) -> Run:
    """Train with the options of ``olvae train``, or with the plan that ``read_plan`` made of them.

    Returns the run folder, which is made after all of the user's input has been checked. Output
    that can't be written is left out.

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
                title = f"this run is done, after {counted(done, 'step')}: set more to continue"
                print_ending(plan.resumed, title)
            return plan.resumed
        with _run_folder(prepared, held) as run:
            trainer = fit(prepared, run)
        finish(prepared, run, trainer)
    return run


def prepare(plan: Plan, held: ExitStack) -> Prepared:
    """Build data and model of a training, load its weights, and check that everything fits.

    A resumed run is locked until ``held`` ends.
    """
    # The time limit counts from here. Then all processes meet, and agree on the run to resume.
    stop = GracefulStop(plan.time_limit)
    processes.meet()
    _lock_resumed(plan.resumed, held)

    # Complete the config: data where they are now, and the networks of `model.from`.
    config, settings = _locate_data(plan)
    weights: Mapping[str, Tensor] | None = None
    weights_config = plan.previous  # of the training that made the weights to start from
    if "from" in config["model"]:
        weights, weights_config = start_from(config, plan.options.overrides)

    # Devices, the number of processes, precision.
    trainer_args = dict(runs.entry_of(config, "lightning.trainer") or {})
    trainer_args |= resolve_devices(settings.gpus, trainer_args)
    count = processes.process_count(trainer_args)
    trainer_args["precision"] = resolve_precision(settings.precision, trainer_args["accelerator"])

    # Data, whose paths are made absolute again: opening it may have downloaded some.
    source = _open_data(plan, config, count, int(trainer_args.get("num_nodes", 1)))
    settings = replace(settings, paths={**settings.paths, **make_data_absolute(config)})

    # Model, with initial weights by the seed.
    quieten()
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    model = build_model(config, trainer_args)
    model.set_up_validation()  # raises if a metric's network is missing
    model.seed = settings.seed
    model.check(source)

    # Weights to start from: of `model.from`, of another run, or of the resumed run.
    fresh = load_networks(model, weights, settings)
    if plan.options.actual_resume is not None:
        other = runs.find_run(plan.options.actual_resume, plan.options.logdir)
        weights_config = load_other_run(model, other, config)
    checkpoint = {} if plan.resumed is None else load_resumed(model, plan.resumed, settings)

    # Note in the config what later runs, and exports, have to know of these weights.
    half = untrained_half(model, weights_config)
    settings = replace(settings, untrained=half, checksums=model.checksums)
    if model.stand_in is not None:
        config["model"]["params"].update(model.for_diffusion)
    config["run"] = settings.as_dict()

    # Steps and processes, now that the model has its accumulation, and the run its step.
    trainer_args = _fit_trainer_args(trainer_args, model, source, count, checkpoint)
    _name_val_set(model, source, trainer_args, count, checkpoint)
    continue_order(model, source, checkpoint, count)
    return Prepared(
        plan=plan,
        settings=settings,
        config=config,
        source=source,
        model=model,
        trainer_args=trainer_args,
        stop=stop,
        images_seen=int(checkpoint.get("images_seen", 0)),
        steps_done=int(checkpoint.get("global_step", 0)),
        checkpoint=checkpoint,
        fresh=fresh,
    )


def continue_order(
    model: LiteAutoencoderKL, source: Source, checkpoint: Mapping[str, Any], world: int
) -> None:
    """Give the model what its checkpoints say of the order; warn of sorted or repeated images."""
    lines = [source.describe_sorted()]
    now = source.layout(int(checkpoint.get("images_seen", 0)), world)
    before: list[LoaderLayout] = []
    if checkpoint:
        # Runs from before November 2026 have no list, and blocks of one shard after the other.
        source.keep_order(checkpoint.get("order"))
        listed = checkpoint.get("layouts", [now._replace(start=0)])
        before = [LoaderLayout(*numbers) for numbers in listed]
    model.layouts = continued(before, now)
    model.order = source.order
    if before and len(model.layouts) > len(before):
        lines.append(source.describe_new_processes())
    for line in filter(None, lines):
        if processes.is_first():
            notify(f"warning: {line}", "yellow")


def fit(prepared: Prepared, run: Run) -> pl.Trainer:
    """Train to the last step or to a stop; return the trainer."""
    model = prepared.model
    source = prepared.source
    resumed = prepared.plan.resumed
    trainer = _trainer(prepared, run)
    first = trainer.is_global_zero
    device = trainer.strategy.root_device

    # Before the first step: summary, memory, and what a new run fits or measures on images.
    if first:
        _print_start(prepared, run, trainer)
    if device.type == "cuda":
        # The least of all processes, so that they decide alike.
        free = min(of_each(torch.cuda.mem_get_info(device)[0]))
        model.flop = check_memory(model, source, prepared.settings.precision, free, first)
    if resumed is None:
        for line in model.prepare(source, prepared.settings.seed, device, prepared.fresh):
            if first:
                notify(line)
    for logger in trainer.loggers:
        logger.log_hyperparams(prepared.config)
        if resumed is None and model.linear_psnr is not None:
            logger.log_metrics({"val/psnr": model.linear_psnr}, step=0)

    # Training. The compiler's stance is restored afterwards, as validation changes it. In float32,
    # torch's own settings of TF32 stay, unless the precision is tf32.
    processes.watch_processes(run)
    named = PRECISIONS[precision_name(prepared.settings.precision)]
    stance = torch.compiler.set_stance("default") if model.compiled else nullcontext()
    try:
        with stance, tf32(True) if named.tf32 else nullcontext():
            trainer.fit(
                model,
                train_dataloaders=source.train_loader(
                    prepared.settings.seed, prepared.images_seen, model.layouts
                ),
                val_dataloaders=source.val_loader(),
                ckpt_path=None if resumed is None else str(run.newest_checkpoint),
                weights_only=True,
            )
    except SystemExit as error:  # Lightning's answer to a second Ctrl-C
        if run.newest_checkpoint.is_file():
            raise TrainingStopped(run, prepared.stop.preempted) from error
        raise KeyboardInterrupt from error
    except (RuntimeError, ConnectionError, EOFError, TypeError) as error:
        cause = processes.process_death(error)
        if cause is None:
            raise
        raise ProcessDiedError(cause, run) from error
    return trainer


def _print_start(prepared: Prepared, run: Run, trainer: pl.Trainer) -> None:
    """Print the summary, and a line if a resumed run's learning rate is not as it was."""
    model, previous = prepared.model, prepared.plan.previous
    done, seen = prepared.steps_done, prepared.images_seen
    print_summary(prepared.settings, run, trainer, model, prepared.source, done, seen)
    if previous is not None:
        line = describe_new_rate(model, trainer.max_steps, prepared.checkpoint, previous)
        if line:
            notify(f"warning: {line}", "yellow")


def finish(prepared: Prepared, run: Run, trainer: pl.Trainer) -> None:
    """Draw the curves and print where the results are; raise TrainingStopped after a stop."""
    stop = prepared.stop
    if trainer.is_global_zero:
        ending = "stopped" if trainer.global_step < trainer.max_steps else "done"
        gain = describe_gain(prepared.model)
        with stop.listening() if stop.agreed else nullcontext():
            print_ending(run, f"{ending} after {counted(trainer.global_step, 'step')}{gain}")
            if stop.requeues:
                processes.requeue()
    # An error, so that the caller, Python or make, does not begin what comes after a training.
    if stop.agreed:
        raise TrainingStopped(run, stop.preempted)


def check_memory(
    model: LiteAutoencoderKL, source: Source, precision: str, free: int, warns: bool = True
) -> int:
    """Warn if a step needs most of a GPU's ``free`` bytes.

    Returns the operations per image, 0 if they could not be counted. ConfigError if not even one
    image fits.
    """
    try:
        plain = footprint(model, source.size, precision)
        bounded = any(part.needs_activations for part in model.each_part)
        fits = MARGIN * plain.total(source.batch_size) <= free
        checkpointed = plain
        if not (fits or bounded):
            checkpointed = footprint(model, source.size, precision, checkpoint=True)
    except Exception as error:
        # Networks of the user's own may need tensors with values: an estimate stops nothing.
        sentence: str | None = f"not counted: {first_line(error)}"
        flop = 0
    else:
        flop = plain.flop
        batches = model.accumulate_grad_batches
        sentence = advice(free, source.batch_size, batches, plain, checkpointed)
        if plain.total(1) > free:
            raise ConfigError(f"data.params.batch_size: not even one image fits: {sentence}")
    if warns and sentence is not None:
        notify(f"warning: memory: {sentence}", "yellow")
    return flop


def _locate_data(plan: Plan) -> tuple[Config, Settings]:
    """Make the data's paths absolute, where they are now, and check a resumed run's changes."""
    config = copy.deepcopy(plan.config)
    previous = copy.deepcopy(plan.previous)

    # Absolute path -> path as the user wrote it, also of data that moved with the folder.
    moved = find_moved_data(config)
    paths = dict(plan.settings.paths)
    paths |= {now: paths[before] for before, now in moved.items()}
    for one in (config, previous):
        if one is not None:
            one["data"] = with_paths(one["data"], lambda text: moved.get(text, text))
            paths |= make_data_absolute(one)
    settings = replace(plan.settings, paths=paths)

    # Only now, when the same data have the same paths, are both configs compared.
    if previous is not None:
        changes = find_changes(previous, config, settings)
        if changes and processes.is_first():
            lines = [f"  {key}: {change}" for key, change in changes.items()]
            notify("\n".join(["settings that differ from the run's own:", *lines]))
        if not plan.options.allow_changes:
            check_changes(changes)
    return config, settings


def _open_data(plan: Plan, config: Config, count: int, nodes: int) -> Source:
    """Build the source of images; a new run's loader processes are chosen by its cores."""
    share_indexes(config["data"])
    source = cfg.instantiate(config["data"])
    if not isinstance(source, Source):
        raise ConfigError(f"data.target: {config['data']['target']} is not a source of images")
    if plan.resumed is None:
        processes.choose_workers(source, config["data"], count, nodes)
    return source


def build_model(config: Config, trainer_args: Config) -> LiteAutoencoderKL:
    """Build the model of a config.

    Takes out of ``trainer_args`` what manual optimisation does in the model instead of Lightning.
    """
    node = config["model"]
    if trainer_args.pop("gradient_clip_algorithm", None) not in (None, "norm"):
        raise ConfigError("lightning.trainer.gradient_clip_algorithm: only norm is supported")
    given = {
        "accumulate_grad_batches": trainer_args.pop("accumulate_grad_batches", None),
        "gradient_clip_val": trainer_args.pop("gradient_clip_val", None),
        "learning_rate": node.get("base_learning_rate"),
    }
    arguments = {key: value for key, value in given.items() if value is not None}
    try:
        model = cfg.instantiate(node, **arguments)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(model, LiteAutoencoderKL):
        raise ConfigError(f"model.target: {node['target']} is not a LiteAutoencoderKL")
    _ = model.objective  # raises if the config is for inference only
    return model


def _fit_trainer_args(
    trainer_args: Config,
    model: LiteAutoencoderKL,
    source: Source,
    count: int,
    checkpoint: Mapping[str, Any],
) -> Config:
    """Adapt Lightning's settings to model, data and ``count`` processes, and check them."""
    # Numbers of steps.
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
        steps = args.get(name)
        if type(steps) is not int or steps < least:  # a bool is no number of steps
            expected = f"expected a number of steps from {least} on{hint}"
            raise ConfigError(f"lightning.trainer.{name}: {steps}: {expected}")
    max_steps = args["max_steps"]
    steps_done = int(checkpoint.get("global_step", 0))
    if steps_done > max_steps:
        raise ConfigError(
            f"`resume`: this run is at step {steps_done}, after the last of max_steps {max_steps}: "
            f"to continue it, set more, as in lightning.trainer.max_steps={2 * steps_done}"
        )

    # Intervals: Lightning counts batches, and refuses one longer than the run.
    args["val_check_interval"] = min(args["val_check_interval"], max_steps)
    args |= {name: args[name] * model.accumulate_grad_batches for name in usual}

    # Processes, and the discriminator, whose start needs steps and images.
    source.check_processes(count)
    if model.adversary is not None:
        model.adversary.check(model, source, max_steps)
    if args["accelerator"] in ("cuda", "gpu"):
        args.setdefault("sync_batchnorm", True)
    strategy = strategy_of(args)
    args["strategy"] = "auto" if count == 1 else players_strategy(strategy)
    return args


def validation_limit(source: Source, limit: Any, count: int) -> tuple[int, int] | None:
    """Convert Lightning's ``limit_val_batches`` to batches of each of ``count`` processes.

    None if all images are validated. Raises ConfigError: it is a fraction of less than a batch.
    """
    # Batches of each process, if they are known.
    batches = None
    if source.val_images is not None and source.shares_evenly:
        batches = -(-source.val_images // (count * source.batch_size))
    if isinstance(limit, float) and batches is not None:
        share = limit
        limit = int(share * batches)
        if share > 0 and not limit:
            raise ConfigError(
                f"lightning.trainer.limit_val_batches: {share:g}: no batch remains of the "
                f"{batches} in all: set a number of batches, such as 1; 0 leaves validation out"
            )
    if not isinstance(limit, int) or (batches is not None and limit >= batches):
        return None
    return limit, count


def _name_val_set(
    model: LiteAutoencoderKL, source: Source, trainer_args: Config, count: int, resumed: Config
) -> None:
    """Name the images of validation; print it where the ``resumed`` checkpoint has others, or none.

    An empty ``resumed`` is of a new run.
    """
    before = resumed.get("val_set")
    limit = trainer_args.get("limit_val_batches")
    if limit == 0:
        model.val_set = before  # for a later resume, which validates again
        return
    source.val_limit = validation_limit(source, limit, count)
    model.val_set = source.describe_val_set()
    if resumed and "val_set" not in resumed and processes.is_first():
        notify(
            "this run was begun by a version that did not note its validation images: they may be "
            "others now, some of them trained on, if its folder has parts such as train/ and "
            f"valid/, which were one set then. From now on they are {model.val_set}",
            "yellow",
        )
    if before not in (None, model.val_set) and processes.is_first():
        notify(
            f"validation images that differ from the run's own: {before} -> {model.val_set}: "
            "scores before and after can't be compared, so `best` starts anew; some may have been "
            "trained on",
            "yellow",
        )


def strategy_of(trainer_args: Config) -> str:
    """The name in lightning.trainer.strategy; ConfigError unless it is one of :data:`HOOKS`."""
    name = trainer_args.get("strategy") or "auto"
    if not isinstance(name, str) or name not in HOOKS:
        raise ConfigError(f"lightning.trainer.strategy: {name}: choose from {', '.join(HOOKS)}")
    return name


def _trainer(prepared: Prepared, run: Run) -> pl.Trainer:
    """Make Lightning's trainer, with the config's callbacks, loggers and settings."""
    lightning = prepared.config.get("lightning") or {}

    # The stop is first, so that the others see it. Lightning moves `KeepCheckpoints` to the end.
    nodes = lightning.get("callbacks") or {}
    configured = [cfg.instantiate(node) for node in nodes.values()]
    callbacks = [prepared.stop, *configured, UnreadableLimit()]
    for default in (BadSteps, KeepCheckpoints, ImageGrids, Health, StepProgress, Lockstep):
        if not any(isinstance(callback, default) for callback in callbacks):
            callbacks.append(default())
    if prepared.plan.options.profile:
        callbacks.append(StepTrace(prepared.plan.options.profile))

    # Deterministic on a CPU. torch would also fill uninitialised memory, which nothing reads.
    on_cpu = prepared.trainer_args["accelerator"] == "cpu"
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    # Settings: our defaults, the config's over them, and last what is not the config's to choose.
    resumed_config = None if prepared.plan.resumed is None else (prepared.config, run.config)
    checkpoints = BackgroundCheckpointIO(resumed_config, prepared.checkpoint)
    settings: Config = {
        "check_val_every_n_epoch": None,
        "deterministic": on_cpu,
        "benchmark": not on_cpu,  # cuDNN tries its algorithms once for each shape
        "enable_model_summary": False,
        "max_epochs": -1,
        "plugins": [checkpoints, *processes.cluster()],
        **prepared.trainer_args,
        "callbacks": callbacks,
        "logger": make_loggers(lightning.get("logger") or {}, run),
        "default_root_dir": run.path,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**settings)


def _lock_resumed(run: Run | None, held: ExitStack) -> None:
    """Lock a resumed run in the first process of all until ``held`` ends.

    ConfigError in all processes if it can't be locked, and in a process that has found another run
    to resume than the first one.
    """
    processes.check_same("" if run is None else str(run.path))
    if run is None:
        return
    refusal = ""
    if processes.is_first():
        try:
            held.enter_context(locked(run, patience=RELEASE_S if restarted() else 0.0))
            # Remove what a killed process left half-written.
            for folder in (run.path, run.checkpoints, run.images):
                remove_partials(folder.glob(".partial-*"))
        except ConfigError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"{error.filename or run.path}: {reason(error)}"
    refusal = of_each(refusal)[0]
    if refusal:
        leave()
        raise ConfigError(refusal)


@contextmanager
def _run_folder(prepared: Prepared, held: ExitStack) -> Iterator[Run]:
    """Make and lock a new run's folder in the first process of all; remove it if nothing is in it.

    The other processes get its path from the first one: by the environment where Lightning starts
    them, by the process group under torchrun and srun.
    """
    if prepared.plan.resumed is not None:
        yield prepared.plan.resumed
    elif RUN_ENV in os.environ and "LOCAL_RANK" in os.environ and processes.find_launcher() is None:
        yield Run(Path(os.environ[RUN_ENV]))
    elif processes.meet()[0] > 0:
        yield Run(Path(of_each("")[0]))
    else:
        settings = prepared.settings
        run = runs.create(prepared.plan.options.logdir, settings.name, settings.precision)
        prepared.config["run"]["begun"] = runs.utc_text()
        held.enter_context(locked(run))
        os.environ[RUN_ENV] = of_each(str(run.path))[0]
        try:
            cfg.save(prepared.config, run.config)
            yield run
        finally:
            if not any(path for pattern in KEPT for path in run.path.glob(pattern)):
                shutil.rmtree(run.path, ignore_errors=True)
                if sys.exc_info()[0] is KeyboardInterrupt:
                    notify(f"{run.path}: removed: nothing was saved yet")


def quieten() -> None:
    """Silence notices that our summary replaces, or that are wrong for an endless stream."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*Your `IterableDataset` has `__len__` defined.*",
        # The anchor, or a frozen encoder, is in eval mode on purpose.
        ".*module\\(s\\) in eval mode at the start of training.*",
        ".*You defined a `validation_step` but have no `val_dataloader`.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*lr_scheduler.step\\(\\).*before.*optimizer.step\\(\\).*",
        # The deprecated one is the only all-reduce with a gradient.
        ".*nn.functional.all_reduce is deprecated.*",
        # Validation's values are of all processes already.
        ".*It is recommended to use `self.log\\(.*sync_dist=True\\)`.*",
    ):
        warnings.filterwarnings("ignore", message=message)
