"""The Fréchet distance of an autoencoder's reconstructions, in EfficientNet-Lite0's features.

python -m study.measure TARGET --tiles study/corpus-out/held_out_tiles --out frechet.json

The features of the tiles themselves are kept beside their folder.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.files import atomic_write, write_json
from olvae.models.loading.targets import find_target
from study.features import Lite0, frechet_lite0

__all__ = ["main", "parts"]

SIDE = 128  # pixels: a tile is shrunk to twice this, and gives four parts


def parts(folder: Path) -> Iterator[Tensor]:
    """The four quarters of each tile at half its size, by name: uint8 (4, 3, 128, 128)."""
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            small = image.convert("RGB").resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
        pixels = pil_to_tensor(small)  # (3, 256, 256)
        rows = pixels.unflatten(1, (2, SIDE)).unflatten(3, (2, SIDE))  # (3, 2, 128, 2, 128)
        yield rows.permute(1, 3, 0, 2, 4).flatten(0, 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--tiles", type=Path, required=True, help="a folder of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    options = parser.parse_args(arguments)
    model, network = find_target(options.target).load(), Lite0()
    known = options.tiles.parent / f"{options.tiles.name}.lite0.npy"
    if not known.is_file():
        with atomic_write(known) as partial, partial.open("wb") as file:
            np.save(file, network.of(parts(options.tiles)))

    @torch.inference_mode()
    def reconstructions() -> Iterator[Tensor]:
        for batch in parts(options.tiles):
            yield to_uint8(model.decode(model.encode(from_uint8(batch)).mode()))

    real, fake = np.load(known), network.of(reconstructions())
    write_json({"frechet_lite0": frechet_lite0(real, fake), "images": len(real)}, options.out)


if __name__ == "__main__":
    main()
