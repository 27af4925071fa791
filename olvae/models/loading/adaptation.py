"""Start from weights whose networks are not quite the wanted ones: other image channels, or another decoder."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.models.autoencoder import LiteVAE
from olvae.models.spec import OURS

CHANNELS = ("in_channels", "out_channels", "input_channels")  # what networks call the number of image channels


def with_channels(model: LiteVAE, channels: int, name: str) -> LiteVAE:
    """The same autoencoder for images of another number of channels.

    The first and the last convolution are widened by zeros or narrowed, and the rest is kept. From and to one channel,
    an image of equal channels and its mean are encoded and decoded as before.

    ConfigError if more than these convolutions depends on the channels, as in a LiteVAE's wavelets.
    """
    old, config = model.in_channels, copy.deepcopy(model.config)
    for half in ("encoder_config", "decoder_config"):
        params = config[half]["params"]
        for node in (params, params.get("config") or {}):
            node |= {key: channels for key in CHANNELS if node.get(key) == old}
    with torch.random.fork_rng(devices=[]):
        out = LiteVAE.from_config(**config).set_for_diffusion(model.for_diffusion)
    weights, wanted = model.state_dict(), out.state_dict()
    for tensor_name, tensor in weights.items():
        new, axis = wanted[tensor_name], int(tensor_name.startswith("encoder"))
        if new.shape == tensor.shape:
            continue
        shape = list(tensor.shape)
        if len(shape) <= axis or shape[axis] != old or [*shape[:axis], channels, *shape[axis + 1 :]] != list(new.shape):
            where = f"which {tensor_name} depends on in another way"
            raise ConfigError(f"{name}: is for images of {old} channels, {where}: it can't be adapted to {channels}")
        weights[tensor_name] = _resized(tensor, axis, channels)
    out.load_state_dict(weights)
    return out.train(model.training)


def _resized(tensor: Tensor, axis: int, channels: int) -> Tensor:
    """Widen or narrow a convolution's weight or bias along its image channels: inputs on axis 1, outputs on axis 0."""
    old = tensor.shape[axis]
    if channels == 1:
        return tensor.sum(axis, keepdim=True) / (1 if axis else old)
    if old == 1:
        return tensor.repeat_interleave(channels, axis) / (channels if axis else 1)
    kept = tensor.narrow(axis, 0, min(old, channels))
    more = list(tensor.shape)
    more[axis] = max(0, channels - old)
    return torch.cat((kept, tensor.new_zeros(more)), axis)


def weights_that_fit(model: LiteVAE, params: Mapping[str, Any], name: str) -> tuple[dict[str, Tensor], bool]:
    """The weights for a config's networks, and whether the decoder is another one: then its weights are left out.

    ConfigError if the encoder is another one, whose latents would be others.
    """
    weights = model.state_dict()
    ours = all(str(params[f"{half}_config"]["target"]).startswith(OURS) for half in ("encoder", "decoder"))
    with torch.random.fork_rng(devices=[]), torch.device("meta" if ours else "cpu"):
        wanted = LiteVAE.from_config(**{key: params[key] for key in model.config}).state_dict()
    shapes, others = ({key: tensor.shape for key, tensor in state.items()} for state in (weights, wanted))
    different = {key for key, _ in shapes.items() ^ others.items()}
    if elsewhere := sorted(key for key in different if not key.startswith("decoder.")):
        raise ConfigError(f"{name}: has another {elsewhere[0]} than the config's: only the decoder may be another one")
    kept = {key: tensor for key, tensor in weights.items() if not (different and key.startswith("decoder."))}
    return kept, bool(different)
