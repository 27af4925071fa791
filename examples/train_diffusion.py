"""Train a small diffusion model on the latents of an exported autoencoder,
and generate images with the two.

It trains on the sample photographs, in about two minutes on one core:

    olvae export demo --out demo-vae
    python examples/train_diffusion.py demo-vae --out diffusion
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor

from olvae import AutoencoderLiteVAE
from olvae.cli.main import print_error
from olvae.data.dataset import SamplePhotographs
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.figures import labelled_grid


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


def train(
    unet: UNet2DModel, latents: Tensor, shift: float, scale: float, steps: int
) -> list[float]:
    """Flow matching: learn the velocity on the straight line from a latent to noise.

    Returns the loss of every step.
    """
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    for step in range(steps):
        mean, std = latents[:, torch.randint(latents.shape[1], (32,))]
        # a posterior sample, scaled to mean 0 and variance 1
        z = (mean + std * torch.randn_like(mean) - shift) * scale
        noise = torch.randn_like(z)
        t = torch.randn(len(z), 1, 1, 1).sigmoid()  # logit-normal: more often in the middle
        velocity = unet((1 - t) * z + t * noise, 1000 * t.flatten()).sample
        loss = F.mse_loss(velocity, noise - z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:4d}  loss {sum(losses[-100:]) / 100:.3f}")
    return losses


@torch.no_grad()
def sample(
    unet: UNet2DModel, vae: AutoencoderLiteVAE, shape: tuple[int, ...], shift: float, scale: float
) -> Tensor:
    """Follow the velocity back from noise to latents in 50 Euler steps and decode:
    images in [-1, 1], (B, 3, H, W)."""
    z = torch.randn(shape)
    times = torch.linspace(1, 0, 51)
    for t, next_t in pairwise(times):
        z = z + (next_t - t) * unet(z, 1000 * t).sample
    images: Tensor = vae.decode(z / scale + shift).sample
    return images


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "vae", help="an export (a folder that olvae export wrote), or its id on the hub"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("diffusion"), help="folder for the model and samples.png"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the crops, in pixels")
    parser.add_argument("--crops", type=int, default=2048, help="how many crops to encode")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    vae = AutoencoderLiteVAE.from_pretrained(args.vae, low_cpu_mem_usage=False)
    if args.size % (least := 2 * vae.encoder.downscale):  # the diffusion model halves latents once
        raise ValueError(f"--size {args.size}: choose a multiple of {least}")
    latents = encode(vae, args.crops, args.size)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    # exported without factors, which olvae latents measures: those of the means
    if (shift, scale) == (0.0, 1.0):
        shift, scale = latents[0].mean().item(), 1 / latents[0].std().item()
    z = (latents[0] - shift) * scale
    print(
        f"{z.shape[0]} latents of {tuple(z.shape[1:])}, mean {z.mean():.2f}, standard deviation "
        f"{z.std():.2f}"
    )

    unet = UNet2DModel(
        sample_size=z.shape[-1],
        in_channels=z.shape[1],
        out_channels=z.shape[1],
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    losses = train(unet, latents, shift, scale, args.steps)
    images = sample(unet.eval(), vae, (8, *z.shape[1:]), shift, scale)

    args.out.mkdir(parents=True, exist_ok=True)
    unet.save_pretrained(args.out / "unet")
    with torch.no_grad():
        real = vae.decode(latents[0, :8]).sample
    labelled_grid(
        {"crops, through the autoencoder": to_uint8(real), "made from noise": to_uint8(images)}
    ).save(args.out / "samples.png")
    print(f"model: {args.out / 'unet'}\nimages: {args.out / 'samples.png'}")
    return losses


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))
