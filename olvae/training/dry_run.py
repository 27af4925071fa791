"""Dry-run a training on many ranks without a GPU: record what the first and the last rank send and launch in a step."""

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
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olvae import config as cfg
from olvae.config import Config, ConfigError
from olvae.data.pixels.size_and_range import Sides, Size
from olvae.data.source import Source
from olvae.devices import PRECISIONS, peak_tflops, precision_name
from olvae.models.adversary import Adversary
from olvae.models.footprint import MARGIN, footprint, without_memory
from olvae.models.large.tiling import GIB
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.optimization import HOOKS, players_strategy
from olvae.runs import entry_of
from olvae.training.progress import describe_rate, describe_step
from olvae.training.run import build_model, quieten, strategy_of

FIRST_STEPS = ("first step", "second step")  # in which Adam's moments and DDP's buckets are made
LOGGED = ", logged"  # ends the name of a step whose values go to the loggers
LAUNCH_S = 6e-6  # that Python takes for a launch: an estimate, until docs/gpu.md has a measurement


@dataclass
class RankStep:
    """Messages and launches of a rank in a step."""

    messages: list[str] = field(default_factory=list)  # in order: the operation, shapes and dtypes
    nbytes: int = 0  # of their tensors
    launches: int = 0  # of kernels, at least


def kinds_of_steps(adversary: Adversary | None) -> dict[str, int | None]:
    """The kinds of steps of a training by name: who plays, terms that not every update has, and a logged step.

    Each with the discriminator's updates before it; None where that does not play.
    """
    if adversary is None:
        return {"a step": None, f"a step{LOGGED}": None}
    found: dict[str, int | None] = {"autoencoder alone": None} if adversary.start_step else {}
    first = adversary.warmup_updates
    for updates in range(max(0, first - 1), first + adversary.ramp_steps + 8 * adversary.r1_every):
        who = "both" if updates >= first else "discriminator alone"
        found.setdefault(", ".join([who, *adversary.rare_terms(updates)]), updates)
    both = min((name for name in found if name.startswith("both")), key=len)
    return {**found, both + LOGGED: found[both]}


class _Recorder(TorchDispatchMode):
    """Bring about a step of each kind after the other, and record what it sends and launches."""

    def __init__(self, kinds: Mapping[str, int | None]) -> None:
        super().__init__()
        self.kinds, self.step = iter(kinds.items()), RankStep()
        self.steps: dict[str, RankStep] = {}

    def begin(self, trainer: pl.Trainer, model: LiteAutoencoderKL, *_: Any) -> None:
        if not model.update_is_complete:
            return
        name, updates = next(self.kinds)
        setattr(trainer, "log_every_n_steps", int(name.endswith(LOGGED)))  # noqa: B010  (mypy does not see it)
        if model.adversary is not None:
            model.adversary.start_step = sys.maxsize if updates is None else 0
            model.adversary.updates = updates or 0
        self.step = self.steps[name] = RankStep()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, sends, tensors = kwargs or {}, func.namespace == "c10d", []
        self.step.launches += not (
            sends or func.is_view or func.namespace == "prim" or "empty" in str(func)
        )
        if sends or func is torch.ops.aten.copy_.default:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if sends:
            shapes = (
                f"{'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}"
                for t in tensors
            )
            self.step.messages.append(
                f"{str(func).split('.')[1].strip('_')} of {', '.join(shapes)}"
            )
            self.step.nbytes += sum(tensor.nbytes for tensor in tensors)
        if (
            func is torch.ops.c10d.allreduce_.default
        ):  # DDP takes the sums from the answer, where the fake has none
            sums: torch.futures.Future[list[Tensor]] = torch.futures.Future()
            sums.set_result(list(args[0]))
            return args[0], _create_work_from_future(sums).boxed()
        # DDP writes the numbers of the parameters in each bucket into memory, and sends them.
        numbers = func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") == torch.int32
        real = numbers or (
            tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        )
        with unset_fake_temporarily() if real else nullcontext():
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
    """Train as one of the ranks, on tensors without memory: a step of each kind, with so many images a micro-batch.

    Lightning's loop, DDP's reducers and the optimizers run as they are, under torch's fake process group. Networks are
    not compiled; no callback but the weights' average runs. ``model`` is on the meta device, and is not changed;
    ``strategy`` is one of :data:`~olvae.models.optimization.HOOKS`.
    """
    kinds = kinds_of_steps(model.adversary)
    recorder = _Recorder({**dict.fromkeys(FIRST_STEPS, next(reversed(kinds.values()))), **kinds})
    hook = HOOKS[strategy]  # by another name, because DDP refuses bfloat16's without NCCL
    renamed = None if hook is None else lambda state, bucket: hook(state, bucket)
    mixed = PRECISIONS[precision].lightning
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: Config = {
        **dict.fromkeys(quiet, False),
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.dict(os.environ, LOCAL_RANK=str(rank)),
            mock.patch(
                "torch.distributed.broadcast_object_list"
            ),  # Lightning's own: the same in all ranks
            mock.patch(
                "torch.nn.utils.clip_grad._has_foreach_support", return_value=True
            ),  # a GPU has it
            FakeTensorMode(),
            recorder,
        ):
            warnings.simplefilter("ignore")
            fake = without_memory(model)
            fake.compiled = False
            fake.__dict__.update(
                dict.fromkeys(("to", "cpu", "log_dict"), lambda *_: fake)
            )  # there are no values
            batch = {
                "image": torch.empty(
                    images, fake.encoder.in_channels, *Sides.of(size), dtype=torch.uint8
                )
            }
            pl.Trainer(
                accelerator="cpu",
                devices=ranks,
                strategy=players_strategy(strategy, ddp_comm_hook=renamed, init_sync=False),
                plugins=[
                    LightningEnvironment(),
                    *([] if mixed == "32-true" else [MixedPrecision(mixed, "cpu")]),
                ],
                callbacks=[LambdaCallback(on_train_batch_start=recorder.begin)],
                max_epochs=1,
                **settings,
            ).fit(
                fake, repeat(batch, (len(FIRST_STEPS) + len(kinds)) * fake.accumulate_grad_batches)
            )
    except DataDependentOutputException as error:
        raise ConfigError(
            f"a step asks for a value, which a dry run does not have: {error}"
        ) from error
    finally:
        dist.destroy_process_group()
    return recorder.steps


