"""Turn shards of `olvae encode` into the latent caches of kohya's sd-scripts:
one .npz file beside each image.

olvae encode my-vae --data photos --size 512 --flip --dtype float32 --out latents
python examples/kohya_cache.py latents photos --model sdxl

Names and arrays are those that library/strategy_base.py and strategy_{sd,sd3,flux}.py of
kohya-ss/sd-scripts read at commit ab0d534 (February 2026). The trainer has not been run on them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from olvae.cli.main import print_error
from olvae.data.read_errors import ReadError
from olvae.data.shards.index import find_shards
from olvae.data.shards.latent_files import LATENT, read_latent, read_stats
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.files import atomic_write, safe_path
from olvae.modules.distributions import keyed_generator

F = 8
"""Pixels per latent position along each side, the same in all these models."""


class Model(NamedTuple):
    """A diffusion model's latent channels, and the factors of its caches: (z - shift) * scale.

    The trainer scales latents of the first three by its own constants.
    """

    channels: int
    shift: float = 0.0
    scale: float = 1.0


MODELS = {"sd": Model(4), "sdxl": Model(4), "sd3": Model(16), "flux": Model(16, 0.1159, 0.3611)}


def main(arguments: list[str] | None = None) -> int:
    """Write the caches; return how many."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("latents", help="what olvae encode wrote")
    parser.add_argument(
        "images", type=Path, help="the folder of images that was encoded; caches go beside them"
    )
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the samples, where moments are stored; by default 0"
    )
    args = parser.parse_args(arguments)

    stats, model = read_stats(args.latents), MODELS[args.model]
    if (len(stats["latents_mean"]), stats["downscale"]) != (model.channels, F):
        raise ValueError(
            f"{args.model} takes {model.channels} channels at 1/{F} of the image's size, but "
            f"{args.latents} has {len(stats['latents_mean'])} at 1/{stats['downscale']}"
        )
    written = set[Path]()
    for entry in (
        entry for url in find_shards(args.latents) for entry in read_shard(Shard(url), LATENT)
    ):
        if isinstance(entry, ReadError):
            raise ValueError(f"{entry.name}: {entry.reason}")
        latent, flipped, meta = read_latent(entry)
        image = args.images / safe_path(meta["key"])
        if reason := unusable(image, meta):
            print(f"skipped {meta['key']}: {reason}", file=sys.stderr)
            continue
        place = image.with_name(
            f"{image.stem}_{meta['width']:04d}x{meta['height']:04d}_{args.model}.npz"
        )
        if place in written:
            raise ValueError(
                f"{meta['key']}: another image has this name, so there is one cache for both"
            )
        sides = {"latents": (latent, ""), "latents_flipped": (flipped, "\nflip")}
        drawn = {
            name: (
                (one.draw(keyed_generator(f"{args.seed}\n{meta['key']}{ending}")) - model.shift)
                * model.scale
            ).numpy()
            for name, (one, ending) in sides.items()
            if one is not None
        }
        height, width = latent.mean.shape[1:]
        about = {"original_size": (meta["width"], meta["height"]), "crop_ltrb": crop(meta)}
        with atomic_write(place) as partial, partial.open("wb") as file:
            np.savez(
                file,
                **{
                    f"{name}_{height}x{width}": np.array(array)
                    for name, array in {**drawn, **about}.items()
                },
            )
        written.add(place)
    print(f"{len(written)} caches beside the images in {args.images}")
    return len(written)


def unusable(image: Path, meta: dict[str, Any]) -> str | None:
    """Say why the trainer can't use the latent of an image."""
    if not image.is_file():
        return f"there is no {image}"
    if any(side % F for side in meta["image"]):
        return f"{meta['image'][0]}x{meta['image'][1]} pixels were padded to multiples of {F}"
    with Image.open(image) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return (
        "it is turned by its EXIF orientation, which the trainer ignores: store it upright"
        if turned
        else None
    )


def crop(meta: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the original when it is fitted into the encoded size:
    what the trainer computes."""
    (width, height), original = meta["image"], (meta["width"], meta["height"])
    scale = min(width / original[0], height / original[1])
    fitted = original[0] * scale, original[1] * scale
    left, top = (width - fitted[0]) // 2, (height - fitted[1]) // 2
    return left, top, left + fitted[0], top + fitted[1]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))
