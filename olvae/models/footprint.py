"""Estimate the GPU memory of a training step, from shapes alone and without a GPU."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from olvae.config import instantiate, resolve_class
from olvae.data.pixels.size_and_range import Sides, Size
from olvae.devices import autocast, precision_name
from olvae.library_internals import FakeTensorMode
from olvae.models.large.tiling import GIB, LiveBytes
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.part import Step
from olvae.models.updates.muon import is_matrix
from olvae.modules.frozen import Frozen

# Memory needed over the estimate: workspaces of convolutions and fragmentation come on top.
MARGIN = 1.15
# Images of two micro-batches; the memory of any number follows from a line through the two.
BATCHES = (4, 8)


class Footprint(NamedTuple):
    """Bytes of a training step on one device, and its operations."""

    fixed: int  # weights, gradients, the optimizers' states, the averaged copy, constant networks
    per_image: int  # activations for the backward pass, and gradients of activations
    # Of an image: floating-point operations of products and convolutions, two a multiply-add.
    flop: int = 0

    def total(self, images: int) -> int:
        """Bytes with this many images in a micro-batch."""
        return self.fixed + images * self.per_image


def without_weights(node: Mapping[str, Any]) -> LiteAutoencoderKL:
    """Build a config's model on the meta device, without memory.

    Of files with weights, only a teacher's are read. ConfigError if the model is not a
    LiteAutoencoderKL, or is for inference only.
    """
    resolve_class(node["target"], LiteAutoencoderKL)
    with torch.device("meta"):
        model: LiteAutoencoderKL = instantiate(node)
    _ = model.objective  # raises if the config is for inference only
    return model


def footprint(
    model: LiteAutoencoderKL, size: Size, precision: str, checkpoint: bool | None = None
) -> Footprint:
    """The footprint of a training step, of both players if there is an adversary.

    The model may be on any device. The step runs on tensors without memory, forward and backward:
    the storages alive at its peak are added up, and its operations, with the ones that
    checkpointing repeats. Workspaces of convolutions, fragmentation and the CUDA context are not
    counted (:data:`MARGIN`). ValueError if the networks do not take images of this size.

    ``checkpoint``: activation checkpointing of both halves; by default as the model has it.
    """
    # Bytes of activations are linear in the images. Operations are counted in a step of their own,
    # because the counter keeps tensors alive.
    few, many = (
        _step_under(LiveBytes(), model, size, images, precision, checkpoint).peak
        for images in BATCHES
    )
    per_image = (many - few) // (BATCHES[1] - BATCHES[0])
    counter = FlopCounterMode(display=False)
    counted = _step_under(counter, model, size, BATCHES[0], precision, checkpoint)
    flop = counted.get_total_flops() // BATCHES[0]

    # What lives between steps: weights, their average, and the optimizers' moments. Adam has two of
    # them, Muon one for a matrix.
    held = _bytes(_tensors(model))
    if model.use_ema:
        held += _bytes(p for p in model.autoencoder.parameters() if p.requires_grad)
    for player in model.players.values():
        held += 2 * _bytes(p for p in player.parameters() if p.requires_grad)
    if model.optimizer == "muon":
        held -= _bytes(p for p in model.autoencoder_parameters() if is_matrix(p))
    return Footprint(held + few - BATCHES[0] * per_image, per_image, flop)


def advice(
    free: int, batch_size: int, accumulated: int, plain: Footprint, checkpointed: Footprint
) -> str | None:
    """Suggest what to change if a micro-batch does not fit into the ``free`` bytes of a device.

    None if it fits. ``checkpointed`` is the footprint with all checkpointing: ``plain`` if the
    config has that, or can't have it.
    """
    room = free / MARGIN
    if plain.total(batch_size) <= room:
        return None

    # With as few changes as possible: the largest part of the batch that fits, without and with
    # checkpointing.
    remedies = []
    for settings, needs in (([], plain), (["model.params.checkpoint=true"], checkpointed)):
        if settings and needs == plain:
            continue
        fitting = [
            n for n in range(1, batch_size + 1) if batch_size % n == 0 and needs.total(n) <= room
        ]
        if not fitting:
            continue
        largest = max(fitting)
        if largest < batch_size:
            times = accumulated * batch_size // largest
            settings = [
                *settings,
                f"data.params.batch_size={largest}",
                f"lightning.trainer.accumulate_grad_batches={times}",
            ]
        remedies.append(" ".join(settings))
    remedy = (
        " or ".join(remedies) or "data.params.size for smaller images, or take narrower networks"
    )
    return (
        f"a step with {batch_size} image{'' if batch_size == 1 else 's'} needs about "
        f"{MARGIN * plain.total(batch_size) / GIB:.1f} GiB, {free / GIB:.1f} GiB are free: set "
        f"{remedy}"
    )


def _step_under(
    mode: Any,
    model: LiteAutoencoderKL,
    size: Size,
    images: int,
    precision: str,
    checkpoint: bool | None,
) -> Any:
    """Run a micro-batch under a mode, and return the mode.

    It does not see the tensors that live between steps.
    """
    with FakeTensorMode():
        fake = without_memory(model, checkpoint)
        batch = torch.empty(images, fake.encoder.in_channels, *Sides.of(size), dtype=torch.uint8)
        with mode, autocast("cpu", precision_name(precision)):
            # Both players. Parts may reduce the images of a step, but not of a warm-up.
            x = fake.images({"image": batch})
            shared = np.random.default_rng(0)
            step = Step(x, None, shared, warming_up=True, adversary_plays=True)
            fake.forward_pass(step)
            total = fake.autoencoder_loss(step)
            if fake.adversary is None or step.reconstruction is None:
                total.backward()
            else:
                (total + fake.adversary.generator_loss(step.reconstruction)).backward()
                loss, _ = fake.adversary.discriminator_loss(step.target, step.reconstruction)
                loss.backward()
    return mode


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, also of constant networks."""
    networks = [model]
    networks += [part.network for part in model.modules() if isinstance(part, Frozen)]
    tensors: list[Tensor] = []
    for network in networks:
        tensors += network.parameters()
        tensors += network.buffers()
    return tensors


def without_memory(model: LiteAutoencoderKL, checkpoint: bool | None = None) -> LiteAutoencoderKL:
    """Copy a model, in training mode, to tensors without memory, under a FakeTensorMode."""
    # Copies of all tensors, for deepcopy to find; and of constant networks, which copies share.
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    for holder in list(model.modules()):
        if isinstance(holder, Frozen):
            twin = copy.copy(holder)
            twin._held = (copy.deepcopy(holder.network, memo),)
            memo[id(holder)] = twin
    fake = copy.deepcopy(model, memo).train()

    # What a step asks: adaptive weights the trainer, GPUs for float32 in GroupNorm under autocast.
    fake.__dict__["_trainer"] = SimpleNamespace(precision_plugin=None)
    for module in fake.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    for half in (fake.encoder, fake.decoder):
        half.train(half in fake.trained_networks)
        if checkpoint is not None:
            with suppress(ValueError):  # a network that can't stays as it is
                half.checkpoint_steps(checkpoint)
    return fake
