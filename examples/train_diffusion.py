"""Train a small diffusion model on the latents of an autoencoder,
and generate images with the two.

It trains on the sample photographs, in about two minutes on one core:

    olvae export demo --out demo-vae
    python examples/train_diffusion.py demo-vae --out diffusion

or on latents of your own images, with the autoencoder that encoded them:

    olvae encode demo --data photos --size 64 --flip --out latents
    python examples/train_diffusion.py demo --latents latents --out diffusion
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor

from olvae import AutoencoderLiteVAE
from olvae.checkpoint import tensors_sum
from olvae.cli.main import print_error
from olvae.data.dataset import SamplePhotographs
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.data.shards.latent_files import read_stats
from olvae.data.shards.latent_source import LatentSource
from olvae.figures import labelled_grid
from olvae.models.loading.targets import find_target

BATCH = 32
EULER_STEPS = 50  # from noise to a latent


@dataclass
class Latents:
    """What a diffusion model trains on, and how to make images of it."""

    batches: Iterator[Tensor]  # endless: (32, n_z, h, w), of mean 0 and variance 1
    shape: tuple[int, ...]  # (n_z, h, w)
    real: Tensor  # some latents to show, not scaled
    title: str  # of the pictures of these
    shift: float | Tensor
    scale: float | Tensor
    decode: Callable[[Tensor], Tensor]  # not scaled, to images in [-1, 1]


@torch.no_grad()
def encode(vae: AutoencoderLiteVAE, crops: int, size: int) -> Tensor:
    """Encode random crops once: means and standard deviations of their posteriors,
    (2, N, n_z, h, w)."""
    parts = []
    for batch in SamplePhotographs(size=size, batch_size=32, shuffle_channels=0).train_loader(
        seed=0
    ):
        posterior = vae.encode(from_uint8(batch["image"])).latent_dist
        parts.append(torch.stack((posterior.mean, posterior.std)))
        if 32 * len(parts) >= crops:
            break
    return torch.cat(parts, dim=1)[:, :crops]


def draw(latents: Tensor, shift: float, scale: float) -> Iterator[Tensor]:
    """Posterior samples of random crops, scaled to mean 0 and variance 1."""
    while True:
        mean, std = latents[:, torch.randint(latents.shape[1], (BATCH,))]
        yield (mean + std * torch.randn_like(mean) - shift) * scale


def of_photographs(name: str, crops: int, size: int) -> Latents:
    """Encode crops of the sample photographs with an export."""
    vae = AutoencoderLiteVAE.from_pretrained(name, low_cpu_mem_usage=False)
    if size % (least := 2 * vae.encoder.downscale):  # the diffusion model halves latents once
        raise ValueError(f"--size {size}: choose a multiple of {least}")
    latents = encode(vae, crops, size)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    # exported without factors, which olvae latents measures: those of the means
    if (shift, scale) == (0.0, 1.0):
        shift, scale = latents[0].mean().item(), 1 / latents[0].std().item()
    z = (latents[0] - shift) * scale
    print(
        f"{z.shape[0]} latents of {tuple(z.shape[1:])}, mean {z.mean():.2f}, standard deviation "
        f"{z.std():.2f}"
    )
    return Latents(
        batches=draw(latents, shift, scale),
        shape=tuple(z.shape[1:]),
        real=latents[0, :8],
        title="crops, through the autoencoder",
        shift=shift,
        scale=scale,
        decode=lambda z: vae.decode(z).sample,
    )


def of_folder(name: str, folder: str, per_channel: bool) -> Latents:
    """Read what olvae encode wrote, and load the autoencoder that decodes it.

    Raises ValueError: the two do not fit, or there are too few latents, of several or odd sizes.
    """
    stats = read_stats(folder)
    if stats["latent_shape"] is None:
        raise ValueError(f"{folder}: latents of several sizes: encode them with --size")
    shape = tuple(stats["latent_shape"])
    if stats["count"] < BATCH:
        raise ValueError(
            f"{folder}: {stats['count']} latents, and a step takes {BATCH}: encode more images"
        )
    if shape[1] % 2 or shape[2] % 2:  # the diffusion model halves latents once
        raise ValueError(
            f"{folder}: latents of {shape[1]}x{shape[2]}: encode images whose sides are multiples "
            f"of {2 * stats['downscale']}"
        )

    # Another model's decoder makes noise of these latents.
    vae = find_target(name).load()
    weights = tensors_sum(vae.state_dict())
    if stats.get("weights", weights) != weights:
        raise ValueError(
            f"{folder}: its latents are of other weights than {name}: name the model that encoded "
            f"them ({stats['target']}), or encode again"
        )
    if vae.in_channels != 3:
        raise ValueError(f"{name}: makes images of {vae.in_channels} channels, and 3 can be shown")

    source = LatentSource(folder, BATCH, per_channel=per_channel)
    first = next(iter(source.val_loader()))["latent"][:8]
    print(f"{stats['count']} latents of {shape}, by {stats['target']}")
    return Latents(
        batches=(batch["latent"] for batch in source.train_loader(seed=0)),
        shape=shape,
        real=first / source.scaling_factor + source.shift_factor,
        title="latents, decoded",
        shift=source.shift_factor,
        scale=source.scaling_factor,
        decode=vae.decode,
    )


def train(unet: UNet2DModel, batches: Iterator[Tensor], steps: int) -> list[float]:
    """Flow matching: learn the velocity on the straight line from a latent to noise.

    Returns the loss of every step.
    """
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    for z in islice(batches, steps):
        noise = torch.randn_like(z)
        t = torch.randn(len(z), 1, 1, 1).sigmoid()  # logit-normal: more often in the middle
        velocity = unet((1 - t) * z + t * noise, 1000 * t.flatten()).sample
        loss = F.mse_loss(velocity, noise - z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        if len(losses) % 100 == 0:
            print(f"step {len(losses):4d}  loss {sum(losses[-100:]) / 100:.3f}")
    return losses


@torch.no_grad()
def sample(unet: UNet2DModel, latents: Latents, count: int) -> Tensor:
    """Follow the velocity back from noise to latents in Euler steps and decode:
    images in [-1, 1], (B, 3, H, W)."""
    z = torch.randn((count, *latents.shape))
    times = torch.linspace(1, 0, EULER_STEPS + 1)
    for t, next_t in pairwise(times):
        z = z + (next_t - t) * unet(z, 1000 * t).sample
    return latents.decode(z / latents.scale + latents.shift)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "vae",
        help="an export (a folder that olvae export wrote), or its id on the hub; with --latents "
        "any model that olvae encode takes",
    )
    parser.add_argument(
        "--latents", metavar="DIR", help="what olvae encode wrote with this model, of one --size"
    )
    parser.add_argument(
        "--per-channel",
        action="store_true",
        help="of --latents: shift and scale each channel by its own numbers",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("diffusion"), help="folder for the model and samples.png"
    )
    parser.add_argument("--size", type=int, help="side of the crops, in pixels; by default 64")
    parser.add_argument("--crops", type=int, help="how many crops to encode, by default 2048")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    args = parser.parse_args(arguments)

    # An option that the other kind of data would ignore is a mistake.
    if args.latents is None and args.per_channel:
        parser.error("--per-channel: for latents of your own: add --latents DIR")
    if args.latents is not None and (args.size, args.crops) != (None, None):
        parser.error("--size and --crops are of the sample photographs: leave them out")
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: give at least 1")
    return args


def main(arguments: list[str] | None = None) -> list[float]:
    args = parse(arguments)
    torch.manual_seed(0)
    if args.latents is None:
        size = 64 if args.size is None else args.size
        latents = of_photographs(args.vae, args.crops or 2048, size)
    else:
        latents = of_folder(args.vae, args.latents, args.per_channel)

    channels = latents.shape[0]
    unet = UNet2DModel(
        sample_size=latents.shape[-1],
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    losses = train(unet, latents.batches, args.steps)
    images = sample(unet.eval(), latents, 8)

    args.out.mkdir(parents=True, exist_ok=True)
    unet.save_pretrained(args.out / "unet")
    with torch.no_grad():
        real = latents.decode(latents.real)
    labelled_grid({latents.title: to_uint8(real), "made from noise": to_uint8(images)}).save(
        args.out / "samples.png"
    )
    print(f"model: {args.out / 'unet'}\nimages: {args.out / 'samples.png'}")
    return losses


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))
