"""Checkpoints of the latent-diffusion code's KL autoencoder (Stable Diffusion's, FLUX's), as diffusers' AutoencoderKL.

The names are converted by diffusers; the configuration is read from the shapes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olvae.checkpoint import load_weights
from olvae.models.loading.diffusers import DiffusersAutoencoder, check_parameters

__all__ = ["from_latent_diffusion", "latent_diffusion_config", "pick_latent_diffusion"]


PREFIXES = ("first_stage_model.", "vae.", "")

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def pick_latent_diffusion(state: Mapping[str, Any], origin: str | Path) -> dict[str, Tensor] | None:
    """Pick the autoencoder's tensors out of a state dict of that code, without the names' prefix; None if it has none.

    Raises:
        ValueError: the autoencoder is vector-quantised.
    """
    prefix = next((p for p in PREFIXES if f"{p}encoder.down.0.block.0.norm1.weight" in state), None)
    if prefix is None:
        return None
    if f"{prefix}quantize.embedding.weight" in state:
        raise ValueError(f"{origin}: a vector-quantised autoencoder of latent-diffusion; only the KL ones are read")
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(PARTS) and isinstance(tensor, Tensor)
    }


def from_latent_diffusion(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    origin: str | Path = "",
    allow_mismatch: bool = False,
) -> DiffusersAutoencoder:
    """Build the autoencoder of :func:`latent_diffusion_config`, in evaluation mode; fresh without weights.

    Args:
        weights: see :func:`pick_latent_diffusion`.
        origin: the file that they are from, for messages.
        allow_mismatch: load the tensors that fit, and warn of the others.

    Raises:
        ValueError: weights do not fit or are non-finite.
    """
    from diffusers import AutoencoderKL  # seconds, which other targets do not need
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model: Any = AutoencoderKL(**config)
    if weights is not None:
        converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(dict(weights), config)
        if len(converted) != len(weights):
            raise ValueError(f"{origin}: {len(weights) - len(converted)} of its tensors have no place in AutoencoderKL")
        load_weights(model, converted, origin, allow_mismatch, prefixes=("",))
    autoencoder = DiffusersAutoencoder(model).eval()
    autoencoder.factors_known = False  # diffusers' defaults are those of Stable Diffusion 1
    return autoencoder


def latent_diffusion_config(weights: Mapping[str, Tensor], origin: str | Path) -> dict[str, Any]:
    """The arguments of AutoencoderKL, from the shapes. GroupNorm always has 32 groups in that code.

    Raises:
        ValueError: it has attention outside the middle, a latent of another width than the decoder's input, or lacks
            a tensor, which AutoencoderKL does not allow.
    """
    if attention := [name for name in weights if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", name)]:
        raise ValueError(f"{origin}: attention outside the middle ({attention[0]}), which AutoencoderKL does not have")
    from diffusers import AutoencoderKL

    needed = ("encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"{origin}: an autoencoder of latent-diffusion, but without {missing[0]}")
    widths: list[int] = []
    while (first := f"encoder.down.{len(widths)}.block.0.conv1.weight") in weights:
        widths.append(weights[first].shape[0])
    blocks = sum(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.norm1\.weight", name) is not None for name in weights)
    latent = weights["decoder.conv_in.weight"].shape[1]
    moments = weights["encoder.conv_out.weight"].shape[0]
    embedded = weights["post_quant_conv.weight"].shape[1] if "post_quant_conv.weight" in weights else latent
    if moments != 2 * latent or embedded != latent:
        raise ValueError(
            f"{origin}: its latent has {embedded} channels, the decoder takes {latent}, the encoder gives {moments}: "
            "AutoencoderKL has one width for all"
        )
    config = {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "latent_channels": latent,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in weights,
    }
    with torch.device("meta"):
        outline: Any = AutoencoderKL(**config)
        check_parameters(outline, sum(weight.nbytes for weight in weights.values()))
    return config
