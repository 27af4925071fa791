"""AutoencoderKL under other names: as a LiteVAE object and back, and from the latent-diffusion code's checkpoints.

Stable Diffusion's, SDXL's, SD3's and FLUX's autoencoders are all diffusers' AutoencoderKL: SDEncoder, SDDecoder and, in
the older ones, a 1x1 convolution on either side of the latent. The latent-diffusion code's names are converted by
diffusers; its configuration is read from the shapes.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olvae.checkpoint import load_weights, read_checkpoint, state_dict_of
from olvae.config import ConfigError
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.diffusers_models import DiffusersAutoencoder, check_parameters
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.spec import AutoencoderSpec
from olvae.models.weight_files import is_export, locate_weights
from olvae.modules.sdvae import SDDecoder, SDEncoder
from olvae.runs import run_of

BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

NAMES = {
    "encoder.": "encoder.model.",
    "decoder.": "decoder.model.",
    "quant_conv.": "quantizer.quant_conv.",
    "post_quant_conv.": "quantizer.post_quant_conv.",
}
"""How names begin in diffusers, and here."""


def is_stable_diffusion(model: Autoencoder) -> bool:
    """Whether a model's networks are AutoencoderKL's."""
    halves = (getattr(model, half, None) for half in ("encoder", "decoder"))
    return all(isinstance(half, kind) for half, kind in zip(halves, (SDEncoder, SDDecoder), strict=True))


def as_litevae(model: Autoencoder, name: str) -> LiteVAE:
    """The same autoencoder as a LiteVAE object, whose networks can be trained and exported.

    Raises:
        ConfigError: it is neither a LiteVAE nor an AutoencoderKL, or has a part that SDEncoder and SDDecoder lack.
    """
    if isinstance(model, LiteVAE):
        return model
    kind = type(model.model).__name__ if isinstance(model, DiffusersAutoencoder) else type(model).__name__
    if not isinstance(model, DiffusersAutoencoder) or kind != "AutoencoderKL":
        raise ConfigError(f"{name}: diffusers' {kind}: only LiteVAE and AutoencoderKL can be trained and exported here")
    spec = _spec(dict(model.model.config), name)
    with torch.random.fork_rng(devices=[]):
        ours = LiteVAE.from_spec(spec)
    load_weights(ours, _renamed(model.model.state_dict(), NAMES), name)
    return ours.train(model.training)


def diffusers_config(model: LiteVAE) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL with the networks of :func:`is_stable_diffusion`.

    Raises:
        ValueError: encoder and decoder differ in a setting that AutoencoderKL has once.
    """
    encoder, decoder = model.encoder.node["params"], model.decoder.node["params"]
    widths = [encoder["channels"] * m for m in encoder["channel_mult"]]
    for what, one, other in (
        ("widths", widths, [decoder["channels"] * m for m in decoder["channel_mult"]]),
        *((key, encoder[key], decoder[key]) for key in ("num_res_blocks", "norm_groups", "attention")),
    ):
        if one != other:
            raise ValueError(f"the encoder has {what} {one}, the decoder {other}: AutoencoderKL has the same in both")
    if model.decoder.z_channels != model.latent_channels or model.encoder.latent_dim != 2 * model.latent_channels:
        raise ValueError(
            f"the latent has {model.latent_channels} channels, the decoder takes {model.decoder.z_channels}, the "
            f"encoder gives {model.encoder.latent_dim}: AutoencoderKL has one width for all"
        )
    return {
        "in_channels": model.in_channels,
        "out_channels": model.decoder.out_channels,
        **{key: [block] * len(widths) for key, block in BLOCKS.items()},
        "block_out_channels": widths,
        "layers_per_block": encoder["num_res_blocks"],
        "latent_channels": model.latent_channels,
        "norm_num_groups": encoder["norm_groups"],
        "sample_size": model.encoder.image_size,
        "use_quant_conv": model.quantizer is not None,
        "use_post_quant_conv": model.quantizer is not None,
        "mid_block_add_attention": encoder["attention"],
        **model.for_diffusion,
    }


def diffusers_weights(model: LiteVAE) -> dict[str, Tensor]:
    """The weights under AutoencoderKL's names."""
    return _renamed(model.state_dict(), {ours: theirs for theirs, ours in NAMES.items()})


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        next(new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)): tensor
        for name, tensor in state.items()
    }


