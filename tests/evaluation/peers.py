"""A LiteVAE and an AutoencoderKL whose latents have the same shape, and batches for observers, for tests."""

import torch
from diffusers import AutoencoderKL

from olvae.evaluation.observers.observer import Observation
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.diffusers_models import DiffusersAutoencoder
from tests.conftest import tiny_config


def litevae(**more) -> LiteVAE:
    params = tiny_config(**more)["model"]["params"]
    return LiteVAE.from_config(**{key: value for key, value in params.items() if key != "lossconfig"}).eval()


def kl(latent_channels: int = 4) -> DiffusersAutoencoder:
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return DiffusersAutoencoder(model.eval()).eval()


def seen(target, keys, x=None, y=None, draw=0, latents=None, values=None) -> Observation:
    """A batch for an observer; black images and latents where the test needs none."""
    x = torch.zeros(len(keys), 3, 16, 16, dtype=torch.uint8) if x is None else x
    latents = torch.zeros(len(keys), 4, 2, 2) if latents is None else latents
    return Observation(target, draw, keys, x, x if y is None else y, latents, values or {})


def numbers(content, path=""):
    """Every number of a nested report."""
    if isinstance(content, dict):
        return [item for key, value in content.items() for item in numbers(value, f"{path}.{key}")]
    if isinstance(content, list):
        return [item for i, value in enumerate(content) for item in numbers(value, f"{path}[{i}]")]
    return [] if isinstance(content, str) else [(path, float(content))]
