"""The contract of a part: a way to train that a config adds to LiteAutoencoderKL by its class path."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from olvae.config import Node, instantiate, resolve_class
from olvae.data.source import Source
from olvae.modules.distributions import Posterior

if TYPE_CHECKING:
    from olvae.models.liteautoencoder import LiteAutoencoderKL
    from olvae.models.parts.teacher import Teacher

Model: TypeAlias = "LiteAutoencoderKL"  # that a part belongs to
StandIn: TypeAlias = "Teacher"


@dataclass
class Step:
    """A micro-batch on its way through a training step; parts read it, and change it in their first two hooks."""

    images: Tensor  # what is encoded: (B, C, H, W) in [-1, 1]
    moments: (
        Tensor | None
    )  # of a posterior that the data provide for the images, (B, 2 n_z, H/f, W/f)
    shared: (
        np.random.Generator
    )  # draws the same numbers in every process and every micro-batch of an update
    warming_up: (
        bool  # the discriminator trains alone: without gradients or losses of the autoencoder
    )
    adversary_plays: (
        bool  # whether the adversary sees this reconstruction; a part may let it sit out
    )
    target: Tensor = field(
        init=False
    )  # what the reconstruction is compared with; the images, unless a part changes it
    encoded: Posterior | None = field(init=False)
    """The encoder's posterior; None where a part stands in for a frozen encoder."""
    posterior: Posterior = field(init=False)
    """The posterior that the latent is drawn from: a stand-in's if there is one, else ``encoded``."""
    drawn: Tensor = field(init=False)  # its sample, or its mode without ``sample_posterior``
    latent: Tensor = field(
        init=False
    )  # what the decoder gets, (B, n_z, h, w); ``drawn``, unless a part changes it
    reconstruction: Tensor | None = field(init=False)
    """(B, C, f h, f w); None where a part stands in for a frozen decoder."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Unweighted losses so far, by name: those of the objective, then of the parts in their order."""
    ratios: dict[str, Tensor] = field(
        default_factory=dict
    )  # of gradients, by which losses are weighted


Loss = tuple[Tensor, Tensor | float]  # an unweighted loss, a scalar, and its weight


class Part(nn.Module):
    """A way to train: override the hooks that are needed. ``model`` is the LiteAutoencoderKL that the part belongs to.

    Parts act in the order of the config. Parameters that need gradients are trained with the autoencoder, and not
    averaged; all parameters and buffers are in checkpoints, and in no export. Random numbers come from torch's global
    generator, which each step seeds, or from ``step.shared``.
    """

    latents: ClassVar[Literal["free", "kept", "given"]] = "free"
    """Where training may take the latents: anywhere, no further than where it started, or to another autoencoder's."""

    needs_activations: ClassVar[bool] = (
        False  # whether it looks at activations that checkpointing drops
    )

    better: ClassVar[
        Mapping[str, str]
    ] = {}  # ``higher`` or ``lower``, of summarise's values that best.ckpt may follow

    name: str = ""  # its key under model.params.parts

    @property
    def stand_in(self) -> "StandIn | None":
        """An autoencoder of the same latents: the decoder learns from it, and it replaces frozen halves."""
        return None

    def attach(self, model: Model) -> None:
        """Build what depends on the model's networks, which have their initial weights."""

    def conflicts(self, model: Model) -> Iterable[str]:
        """One line for each setting that contradicts this part, as ``setting: why``, relative to ``model.params``."""
        return ()

    def check(self, model: Model, source: Source) -> None:
        """Raise ConfigError unless the part can train on the source's images."""

    def prepare(self, model: Model, source: Source, seed: int, device: torch.device) -> None:
        """Before the first step of a new run, and not of a resumed one: measure or fit on :func:`first_images`."""

    def start(self, model: Model, resumed: bool) -> None:
        """Before the first step and after every resume, with the weights on their device."""

    def watch(self, model: Model) -> AbstractContextManager[None]:
        """A context around the autoencoder's forward pass of a step."""
        return nullcontext()

    def on_images(self, model: Model, step: Step) -> None:
        """Change the images or ``adversary_plays`` before encoding; moments, where there are any, are of the images."""

    def on_latent(self, model: Model, step: Step) -> None:
        """Change the latent, the target or ``adversary_plays`` before decoding."""

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        """Losses of the autoencoder by name, each logged as ``train/NAME``, or ``train/PART_NAME`` if that is taken."""
        return {}

    def validate(self, model: Model, x: Tensor, moments: Tensor | None) -> Mapping[str, Tensor]:
        """Means over the images of a validation batch by name; see :meth:`summarise`."""
        return {}

    def summarise(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Values to log as ``val/NAME``, from the means of :meth:`validate` over all images and processes."""
        return means

    def checksum(self) -> str | None:
        """A checksum of frozen weights that the settings only name; a resumed run must find the same."""
        return None

    def describe(self) -> str:
        """One line for the summary of a run, or nothing."""
        return ""


def attach_parts(model: Model, nodes: Mapping[str, Node | None]) -> Iterator[str]:
    """Build a model's parts from their nodes, and yield one line for each that can't be built."""
    for name, node in nodes.items():
        if node is None:
            continue
        if not name.isidentifier() or hasattr(model.parts, name):
            yield f"parts.{name}: expected a name of letters, digits and underscores, and none of torch's, such as keys"
            continue
        try:
            resolve_class(node["target"], Part)
            part = instantiate(node)
        except ValueError as error:
            yield from (
                f"parts.{name}: {mistake}" for mistake in getattr(error, "mistakes", [error])
            )
            continue
        part.name = name
        model.parts[name] = part
        part.attach(model)


def first_images(source: Source, seed: int, count: int, device: torch.device) -> Iterator[Tensor]:
    """The first training images of a run, one by one, (1, C, H, W) in [-1, 1]: the same in every process."""
    return (
        source.pixel_range.normalise(image[None].to(device))
        for image in source.first_images(seed, count)
    )
