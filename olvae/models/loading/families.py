"""Classes of diffusers that can be trained here, and written back: AutoencoderKL, Tiny, and wrapped ones."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.autoencoder_kl import StableDiffusion
from olvae.models.loading.loader import Family
from olvae.models.spec import FOR_DIFFUSION, AutoencoderSpec
from olvae.modules.others.tiny import TinyDecoder, TinyEncoder
from olvae.modules.others.wrapped import HALVES, TRAINED, DiffusersDecoder, DiffusersEncoder


class Wrapped(Family):
    """The classes in :data:`TRAINED`: each half is diffusers' own module, under its own names."""

    kinds = TRAINED

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:  # noqa: ARG002
        given = {key: value for key, value in theirs.model.config.items() if not key.startswith("_")}
        n_z, f = theirs.latent_channels, theirs.downscale
        shared = {"kind": theirs.kind, "config": json.loads(json.dumps(given)), "frames": theirs.frames}
        encoder = {"latent_dim": 2 * n_z, "in_channels": theirs.in_channels, "image_size": max(256, f), "downscale": f}
        encoder["deterministic"] = theirs.deterministic
        decoder = {"z_channels": n_z, "out_channels": theirs.in_channels, "upscale": f}
        target = DiffusersEncoder.__module__
        return AutoencoderSpec(
            encoder_config={"target": f"{target}.DiffusersEncoder", "params": {**shared, **encoder}},
            decoder_config={"target": f"{target}.DiffusersDecoder", "params": {**shared, **decoder}},
            embed_dim=n_z,
            **theirs.for_diffusion,
        )

    def ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        elsewhere = {"encoder": HALVES["decoder"], "decoder": HALVES["encoder"]}
        return {
            f"{half}.model.{name}": tensor
            for name, tensor in state.items()
            for half, others in elsewhere.items()
            if name.partition(".")[0] not in others
        }

    def holds(self, model: LiteVAE) -> bool:
        return isinstance(model.encoder, DiffusersEncoder) and isinstance(model.decoder, DiffusersDecoder)

    def kind(self, model: LiteVAE) -> str:
        kind: str = model.decoder.node["params"]["kind"]
        return kind

    def config(self, model: LiteVAE) -> dict[str, Any]:
        encoder, decoder = model.encoder.node["params"], model.decoder.node["params"]
        if encoder["kind"] != decoder["kind"]:
            raise ValueError(f"the encoder is {encoder['kind']}'s, the decoder {decoder['kind']}'s")
        factors = {name: getattr(model, name) for name in FOR_DIFFUSION if name in decoder["config"]}
        return {**decoder["config"], **factors}

    def theirs(self, model: LiteVAE) -> dict[str, Tensor]:
        named = sorted(model.state_dict().items())  # the encoder's last: a fresh decoder has FLUX.2's statistics not
        return {name.partition(".model.")[2]: tensor for name, tensor in named}


class Tiny(Family):
    """AutoencoderTiny as TinyEncoder and TinyDecoder; its latents are a diffusion model's, without any factor."""

    kinds = ("AutoencoderTiny",)

    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        config, n_z = theirs.model.config, theirs.latent_channels
        widths = {*config["encoder_block_out_channels"], *config["decoder_block_out_channels"]}
        rest = (config["act_fn"], config["upsample_fn"], config["upsampling_scaling_factor"])
        if len(widths) > 1 or rest != ("relu", "nearest", 2):
            raise ConfigError(f"{name}: only TAESD's form of AutoencoderTiny can be trained: one width, relu, nearest")
        shared, target = {"channels": widths.pop()}, TinyEncoder.__module__
        encoder = {"in_channels": theirs.in_channels, "latent_dim": 2 * n_z, "blocks": [*config["num_encoder_blocks"]]}
        decoder = {"z_channels": n_z, "out_channels": theirs.in_channels, "blocks": [*config["num_decoder_blocks"]]}
        return AutoencoderSpec(
            encoder_config={"target": f"{target}.TinyEncoder", "params": {**shared, **encoder}},
            decoder_config={"target": f"{target}.TinyDecoder", "params": {**shared, **decoder}},
            embed_dim=n_z,
            **theirs.for_diffusion,
        )

    def ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n_z = state["decoder.layers.0.weight"].shape[1]
        plain = {"latents_mean": torch.zeros(n_z, 1, 1), "latents_std": torch.ones(n_z, 1, 1)}
        return {**state, **{f"{half}.{name}": value for half in HALVES for name, value in plain.items()}}

    def holds(self, model: LiteVAE) -> bool:
        return isinstance(model.encoder, TinyEncoder) and isinstance(model.decoder, TinyDecoder)

    def kind(self, model: LiteVAE) -> str:  # noqa: ARG002
        return "AutoencoderTiny"

    def config(self, model: LiteVAE) -> dict[str, Any]:
        halves = {"encoder": model.encoder.node["params"], "decoder": model.decoder.node["params"]}
        return {
            "in_channels": model.in_channels,
            "out_channels": model.decoder.out_channels,
            "latent_channels": model.latent_channels,
            **{f"num_{half}_blocks": params["blocks"] for half, params in halves.items()},
            **{f"{n}_block_out_channels": [p["channels"]] * len(p["blocks"]) for n, p in halves.items()},
            "force_upcast": model.force_upcast,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
        }

    def theirs(self, model: LiteVAE) -> dict[str, Tensor]:
        if model.quantizer is not None or not all(torch.equal(*pair) for pair in self._statistics(model)):
            raise ValueError("AutoencoderTiny has neither a quantizer nor two units of its latents")
        return {name: tensor for name, tensor in model.state_dict().items() if ".layers." in name}

    def units(self, model: LiteVAE) -> tuple[Tensor, Tensor]:
        (mean, _), (std, _) = self._statistics(model)
        return mean, std

    def _statistics(self, model: LiteVAE) -> list[tuple[Tensor, Tensor]]:
        assert isinstance(model.encoder, TinyEncoder)
        assert isinstance(model.decoder, TinyDecoder)
        halves = (model.encoder, model.decoder)
        one, other = ((half.latents_mean, half.latents_std) for half in halves)
        return list(zip(one, other, strict=True))


FAMILIES: tuple[Family, ...] = (StableDiffusion(), Wrapped(), Tiny())


def family_of(model: LiteVAE) -> Family | None:
    """The family that has a model's networks; None for a LiteVAE's."""
    return next((family for family in FAMILIES if family.holds(model)), None)
