"""Autoencoders of a few thousand parameters, for tests of exports."""

import torch
from diffusers import AutoencoderKL

from olvae import LiteVAE
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from tests.conftest import one_width, tiny


def tiny_litevae() -> LiteVAE:
    """Fresh weights, but for the self-modulation, so that folding is not the identity."""
    model = tiny(encoder_config=one_width())
    for name, p in model.named_parameters():
        if name.endswith(("scales", "gain")):
            torch.nn.init.uniform_(p, 0.5, 2.0)
    return model.set_for_diffusion({"scaling_factor": 0.9, "shift_factor": -0.1})


def ours(model: AutoencoderKL) -> LiteVAE:
    """diffusers' AutoencoderKL as a LiteVAE object."""
    return DiffusersAutoencoder(model).as_litevae("sd")


def reflecting(model: AutoencoderKL, *halves: str) -> LiteVAE:
    """Ours, whose encoder or decoder pads by reflection, as configs say it."""
    plain = ours(model)
    config = {**plain.config}
    for half in (f"{half}_config" for half in halves):
        config[half] = {**config[half], "params": {**config[half]["params"], "padding": "reflect"}}
    built = LiteVAE.from_config(**config).eval()
    built.load_state_dict(plain.state_dict())
    return built.set_for_diffusion(plain.for_diffusion)
