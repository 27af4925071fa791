"""Stable Diffusion's autoencoder under diffusers' names: AutoencoderKL as a LiteVAE, and back.

Stable Diffusion's, SDXL's, SD3's and FLUX.1's autoencoders are all diffusers' AutoencoderKL: SDEncoder, SDDecoder and,
in the older ones, a 1x1 convolution on either side of the latent. So it can be a LiteVAE, to be trained and exported.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from olvae.config import ConfigError
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.loader import Family
from olvae.models.spec import FOR_DIFFUSION, AutoencoderSpec
from olvae.modules.sdvae import SDDecoder, SDEncoder

BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

NAMES = {
    "encoder.": "encoder.model.",
    "decoder.": "decoder.model.",
    "quant_conv.": "quantizer.quant_conv.",
    "post_quant_conv.": "quantizer.post_quant_conv.",
}
"""How AutoencoderKL's names begin in diffusers, and here."""


class StableDiffusion(Family):
    """AutoencoderKL as SDEncoder, SDDecoder and a quantizer."""

    kinds = ("AutoencoderKL",)

    def holds(self, model: LiteVAE) -> bool:
        return model.is_stable_diffusion

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        return _spec(dict(theirs.model.config), name)

    def ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(state, NAMES)

    def kind(self, model: LiteVAE) -> str:  # noqa: ARG002
        return "AutoencoderKL"

    def config(self, model: LiteVAE) -> dict[str, Any]:
        encoder, decoder = model.encoder.node["params"], model.decoder.node["params"]
        widths, others = ([half["channels"] * m for m in half["channel_mult"]] for half in (encoder, decoder))
        n_z, moments = model.latent_channels, model.encoder.latent_dim
        for what, one, other in (
            ("widths", widths, others),
            *((key, encoder[key], decoder[key]) for key in ("num_res_blocks", "norm_groups", "attention")),
            ("moments", moments, 2 * model.decoder.z_channels),
            ("moments", moments, 2 * n_z),
        ):
            if one != other:
                raise ValueError(
                    f"the encoder has {what} {one}, the decoder {other}: AutoencoderKL has the same in both"
                )
        quantized = model.quantizer is not None
        return {
            "in_channels": model.in_channels,
            "out_channels": model.decoder.out_channels,
            **{key: [block] * len(widths) for key, block in BLOCKS.items()},
            "block_out_channels": widths,
            "layers_per_block": encoder["num_res_blocks"],
            "latent_channels": n_z,
            "norm_num_groups": encoder["norm_groups"],
            "sample_size": model.encoder.image_size,
            "use_quant_conv": quantized,
            "use_post_quant_conv": quantized,
            "mid_block_add_attention": encoder["attention"],
            **model.for_diffusion,
        }

    def theirs(self, model: LiteVAE) -> dict[str, Tensor]:
        if model.encoder.linear is not None or model.decoder.linear is not None:
            raise ValueError("AutoencoderKL has no linear path beside its networks")
        return _renamed(model.state_dict(), {ours: theirs for theirs, ours in NAMES.items()})


def _spec(config: Mapping[str, Any], name: str) -> AutoencoderSpec:
    """What AutoencoderKL's config describes; training and exports need no more of it."""
    for key, only in (*BLOCKS.items(), ("act_fn", "silu")):
        found = {config[key]} if isinstance(config[key], str) else set(config[key])
        if other := found - {only}:
            raise ConfigError(f"{name}: {key}: {', '.join(sorted(other))}: only {only} can be trained here")
    if config["use_quant_conv"] != config["use_post_quant_conv"]:
        raise ConfigError(f"{name}: it has one of quant_conv and post_quant_conv: only both or none can be trained")
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
        **{factor: config[factor] for factor in FOR_DIFFUSION} | {"shift_factor": config["shift_factor"] or 0.0},
    )


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        next(new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)): tensor
        for name, tensor in state.items()
    }
