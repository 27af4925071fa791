"""An autoencoder of Stable Diffusion's kind as one file with latent-diffusion's names, as ComfyUI and A1111 load it.

The layout is that of the published files, without a prefix: ``encoder.down.I.block.J``, ``decoder.up.I`` with the level
of the image's size as 0, ``mid.attn_1`` with 1x1 convolutions.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olvae.checkpoint import read_checkpoint
from olvae.export.autoencoder_kl import reflects
from olvae.export.compare import as_exported, check_equal, check_tensors, distance
from olvae.export.single import check_file, export_file
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.latent_diffusion import from_latent_diffusion, latent_diffusion_config, pick_latent_diffusion
from olvae.models.loading.stable_diffusion import as_litevae, diffusers_config, diffusers_weights
from olvae.modules.sdvae import set_padding

__all__ = ["export_latent_diffusion", "latent_diffusion_weights", "not_stock"]

GROUPS = 32
"""Of every GroupNorm in that code."""

STOCK = {"block_out_channels": ([128, 256, 512], [128, 256, 512, 512]), "layers_per_block": (2,)}
"""What ComfyUI builds, whatever the file says. A1111's config says the longer list."""

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def latent_diffusion_weights(model: LiteVAE) -> dict[str, Tensor]:
    """The weights under latent-diffusion's names and in its shapes.

    Raises:
        ValueError: the networks have what that layout can't express.
    """
    config = diffusers_config(model)
    if config["norm_num_groups"] != GROUPS:
        raise ValueError(f"GroupNorm with {config['norm_num_groups']} groups: latent-diffusion always has {GROUPS}")
    if not config["mid_block_add_attention"]:
        raise ValueError("no attention in the middle: latent-diffusion always has it")
    last = len(config["block_out_channels"]) - 1
    renamed = ((_name(name, last), tensor) for name, tensor in diffusers_weights(model).items())
    # Attention's linear layers are 1x1 convolutions there, (C, C, 1, 1).
    return {name: tensor[:, :, None, None] if tensor.ndim == 2 else tensor for name, tensor in renamed}


def _name(name: str, last: int) -> str:
    """latent-diffusion's name of a parameter of AutoencoderKL, whose lowest resolution is level ``last``."""
    rules: tuple[tuple[str, Any], ...] = (
        (r"\.down_blocks\.(\d+)\.", r".down.\1."),
        (r"\.up_blocks\.(\d+)\.", lambda found: f".up.{last - int(found[1])}."),
        (r"\.mid_block\.resnets\.(\d+)\.", lambda found: f".mid.block_{int(found[1]) + 1}."),
        (r"\.mid_block\.attentions\.0\.(.+)\.", lambda found: f".mid.attn_1.{ATTENTION[found[1]]}."),
        (r"\.resnets\.", ".block."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.conv_norm_out\.", ".norm_out."),
    )
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def not_stock(model: LiteVAE) -> str | None:
    """What ComfyUI and A1111 do not build; None if there is no such thing."""
    config = diffusers_config(model)
    odd = [f"{key} {config[key]}" for key, known in STOCK.items() if config[key] not in known]
    return ", ".join(odd) or None


def export_latent_diffusion(
    model: LiteVAE, file: Path, dtype: torch.dtype = torch.float32, force: bool = False
) -> dict[str, float]:
    """Write one file, load it back with :func:`from_latent_diffusion`, and compare it, before it appears.

    Args:
        model: in float32.
        file: ends with .safetensors.
        dtype: to round the weights to.
        force: replace the file.

    Returns:
        The relative difference, by what was compared.

    Raises:
        FileExistsError: see :func:`check_file`.
        ValueError: latent-diffusion has no such networks, weights are non-finite, also after rounding, or a comparison
            fails.
    """
    check_file(file, force)
    out, differences = as_exported(model, dtype)
    weights = latent_diffusion_weights(out)

    def compare(partial: Path) -> None:
        check_tensors(partial, weights)
        found = pick_latent_diffusion(read_checkpoint(partial), file) or {}
        back = as_litevae(from_latent_diffusion(latent_diffusion_config(found, file), found, file), str(file))
        for half in reflects(out):
            set_padding(getattr(back, half), "reflect")
        differences["loaded back"] = check_equal("loading it back", distance(out, back.moments, back.decode))

    export_file(file, weights, {}, compare)
    return differences
