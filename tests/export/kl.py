"""AutoencoderKL in the shapes of the published ones, narrower, with random weights, for tests."""

import torch
from diffusers import AutoencoderKL

SHAPES = {
    "SD 1": {"latent_channels": 4, "scaling_factor": 0.18215, "force_upcast": False, "sample_size": 512},
    "SDXL": {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024},
    "SD 3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024},
    "FLUX": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024},
    "per channel": {
        "latent_channels": 4,
        "scaling_factor": 1.0,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 2.0, 1.0],
    },
}


def autoencoder_kl(shape: str = "SD 1", widths: tuple[int, ...] = (32, 64, 128, 128), **changes) -> AutoencoderKL:
    """One of :data:`SHAPES`; SD 3 and FLUX have no quant convolutions."""
    torch.manual_seed(1)
    quant = shape not in ("SD 3", "FLUX")
    model = AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths),
            "block_out_channels": widths,
            "layers_per_block": 2,
            "use_quant_conv": quant,
            "use_post_quant_conv": quant,
            **SHAPES[shape],
            **changes,
        }
    )
    return model.eval()
