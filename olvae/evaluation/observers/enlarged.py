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
    """

    tells_apart = False

    def __init__(self) -> None:
        self._added: set[str] = set()
        self._large: dict[str, int] = {}

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
        return {**subjects, **added}

    def complete(self, row: Row, rows: Mapping[str, Row]) -> Row:
        """Added rows have the costs and the weights of their targets' rows."""
        return replace(row, cost=None, weights=None) if row.target in self._added else row

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        for name, by in self._large.items():
            yield (
                f"{name}: encodes the images {by} times smaller, and decodes them to their size; "
                "at 1x it encodes them whole, and what it decodes is shrunk"
            )
