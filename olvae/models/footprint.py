"""What a training step needs on its device, in bytes, counted on tensors without memory."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from olvae.config import ConfigError, instantiate
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.part import Step
from olvae.modules.base import Steps
from olvae.modules.frozen import Constant

__all__ = ["CHECKPOINTS", "Checkpoint", "Footprint", "Kept", "advice", "footprints", "keep", "without_weights"]

Checkpoint = bool | Literal["encoder", "decoder"]
CHECKPOINTS: tuple[Checkpoint, ...] = (False, "encoder", "decoder", True)
"""The values of ``model.params.checkpoint``."""

AUTOCAST = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}

GIB = 2**30

MARGIN = 1.15
"""What a device should have, relative to what is counted: gradients of activations and workspaces come on top."""

Storages = dict[int, Tensor]
"""A tensor of each storage, by the storage's address: held, so that no address is used twice."""


class Moment(NamedTuple):
    """What is kept for the backward pass at one time: whatever the batch, as self-modulated weights, and per image."""

    shared: int
    per_image: int

    def kept(self, images: int) -> int:
        return self.shared + images * self.per_image


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step on one device.

    Args:
        held: between steps: weights, the optimizers' states, the averaged copy, networks that are constants.
        gradients: of everything that is trained.
        moments: after the losses, in each step that is computed again, and in the discriminator's turn.
    """

    held: int
    gradients: int
    moments: tuple[Moment, ...]

    @property
    def largest(self) -> Moment:
        """The moment that decides how large a batch can be."""
        return max(self.moments, key=lambda moment: (moment.per_image, moment.shared))

    @property
    def per_image(self) -> int:
        return self.largest.per_image

    @property
    def fixed(self) -> int:
        """All but the images'."""
        return self.held + self.gradients + self.largest.shared

    def total(self, images: int) -> int:
        """With this many images in a micro-batch."""
        return self.held + self.gradients + max(moment.kept(images) for moment in self.moments)

    def least(self, images: int) -> int:
        """What can't be done without, even if gradients take the place of what was kept for them."""
        return self.held + max(self.gradients, *(moment.kept(images) for moment in self.moments))


def without_weights(node: Mapping[str, Any]) -> LiteAutoencoderKL:
    """Build a config's model on the meta device: without memory, and without the files of constant networks.

    Only a teacher is loaded.

    Args:
        node: the config's ``model``.

    Raises:
        ConfigError: it is not a LiteAutoencoderKL, or is for inference only.
    """
    with torch.device("meta"):
        model = instantiate(node)
    if not isinstance(model, LiteAutoencoderKL):
        raise ConfigError(f"model.target: {node['target']} is not a LiteAutoencoderKL")
    _ = model.objective  # raises if the config is for inference only
    return model


def footprints(
    model: LiteAutoencoderKL, size: int, precision: str, device: Literal["cuda", "cpu"] = "cuda"
) -> dict[tuple[Literal["A", "B"], Checkpoint], Footprint]:
    """The footprint of a training step, by phase and checkpointing: phase B where the model has an adversary.

    Counted from what autograd keeps of one image and of two, in float32 and under autocast. Not counted are gradients
    of activations (:data:`MARGIN`), cuDNN's workspaces, and the CUDA context.

    Args:
        model: on any device, the meta device too; it is not changed.
        size: of the images in pixels.
        precision: 32, bf16 or 16.
        device: whose autocast rules count.

    Raises:
        ValueError: the networks do not take images of this size.
    """
    one, two = (keep(model, size, images, precision, device) for images in (1, 2))
    found: dict[tuple[Literal["A", "B"], Checkpoint], Footprint] = {}
    phases: tuple[Literal["A", "B"], ...] = ("A",) if model.adversary is None else ("A", "B")
    for phase, checkpoint in itertools.product(phases, CHECKPOINTS):
        moments = zip(*(kept.moments(phase, checkpoint) for kept in (one, two)), strict=True)
        found[phase, checkpoint] = Footprint(
            *_constant(model, adversary=phase == "B"),
            tuple(Moment(2 * of_one - of_two, of_two - of_one) for of_one, of_two in moments),
        )
    return found


class _Step(NamedTuple):
    half: str
    inputs: Storages
    inside: Storages


class Kept:
    """What autograd keeps of one micro-batch: in steps that can be computed again, and outside of them by part.

    Args:
        own: of the model's weights and constants, which do not count.
    """

    def __init__(self, own: Storages) -> None:
        self.own = own
        self.steps: list[_Step] = []
        self.parts: dict[str, Storages] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Collect what is kept in this context, outside of steps."""
        with _collect(self.parts.setdefault(name, {})):
            yield

    def step(self, network: Steps, half: str, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """A :meth:`Steps.step` that collects what the step keeps."""
        if not (network.training and torch.is_grad_enabled()):
            return run(*inputs)
        inside: Storages = {}
        with _collect(inside):
            out = run(*inputs)
        self.steps.append(_Step(half, _storages(t for t in inputs if t is not None), inside))
        return out

    def networks(self, checkpoint: Checkpoint) -> Storages:
        """What the encoder and the decoder keep."""
        kept = dict(self.parts["networks"])
        for step in self.steps:
            kept |= step.inputs if checkpoint in (True, step.half) else step.inside
        return kept

    def bytes(self, *storages: Storages) -> int:
        """Each storage counts once, the model's own do not."""
        merged = {k: t for part in storages for k, t in part.items() if k not in self.own}
        return _bytes(merged.values())

    def moments(self, phase: Literal["A", "B"], checkpoint: Checkpoint) -> list[int]:
        """Bytes kept after the losses, in each step that is computed again, and in the discriminator's turn."""
        networks = self.networks(checkpoint)
        losses = [self.parts["losses"], *([self.parts["adversarial"]] if phase == "B" else [])]
        again = [step.inside for step in self.steps if checkpoint in (True, step.half)]
        moments = [self.bytes(networks, *losses), *(self.bytes(networks, inside) for inside in again)]
        if phase == "B":
            moments.append(self.bytes(self.parts["discriminator"]))
        return moments


