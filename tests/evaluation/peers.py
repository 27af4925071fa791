"""An AutoencoderKL with latents of the tiny LiteVAE's shape, and batches for observers."""

import torch

from olvae.evaluation.observers.observer import Observation
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from tests.models.autoencoder_kl import autoencoder_kl


def kl(latent_channels: int = 4) -> DiffusersAutoencoder:
    """Of the shape of :func:`tests.conftest.tiny`."""
    model = autoencoder_kl(
        (8,) * 4, latent_channels=latent_channels, layers_per_block=1, norm_num_groups=4
    )
    return DiffusersAutoencoder(model).eval()


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
