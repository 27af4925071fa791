"""Crossed evaluation of two autoencoders with one latent: every encoder with every decoder, and how latents differ."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.evaluation.roundtrip import Direction, OneWay
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Posterior

__all__ = ["Crossed", "LatentError", "LatentErrors", "crossed"]


LATENT = 8
"""Side of the latent with which parameters are counted; some networks refuse smaller ones."""


class Crossed(Autoencoder):
    """The encoder of one autoencoder with the decoder of another; it shares their weights."""

    def __init__(self, encoder_of: Autoencoder, decoder_of: Autoencoder) -> None:
        super().__init__()
        self.encoder_of, self.decoder_of = encoder_of, decoder_of
        self.in_channels = encoder_of.in_channels
        self.downscale, self.latent_channels = encoder_of.downscale, encoder_of.latent_channels

    def encode(self, x: Tensor) -> Posterior:
        return self.encoder_of.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder_of.decode(z)

    def used_parameters(self) -> int:
        """Parameters of the two halves in use: those that a latent of the one, or an image of the other, depends on."""
        encoder = _used_parameters(self.encoder_of, "encode", self.in_channels, LATENT * self.downscale)
        return encoder + _used_parameters(self.decoder_of, "decode", self.latent_channels, LATENT)


def crossed(models: Mapping[str, Autoencoder]) -> dict[str, Autoencoder]:
    """Two autoencoders by name, and after them the encoder of each with the decoder of the other.

    Raises:
        ConfigError: their latents have different shapes.
    """
    (a, first), (b, second) = models.items()
    if (first.latent_channels, first.downscale) != (second.latent_channels, second.downscale):
        raise ConfigError(
            f"{a} has {first.latent_channels} channels at f{first.downscale}, {b} {second.latent_channels} at "
            f"f{second.downscale}: crossed evaluation needs the same latent"
        )
    pairs = {
        f"{a}'s encoder, {b}'s decoder": Crossed(first, second),
        f"{b}'s encoder, {a}'s decoder": Crossed(second, first),
    }
    return {**models, **pairs}


@dataclass(frozen=True)
class LatentError:
    """How far a student's latents are from its teacher's: the means of the posteriors of the same images.

    Args:
        teacher: its name.
        rmse: the root of the mean over channels of the squares of ``per_channel``, without those that are None; None
            if all are.
        per_channel: root mean square of the difference over images and positions, divided by ``teacher_std``; None
            where the teacher's channel is constant.
        teacher_std: standard deviation of the teacher's means over the same images and positions, per channel.
    """

    teacher: str
    rmse: float | None
    per_channel: Sequence[float | None]
    teacher_std: Sequence[float]


class _Sums(NamedTuple):
    """Of one image, over its positions; each list has a number per channel."""

    positions: int
    mean: list[float]
    """Of the teacher."""
    deviation: list[float]
    """Squared deviations of the teacher from its mean, summed."""
    error: list[float]
    """Squared differences of student and teacher, summed."""


class LatentErrors:
    """The error of a student's latents, from sums per image in float64.

    Batches, their order and the number of processes make no difference, and a key counts once.

    Args:
        name: of the teacher.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._images: dict[str, _Sums] = {}
        self._waiting: Tensor | None = None

    def teacher(self, keys: Sequence[str], mean: Tensor) -> None:  # noqa: ARG002  (the student's are the same)
        """Take the teacher's means of a batch (B, n_z, h, w), for the call of :meth:`student` that follows."""
        self._waiting = mean

    def student(self, keys: Sequence[str], mean: Tensor) -> None:
        """Add the student's means of the same batch (B, n_z, h, w)."""
        assert self._waiting is not None, "the teacher comes first"
        teacher = self._waiting.double().flatten(2)  # (B, n_z, h w)
        self._waiting = None
        error = (mean.double().flatten(2) - teacher).square().sum(2)  # (B, n_z)
        centre = teacher.mean(2)
        deviation = (teacher - centre[..., None]).square().sum(2)
        for key, *sums in zip(keys, centre.tolist(), deviation.tolist(), error.tolist(), strict=True):
            self._images.setdefault(key, _Sums(teacher.shape[2], *sums))

    def merge(self, other: "LatentErrors") -> None:
        """Add what another process has seen."""
        self._images = other._images | self._images

    def compute(self) -> LatentError:
        images = self._images.values()
        n = sum(image.positions for image in images)
        per_channel: list[float | None] = []
        deviations: list[float] = []
        for channel in range(len(next(iter(images)).mean)):
            mean = math.fsum(image.positions * image.mean[channel] for image in images) / n
            within = math.fsum(image.deviation[channel] for image in images)
            between = math.fsum(image.positions * (image.mean[channel] - mean) ** 2 for image in images)
            std = math.sqrt((within + between) / n)
            rms = math.sqrt(math.fsum(image.error[channel] for image in images) / n)
            constant = std <= torch.finfo(torch.float32).eps * abs(mean)  # but for the latents' own rounding
            per_channel.append(None if constant else rms / std)
            deviations.append(std)
        known = [value for value in per_channel if value is not None]
        rmse = math.sqrt(math.fsum(value**2 for value in known) / len(known)) if known else None
        return LatentError(self._name, rmse, per_channel, deviations)


def _used_parameters(model: Autoencoder, direction: Direction, channels: int, side: int) -> int:
    """Parameters that have a gradient; on the meta device, so without memory."""
    module = OneWay(copy.deepcopy(model), direction).to("meta").requires_grad_(True)
    with torch.enable_grad():
        module(torch.empty(1, channels, side, side, device="meta")).sum().backward()
    return sum(p.numel() for p in module.parameters() if p.grad is not None)
