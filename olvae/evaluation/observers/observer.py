"""The contract of an observer: something to look at in an evaluation besides its metrics."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.evaluation.page import Page
from olvae.evaluation.results import Results, Row
from olvae.models.autoencoder import Autoencoder

UNTRAINED = "untrained"  # a baseline's name, which no target may have


@dataclass(frozen=True)
class Subject:
    """An autoencoder that is evaluated: a row of the tables.

    A baseline draws no latents, and has no cost.
    """

    model: Autoencoder  # in evaluation mode and, unless an observer derived it, in float32
    baseline: bool = False  # no target, but something to compare targets with


@dataclass(frozen=True)
class Observation:
    """A batch of test images and one subject's reconstructions of them."""

    target: str  # the subject's name
    draw: int  # index of the sampling mode; 0 is the first protocol's, and baselines have 0 alone
    keys: Sequence[str]  # of the B images
    # images, levels of their range, (B, C, H, W), on the CPU: uint8, or float32 without 8 bits
    x: Tensor
    y: Tensor  # their reconstructions, likewise
    # the posterior's means, (B, n_z, H/f, W/f), f = ``upscale``, on the device that computes
    latents: Tensor
    # by name of a metric of single images, its values so far by key
    values: Mapping[str, Mapping[str, float]]
    pixel_range: PixelRange = EIGHT_BITS
    shards: bool = False  # whether keys begin with the names of shards


class Observer:
    """Look at something in an evaluation: subclass it, and override what you need.

    An instance describes what to look at; each pass over images works on a deep copy. Methods are
    called in this order: :meth:`conflicts`, :meth:`derive`, then for each batch and subject
    :meth:`watch` and :meth:`update`, then in the first process :meth:`merge`, :meth:`examine`,
    :meth:`result`, :meth:`complete`, and whatever is shown. ``olvae evaluate`` also takes a user's
    class, ``package.module.Class``, and builds it without arguments.
    """

    # of its entry in the rows of metrics.json, and of its section's anchor on the page
    name: str = ""
    title: str = ""  # of its section
    # The setting by which it makes rows of its own from the targets, if it does.
    adds_rows: str = ""
    # Whether an evaluation with it is another one than without it, for the zoo.
    tells_apart = True

    def choices(self) -> Mapping[str, str]:
        """Return choices, by name, with which an evaluation has other results, for the zoo."""
        return {}

    def conflicts(
        self, targets: Sequence[str], metrics: Sequence[str], observers: Sequence["Observer"]
    ) -> Iterator[str]:
        """Yield a line for each thing in a request that does not go with this observer."""
        yield from ()

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        """Choose the subjects to evaluate, by name: those given, and others derived from them."""
        return dict(subjects)

    def watch(
        self, target: str, draw: int, subject: Subject, keys: Sequence[str]
    ) -> AbstractContextManager[None]:
        """Make a context round the forward pass of a batch; by default, none."""
        return nullcontext()

    def update(self, batch: Observation) -> None:
        """Take a batch that one subject reconstructed.

        Keys are unique, but two processes may have the same image.
        """

    def state(self) -> Any:
        """Return all that was observed, to be pickled and merged in the first process; no copy."""
        return None

    def merge(self, state: Any) -> None:
        """Add the :meth:`state` of another process."""

    def examine(self, subjects: Mapping[str, Subject], size: int, device: str) -> None:
        """Run the subjects on other inputs, in the first process.

        ``size`` is the images' shorter side.
        """

    def result(self, target: str, draw: int) -> Any:
        """Return a row's entry in metrics.json, ready for JSON; None if there is none."""
        return None

    def complete(self, row: Row, rows: Mapping[str, Row]) -> Row:
        """Return a row under one protocol, completed from its own entries and from all rows."""
        return row

    def of_images(self, target: str, keys: Sequence[str]) -> Mapping[str, float]:
        """Return figures, by name, of some of a target's images, as of a volume's slices."""
        return {}

    def columns(self, entry: Any) -> Mapping[str, str]:
        """Return the cells, by heading, that a row's entry adds to the tables."""
        return {}

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        """Yield lines to be printed below the tables; some rows may be of earlier results."""
        yield from ()

    def section(self, page: Page) -> Markup | None:
        """Return the HTML of a section of the page; None leaves it out."""
        return None

    def write(self, folder: Path, suffix: str) -> Mapping[str, Path]:
        """Write files beside metrics.json, with a suffix to their names; return what and where."""
        return {}


class PerImageObserver(Observer):
    """Keep a row of numbers for each image, once per target and key, and make an entry of all.

    Override ``measure``, and ``summarise`` or ``result``. Latents are drawn as in the first
    protocol.
    """

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}  # by target and key

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        """Return a row for each image of a batch; None if there is nothing to measure."""
        raise NotImplementedError

    def summarise(self, columns: Sequence[Any]) -> Any:
        """Return a target's entry, by the columns of its rows."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, batch: Observation) -> None:
        if batch.draw:
            return
        rows = self.measure(batch)
        if rows is None:
            return
        known = self._rows.setdefault(batch.target, {})
        for key, row in zip(batch.keys, rows, strict=True):
            known.setdefault(key, row)

    def state(self) -> Any:
        return self._rows

    def merge(self, state: Any) -> None:
        for target, rows in state.items():
            self._rows[target] = rows | self._rows.get(target, {})

    def result(self, target: str, draw: int) -> Any:
        # In the order of keys, whatever the order of batches.
        rows = [row for _, row in sorted(self._rows.get(target, {}).items())]
        return self.summarise(list(zip(*rows, strict=True))) if rows else None


@dataclass(frozen=True)
class Evaluated:
    """The results under one protocol, and the observers that show more of them.

    Protocols that share a pass over the images share its observers.
    """

    results: Results
    observers: Sequence[Observer] = ()
