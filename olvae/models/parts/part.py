"""The contract of a part: a way to train that a config adds to LiteAutoencoderKL by class path."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from olvae.config import Node, instantiate, resolve_class
from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.source import Batch, Source
from olvae.losses.objective import Objective
from olvae.models.autoencoder import LiteVAE, Quantizer
from olvae.modules.base import Decoder, Encoder
from olvae.modules.distributions import Posterior

# The largest adaptive factor of published code, VA-VAE's and SSVAE's, whose image terms are sums
# over an image: margins may leave almost nothing of a loss's gradient.
ADAPTIVE_MAX = 1e8


class StandIn(Protocol):
    """An autoencoder whose latents the model learns, and that replaces its frozen halves."""

    @property
    def deterministic(self) -> bool:
        """Whether its latents have no distribution."""

    def posterior(self, x: Tensor, moments: Tensor | None = None) -> Posterior:
        """The posterior of images, or of ``moments`` where the data provide them."""

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents; only z gets gradients."""


class Model(Protocol):
    """The LiteAutoencoderKL as its parts and helpers see it; it has a docstring for each method."""

    # Networks; ``adversary`` is an Adversary, and None in phase A.
    encoder: Encoder
    decoder: Decoder
    quantizer: Quantizer | None
    parts: nn.ModuleDict
    adversary: Any

    # Settings, as its constructor takes them.
    freeze_encoder: bool
    freeze_decoder: bool
    sample_posterior: bool
    checkpoint: bool | Literal["encoder", "decoder"]
    channels_last: bool
    compiled: bool
    use_ema: bool
    optimizer: Literal["adam", "muon"]
    learning_rate: float
    betas: tuple[float, float]
    scheduler: Literal["constant", "cosine"]
    warmup_steps: int
    decay_steps: int | None
    min_lr_factor: float
    accumulate_grad_batches: int

    # Facts about the latents for a diffusion model: those of the settings, and all.
    given_factors: dict[str, Any]
    for_diffusion: dict[str, Any]

    # State of the training.
    pixel_range: PixelRange
    reports: bool
    rate_factor: float
    trainer: Any

    @property
    def device(self) -> torch.device: ...
    @property
    def global_rank(self) -> int: ...
    @property
    def global_step(self) -> int: ...
    @property
    def autoencoder(self) -> LiteVAE: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def loss_weights(self) -> Mapping[str, float]: ...
    @property
    def each_part(self) -> list["Part"]: ...
    @property
    def stand_in(self) -> StandIn | None: ...
    @property
    def frozen_halves(self) -> list[str]: ...
    @property
    def trained_networks(self) -> list[nn.Module]: ...

    def __call__(self, x: Tensor, *, moments: Tensor | None = None) -> Any: ...
    def images(self, batch: Batch) -> Tensor: ...
    def encode(self, x: Tensor) -> Posterior: ...
    def decode(self, z: Tensor) -> Tensor: ...
    def draw(self, posterior: Posterior) -> Tensor: ...
    def report(self, values: Mapping[str, Tensor | float], rare: bool = False) -> None: ...
    def ratio_of_gradients(
        self, step: "Step", loss: Tensor, network: nn.Module | None = None
    ) -> Tensor: ...
    def autoencoder_parameters(self) -> list[nn.Parameter]: ...


@dataclass
class Step:
    """A micro-batch in a training step; parts read it, and change it in their first two hooks."""

    # The images to encode: (B, C, H, W) in [-1, 1]. Until they are encoded they have the size of
    # the decoded ones, which are larger with a decoder at 2x.
    images: Tensor
    # Moments of a posterior that the data provide for the images: (B, 2 n_z, H/f, W/f).
    moments: Tensor | None
    # Draws the same numbers in every process and every micro-batch of an update.
    rng: np.random.Generator
    # The discriminator trains alone: without gradients or losses of the autoencoder.
    warming_up: bool
    # Whether the adversary sees this reconstruction; a part may set it to False.
    adversary_plays: bool
    # The reconstruction is compared with this: the images, unless a part changes it. A part may
    # give more samples of target and latent than there are images, as many of both.
    target: Tensor = field(init=False)
    # The encoder's posterior; None where a part stands in for a frozen encoder.
    encoded: Posterior | None = field(init=False)
    # The latent is drawn from this: a stand-in's posterior if there is one, else ``encoded``.
    posterior: Posterior = field(init=False)
    # The sample of ``posterior``, or its mode without ``sample_posterior``.
    drawn: Tensor = field(init=False)
    # The decoder's input, (B, n_z, h, w): ``drawn``, unless a part changes it.
    latent: Tensor = field(init=False)
    # (B, C, f h, f w), of the target's size; None where a part stands in for a frozen decoder.
    reconstruction: Tensor | None = field(init=False)
    # Losses so far by name, without weights: the objective's, then the parts' in their order.
    losses: dict[str, Tensor] = field(default_factory=dict)
    # Ratios of gradients, by which losses are weighted.
    ratios: dict[str, Tensor] = field(default_factory=dict)


# An unweighted loss, a scalar, and its weight.
Loss = tuple[Tensor, Tensor | float]


