"""Observe two autoencoders with one latent: every encoder with every decoder, and how far the latents differ."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor

from olvae.config import ConfigError
from olvae.evaluation.cells import NONE, Cell, Table, significant
from olvae.evaluation.html import Page
from olvae.evaluation.observers.observer import Observer, Seen, Subject
from olvae.evaluation.results import Row
from olvae.evaluation.roundtrip import Direction, OneWay
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Posterior
from olvae.modules.moments import Moments

_Sums = tuple[tuple[int, list[list[float]]], list[float]]
"""Of one image: the state of the Moments of the teacher's means, and per channel the squared differences, summed."""

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


class Pair(NamedTuple):
    """A crossed row: the targets whose encoder and decoder it has, and its number of parameters in use."""

    encoder: str
    decoder: str
    parameters: int


class Cross(Observer):
    """Evaluate each encoder of two targets, teacher then student, with the other's decoder, and compare the latents.

    Batches, their order and the number of processes make no difference to the latents' error, and a key counts once.
    """

    name = "latents"
    title = "Latents"

    def __init__(self) -> None:
        self._teacher = self._student = ""
        self._pairs: dict[str, Pair] = {}
        self._waiting: Tensor | None = None  # the teacher's latents of the batch
        self._sums: dict[str, _Sums] = {}  # by key

    def conflicts(
        self,
        targets: Sequence[str],
        metrics: Sequence[str],
        observers: Sequence[Observer],
    ) -> Iterator[str]:
        if len(targets) != 2:
            yield f"`cross` takes two targets, TEACHER STUDENT, and got {len(targets)}"

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        """The two autoencoders, and after them the encoder of each with the decoder of the other.

        Raises:
            ConfigError: their latents have different shapes.
        """
        (a, first), (b, second) = ((name, subject.model) for name, subject in subjects.items())
        if (first.latent_channels, first.downscale) != (second.latent_channels, second.downscale):
            raise ConfigError(
                f"{a} has {first.latent_channels} channels at f{first.downscale}, {b} {second.latent_channels} at "
                f"f{second.downscale}: crossed evaluation needs the same latent"
            )
        self._teacher, self._student = a, b
        crossed = {
            f"{a}'s encoder, {b}'s decoder": (a, b, Crossed(first, second)),
            f"{b}'s encoder, {a}'s decoder": (b, a, Crossed(second, first)),
        }
        self._pairs = {name: Pair(x, y, model.used_parameters()) for name, (x, y, model) in crossed.items()}
        return {**subjects, **{name: Subject(model) for name, (_, _, model) in crossed.items()}}

    def see(self, seen: Seen) -> None:
        if seen.draw:
            return
        if seen.target == self._teacher:
            self._waiting = seen.latents
        elif seen.target == self._student:
            assert self._waiting is not None, "the teacher comes first"
            errors = (seen.latents.double() - self._waiting.double()).square().sum((2, 3))  # (B, n_z)
            for key, teacher, error in zip(seen.keys, self._waiting, errors.tolist(), strict=True):
                self._sums.setdefault(key, (Moments.of(teacher).state(), error))
            self._waiting = None

    def state(self) -> Any:
        return self._sums

    def merge(self, state: Any) -> None:
        self._sums = state | self._sums

    def result(self, target: str, draw: int) -> dict[str, Any] | None:
        return (
            asdict(_error(self._teacher, (self._sums[key] for key in sorted(self._sums))))
            if target == self._student
            else None
        )

    def complete(self, rows: Sequence[Row]) -> list[Row]:
        """Costs of crossed rows: the parameters in use; the same half has one speed in all rows."""
        costs = {row.target: row.cost for row in rows if row.cost}
        done = []
        for row in rows:
            if row.cost and (pair := self._pairs.get(row.target)):
                cost = replace(
                    row.cost,
                    parameters=pair.parameters,
                    encode_images_per_s=costs[pair.encoder].encode_images_per_s,
                    decode_images_per_s=costs[pair.decoder].decode_images_per_s,
                )
                row = replace(row, cost=cost)
            done.append(row)
        return done

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        for name, found in _errors(rows).items():
            overall, *channels = (
                NONE if value is None else f"{value:.3f}" for value in (found.rmse, *found.per_channel)
            )
            yield (
                f"latents of {name}: RMS error {overall} in standard deviations of {found.teacher}; per channel "
                f"{', '.join(channels)}"
            )

    def section(self, page: Page) -> Markup | None:
        errors = _errors(page.results.table)
        channels = max((len(found.per_channel) for found in errors.values()), default=0)
        cells = {}
        for name, found in errors.items():
            pairs = zip(found.per_channel, found.teacher_std, strict=True)
            one = [Cell(significant(error), significant(std)) for error, std in pairs]
            cells[name] = [Cell(significant(found.rmse)), *one, *[Cell(NONE)] * (channels - len(one))]
        table = Table(["all", *(f"channel {i + 1}" for i in range(channels))], cells)
        caption = (
            "Root mean square of the difference from the teacher's latents, over images and positions, in units of the "
            "teacher's standard deviation; in small print that deviation."
        )
        return page.table(table, self.name, caption) or None


def _error(teacher: str, sums: Iterable[_Sums]) -> LatentError:
    moments, errors = zip(*sums, strict=True)
    total = reduce(add, (Moments.from_state(*state) for state in moments))
    rms = [math.sqrt(math.fsum(channel) / total.positions) for channel in zip(*errors, strict=True)]
    deviations = total.std.tolist()
    per_channel = [
        None if std <= torch.finfo(torch.float32).eps * abs(mean) else error / std  # constant but for rounding
        for error, std, mean in zip(rms, deviations, total.mean.tolist(), strict=True)
    ]
    known = [value for value in per_channel if value is not None]
    rmse = math.sqrt(math.fsum(value**2 for value in known) / len(known)) if known else None
    return LatentError(teacher, rmse, per_channel, deviations)


def _errors(rows: Sequence[Row]) -> dict[str, LatentError]:
    return {row.target: LatentError(**row.observed["latents"]) for row in rows if row.observed.get("latents")}


def _used_parameters(model: Autoencoder, direction: Direction, channels: int, side: int) -> int:
    """Parameters that have a gradient; on the meta device, so without memory."""
    module = OneWay(copy.deepcopy(model), direction).to("meta").requires_grad_(True)
    with torch.enable_grad():
        module(torch.empty(1, channels, side, side, device="meta")).sum().backward()
    return sum(p.numel() for p in module.parameters() if p.grad is not None)