def keep(model: LiteAutoencoderKL, size: int, images: int, precision: str, device: Literal["cuda", "cpu"]) -> Kept:
    """What autograd keeps of a micro-batch of ``images``; see :func:`footprints`."""
    mode = FakeTensorMode()
    dtype = AUTOCAST[precision]
    autocast = torch.autocast("cpu", dtype=dtype, cache_enabled=False) if dtype is not None else nullcontext()
    with mode:
        fake = _fake(model)
        fake.__dict__["_trainer"] = SimpleNamespace(precision_plugin=None, world_size=1)  # adaptive weights ask it
        kept = Kept(_storages(_tensors(fake)))
        for half, network in (("encoder", fake.encoder), ("decoder", fake.decoder)):
            network.eval() if getattr(fake, f"freeze_{half}") else network.train()
            for part in network.modules():
                if isinstance(part, Steps):
                    part.__dict__["step"] = partial(kept.step, part, half)
            network.checkpoint_steps()  # so that every network hands over its steps
        with autocast, _LikeCUDA() if device == "cuda" else nullcontext():
            _training_step(fake, kept, torch.empty(images, fake.encoder.in_channels, size, size, dtype=torch.uint8))
    return kept


def _training_step(model: LiteAutoencoderKL, kept: Kept, images: Tensor) -> None:
    """The forward passes of a step with both players."""
    shared = np.random.default_rng(0)
    # A warm-up's images keep their size, which needs the most.
    step = Step(model.images({"image": images}), None, shared, warming_up=True, adversary_plays=True)
    with kept.part("networks"):
        model.forward_pass(step)
    with kept.part("losses"):
        model.autoencoder_loss(step)
    if model.adversary is not None and step.reconstruction is not None:
        with kept.part("adversarial"):
            model.adversary.generator_loss(step.reconstruction)
        with kept.part("discriminator"):
            model.adversary.discriminator_loss(step.target, step.reconstruction)


def _constant(model: LiteAutoencoderKL, adversary: bool) -> tuple[int, int]:
    """Bytes held between steps, and of gradients."""
    everything = _bytes(_tensors(model))
    trained = model.autoencoder_parameters()
    if model.adversary is not None:
        if adversary:
            trained = [*trained, *model.adversary.discriminator.parameters()]
        else:
            everything -= _bytes(_tensors(model.adversary))
    averaged = _bytes(p for p in model.autoencoder.parameters() if p.requires_grad) if model.use_ema else 0
    return everything + averaged + 2 * _bytes(trained), _bytes(trained)  # Adam has two moments


class _LikeCUDA(TorchFunctionMode):
    """Under autocast a GPU normalises groups in float32; a CPU takes what it gets."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.group_norm, F.group_norm) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def _collect(into: Storages) -> saved_tensors_hooks:
    def pack(tensor: Tensor) -> Tensor:
        into.update(_storages([tensor]))
        return tensor

    return saved_tensors_hooks(pack, lambda tensor: tensor)


def _storages(tensors: Iterable[Tensor]) -> Storages:
    return {t.untyped_storage()._cdata: t for t in tensors}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, of constant networks too."""
    parts = [model, *(part.network for part in model.modules() if isinstance(part, Constant))]
    return [t for part in parts for t in (*part.parameters(), *part.buffers())]


def _fake(model: LiteAutoencoderKL) -> LiteAutoencoderKL:
    """A copy whose tensors have no memory; under a FakeTensorMode."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        learned = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if learned else empty
    holders = [part for part in model.modules() if isinstance(part, Constant)]
    for holder in holders:
        twin = copy.copy(holder)
        twin.__dict__["network"] = copy.deepcopy(holder.network, memo)
        memo[id(holder)] = twin
    return copy.deepcopy(model, memo)


def advice(
    device_bytes: int, batch_size: int, accumulated: int, footprint: Footprint, checkpointed: Footprint
) -> str | None:
    """What to change where a micro-batch does not fit, in one sentence; None where it fits.

    Args:
        device_bytes: free on the device before training.
        batch_size: images of a micro-batch.
        accumulated: micro-batches of an update.
        footprint: as the config is.
        checkpointed: with all checkpointing; the same where the config has it.
    """
    room = device_bytes / MARGIN
    if footprint.total(batch_size) <= room:
        return None

    def smaller(what: Footprint) -> str | None:
        parts = [n for n in range(1, batch_size) if batch_size % n == 0 and what.total(n) <= room]
        if not parts:
            return None
        times = accumulated * batch_size // max(parts)
        return f"data.params.batch_size={max(parts)} lightning.trainer.accumulate_grad_batches={times}"

    remedies = [change for change in (smaller(footprint),) if change is not None]
    if checkpointed != footprint:
        if checkpointed.total(batch_size) <= room:
            remedies.append("model.params.checkpoint=true")
        elif not remedies and (both := smaller(checkpointed)) is not None:
            remedies.append(f"model.params.checkpoint=true {both}")
    remedy = " or ".join(remedies) or "data.params.size for smaller images, or take narrower networks"
    return (
        f"a step with {batch_size} image{'' if batch_size == 1 else 's'} needs about "
        f"{MARGIN * footprint.total(batch_size) / GIB:.1f} GiB, {device_bytes / GIB:.1f} GiB are free: set {remedy}"
    )