class Part(nn.Module):
    """A way to train: override the hooks that are needed.

    ``model`` is the LiteAutoencoderKL that the part belongs to. Parts act in the order of the
    config. Parameters that need gradients are trained with the autoencoder, and not averaged; all
    parameters and buffers are in checkpoints, and in no export. Random numbers come from torch's
    global generator, which each step seeds, or from ``step.rng``.
    """

    latents: ClassVar[Literal["free", "kept", "given"]] = "free"
    """Where training may move the latents: anywhere; not away from their start; to a stand-in's."""

    # Whether the part adds noise to the latent, and whether it shrinks or moves the latent.
    adds_noise: ClassVar[bool] = False
    moves_latents: ClassVar[bool] = False

    # Whether the part looks at activations, which checkpointing drops.
    needs_activations: ClassVar[bool] = False

    # Values of `summarise` that best.ckpt may follow: which is better, ``higher`` or ``lower``.
    better: ClassVar[Mapping[str, str]] = {}

    # The part's key under model.params.parts.
    name: str = ""

    @property
    def stand_in(self) -> StandIn | None:
        """An autoencoder of the same latents: teaches the decoder, and replaces frozen halves."""
        return None

    def attach(self, model: Model) -> None:
        """Build what depends on the model's networks, which have their initial weights."""

    def conflicts(self, model: Model) -> Iterable[str]:
        """Yield a line, ``setting: why``, for each setting that contradicts this part.

        Settings are relative to ``model.params``.
        """
        return ()

    def check(self, model: Model, source: Source) -> None:
        """Raise ConfigError unless the part can train on the source's images."""

    def prepare(self, model: Model, source: Source, seed: int, device: torch.device) -> None:
        """Measure or fit on :func:`first_images`, before the first step of a new run only."""

    def start(self, model: Model, resumed: bool) -> None:
        """Set up before the first step and after every resume, with the weights on their device."""

    def watch(self, model: Model) -> AbstractContextManager[None]:
        """Return a context for the autoencoder's forward pass of a step."""
        return nullcontext()

    def on_images(self, model: Model, step: Step) -> None:
        """Change the images or ``adversary_plays`` before encoding.

        Images that come with moments have to stay as they are.
        """

    def on_latent(self, model: Model, step: Step) -> None:
        """Change the latent, the target or ``adversary_plays`` before decoding."""

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        """Return losses of the autoencoder by name.

        Each is logged as ``train/NAME``, or ``train/PART_NAME`` if that name is taken.
        """
        return {}

    def validate(self, model: Model, x: Tensor, moments: Tensor | None) -> Mapping[str, Tensor]:
        """Return means over the images of a validation batch by name; see :meth:`summarise`.

        ``x`` are the images that are encoded, which a decoder at 2x makes larger.
        """
        return {}

    def summarise(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return values to log as ``val/NAME``, from :meth:`validate`'s means over all images."""
        return means

    def checksum(self) -> str | None:
        """Return a checksum of frozen weights that the settings only name.

        A resumed run must find the same one.
        """
        return None

    def describe(self) -> str:
        """Return one line for the summary of a run, or nothing."""
        return ""


def attach_parts(model: Model, nodes: Mapping[str, Node | None]) -> Iterator[str]:
    """Build a model's parts from their nodes, and yield one line for each that can't be built."""
    for name, node in nodes.items():
        # Null removes a part that an included config has.
        if node is None:
            continue
        if not name.isidentifier() or hasattr(model.parts, name):
            yield (
                f"parts.{name}: expected a name of letters, digits and underscores, "
                "and none of torch's, such as keys"
            )
            continue
        try:
            resolve_class(node["target"], Part)
            part = instantiate(node)
        except ValueError as error:
            for mistake in getattr(error, "mistakes", [error]):
                yield f"parts.{name}: {mistake}"
            continue
        part.name = name
        model.parts[name] = part
        part.attach(model)


def fixed_latents(part: Part, model: Model) -> Iterator[str]:
    """Yield a part's conflict with settings by which training can't move the latents."""
    settings = ["freeze_encoder"] if model.freeze_encoder else []
    settings += [f"parts.{other.name}" for other in model.each_part if other.latents != "free"]
    if settings:
        fixed = ", ".join(settings)
        yield f"parts.{part.name}: the latents can't change ({fixed}): leave it out"


def nothing_decoded(part: Part, model: Model) -> Iterator[str]:
    """Yield a part's conflict with a training in which nothing is decoded."""
    if model.freeze_decoder and model.stand_in is not None:
        yield (
            f"parts.{part.name}: the decoder is frozen (freeze_decoder), and nothing is decoded: "
            "leave it out"
        )


def adaptive_factor(model: Model, step: Step, loss: Tensor) -> Tensor:
    """|gradient of the weighted image terms| / |gradient of a loss of the latent|, a scalar.

    At the last convolution that both depend on: the encoder's, or quant_conv where there is one. At
    most the 1e8 of published code beside image terms that are sums, here 1e8 / (C H W).
    """
    last = model.encoder if model.quantizer is None else model.quantizer.quant_conv
    most = ADAPTIVE_MAX / step.target[0].numel()
    return model.ratio_of_gradients(step, loss, last).clamp(max=most)


def first_images(source: Source, seed: int, count: int, device: torch.device) -> Iterator[Tensor]:
    """Iterate over a run's first training images, (1, C, H, W) in [-1, 1]; equal on all ranks."""
    return (
        source.pixel_range.normalise(image[None].to(device))
        for image in source.first_images(seed, count)
    )
