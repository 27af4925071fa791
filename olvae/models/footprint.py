"""Estimate the GPU memory of a training step, from shapes alone and without a GPU."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from olvae.config import instantiate, resolve_class
from olvae.data.pixels.size_and_range import Sides, Size
from olvae.devices import autocast, precision_name
from olvae.models.large.tiling import GIB, LiveBytes
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.muon import is_matrix
from olvae.models.parts.part import Step
from olvae.modules.frozen import Constant

MARGIN = 1.15  # memory needed over the estimate: workspaces of convolutions and fragmentation come on top
BATCHES = (4, 8)  # images of the two micro-batches between which the memory is taken as linear


class Footprint(NamedTuple):
    """Bytes of a training step on one device, and its operations."""

    fixed: int  # weights, gradients, the optimizers' states, the averaged copy, constant networks
    per_image: (
        int  # of a micro-batch: activations for the backward pass, and gradients of activations
    )
    flop: int = 0  # of an image: floating-point operations of products and convolutions, two for each multiply-add

    def total(self, images: int) -> int:
        """Bytes with this many images in a micro-batch."""
        return self.fixed + images * self.per_image


def without_weights(node: Mapping[str, Any]) -> LiteAutoencoderKL:
    """Build a config's model on the meta device: without memory, and without the files of constant networks.

    Only a teacher is loaded. ConfigError if it is not a LiteAutoencoderKL, or is for inference only.
    """
    resolve_class(node["target"], LiteAutoencoderKL)
    with torch.device("meta"):
        model: LiteAutoencoderKL = instantiate(node)
    _ = model.objective  # raises if the config is for inference only
    return model


def footprint(
    model: LiteAutoencoderKL, size: Size, precision: str, checkpoint: bool | None = None
) -> Footprint:
    """The footprint of a training step, of both players where the model has an adversary; it may be on any device.

    The step runs on tensors without memory, forward and backward; the storages alive at its peak are added up, and its
    operations, with those that checkpointing repeats. Workspaces of convolutions, fragmentation and the CUDA context
    are not counted (:data:`MARGIN`). ValueError if the networks do not take images of this size.

    ``checkpoint``: activation checkpointing of both halves; by default as the model has it.
    """
    few, many = (
        _step_under(LiveBytes(), model, size, images, precision, checkpoint).peak
        for images in BATCHES
    )
    counter = FlopCounterMode(display=False)  # in a step of its own: it keeps tensors alive
    flop = (
        _step_under(counter, model, size, BATCHES[0], precision, checkpoint).get_total_flops()
        // BATCHES[0]
    )
    per_image = (many - few) // (BATCHES[1] - BATCHES[0])
    trained = [
        p for player in model.players.values() for p in player.parameters() if p.requires_grad
    ]
    averaged = (
        [p for p in model.autoencoder.parameters() if p.requires_grad] if model.use_ema else []
    )
    held = _bytes(_tensors(model)) + _bytes(averaged) + 2 * _bytes(trained)  # Adam has two moments
    if model.optimizer == "muon":
        held -= _bytes([p for p in model.autoencoder_parameters() if is_matrix(p)])
    return Footprint(held + few - BATCHES[0] * per_image, per_image, flop)


def advice(
    free: int, batch_size: int, accumulated: int, plain: Footprint, checkpointed: Footprint
) -> str | None:
    """Suggest what to change where a micro-batch does not fit into the ``free`` bytes of a device; None where it fits.

    ``checkpointed`` is the footprint with all checkpointing: ``plain`` where the config has it, or can't have it.
    """
    room = free / MARGIN
    if plain.total(batch_size) <= room:
        return None
    remedies = []
    for settings, needs in (("", plain), ("model.params.checkpoint=true ", checkpointed)):
        fitting = [
            n for n in range(1, batch_size + 1) if batch_size % n == 0 and needs.total(n) <= room
        ]
        if fitting and (needs != plain or not settings):
            times = accumulated * batch_size // max(fitting)
            smaller = f"data.params.batch_size={max(fitting)} lightning.trainer.accumulate_grad_batches={times}"
            remedies.append(settings + smaller if max(fitting) < batch_size else settings.rstrip())
    remedy = (
        " or ".join(remedies) or "data.params.size for smaller images, or take narrower networks"
    )
    return (
        f"a step with {batch_size} image{'' if batch_size == 1 else 's'} needs about "
        f"{MARGIN * plain.total(batch_size) / GIB:.1f} GiB, {free / GIB:.1f} GiB are free: set {remedy}"
    )


def _step_under(
    mode: Any,
    model: LiteAutoencoderKL,
    size: Size,
    images: int,
    precision: str,
    checkpoint: bool | None,
) -> Any:
    """The mode, after it saw a micro-batch, without the tensors that live between steps."""
    with FakeTensorMode():
        fake = without_memory(model, checkpoint)
        batch = torch.empty(images, fake.encoder.in_channels, *Sides.of(size), dtype=torch.uint8)
        with (
            mode,
            autocast("cpu", precision_name(precision)),
        ):  # both players, at full size, which parts may reduce
            x, shared = fake.images({"image": batch}), np.random.default_rng(0)
            step = Step(x, None, shared, warming_up=True, adversary_plays=True)
            fake.forward_pass(step)
            total = fake.autoencoder_loss(step)
            if fake.adversary is None or step.reconstruction is None:
                total.backward()
            else:
                (total + fake.adversary.generator_loss(step.reconstruction)).backward()
                fake.adversary.discriminator_loss(step.target, step.reconstruction)[0].backward()
    return mode


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, of constant networks too."""
    networks = [model, *(part.network for part in model.modules() if isinstance(part, Constant))]
    return [t for network in networks for t in (*network.parameters(), *network.buffers())]


def without_memory(model: LiteAutoencoderKL, checkpoint: bool | None = None) -> LiteAutoencoderKL:
    """Copy a model, in training mode, into tensors without memory; call it under a FakeTensorMode."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        learned = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=tensor.requires_grad) if learned else empty
        )
    for holder in [part for part in model.modules() if isinstance(part, Constant)]:
        twin = copy.copy(holder)
        twin._held = (copy.deepcopy(holder.network, memo),)
        memo[id(holder)] = twin
    fake = copy.deepcopy(model, memo).train()
    fake.__dict__["_trainer"] = SimpleNamespace(
        precision_plugin=None, world_size=1
    )  # adaptive weights ask it
    for module in fake.modules():
        if isinstance(
            module, nn.GroupNorm
        ):  # in float32 under a GPU's autocast, and not under a CPU's
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    for half in (fake.encoder, fake.decoder):
        half.train(half in fake.trained_networks)
        if checkpoint is not None:
            with suppress(ValueError):  # of a network that can't: it stays as it is
                half.checkpoint_steps(checkpoint)
    return fake