def dry_run(
    config: Config, ranks: int, precision: str | None = None
) -> tuple[dict[str, RankStep], list[str]]:
    """Run the steps of a config's training as the first and the last of some ranks.

    Returns the first one's by kind, and sentences on data, learning rate, memory and time. ``precision`` is by default
    the config's.

    Raises ConfigError or ValueError: a mistake in the config, data that can't be shared among so many, or ranks that
    would wait for each other, because they do not send the same messages in the same order.
    """
    trainer = dict(entry_of(config, "lightning.trainer") or {})
    precision = precision_name(str(precision or trainer.get("precision") or "32"))
    strategy = strategy_of(trainer)
    params = entry_of(config, "data.params") or {}
    size, images = Sides.of(params.get("size") or 256), params.get("batch_size") or 1
    try:
        source: Source = cfg.instantiate(config["data"])
    except OSError as error:
        notes = [f"data: not checked: {error}"]
    else:
        size, images, notes = source.size, source.batch_size, check_data(source, ranks)
    quieten()
    with torch.device("meta"):
        model = build_model(config, trainer)
    last, first = (
        record_steps(model, images, size, precision, strategy, rank, ranks)
        for rank in (ranks - 1, 0)
    )
    for name, step in first.items():
        for number, (one, other) in enumerate(
            zip_longest(step.messages, last[name].messages, fillvalue="none"), 1
        ):
            if one != other:
                where = f"{one} on rank 0, and {other} on rank {ranks - 1}"
                raise ConfigError(
                    f"{name}: message {number} is {where}: they would wait for each other"
                )
    steps = {name: step for name, step in first.items() if name not in FIRST_STEPS}
    needs, batches = footprint(model, size, precision), model.accumulate_grad_batches
    host_s = (
        LAUNCH_S
        * max(step.launches for name, step in steps.items() if not name.endswith(LOGGED))
        / batches
    )
    whole, each = (f"{n / GIB:.3g} GiB" for n in (needs.total(images), needs.per_image))
    return steps, [
        *notes,
        f"images: {images * batches * ranks} a step = {images} x {batches} accumulated x {ranks} ranks, {size} pixels",
        f"learning rate: {describe_rate(model)}; the number of ranks does not change it",
        f"memory: {whole} a rank in {precision}, {each} for each image of a micro-batch; allow {MARGIN - 1:.0%} more",
        describe_step(
            needs.flop, images, peak_tflops("H100", precision), model.compiled, host_s, "an H100"
        ),
        f"ranks 0 and {ranks - 1} send the same messages in the same order",
    ]


def check_data(source: Source, ranks: int) -> list[str]:
    """Sentences on images that all ranks do not have enough of; ValueError if they can't be shared."""
    source.check_processes(ranks)
    step, known, val = source.batch_size * ranks, source.samples_per_epoch, source.val_images
    notes = [f"data: {source.describe()}"]
    if known is not None and known < step:
        notes.append(
            f"data: {step} images of all ranks are more than an epoch's {known}: some come twice in a step"
        )
    if val is not None and val < ranks:
        notes.append(
            f"data: {val} validation images: {ranks - val} ranks have none, and wait for the others"
        )
    return notes
