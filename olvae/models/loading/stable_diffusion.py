"""AutoencoderKL as a LiteVAE object and back: its networks, its config and the names of its weights.

Stable Diffusion's, SDXL's, SD3's and FLUX's autoencoders are all diffusers' AutoencoderKL: SDEncoder, SDDecoder and, in
the older ones, a 1x1 convolution on either side of the latent.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olvae.checkpoint import load_weights
from olvae.config import ConfigError
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.diffusers import DiffusersAutoencoder
from olvae.models.spec import AutoencoderSpec
from olvae.modules.sdvae import SDDecoder, SDEncoder

__all__ = ["as_litevae", "diffusers_config", "diffusers_weights", "is_stable_diffusion"]

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
    return isinstance(getattr(model, "encoder", None), SDEncoder) and isinstance(
        getattr(model, "decoder", None), SDDecoder
    )


def as_litevae(model: Autoencoder, name: str) -> LiteVAE:
    """The same autoencoder as a LiteVAE object, whose networks can be trained and exported.

    Args:
        model: a LiteVAE, which is returned as it is, or diffusers' AutoencoderKL, whose weights are copied.
        name: of the model, for messages.

    Raises:
        ConfigError: it is another autoencoder, or has a part that SDEncoder and SDDecoder do not have.
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
        ValueError: encoder and decoder differ in a setting of which AutoencoderKL has one for both.
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
    common = math.gcd(*widths)
    shared = {
        "channels": common,
        "channel_mult": [width // common for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "norm_groups": config["norm_num_groups"],
        "attention": config["mid_block_add_attention"],
    }
    encoder = {"latent_dim": 2 * n_z, "in_channels": config["in_channels"], "image_size": _size(config)}
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


def _size(config: Mapping[str, Any]) -> int:
    """The side of the images in pixels that it was made for."""
    size, f = config["sample_size"], 2 ** (len(config["block_out_channels"]) - 1)
    return size if isinstance(size, int) and size % f == 0 else max(256, f)
