"""Dry-run a training on many ranks without a GPU: record each step's messages and launches."""

import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import repeat, zip_longest
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from olvae import config as cfg
from olvae.config import Config, ConfigError
from olvae.data.pixels.size_and_range import Sides, Size
from olvae.data.source import Source
from olvae.devices import PRECISIONS, peak_tflops, precision_name
from olvae.library_internals import (
    HAS_FOREACH,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    fake_store,
    finished_work,
    real_tensors,
    tree_leaves,
    value_needed_error,
)
from olvae.models.adversary import Adversary
from olvae.models.footprint import MARGIN, footprint, without_memory
from olvae.models.large.tiling import GIB
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.ddp import HOOKS, players_strategy
from olvae.runs import entry_of
from olvae.training.progress import describe_step
from olvae.training.run import build_model, quieten, strategy_of
from olvae.training.summary import describe_rate

# Steps before those that are reported: they make Adam's moments and DDP's buckets.
FIRST_STEPS = ("first step", "second step")

LOGGED = ", logged"  # ends the name of a step whose values go to the loggers

# Seconds that Python takes per launch: an estimate, until docs/gpu.md has a measurement.
LAUNCH_S = 6e-6


@dataclass
class RankStep:
    """Messages and launches of a rank in a step."""

    messages: list[str] = field(default_factory=list)  # in order: the operation, shapes and dtypes
    nbytes: int = 0  # of the messages' tensors
    launches: int = 0  # of kernels, at least


def kinds_of_steps(adversary: Adversary | None) -> dict[str, int | None]:
    """Name the kinds of steps of a training: who plays, rare terms such as R1, and a logged step.

    Each with the number of discriminator updates before it; None if the discriminator does not
    play.
    """
    if adversary is None:
        return {"a step": None, f"a step{LOGGED}": None}
    found: dict[str, int | None] = {}
    if adversary.start_step:
        found["autoencoder alone"] = None

    # From the last update of the warm-up until all rare terms, and their combinations, have come.
    first = adversary.warmup_updates
    for updates in range(max(0, first - 1), first + adversary.ramp_steps + 8 * adversary.r1_every):
        who = "both" if updates >= first else "discriminator alone"
        found.setdefault(", ".join([who, *adversary.rare_terms(updates)]), updates)

    # The logged step is the one with the fewest rare terms.
    both = min((name for name in found if name.startswith("both")), key=len)
    return {**found, both + LOGGED: found[both]}


