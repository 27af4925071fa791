"""Load a vision encoder of timm as the encoder of an autoencoder: ``timm:NAME``."""

import re
import warnings
from functools import partial
from typing import Any

import torch

from olvae.config import Config, ConfigError, Node
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.spec import AutoencoderSpec
from olvae.models.target_names import TIMM
from olvae.modules.frozen import find_vision_weights, vision_network
from olvae.modules.others.representation import RepresentationEncoder
from olvae.modules.others.vit import HEAD_CHANNELS, ViTDecoder

FORM = re.compile(r"(?P<name>[^=:]+)(=(?P<file>[^:].*?))?(::(?P<channels>\d+))?")


class VisionLoader(Loader):
    """``timm:NAME``: a vision encoder with its published weights, and a decoder that is untrained.

    ``=FILE`` names the weights' file, ``::CHANNELS`` reduces the features to that many channels by
    one attention layer, which is untrained too.
    """

    def accepts(self, text: str) -> bool:
        return text.startswith(TIMM)

    def find(self, text: str, options: LoadOptions) -> Target:
        for option, given in (("config", options.config), ("raw", options.raw)):
            if given:
                warnings.warn(f"{text}: a vision encoder has no `{option}`: ignored", stacklevel=2)
        match = FORM.fullmatch(text.removeprefix(TIMM))
        if match is None:
            raise ConfigError(f"{text}: expected timm:NAME, timm:NAME=FILE or timm:NAME::CHANNELS")
        name = match["name"]
        channels = int(match["channels"]) if match["channels"] else None
        spec = vision_spec(name, channels)
        load = partial(_load, spec, name, match["file"])
        return Target(load, partial(LiteVAE.from_spec, spec), name=text)


def vision_spec(name: str, channels: int | None) -> AutoencoderSpec:
    """Describe the autoencoder of a timm network, and a decoder of the same width and depth [D].

    ConfigError: timm is missing, has no such network, or it gives no feature maps.
    """
    try:
        with torch.device("meta"):
            inner: Any = vision_network(name, None)[1]
    except ModuleNotFoundError as error:
        raise ConfigError(f"{TIMM}{name} needs timm: pip install timm") from error
    except ValueError as error:
        raise ConfigError(f"{TIMM}{name}: {error}") from error
    width = int(inner.feature_info[-1]["num_chs"])
    n_z = channels or width
    encoder = {"encoder": name, "attention": channels is not None}
    decoder = {
        "z_channels": n_z,
        "width": width,
        "depth": len(inner.feature_info),
        "heads": max(1, width // HEAD_CHANNELS),
    }
    return AutoencoderSpec(_node(RepresentationEncoder, encoder), _node(ViTDecoder, decoder), n_z)


def _node(network: type, params: Config) -> Node:
    return {"target": f"{network.__module__}.{network.__qualname__}", "params": params}


def _load(spec: AutoencoderSpec, name: str, file: str | None) -> LiteVAE:
    # Fresh weights of what is untrained must be the same each time, and not draw from the caller's
    # generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LiteVAE.from_spec(spec)
        trained = vision_network(name, find_vision_weights(name, file))
    assert isinstance(model.encoder, RepresentationEncoder)
    model.encoder.network.load_state_dict(trained.state_dict())
    return model.eval()
