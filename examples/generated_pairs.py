"""Make latents as a diffusion model leaves them, with their images, for a decoder to learn from.

Encode crops with their images, and others to hold out. A small diffusion transformer learns the
latents of the first folder; then those of each folder are noised, and denoised by it. Train the
decoder on the result, which leaves the autoencoder's latents as they are:

    olvae encode olvae:photos-f8c12 --data crops --size 64 --images --out pairs
    olvae encode olvae:photos-f8c12 --data other-crops --size 64 --images --out held_out
    python examples/generated_pairs.py pairs held_out --out generated
    olvae train --base latents/robust_decoder

The noise of each latent has its own strength, uniform up to --strength: 1 leaves nothing of the
latent, so that the image would be another one.
"""

import argparse
import io
import shutil
import sys
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where examples/ is

from examples.diffusability import sample, train
from olvae.cli.main import print_error
from olvae.data.shards.index import find_shards
from olvae.data.shards.latent_files import FLIP, LATENT, STATS, read_stats
from olvae.data.shards.latent_source import LatentSource
from olvae.devices import keep_freed_memory
from olvae.files import atomic_write, check_folder
from olvae.modules.distributions import keyed_generator
from olvae.modules.others.denoiser import DiT

BATCH = 50  # latents that are denoised together
HEUN_STEPS = 6


@torch.no_grad()
def generate(velocity: nn.Module, z: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Noise scaled latents (B, n_z, h, w), each to its own strength, and follow them back."""
    t = strength * torch.rand(len(z), generator=generator)
    at = t[:, None, None, None]
    noisy = (1 - at) * z + at * torch.randn(z.shape, generator=generator)
    # The time from 1 to 0 is here the share of each latent's own way.
    return sample(lambda x, share: at * velocity(x, share * t), noisy, HEUN_STEPS)


def replace_latents(
    shard: Path, out: Path, source: LatentSource, velocity: nn.Module, args: argparse.Namespace
) -> None:
    """Copy a shard with generated latents, of deviation 0, in place of its Gaussians."""
    with tarfile.open(shard) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        contents = {name: file.read() for name, file in files.items() if file is not None}
    latents = {name: load(data) for name, data in contents.items() if name.endswith(LATENT)}
    sides = ("mean", f"mean{FLIP}")
    places = [(name, side) for name in latents for side in sides if side in latents[name]]

    generator = keyed_generator(f"{args.seed} {shard.name}")
    for start in range(0, len(places), BATCH):
        batch = places[start : start + BATCH]
        stored = torch.stack([latents[name][key].float() for name, key in batch])
        z = (stored - source.shift_factor) * source.scaling_factor
        made = generate(velocity, z, args.strength, generator)
        made = made / source.scaling_factor + source.shift_factor
        for (name, key), latent in zip(batch, made, strict=True):
            tensors = latents[name]
            tensors[key] = latent.to(tensors[key].dtype)
            deviation = key.replace("mean", "std")
            tensors[deviation] = torch.zeros_like(tensors[deviation])

    with atomic_write(out / shard.name) as partial, tarfile.open(partial, "w") as archive:
        for name, data in contents.items():
            content = save(latents[name]) if name in latents else data
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders that olvae encode --images wrote, of one size; the first is learned",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a folder of that name for each"
    )
    parser.add_argument("--strength", type=float, default=0.5, help="of the noise; by default 0.5")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps, by default 2000")
    parser.add_argument("--batch-size", type=int, default=16, help="by default 16")
    parser.add_argument("--lr", type=float, default=1e-3, help="by default 1e-3, which falls to 0")
    parser.add_argument("--width", type=int, default=128, help="of a token, by default 128")
    parser.add_argument("--depth", type=int, default=4, help="blocks, by default 4")
    parser.add_argument("--patch", type=int, default=2, help="side of a token, by default 2")
    parser.add_argument("--seed", type=int, default=0, help="by default 0")
    args = parser.parse_args(arguments)
    if not 0 < args.strength <= 1:
        parser.error(f"--strength {args.strength}: give a number above 0, at most 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    keep_freed_memory()
    first, *_ = args.folders
    stats = [read_stats(folder) for folder in args.folders]
    for folder, found in zip(args.folders, stats, strict=True):
        if found["latent_shape"] is None or found["latent_shape"] != stats[0]["latent_shape"]:
            raise ValueError(f"{folder}: encode it with the same --size as {first}")
        if found["weights"] != stats[0]["weights"]:
            raise ValueError(f"{folder}: its latents are not of the weights of {first}")

    torch.manual_seed(args.seed)
    source = LatentSource(first, args.batch_size)
    model = DiT(tuple(stats[0]["latent_shape"]), args.width, args.depth, args.patch)
    velocity, losses = train(source, model, args.steps, args.lr, args.seed)
    print(f"loss {sum(losses[-100:]) / len(losses[-100:]):.3f} after {args.steps} steps")
    for folder in args.folders:
        out = check_folder(args.out) / folder.name
        out.mkdir(parents=True, exist_ok=True)
        for shard in find_shards(folder):
            replace_latents(Path(shard), out, source, velocity, args)
        shutil.copy(folder / STATS, out / STATS)  # last: it makes the folder complete
        print(f"{out}: {read_stats(out)['count']} pairs")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))
