"""Classes of diffusers that can be trained here, and written back: the contract; AutoencoderKL, Tiny, wrapped ones."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.models.autoencoder import LiteVAE
from olvae.models.spec import FOR_DIFFUSION, AutoencoderSpec
from olvae.modules.base import HALVES, Decoder, Encoder
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from olvae.modules.others.wrapped import MODULES, TRAINABLE, DiffusersDecoder, DiffusersEncoder
from olvae.modules.sdvae import SDDecoder, SDEncoder

BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

NAMES = {
    "encoder.": "encoder.model.",
    "decoder.": "decoder.model.",
    "quant_conv.": "quantizer.quant_conv.",
    "post_quant_conv.": "quantizer.post_quant_conv.",
}
"""How AutoencoderKL's names begin in diffusers, and here."""


class Family(ABC):
    """Classes of diffusers whose networks are networks of ours: one becomes a LiteVAE, to be trained, and goes back."""

    kinds: ClassVar[Sequence[str]]  # names of the classes
    networks: ClassVar[tuple[type[Encoder], type[Decoder]]]  # of ours

    @abstractmethod
    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        """Describe the networks of a DiffusersAutoencoder as ours; ConfigError if these lack a part of them."""

    def spec_of(self, encoder: Config, decoder: Config, n_z: int, **others: Any) -> AutoencoderSpec:
        """The spec of the family's networks with these params, and other arguments of :class:`AutoencoderSpec`."""
        halves = zip(self.networks, (encoder, decoder), strict=True)
        one, other = (
            {"target": f"{half.__module__}.{half.__qualname__}", "params": p} for half, p in halves
        )
        return AutoencoderSpec(one, other, n_z, **others)

    @abstractmethod
    def to_ours(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rename diffusers' weights to ours."""

    def holds(self, model: LiteVAE) -> bool:
        """Whether a model's networks are of this family."""
        return isinstance(model.encoder, self.networks[0]) and isinstance(
            model.decoder, self.networks[1]
        )

    def kind(self, model: LiteVAE) -> str:  # noqa: ARG002
        """The class of diffusers that a model is."""
        return self.kinds[0]

    @abstractmethod
    def config(self, model: LiteVAE) -> dict[str, Any]:
        """The arguments of that class; ValueError if it has none for a setting of the model."""

    @abstractmethod
    def to_diffusers(self, model: LiteVAE) -> Mapping[str, Tensor]:
        """Rename a model's weights to diffusers'; ValueError if one has no place there."""

    def units(self, model: LiteVAE) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """Mean and deviation, (n_z, 1, 1) each, if the class has its latents in a diffusion model's units."""
        return None


class StableDiffusion(Family):
    """AutoencoderKL, also Stable Diffusion's, SDXL's, SD3's and FLUX.1's, as SDEncoder, SDDecoder and a quantizer."""

    kinds, networks = ("AutoencoderKL",), (SDEncoder, SDDecoder)

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        config = theirs.model.config
        for key, only in (*BLOCKS.items(), ("act_fn", "silu")):
            found = {config[key]} if isinstance(config[key], str) else set(config[key])
            if other := found - {only}:
                raise ConfigError(
                    f"{name}: {key}: {', '.join(sorted(other))}: only {only} can be trained here"
                )
        if config["use_quant_conv"] != config["use_post_quant_conv"]:
            raise ConfigError(
                f"{name}: it has one of quant_conv and post_quant_conv: only both or none can be trained"
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
        factors = {factor: config[factor] for factor in FOR_DIFFUSION} | {
            "shift_factor": config["shift_factor"] or 0.0
        }
        return self.spec_of(
            encoder | shared, decoder | shared, n_z, use_quant=config["use_quant_conv"], **factors
        )

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(state, NAMES)

    def config(self, model: LiteVAE) -> dict[str, Any]:
        encoder, decoder = model.encoder.node["params"], model.decoder.node["params"]
        widths, others = (
            [half["channels"] * m for m in half["channel_mult"]] for half in (encoder, decoder)
        )
        n_z, moments = model.latent_channels, model.encoder.latent_dim
        for what, one, other in (
            ("widths", widths, others),
            *(
                (key, encoder[key], decoder[key])
                for key in ("num_res_blocks", "norm_groups", "attention")
            ),
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

    def to_diffusers(self, model: LiteVAE) -> dict[str, Tensor]:
        if model.encoder.linear is not None or model.decoder.linear is not None:
            raise ValueError("AutoencoderKL has no linear path beside its networks")
        return _renamed(model.state_dict(), {ours: theirs for theirs, ours in NAMES.items()})


class Wrapped(Family):
    """The classes in :data:`TRAINABLE`: each half is diffusers' own module, under its own names."""

    kinds, networks = TRAINABLE, (DiffusersEncoder, DiffusersDecoder)

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:  # noqa: ARG002
        given = {
            key: value for key, value in theirs.model.config.items() if not key.startswith("_")
        }
        n_z, f = theirs.latent_channels, theirs.downscale
        shared = {
            "kind": theirs.kind,
            "config": json.loads(json.dumps(given)),
            "frames": theirs.frames,
        }
        encoder = {
            "latent_dim": 2 * n_z,
            "in_channels": theirs.in_channels,
            "image_size": max(256, f),
            "downscale": f,
        }
        encoder["deterministic"] = theirs.deterministic
        decoder = {"z_channels": n_z, "out_channels": theirs.in_channels, "upscale": f}
        return self.spec_of(shared | encoder, shared | decoder, n_z, **theirs.for_diffusion)

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        elsewhere = {"encoder": MODULES["decoder"], "decoder": MODULES["encoder"]}
        return {
            f"{half}.model.{name}": tensor
            for name, tensor in state.items()
            for half, others in elsewhere.items()
            if name.partition(".")[0] not in others
        }

    def kind(self, model: LiteVAE) -> str:
        kind: str = model.decoder.node["params"]["kind"]
        return kind

    def config(self, model: LiteVAE) -> dict[str, Any]:
        encoder, decoder = model.encoder.node["params"], model.decoder.node["params"]
        if encoder["kind"] != decoder["kind"]:
            raise ValueError(f"the encoder is {encoder['kind']}'s, the decoder {decoder['kind']}'s")
        factors = {
            name: getattr(model, name) for name in FOR_DIFFUSION if name in decoder["config"]
        }
        return {**decoder["config"], **factors}

    def to_diffusers(self, model: LiteVAE) -> dict[str, Tensor]:
        named = sorted(
            model.state_dict().items()
        )  # the encoder's last: a fresh decoder has FLUX.2's statistics not
        return {name.partition(".model.")[2]: tensor for name, tensor in named}


class Tiny(Family):
    """AutoencoderTiny as TinyEncoder and TinyDecoder; its latents are a diffusion model's, without any factor."""

    kinds, networks = ("AutoencoderTiny",), (TinyEncoder, TinyDecoder)

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        config, n_z = theirs.model.config, theirs.latent_channels
        widths = {*config["encoder_block_out_channels"], *config["decoder_block_out_channels"]}
        rest = (config["act_fn"], config["upsample_fn"], config["upsampling_scaling_factor"])
        if len(widths) > 1 or rest != ("relu", "nearest", 2):
            raise ConfigError(
                f"{name}: only TAESD's form of AutoencoderTiny can be trained: one width, relu, nearest"
            )
        shared = {"channels": widths.pop()}
        encoder = {
            "in_channels": theirs.in_channels,
            "latent_dim": 2 * n_z,
            "blocks": [*config["num_encoder_blocks"]],
        }
        decoder = {
            "z_channels": n_z,
            "out_channels": theirs.in_channels,
            "blocks": [*config["num_decoder_blocks"]],
        }
        return self.spec_of(shared | encoder, shared | decoder, n_z, **theirs.for_diffusion)

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n_z = state["decoder.layers.0.weight"].shape[1]
        plain = {"latents_mean": torch.zeros(n_z, 1, 1), "latents_std": torch.ones(n_z, 1, 1)}
        return {
            **state,
            **{f"{half}.{name}": value for half in HALVES for name, value in plain.items()},
        }

    def config(self, model: LiteVAE) -> dict[str, Any]:
        halves = {"encoder": model.encoder.node["params"], "decoder": model.decoder.node["params"]}
        return {
            "in_channels": model.in_channels,
            "out_channels": model.decoder.out_channels,
            "latent_channels": model.latent_channels,
            **{f"num_{half}_blocks": params["blocks"] for half, params in halves.items()},
            **{
                f"{n}_block_out_channels": [p["channels"]] * len(p["blocks"])
                for n, p in halves.items()
            },
            "force_upcast": model.force_upcast,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
        }

    def to_diffusers(self, model: LiteVAE) -> dict[str, Tensor]:
        assert isinstance(model.decoder, TinyDecoder)
        decoders = (model.decoder.latents_mean, model.decoder.latents_std)
        if model.quantizer is not None or not all(map(torch.equal, self.units(model), decoders)):
            raise ValueError("AutoencoderTiny has neither a quantizer nor two units of its latents")
        return {name: tensor for name, tensor in model.state_dict().items() if ".layers." in name}

    def units(self, model: LiteVAE) -> tuple[Tensor, Tensor]:
        assert isinstance(model.encoder, TinyEncoder)
        return model.encoder.latents_mean, model.encoder.latents_std


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        next(
            new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)
        ): tensor
        for name, tensor in state.items()
    }


FAMILIES: tuple[Family, ...] = (StableDiffusion(), Wrapped(), Tiny())


def family_of(model: LiteVAE) -> Family | None:
    """The family that has a model's networks; None for a LiteVAE's."""
    return next((family for family in FAMILIES if family.holds(model)), None)
