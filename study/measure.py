"""The Fréchet distance of reconstructions in EfficientNet-Lite0's features,
and what colour they lack.

python -m study.measure TARGET --tiles study/corpus-out/held_out_tiles --out frechet.json

The features of the tiles themselves are kept beside their folder.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.files import atomic_write, write_json
from olvae.models.loading.targets import find_target
from study.corpus import FEATURES
from study.features import Lite0, frechet_lite0

SIDE = 128  # pixels: a tile is shrunk to twice this, and gives four parts

AXES = {"luma": (1.0, 1.0, 1.0), "red_blue": (1.0, 0.0, -1.0), "green_magenta": (-1.0, 2.0, -1.0)}
"""Of red, green and blue: along these photographs' colours vary, in this order,
by far the most along the first."""


class Unexplained:
    """The share of the variance of 8x8 pixels' mean colours that reconstructions lack,
    along each of the axes."""

    def __init__(self) -> None:
        self._axes = F.normalize(torch.tensor(list(AXES.values()), dtype=torch.float64))
        self._count, self._error, self._sum, self._squares = (
            0,
            *torch.zeros(3, len(AXES), dtype=torch.float64),
        )

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add images and their reconstructions, (B, 3, H, W)."""
        colours, others = (
            torch.einsum("ac,bchw->abhw", self._axes, F.avg_pool2d(image.double(), 8)).flatten(1)
            for image in (x, y)
        )
        self._count += colours.shape[1]
        self._error = self._error + (others - colours).square().sum(1)
        self._sum, self._squares = (
            self._sum + colours.sum(1),
            self._squares + colours.square().sum(1),
        )

    def compute(self) -> dict[str, float]:
        shares = self._error / (self._squares - self._sum.square() / self._count)
        return dict(zip(AXES, shares.tolist(), strict=True))


def parts(folder: Path) -> Iterator[Tensor]:
    """The four quarters of each tile at half its size, by name: uint8 (4, 3, 128, 128)."""
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            small = image.convert("RGB").resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
        pixels = pil_to_tensor(small)  # (3, 256, 256)
        rows = pixels.unflatten(1, (2, SIDE)).unflatten(3, (2, SIDE))  # (3, 2, 128, 2, 128)
        yield rows.permute(1, 3, 0, 2, 4).flatten(0, 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("--tiles", type=Path, required=True, help="a folder of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    options = parser.parse_args(arguments)
    model, network = find_target(options.target).load(), Lite0()
    known = options.tiles.parent / f"{options.tiles.name}{FEATURES}"
    if not known.is_file():
        with atomic_write(known) as partial, partial.open("wb") as file:
            np.save(file, network.of(parts(options.tiles)))

    @torch.inference_mode()
    def reconstructions() -> Iterator[Tensor]:
        for batch in parts(options.tiles):
            y = to_uint8(model.decode(model.encode(from_uint8(batch)).mode()))
            unexplained.update(batch, y)
            yield y

    unexplained = Unexplained()
    real, fake = np.load(known), network.of(reconstructions())
    found = {
        "frechet_lite0": frechet_lite0(real, fake),
        "images": len(real),
        "unexplained": unexplained.compute(),
    }
    write_json(found, options.out)


if __name__ == "__main__":
    main()
