"""Train classes of diffusers and write them back: AutoencoderKL, Tiny, RAE, wrapped ones."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.models.autoencoder import LiteVAE
from olvae.models.spec import FOR_DIFFUSION, UNMEASURED, AutoencoderSpec
from olvae.modules.base import HALVES, Decoder, Encoder
from olvae.modules.others.rae import RAEDecoder, RAEEncoder
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from olvae.modules.others.wrapped import MODULES, TRAINABLE, DiffusersDecoder, DiffusersEncoder
from olvae.modules.sdvae import SDDecoder, SDEncoder, block_types

NAMES = {
    "encoder.": "encoder.model.",
    "decoder.": "decoder.model.",
    "quant_conv.": "quantizer.quant_conv.",
    "post_quant_conv.": "quantizer.post_quant_conv.",
}
"""How AutoencoderKL's names begin in diffusers, and here."""


class Family(ABC):
    """Contract of classes of diffusers whose networks are also ours.

    One of these classes becomes a LiteVAE, to be trained, and can be written back.
    """

    # Names of the classes.
    kinds: ClassVar[Sequence[str]]
    # Our networks.
    networks: ClassVar[tuple[type[Encoder], type[Decoder]]]

    @abstractmethod
    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        """Describe the networks of a DiffusersAutoencoder as ours.

        Raises ConfigError: ours lack a part of them.
        """

    def spec_of(self, encoder: Config, decoder: Config, n_z: int, **others: Any) -> AutoencoderSpec:
        """Make the spec of networks with these params, and other arguments of AutoencoderSpec."""
        one, other = self.networks
        return AutoencoderSpec(
            {"target": f"{one.__module__}.{one.__qualname__}", "params": encoder},
            {"target": f"{other.__module__}.{other.__qualname__}", "params": decoder},
            n_z,
            **others,
        )

    @abstractmethod
    def to_ours(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rename diffusers' weights to ours."""

    def holds(self, model: LiteVAE) -> bool:
        """Whether a model's networks are of this family."""
        encoder, decoder = self.networks
        return isinstance(model.encoder, encoder) and isinstance(model.decoder, decoder)

    def kind(self, model: LiteVAE) -> str:  # noqa: ARG002
        """The class of diffusers that a model is."""
        return self.kinds[0]

    @abstractmethod
    def config(self, model: LiteVAE) -> dict[str, Any]:
        """List that class's arguments; ValueError if it has none for a setting of the model."""

    def original_config(self, model: LiteVAE) -> dict[str, Any]:
        """As :meth:`config`, for files of the class's project, which may hold more."""
        return self.config(model)

    @abstractmethod
    def to_diffusers(self, model: LiteVAE) -> Mapping[str, Tensor]:
        """Rename a model's weights to diffusers'; ValueError if one has no place there."""

    def units(self, model: LiteVAE) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """Mean and deviation, (n_z, 1, 1) each, if the class scales its latents by them."""
        return None


def _attention_levels(blocks: Sequence[str]) -> list[int]:
    """Find the levels with attention; others have the plain blocks, or can't be autoencoders."""
    return [level for level, block in enumerate(blocks) if block.startswith("Attn")]


class StableDiffusion(Family):
    """AutoencoderKL as SDEncoder, SDDecoder and a quantizer: Stable Diffusion's to FLUX.1's."""

    kinds = ("AutoencoderKL",)
    networks = (SDEncoder, SDDecoder)

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        # Our networks have one activation.
        config = theirs.model.config
        if config["act_fn"] != "silu":
            raise ConfigError(f"{name}: act_fn: {config['act_fn']}: only silu can be trained here")

        # Both convolutions beside the latent, or none.
        if config["use_quant_conv"] != config["use_post_quant_conv"]:
            raise ConfigError(
                f"{name}: it has one of quant_conv and post_quant_conv: "
                "only both or none can be trained"
            )

        # Params of the networks: widths are multiples of a common one.
        widths = list(config["block_out_channels"])
        common = math.gcd(*widths)
        shared = {
            "channels": common,
            "channel_mult": [width // common for width in widths],
            "num_res_blocks": config["layers_per_block"],
            "norm_groups": config["norm_num_groups"],
            "attention": config["mid_block_add_attention"],
        }
        z_channels = config["latent_channels"]
        size = config["sample_size"]
        f = 2 ** (len(widths) - 1)
        encoder = {"latent_dim": 2 * z_channels, "in_channels": config["in_channels"]}
        encoder["attention_levels"] = _attention_levels(config["down_block_types"])
        encoder["image_size"] = size if isinstance(size, int) and size % f == 0 else max(256, f)
        decoder = {"z_channels": z_channels, "enlarge": theirs.enlarge}
        decoder["attention_levels"] = _attention_levels(config["up_block_types"][::-1])
        decoder["out_channels"] = config["out_channels"]
        if theirs.enlarge > 1:
            decoder["out_channels"] = theirs.in_channels

        factors = {factor: config[factor] for factor in FOR_DIFFUSION}
        factors["shift_factor"] = config["shift_factor"] or 0.0
        quantized = config["use_quant_conv"]
        n_z = theirs.latent_channels
        return self.spec_of(encoder | shared, decoder | shared, n_z, use_quant=quantized, **factors)

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(state, NAMES)

    def config(self, model: LiteVAE) -> dict[str, Any]:
        config = self.original_config(model)
        z_channels = model.decoder.z_channels
        if model.latent_channels != z_channels:
            raise ValueError(
                f"latents of {model.latent_channels} channels, networks of {z_channels}: "
                "AutoencoderKL has one number for both"
            )
        return config

    def original_config(self, model: LiteVAE) -> dict[str, Any]:
        encoder = model.encoder.node["params"]
        decoder = model.decoder.node["params"]
        widths = [encoder["channels"] * m for m in encoder["channel_mult"]]
        others = [decoder["channels"] * m for m in decoder["channel_mult"]]
        n_z = model.latent_channels
        moments = model.encoder.latent_dim

        # AutoencoderKL has one setting for both halves, but for attention at levels.
        both: list[tuple[str, Any, Any]] = [("widths", widths, others)]
        for key in ("num_res_blocks", "norm_groups", "attention"):
            both.append((key, encoder[key], decoder[key]))
        both.append(("moments", moments, 2 * model.decoder.z_channels))
        for what, one, other in both:
            if one != other:
                raise ValueError(
                    f"the encoder has {what} {one}, the decoder {other}: "
                    "AutoencoderKL has the same in both"
                )

        quantized = model.quantizer is not None
        return {
            "in_channels": model.in_channels,
            "out_channels": model.decoder.out_channels,
            **block_types(len(widths), encoder["attention_levels"], decoder["attention_levels"]),
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

    kinds = TRAINABLE
    networks = (DiffusersEncoder, DiffusersDecoder)

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:  # noqa: ARG002
        config = theirs.model.config
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        # Of a folder of diffusers, a decoder at 2x is in the config as well; of a file, it is not.
        outputs = given.get("out_channels")
        if theirs.enlarge > 1 and outputs == theirs.model.decoder.conv_out.out_channels:
            given["out_channels"] = outputs // theirs.enlarge**2
        n_z = theirs.latent_channels
        f = theirs.downscale
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
            "deterministic": theirs.deterministic,
        }
        decoder = {"z_channels": n_z, "out_channels": theirs.in_channels, "upscale": f}
        decoder["enlarge"] = theirs.enlarge
        return self.spec_of(shared | encoder, shared | decoder, n_z, **theirs.for_diffusion)

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # What belongs to neither half, such as FLUX.2's batch norm, goes to both.
        elsewhere = {"encoder": MODULES["decoder"], "decoder": MODULES["encoder"]}
        renamed = {}
        for name, tensor in state.items():
            for half, others in elsewhere.items():
                if name.partition(".")[0] not in others:
                    renamed[f"{half}.model.{name}"] = tensor
        return renamed

    def kind(self, model: LiteVAE) -> str:
        kind: str = model.decoder.node["params"]["kind"]
        return kind

    def config(self, model: LiteVAE) -> dict[str, Any]:
        encoder = model.encoder.node["params"]
        decoder = model.decoder.node["params"]
        if encoder["kind"] != decoder["kind"]:
            raise ValueError(f"the encoder is {encoder['kind']}'s, the decoder {decoder['kind']}'s")
        config = dict(decoder["config"])
        for name in FOR_DIFFUSION:
            if name in config:
                config[name] = getattr(model, name)
        return config

    def to_diffusers(self, model: LiteVAE) -> dict[str, Tensor]:
        # Of tensors that both halves have, the encoder's come last and are kept: a fresh decoder
        # has not FLUX.2's statistics.
        named = sorted(model.state_dict().items())
        return {name.partition(".model.")[2]: tensor for name, tensor in named}


class Representation(Family):
    """AutoencoderRAE: a frozen vision encoder, and a transformer that is trained to decode it.

    Its encode and decode apply the factors in its config, which stay.
    """

    kinds = ("AutoencoderRAE",)
    networks = (RAEEncoder, RAEDecoder)

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        given = theirs.model.config
        if not given["reshape_to_2d"]:
            raise ConfigError(f"{name}: reshape_to_2d: false: only latents of a grid are trained")
        config = {key: value for key, value in given.items() if not key.startswith("_")}
        shared = {"config": json.loads(json.dumps(config))}
        n_z = theirs.latent_channels
        f = theirs.downscale
        encoder = {"latent_dim": 2 * n_z, "image_size": theirs.side, "downscale": f}
        return self.spec_of(shared | encoder, shared | {"z_channels": n_z, "upscale": f}, n_z)

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Means and deviations, of images and of latents, belong to both halves.
        elsewhere = dict(zip(HALVES, reversed(HALVES), strict=True))
        renamed = {}
        for name, tensor in state.items():
            for half, other in elsewhere.items():
                if name.partition(".")[0] != other:
                    renamed[f"{half}.model.{name}"] = tensor
        return renamed

    def config(self, model: LiteVAE) -> dict[str, Any]:
        encoder = model.encoder.node["params"]["config"]
        decoder = model.decoder.node["params"]["config"]
        if encoder != decoder:
            raise ValueError("the encoder and the decoder are of two AutoencoderRAE")
        return dict(decoder)

    def to_diffusers(self, model: LiteVAE) -> dict[str, Tensor]:
        if model.quantizer is not None:
            raise ValueError("AutoencoderRAE has no quantizer")
        return {name.partition(".model.")[2]: tensor for name, tensor in model.state_dict().items()}


class Tiny(Family):
    """AutoencoderTiny as TinyEncoder, TinyDecoder; diffusion models take its latents unscaled."""

    kinds = ("AutoencoderTiny",)
    networks = (TinyEncoder, TinyDecoder)

    def holds(self, model: LiteVAE) -> bool:
        if not super().holds(model):
            return False
        # TAEF2's and TAESANA's networks have parts that AutoencoderTiny lacks.
        encoder = model.encoder.node["params"]
        decoder = model.decoder.node["params"]
        others = (encoder["pool"], encoder["stem"], decoder["pool"], decoder["channel_mult"])
        return not any(others)

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        config = theirs.model.config
        n_z = theirs.latent_channels
        widths = {*config["encoder_block_out_channels"], *config["decoder_block_out_channels"]}
        rest = (config["act_fn"], config["upsample_fn"], config["upsampling_scaling_factor"])
        if len(widths) > 1 or rest != ("relu", "nearest", 2):
            raise ConfigError(
                f"{name}: only TAESD's form of AutoencoderTiny can be trained: "
                "one width, relu, nearest"
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
            "enlarge": theirs.enlarge,
        }
        return self.spec_of(shared | encoder, shared | decoder, n_z, **theirs.for_diffusion)

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n_z = state["decoder.layers.0.weight"].shape[1]
        mean = torch.zeros(n_z, 1, 1)
        std = torch.ones(n_z, 1, 1)
        ours = dict(state)
        for half in HALVES:
            ours[f"{half}.latents_mean"] = mean
            ours[f"{half}.latents_std"] = std
        return ours

    def config(self, model: LiteVAE) -> dict[str, Any]:
        encoder = model.encoder.node["params"]
        decoder = model.decoder.node["params"]
        return {
            "in_channels": model.in_channels,
            "out_channels": model.decoder.out_channels,
            "latent_channels": model.latent_channels,
            "num_encoder_blocks": encoder["blocks"],
            "num_decoder_blocks": decoder["blocks"],
            "encoder_block_out_channels": [encoder["channels"]] * len(encoder["blocks"]),
            "decoder_block_out_channels": [decoder["channels"]] * len(decoder["blocks"]),
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
    """Replace the beginning of each name; every name begins with one of ``names``."""
    renamed = {}
    for name, tensor in state.items():
        old = next(old for old in names if name.startswith(old))
        renamed[names[old] + name.removeprefix(old)] = tensor
    return renamed


FAMILIES: tuple[Family, ...] = (StableDiffusion(), Wrapped(), Representation(), Tiny())


def drop_factors(model: LiteVAE) -> None:
    """Reset a model's factors, which its training has outdated.

    Factors per channel of a class of diffusers stay, as it can't be without.
    """
    if model.latents_mean is None or not isinstance(family_of(model), Wrapped):
        model.set_for_diffusion(UNMEASURED)


def family_of(model: LiteVAE) -> Family | None:
    """The family that has a model's networks; None for a LiteVAE's."""
    for family in FAMILIES:
        if family.holds(model):
            return family
    return None
