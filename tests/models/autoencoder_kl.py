"""AutoencoderKL of diffusers in the shapes of published models, narrow enough for the suite."""

from typing import Any

import diffusers
import torch

SHAPES: dict[str, dict[str, Any]] = {
    "sd1": {
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "force_upcast": False,
        "sample_size": 512,
    },
    "sdxl": {
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "force_upcast": True,
        "sample_size": 1024,
    },
    "sd3": {
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "sample_size": 1024,
    },
    "flux": {
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "sample_size": 1024,
    },
}
"""What the config.json of each says, beside widths."""

PER_CHANNEL: dict[str, Any] = {
    "scaling_factor": 1.0,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.5, 2.0, 1.0],
}
"""Factors for four latent channels, as some autoencoders have them."""


def autoencoder_kl(
    widths: tuple[int, ...] = (32, 32, 64, 64), **arguments: Any
) -> diffusers.AutoencoderKL:
    """With random weights, two blocks a level; in evaluation mode."""
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths),
            "block_out_channels": widths,
            "layers_per_block": 2,
            "sample_size": 256,
            **arguments,
        }
    ).eval()


def tiny_kl(**arguments: Any) -> diffusers.AutoencoderKL:
    """Factor 4, one narrow block a level: for trainings of a few seconds. Biases are random too."""
    model = autoencoder_kl(
        (8, 8, 16), **{"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16, **arguments}
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model
