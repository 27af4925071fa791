"""Compare decoders at 2x with others: rows at the encoded size, and by bicubic enlargement."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from olvae.evaluation.observers.observer import Observer, Subject
from olvae.evaluation.results import Row
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Posterior


class ShrunkAgain(Autoencoder):
    """An autoencoder at 2x whose images are shrunk to the size of the encoded ones."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model
        self.in_channels = model.in_channels
        self.downscale = model.downscale
        self.latent_channels = model.latent_channels
        self.pixel_range = model.pixel_range
        self.side = model.side

    def encode(self, x: Tensor) -> Posterior:
        return self.model.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.model.shrink(self.model.decode(z))


class Bicubically(ShrunkAgain):
    """An autoencoder at 1x whose images are enlarged ``by`` times, with Pillow's bicubic."""

    def __init__(self, model: Autoencoder, by: int) -> None:
        super().__init__(model)
        self.enlarge = by

    def decode(self, z: Tensor) -> Tensor:
        y = self.model.decode(z)
        # With antialias torch has Pillow's kernel; enlarging, it averages nothing.
        return F.interpolate(y, scale_factor=self.enlarge, mode="bicubic", antialias=True)


class Enlarged(Observer):
    """Add rows that compare decoders at 2x with others; without such a decoder there are none.

    A target at 2x encodes the images at half their size, and is compared at their size. Further
    rows, without costs:

    - of each such target, ``at 1x``: it encodes the images whole, and its own are shrunk, as a row
      of a target at 1x;
    - of each target at 1x with latents of the same shape, ``bicubic to 2x``: as a target at 2x, by
      bicubic interpolation.

    Differences from the first row are of the rows alone that encode images of its size.
    """

    tells_apart = False

    def __init__(self) -> None:
        self._added: set[str] = set()
        # By target at 2x, how much larger its images are; by row, how much smaller those are that
        # are encoded.
        self._large: dict[str, int] = {}
        self._smaller: dict[str, int] = {}

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        targets = {name: one.model for name, one in subjects.items() if not one.baseline}
        large = [model for model in targets.values() if model.enlarge > 1]
        latents = {(model.latent_channels, model.downscale): model.enlarge for model in large}

        added: dict[str, Subject] = {}
        for name, model in targets.items():
            by = latents.get((model.latent_channels, model.downscale), 1)
            if model.enlarge > 1:
                self._large[name] = model.enlarge
                added[f"{name}, at 1x"] = Subject(ShrunkAgain(model))
            elif by > 1:
                added[f"{name}, bicubic to {by}x"] = Subject(Bicubically(model, by))
        self._added = set(added)
        everything = {**subjects, **added}
        for name, subject in everything.items():
            if large and not subject.baseline:
                self._smaller[name] = subject.model.enlarge
        return everything

    def complete(self, row: Row, rows: Mapping[str, Row]) -> Row:
        """Keep costs and weights to the targets' rows, and differences to images of one size."""
        if row.target in self._added:
            row = replace(row, cost=None, weights=None)
        first = self._smaller.get(next(iter(rows)))
        if self._smaller.get(row.target, first) != first:
            row = replace(row, differences={})
        return row

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        for name, by in self._large.items():
            yield (
                f"{name}: encodes the images {by} times smaller, and decodes them to their size; "
                "at 1x it encodes them whole, and what it decodes is shrunk"
            )
