"""Files of the latent-diffusion code: its names of AutoencoderKL's weights, and a loader of them.

Its names are converted by diffusers; its configuration is read from the shapes.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olvae.checkpoint import load_weights, read_checkpoint, state_dict_of
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.autoencoder_kl import BLOCKS, NAMES, diffusers_weights
from olvae.models.loading.diffusers_models import DiffusersAutoencoder, check_parameters
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.weight_files import locate_weights

LDM_NAMES = {
    "down_blocks.": "down.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "resnets.": "block.",
    "samplers.0.": "sample.",
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
"""Parts of names in diffusers' AutoencoderKL and in latent-diffusion, where levels of the decoder count backwards."""


def latent_diffusion_weights(model: LiteVAE) -> dict[str, Tensor]:
    """Name the weights as latent-diffusion does, where attention's linear layers are 1x1 convolutions, (C, C, 1, 1)."""
    last = len(model.encoder.node["params"]["channel_mult"]) - 1
    named = {}
    for name, tensor in diffusers_weights(model).items():
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
        for ours, theirs in LDM_NAMES.items():
            name = name.replace(ours, theirs)
        named[name] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    return named


class LatentDiffusionLoader(Loader):
    """A checkpoint of the latent-diffusion code with a KL autoencoder, or a folder with one."""

    def accepts(self, text: str) -> bool:
        try:
            weights = locate_weights(text)
        except (FileNotFoundError, ValueError):
            return False
        return bool(_latent_diffusion_tensors(weights, check=False))

    def find(self, text: str, options: LoadOptions) -> Target:
        weights, raw = locate_weights(text), options.raw
        config = _latent_diffusion_config(_latent_diffusion_tensors(weights, raw, check=False), weights)

        def load() -> DiffusersAutoencoder:
            tensors = _latent_diffusion_tensors(weights, raw)
            return _from_latent_diffusion(config, tensors, weights, options.allow_mismatch)

        return Target(load, partial(_from_latent_diffusion, config), raw=raw, name=text)


def _latent_diffusion_tensors(file: Path, raw: bool = False, check: bool = True) -> dict[str, Tensor]:
    """The autoencoder's tensors in a file of that code, without the names' prefix; none of another file."""
    state = state_dict_of(read_checkpoint(file, check), file, raw)
    prefixes = ("first_stage_model.", "vae.", "")
    prefix = next((p for p in prefixes if f"{p}encoder.down.0.block.0.norm1.weight" in state), None)
    if prefix is None:
        return {}
    if f"{prefix}quantize.embedding.weight" in state:
        raise ValueError(f"{file}: a vector-quantised autoencoder of latent-diffusion; only the KL ones are read")
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {n: tensor for n, tensor in found.items() if n.startswith(tuple(NAMES)) and isinstance(tensor, Tensor)}


def _from_latent_diffusion(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    origin: str | Path = "",
    allow_mismatch: bool = False,
) -> DiffusersAutoencoder:
    """Build AutoencoderKL with these weights, in evaluation mode; fresh without weights."""
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


def _latent_diffusion_config(weights: Mapping[str, Tensor], origin: Path) -> dict[str, Any]:
    """The arguments of AutoencoderKL, from the shapes. GroupNorm always has 32 groups in that code."""
    from diffusers import AutoencoderKL

    if attention := [name for name in weights if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", name)]:
        raise ValueError(f"{origin}: attention outside the middle ({attention[0]}), which AutoencoderKL does not have")
    try:
        channels, moments = weights["encoder.conv_in.weight"].shape[1], weights["encoder.conv_out.weight"].shape[0]
        latent, output = weights["decoder.conv_in.weight"].shape[1], weights["decoder.conv_out.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{origin}: an autoencoder of latent-diffusion, but without {error.args[0]}") from error
    widths: list[int] = []
    while (first := f"encoder.down.{len(widths)}.block.0.conv1.weight") in weights:
        widths.append(weights[first].shape[0])
    embedded = weights["post_quant_conv.weight"].shape[1] if "post_quant_conv.weight" in weights else latent
    if moments != 2 * latent or embedded != latent:
        raise ValueError(
            f"{origin}: its latent has {embedded} channels, the decoder takes {latent}, the encoder gives {moments}: "
            "AutoencoderKL has one width for all"
        )
    config = {
        "in_channels": channels,
        "out_channels": output,
        **{key: (block,) * len(widths) for key, block in BLOCKS.items()},
        "block_out_channels": tuple(widths),
        "layers_per_block": sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.norm1\.weight", n)) for n in weights),
        "latent_channels": latent,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in weights,
    }
    with torch.device("meta"):
        outline: Any = AutoencoderKL(**config)
        check_parameters(outline, sum(weight.nbytes for weight in weights.values()))
    return config