def _spec(config: Mapping[str, Any], name: str) -> AutoencoderSpec:
    """What AutoencoderKL's config describes; training and exports need no more of it."""
    for key, block in BLOCKS.items():
        if other := set(config[key]) - {block}:
            raise ConfigError(f"{name}: {key}: {', '.join(sorted(other))}: only {block} can be trained here")
    if config["act_fn"] != "silu":
        raise ConfigError(f"{name}: act_fn: {config['act_fn']}: only silu can be trained here")
    if config["use_quant_conv"] != config["use_post_quant_conv"]:
        raise ConfigError(
            f"{name}: it has one of quant_conv and post_quant_conv: only both or none can be trained here"
        )
    widths, n_z = list(config["block_out_channels"]), config["latent_channels"]
    common, size, f = math.gcd(*widths), config["sample_size"], 2 ** (len(widths) - 1)
    shared = {
        "channels": common,
        "channel_mult": [width // common for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "norm_groups": config["norm_num_groups"],
        "attention": config["mid_block_add_attention"],
    }
    encoder = {"latent_dim": 2 * n_z, "in_channels": config["in_channels"]}
    encoder["image_size"] = size if isinstance(size, int) and size % f == 0 else max(256, f)
    decoder = {"z_channels": n_z, "out_channels": config["out_channels"]}
    return AutoencoderSpec(
        encoder_config={"target": f"{SDEncoder.__module__}.SDEncoder", "params": {**encoder, **shared}},
        decoder_config={"target": f"{SDDecoder.__module__}.SDDecoder", "params": {**decoder, **shared}},
        embed_dim=n_z,
        use_quant=config["use_quant_conv"],
        scaling_factor=config["scaling_factor"],
        shift_factor=config["shift_factor"] or 0.0,
        latents_mean=config["latents_mean"],
        latents_std=config["latents_std"],
        force_upcast=bool(config["force_upcast"]),
    )


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

LDM_PREFIXES = ("first_stage_model.", "vae.", "")

LDM_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


class LatentDiffusionLoader(Loader):
    """A checkpoint of the latent-diffusion code with a KL autoencoder, or a folder with one."""

    def accepts(self, text: str) -> bool:
        try:
            weights = locate_weights(text)
        except (FileNotFoundError, ValueError):
            return False
        if run_of(weights) or is_export(weights):
            return False
        return _prefix(state_dict_of(read_checkpoint(weights, check=False), weights)) is not None

    def find(self, text: str, options: LoadOptions) -> Target:
        weights = locate_weights(text)

        def read(check: bool = True) -> dict[str, Tensor]:
            state = state_dict_of(read_checkpoint(weights, check), weights, options.raw)
            if (tensors := pick_latent_diffusion(state, weights)) is None:
                raise ValueError(f"{weights}: the file has been replaced by something else")
            return tensors

        config = latent_diffusion_config(read(check=False), weights)
        return Target(
            lambda: from_latent_diffusion(config, read(), weights, options.allow_mismatch),
            partial(from_latent_diffusion, config),
            raw=options.raw,
            name=text,
        )


def _prefix(state: Mapping[str, Any]) -> str | None:
    return next((p for p in LDM_PREFIXES if f"{p}encoder.down.0.block.0.norm1.weight" in state), None)


def pick_latent_diffusion(state: Mapping[str, Any], origin: str | Path) -> dict[str, Tensor] | None:
    """Pick the autoencoder's tensors out of a state dict of that code, without the names' prefix; None if it has none.

    Raises:
        ValueError: the autoencoder is vector-quantised.
    """
    if (prefix := _prefix(state)) is None:
        return None
    if f"{prefix}quantize.embedding.weight" in state:
        raise ValueError(f"{origin}: a vector-quantised autoencoder of latent-diffusion; only the KL ones are read")
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(LDM_PARTS) and isinstance(tensor, Tensor)
    }


def from_latent_diffusion(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    origin: str | Path = "",
    allow_mismatch: bool = False,
) -> DiffusersAutoencoder:
    """Build the autoencoder of :func:`latent_diffusion_config`, in evaluation mode; fresh without weights.

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
        ValueError: AutoencoderKL does not allow it: attention outside the middle, several latent widths, a gap.
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
