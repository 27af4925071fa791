"""LiteVAE in one file: its whole training in plain PyTorch, to read, to copy and to change.

    python examples/nano_litevae.py --out nano
    python examples/nano_litevae.py photos/*.jpg --out nano --steps 2000 --steps-b 120

Without images it takes the package's photographs. Phase A learns to reconstruct, phase B adds a
discriminator. The trainer has the rest: resuming, many GPUs, validation, configs. With the same
settings and batches, the steps of both phases equal the trainer's.
"""

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from olvae.data.dataset import PHOTOGRAPHS
from olvae.losses.gan_losses import discriminator_loss, generator_loss
from olvae.losses.objective import Objective
from olvae.models.autoencoder import LiteVAE
from olvae.models.linear_code import fit_linear_paths
from olvae.modules.base import last_convolution
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.unetgan import UNetGAN, power_iteration, stop_power_iterations

CHANNELS = 12  # n_z, of the latent
WARMUP = 50  # steps in which the learning rate rises
EMA_DECAY = 0.99
ADVERSARIAL_WEIGHT = 0.02
RAMP = 40  # steps of phase B in which that weight grows from 0


def read_image(path: Path) -> Tensor:
    pixels = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels).movedim(-1, 0)  # (3, H, W), uint8


def random_crops(images: list[Tensor], size: int, count: int, rng: np.random.Generator) -> Tensor:
    """Cut squares, resize them and mirror half of them: (count, 3, size, size), uint8."""
    crops = []
    for _ in range(count):
        image = images[rng.integers(len(images))]
        height, width = image.shape[1:]
        side = int(rng.uniform(0.3, 1.0) * min(height, width))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crop = image[None, :, top : top + side, left : left + side].float()
        crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)
        crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    return torch.cat(crops).clamp(0, 255).round().to(torch.uint8)