class _Recorder(TorchDispatchMode):
    """Run one step of each kind and record its collectives and kernel launches."""

    def __init__(self, kinds: Mapping[str, int | None]) -> None:
        super().__init__()
        self.kinds = iter(kinds.items())
        self.step = RankStep()
        self.steps: dict[str, RankStep] = {}

    def begin(self, trainer: pl.Trainer, model: LiteAutoencoderKL, *_: Any) -> None:
        """Bring about the next kind of step, and record it from here; called before each batch."""
        if not model.update_is_complete:
            return
        name, updates = next(self.kinds)
        # By setattr, as mypy does not know the attribute.
        setattr(trainer, "log_every_n_steps", int(name.endswith(LOGGED)))  # noqa: B010
        if model.adversary is not None:
            model.adversary.start_step = sys.maxsize if updates is None else 0
            model.adversary.updates = updates or 0
        self.step = self.steps[name] = RankStep()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, and run it: on fake tensors, or on real ones if DDP needs values."""
        kwargs = kwargs or {}
        sends = func.namespace == "c10d"
        copies = func is torch.ops.aten.copy_.default

        # Launches: no views, no allocations, and nothing that torch does in Python ("prim").
        if not (sends or func.is_view or func.namespace == "prim" or "empty" in str(func)):
            self.step.launches += 1

        # Messages, such as "allreduce of 3x3 float32".
        tensors = []
        if sends or copies:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if sends:
            described = []
            for tensor in tensors:
                shape = "x".join(map(str, tensor.shape))
                described.append(f"{shape} {str(tensor.dtype).removeprefix('torch.')}")
                self.step.nbytes += tensor.nbytes
            operation = str(func).split(".")[1].strip("_")
            self.step.messages.append(f"{operation} of {', '.join(described)}")

        # DDP takes the sums from the answer of an all-reduce, which the fake process group leaves
        # empty: answer with what was sent.
        if func is torch.ops.c10d.allreduce_.default:
            return args[0], finished_work(list(args[0]))
        # torch 2.8 has no barrier for fake tensors.
        if func is torch.ops.c10d.barrier.default:
            return finished_work([])

        # DDP writes the numbers of the parameters in each bucket into real memory (int32), and
        # sends them: these tensors, and operations on real tensors alone, are not faked.
        numbers = func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") == torch.int32
        faked = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        real = numbers or (tensors and not faked)
        with real_tensors() if real else nullcontext():
            return func(*args, **kwargs)


def record_steps(
    model: LiteAutoencoderKL,
    images: int,
    size: Size,
    precision: str,
    strategy: str,
    rank: int,
    ranks: int,
) -> dict[str, RankStep]:
    """Train as one of the ranks, on tensors without memory, for a step of each kind.

    Lightning's loop, DDP's reducers and the optimizers run as they are, under torch's fake process
    group. Networks are not compiled; no callback but the weights' average runs.

    Args:
        model: on the meta device; it is not changed.
        images: images in a micro-batch.
        strategy: one of :data:`~olvae.models.updates.ddp.HOOKS`.
    """
    kinds = kinds_of_steps(model.adversary)
    usual = next(reversed(kinds.values()))
    recorder = _Recorder({**dict.fromkeys(FIRST_STEPS, usual), **kinds})

    # DDP refuses its bfloat16 hook without NCCL, by its name: wrap it.
    hook = HOOKS[strategy]
    renamed = None if hook is None else lambda state, bucket: hook(state, bucket)
    mixed = PRECISIONS[precision].lightning
    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=ranks)
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.dict(os.environ, LOCAL_RANK=str(rank)),
            # What Lightning broadcasts is the same in all ranks.
            mock.patch("torch.distributed.broadcast_object_list"),
            # Clip gradients by the operations of a GPU.
            mock.patch(HAS_FOREACH, return_value=True),
            FakeTensorMode(),
            recorder,
        ):
            warnings.simplefilter("ignore")
            fake = without_memory(model)
            fake.compiled = False
            # Tensors can't be moved, and have no values to log.
            fake.__dict__.update(dict.fromkeys(("to", "cpu", "log_dict"), lambda *_: fake))
            shape = (images, fake.encoder.in_channels, *Sides.of(size))
            batch = {"image": torch.empty(shape, dtype=torch.uint8)}
            plugins: list[Any] = [LightningEnvironment()]
            if mixed != "32-true":
                plugins.append(MixedPrecision(mixed, "cpu"))
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=ranks,
                strategy=players_strategy(strategy, ddp_comm_hook=renamed, init_sync=False),
                plugins=plugins,
                callbacks=[LambdaCallback(on_train_batch_start=recorder.begin)],
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                use_distributed_sampler=False,
            )
            steps = len(FIRST_STEPS) + len(kinds)
            trainer.fit(fake, repeat(batch, steps * fake.accumulate_grad_batches))
    except value_needed_error() as error:
        why = "a step asks for a value, which a dry run does not have"
        raise ConfigError(f"{why}: {error}") from error
    finally:
        dist.destroy_process_group()
    return recorder.steps


def dry_run(
    config: Config, ranks: int, precision: str | None = None
) -> tuple[dict[str, RankStep], list[str]]:
    """Run the steps of a config's training as the first and the last of some ranks.

    Returns the first one's by kind, and sentences on data, learning rate, memory and time.
    ``precision``: the config's by default.

    Raises ConfigError or ValueError: a mistake in the config, data that can't be shared among so
    many, or ranks that would wait for each other, because they do not send the same messages in
    the same order.
    """
    trainer = dict(entry_of(config, "lightning.trainer") or {})
    precision = precision_name(str(precision or trainer.get("precision") or "32"))
    strategy = strategy_of(trainer)

    # Data, if they are here; else the config's size and batch size.
    params = entry_of(config, "data.params") or {}
    size = Sides.of(params.get("size") or 256)
    images = params.get("batch_size") or 1
    try:
        source: Source = cfg.instantiate(config["data"])
    except OSError as error:
        notes = [f"data: not checked: {error}"]
    else:
        size = source.size
        images = source.batch_size
        notes = check_data(source, ranks)

    # Steps, which have to send the same in the first and the last rank.
    quieten()
    with torch.device("meta"):
        model = build_model(config, trainer)
    last = record_steps(model, images, size, precision, strategy, ranks - 1, ranks)
    first = record_steps(model, images, size, precision, strategy, 0, ranks)
    for name, step in first.items():
        pairs = zip_longest(step.messages, last[name].messages, fillvalue="none")
        for number, (one, other) in enumerate(pairs, 1):
            if one != other:
                raise ConfigError(
                    f"{name}: message {number} is {one} on rank 0, and {other} on rank "
                    f"{ranks - 1}: they would wait for each other"
                )
    steps = {name: step for name, step in first.items() if name not in FIRST_STEPS}

    # Memory, and time of a micro-batch: of the kind of step with the most launches.
    needs = footprint(model, size, precision)
    batches = model.accumulate_grad_batches
    launches = max(step.launches for name, step in steps.items() if not name.endswith(LOGGED))
    host_s = LAUNCH_S * launches / batches
    peak = peak_tflops("H100", precision)
    whole = f"{needs.total(images) / GIB:.3g} GiB"
    each = f"{needs.per_image / GIB:.3g} GiB"
    return steps, [
        *notes,
        f"images: {images * batches * ranks} a step = {images} x {batches} accumulated x {ranks} "
        f"ranks, {size} pixels",
        f"learning rate: {describe_rate(model)}; the number of ranks does not change it",
        f"memory: {whole} a rank in {precision}, {each} for each image of a micro-batch; "
        f"allow {MARGIN - 1:.0%} more",
        describe_step(needs.flop, images, peak, model.compiled, host_s, "an H100"),
        f"ranks 0 and {ranks - 1} send the same messages in the same order",
    ]


def check_data(source: Source, ranks: int) -> list[str]:
    """Describe the data, and warn if there are too few for all ranks; ValueError if unshareable."""
    source.check_processes(ranks)
    step = source.batch_size * ranks
    epoch = source.samples_per_epoch
    validation = source.val_images
    notes = [f"data: {source.describe()}"]
    if epoch is not None and epoch < step:
        notes.append(
            f"data: {step} images of all ranks are more than an epoch's {epoch}: "
            "some come twice in a step"
        )
    if validation is not None and validation < ranks:
        notes.append(
            f"data: {validation} validation images: {ranks - validation} ranks have none, "
            "and wait for the others"
        )
    return notes
