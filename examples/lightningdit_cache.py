"""Turn shards of `olvae encode` into the files that LightningDiT reads:
safetensors of latents and labels.

olvae encode my-vae --data imagenet/train --size 256 --flip --classes --dtype float32 --out latents
python examples/lightningdit_cache.py latents --out dit-latents

Names and shapes are those of extract_features.py and datasets/img_latent_dataset.py of
hustvl/LightningDiT. The trainer has not been run on them.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from olvae.cli.main import print_error
from olvae.data.read_errors import ReadError
from olvae.data.shards.index import find_shards
from olvae.data.shards.latent_files import LATENT, read_label, read_latent, read_stats
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.files import atomic_write, check_folder
from olvae.modules.distributions import keyed_generator


def main(arguments: list[str] | None = None) -> int:
    """Write a file for each shard, and latents_stats.pt; return the number of images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "latents", help="what olvae encode wrote, with --flip and --classes, of one size"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for the files: data_path"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the samples, where moments are stored; by default 0"
    )
    args = parser.parse_args(arguments)

    stats = read_stats(args.latents)
    if stats["latent_shape"] is None:
        raise ValueError(f"{args.latents}: latents of several sizes: encode with --size")
    if not stats.get("flip"):
        raise ValueError(
            f"{args.latents}: mirrored latents are read half of the time: encode with --flip"
        )
    check_folder(args.out).mkdir(parents=True, exist_ok=True)
    images, urls = 0, find_shards(args.latents)
    if others := {path.stem for path in args.out.glob("*.safetensors")}.difference(
        Path(url).stem for url in urls
    ):
        raise ValueError(
            f"{args.out}: has {min(others)}.safetensors, of other latents: choose another folder"
        )
    for url in urls:
        tensors = shard(url, args.seed)
        if not len(tensors["labels"]):
            continue
        with atomic_write(args.out / f"{Path(url).stem}.safetensors") as partial:
            save_file(tensors, partial)
            partial.chmod(0o644)  # safetensors leaves it to its owner
        images += len(tensors["labels"])
    if not images:
        raise ValueError(
            f"{args.latents}: no image has a label: encode folders with --classes, or shards "
            "with .cls"
        )
    numbers = {
        name: torch.tensor(stats[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std")
    }
    with atomic_write(args.out / "latents_stats.pt") as partial:
        torch.save(numbers, partial)
    print(f"{images} images in {args.out}")
    return images


def shard(url: str, seed: int) -> dict[str, torch.Tensor]:
    """Read a shard: latents and latents_flip, (N, n_z, h, w), and labels, int64 (N,),
    of images that have one."""
    latents, mirrored, labels = list[torch.Tensor](), list[torch.Tensor](), list[int]()
    for entry in read_shard(Shard(url), LATENT):
        if isinstance(entry, ReadError):
            raise ValueError(f"{entry.name}: {entry.reason}")
        if (label := read_label(entry)) is None:
            print(f"skipped {entry.key}: no .cls file with a number", file=sys.stderr)
            continue
        latent, flipped, meta = read_latent(entry)
        latents.append(latent.draw(keyed_generator(f"{seed}\n{meta['key']}")))
        mirrored.append(flipped.draw(keyed_generator(f"{seed}\n{meta['key']}\nflip")))
        labels.append(label)
    stacked = {"latents": latents, "latents_flip": mirrored}
    tensors = {
        name: torch.stack(parts) if parts else torch.empty(0) for name, parts in stacked.items()
    }
    return {**tensors, "labels": torch.tensor(labels, dtype=torch.int64)}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))
