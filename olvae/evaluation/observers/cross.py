"""Observe two autoencoders with one latent: crossed encoders and decoders, and latents' errors."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.evaluation.cells import NONE
from olvae.evaluation.observers.observer import Observation, Observer, PerImageObserver, Subject
from olvae.evaluation.results import Row
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Posterior
from olvae.modules.mixed_precision import in_float64
from olvae.modules.moments import Moments


class Crossed(Autoencoder):
    """Join the encoder of one autoencoder with the decoder of another; weights are shared."""

    def __init__(self, encoder_of: Autoencoder, decoder_of: Autoencoder) -> None:
        super().__init__()
        self.encoder_of = encoder_of
        self.decoder_of = decoder_of
        self.in_channels = encoder_of.in_channels
        self.pixel_range = encoder_of.pixel_range
        self.side = encoder_of.side or decoder_of.side
        self.downscale = encoder_of.downscale
        self.enlarge = decoder_of.enlarge
        self.latent_channels = encoder_of.latent_channels

    def encode(self, x: Tensor) -> Posterior:
        return self.encoder_of.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder_of.decode(z)


class Cross(PerImageObserver):
    """Evaluate each encoder of two targets with the other's decoder, and compare the latents.

    The first target is the teacher, the second the student, whose entry has:

    - ``teacher``, its name, and ``teacher_std``, the standard deviation of its posterior means per
      channel;
    - ``per_channel``, the root mean square of student minus teacher over images and positions,
      divided by ``teacher_std``; None where the teacher's channel is constant;
    - ``rmse``, the root mean square of ``per_channel``.

    If one has its latents in a diffusion model's units, they are converted to the other's.
    """

    name = "latents"
    adds_rows = "cross"

    def __init__(self) -> None:
        super().__init__()
        self._teacher = self._student = ""
        self._crossed: set[str] = set()  # names of the rows without costs
        self._waiting: Tensor | None = None  # the teacher's latents of the batch

    def conflicts(
        self, targets: Sequence[str], metrics: Sequence[str], observers: Sequence[Observer]
    ) -> Iterator[str]:
        if len(targets) != 2:
            yield f"`cross` takes two targets, TEACHER STUDENT, and got {len(targets)}"

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        """The two autoencoders, then each encoder with the other's decoder.

        Raises ConfigError: the latents' shapes differ.
        """
        # Both must have the same latent, in the same units.
        (a, teacher), (b, student) = subjects.items()
        first = teacher.model
        second = student.model
        if (first.latent_channels, first.downscale) != (second.latent_channels, second.downscale):
            found = f"{a} has {first.latent_channels} channels at f{first.downscale}"
            other = f"{b} {second.latent_channels} at f{second.downscale}"
            raise ConfigError(f"{found}, {other}: crossed evaluation needs the same latent")
        if first.enlarge != second.enlarge:
            raise ConfigError(
                f"{a} decodes images at {first.enlarge}x, {b} at {second.enlarge}x, and so they "
                "encode images of unlike sizes: leave `cross` out, and their rows are compared"
            )
        first.use_latents(*second.statistics())
        second.use_latents(*first.statistics())
        self._teacher = a
        self._student = b

        # The crossed autoencoders, as rows after the two.
        crossed = {
            f"{a}'s encoder, {b}'s decoder": Subject(Crossed(first, second)),
            f"{b}'s encoder, {a}'s decoder": Subject(Crossed(second, first)),
        }
        self._crossed = set(crossed)
        return {**subjects, **crossed}

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        """For the student's images, the teacher's Moments and the latents' squared differences."""
        # Each batch comes for the teacher, then for the student.
        teacher = self._waiting
        self._waiting = batch.latents if batch.target == self._teacher else None
        if batch.target != self._student:
            return None
        assert teacher is not None, "the teacher comes first"
        errors = (in_float64(batch.latents) - in_float64(teacher)).square().sum((2, 3))  # (B, n_z)
        return zip((Moments.of(latent).state() for latent in teacher), errors.tolist(), strict=True)

    def summarise(self, columns: Sequence[Any]) -> dict[str, Any]:
        moments, errors = columns
        total = reduce(add, (Moments.from_state(*state) for state in moments))
        deviations = total.std.tolist()

        # Each channel's error in standard deviations, unless it is constant but for rounding.
        per_channel: list[float | None] = []
        sums = map(math.fsum, zip(*errors, strict=True))
        for squares, std, mean in zip(sums, deviations, total.mean.tolist(), strict=True):
            constant = std <= torch.finfo(torch.float32).eps * abs(mean)
            rms = math.sqrt(squares / total.positions)
            per_channel.append(None if constant else rms / std)

        known = [value for value in per_channel if value is not None]
        rmse = None
        if known:
            rmse = math.sqrt(math.fsum(value**2 for value in known) / len(known))
        return {
            "teacher": self._teacher,
            "rmse": rmse,
            "per_channel": per_channel,
            "teacher_std": deviations,
        }

    def complete(self, row: Row, rows: Mapping[str, Row]) -> Row:
        """Crossed rows have no costs: the rows of the two models show them."""
        return replace(row, cost=None) if row.target in self._crossed else row

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            entry = row.observed.get(self.name)
            if entry:
                values = []
                for value in (entry["rmse"], *entry["per_channel"]):
                    values.append(NONE if value is None else f"{value:.3f}")
                overall, *channels = values
                error = f"RMS error {overall} in standard deviations of {entry['teacher']}"
                yield f"latents of {row.target}: {error}; per channel {', '.join(channels)}"