def batches(images: list[Tensor], size: int, count: int, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    while True:
        yield random_crops(images, size, count, rng)


def make_autoencoder() -> LiteVAE:
    """The demo's: an encoder on wavelet packets, 8 times smaller sides, and a small decoder."""
    encoder = LiteVAE_Encoder(
        latent_dim=2 * CHANNELS,  # means and log-variances
        scale="S",
        image_size=64,
        packets=True,
        linear=True,
        aggregate_channels=48,
        aggregate_mult=[1, 1],
        aggregate_resblocks=1,
    )
    widths = {"channels": 12, "channel_mult": [1, 2, 4, 4], "num_res_blocks": 0}
    decoder = LiteVAE_Decoder(z_channels=CHANNELS, variant="paper_smc", linear=True, **widths)
    # Latents of fresh weights would be mostly noise, of variance 1: begin with e^-8.
    with torch.no_grad():
        last_convolution(encoder).bias[CHANNELS:] -= 8.0
    return LiteVAE(encoder, decoder)


def make_objective() -> Objective:
    """The sum of weighted terms that compare two images, and KL [P 4.3]; without LPIPS here."""
    others = {"kl_weight": 1e-6, "wavelet_weight": 0.05, "gaussian_weight": 0.1}
    return Objective(reconstruction="l2", rec_weight=5.0, lpips_weight=0.0, **others)


class Training:
    """A phase: an autoencoder, its average (EMA), a discriminator in phase B, optimizers."""

    def __init__(
        self, vae: LiteVAE, rate: float, steps: int, discriminator: UNetGAN | None = None
    ) -> None:
        self.vae, self.discriminator, self.objective = vae, discriminator, make_objective()
        self.average = copy.deepcopy(vae).requires_grad_(False)
        self.rate, self.steps, self.done = rate, steps, 0
        self.adam = torch.optim.Adam(vae.parameters(), lr=rate, betas=(0.9, 0.99), fused=True)
        if discriminator is not None:
            # Spectral norm's power iteration runs once an update, not in each forward pass.
            stop_power_iterations(discriminator)
            weights = discriminator.parameters()
            self.adam_d = torch.optim.Adam(weights, lr=2 * rate, betas=(0.5, 0.9), fused=True)

    def learning_rate(self) -> float:
        """Rise in a line, then fall in half a cosine, as a factor of the base rate."""
        if self.done < WARMUP:
            return (self.done + 1) / WARMUP
        progress = (self.done - WARMUP) / max(1, self.steps - WARMUP)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def step(self, batch: Tensor) -> float:
        """Update both players on a batch (B, 3, H, W), uint8; return the autoencoder's loss."""
        images = batch.float() / 127.5 - 1.0
        posterior = self.vae.encode(images)
        reconstruction = self.vae.decode(posterior.sample())
        # The autoencoder's loss. The discriminator judges, and does not learn from it.
        loss, _ = self.objective(images, reconstruction, posterior)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
            realism = generator_loss("hinge", self.discriminator(reconstruction))
            grown = min(1.0, (self.done + 1) / RAMP)
            loss = loss + ADVERSARIAL_WEIGHT * grown * realism
            self.discriminator.requires_grad_(True)
        loss.backward()

        # The discriminator's loss, on the reconstruction without its graph.
        if self.discriminator is not None:
            real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
            discriminator_loss("hinge", real, fake).backward()
            self.update(self.adam_d, self.discriminator, 2 * self.rate)
            power_iteration(self.discriminator)
        self.update(self.adam, self.vae, self.rate)

        # The average starts as the weights after the first step.
        decay = min(EMA_DECAY, (1 + self.done) / (10 + self.done)) if self.done else 0.0
        with torch.no_grad():
            weights = dict(self.vae.named_parameters())
            for name, average in self.average.named_parameters():
                average.add_((weights[name] - average) * (1.0 - decay))
        self.done += 1
        return loss.item()

    def update(self, optimizer: torch.optim.Optimizer, network: nn.Module, rate: float) -> None:
        """Clip the gradients to a norm of 1 and step."""
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * self.learning_rate()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def save_picture(vae: LiteVAE, batch: Tensor, path: Path) -> float:
    """Write images above their reconstructions; return PSNR in dB."""
    images = batch.float() / 127.5 - 1.0
    decoded = vae.decode(vae.encode(images).mode())
    rows = torch.cat([torch.cat(list(row), dim=-1) for row in (images, decoded)], dim=-2)
    values = ((rows.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1)
    Image.fromarray(values.numpy()).save(path)
    return -10 * math.log10(float((images - decoded.clamp(-1, 1)).square().mean()) / 4)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train LiteVAE in plain PyTorch.")
    parser.add_argument("images", nargs="*", type=Path, default=list(PHOTOGRAPHS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--steps-b", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    images = [read_image(path) for path in options.images]
    held_out = next(batches(images[::10], 64, 8, seed=1))  # of every tenth image
    images = [image for number, image in enumerate(images) if number % 10]

    # The linear start: principal components of patches, and the best linear decoder.
    torch.manual_seed(options.seed)
    vae = make_autoencoder()
    fit_linear_paths(vae, next(batches(images, 64, 1024, options.seed)))

    # Phase A on small crops, phase B on larger ones from the average of phase A.
    phases = [("a", 1e-3, options.steps, 64, 8), ("b", 2e-4, options.steps_b, 128, 2)]
    for name, rate, steps, size, count in phases:
        discriminator = UNetGAN(base_channels=8, image_size=size) if name == "b" else None
        training = Training(vae, rate, steps, discriminator)
        crops = batches(images, size, count, options.seed)
        for number in range(steps):
            loss = training.step(next(crops))
            if number % 100 == 0:
                print(f"phase {name}, step {number}: loss {loss:.4f}", flush=True)
        vae = training.average.requires_grad_(True)
        decibels = save_picture(vae, held_out, options.out / f"phase_{name}.png")
        print(f"phase {name}: {decibels:.2f} dB on held-out crops")
    vae.save_pretrained(options.out)


if __name__ == "__main__":
    main()
