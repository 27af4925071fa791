"""Start a training from an existing autoencoder, which ``model.from`` names; adapt it."""

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from olvae import config as cfg
from olvae.config import Config, ConfigError
from olvae.config.reading import merge_files
from olvae.data.pixels.size_and_range import PixelRange
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.families import drop_factors
from olvae.models.loading.loader import rules_of_latents
from olvae.models.loading.targets import find_without_options
from olvae.models.parts.teacher import TEACHER_HAS_NO_FACTORS
from olvae.models.spec import OURS
from olvae.runs import entry_of

# What networks call the number of image channels.
CHANNELS = ("in_channels", "out_channels", "input_channels")


def start_from(
    config: Config, overrides: Sequence[str] = ()
) -> tuple[Mapping[str, Tensor], Config]:
    """Load the autoencoder that ``model.from`` names, and put its networks into the config.

    - Networks in the config are replaced, with a warning if the class is another one, except for
      params without a target, such as ``padding: reflect``, which are added. A decoder whose shapes
      they change starts fresh.
    - A decoder in the config whose class extends the autoencoder's keeps its class, and the params
      and tensors that it adds: all others are the autoencoder's.
    - With another number of image channels in ``data.params.channels``, the first and the last
      convolution change.
    - With ``enlarge`` in the decoder's params, its last convolution is widened: its images are at
      first the nearest-neighbour enlargement of what they were.
    - The autoencoder's factors for a diffusion model replace the config's, unless its file has none
      (as latent-diffusion's) or the config has a part that brings latents. Without any if its
      encoder was trained since they were measured: then those of ``overrides``, which are in the
      config already, count.
    - The decoder alone is trained unless the config says otherwise, or a part keeps or brings its
      latents.
    - ``model.from`` is removed from the config, which is then complete.

    ConfigError if the networks can't be trained here, or adapted.

    Returns the weights for the config's networks, and the autoencoder's training config, empty if
    it has none.
    """
    # The autoencoder, with convolutions for the config's number of image channels.
    node = config["model"]
    name = node.pop("from")
    params = dict(node.get("params") or {})
    target = find_without_options(name)
    source = target.load()
    loaded = source.as_litevae(name)
    if loaded.folded:
        raise ConfigError(
            f"{name}: its convolutions are folded, for inference only: start from an export "
            "without it"
        )
    channels = entry_of(config, "data.params.channels") or loaded.in_channels
    found = loaded
    if channels != loaded.in_channels:
        found = with_channels(loaded, channels, name)
    overriding = entry_of(merge_files((), overrides, resolve=False), "model.params") or {}
    if target.factors_outdated:
        drop_factors(found)

    # Its networks, with the config's additions; `enlarge` counts also beside other networks.
    enlarge = entry_of(params, "decoder_config.params.enlarge")
    for key, value in found.config.items():
        where = f"model.params.{key}"
        params[key] = _network(value, params.get(key), overriding.get(key), where, name)
    if enlarge is not None:
        params["decoder_config"]["params"]["enlarge"] = enlarge
    params.pop("initial_logvar", None)
    found = enlarged_as(found, params["decoder_config"], name)

    # Factors and frozen halves. A frozen encoder must keep its latents.
    measured = overriding if target.factors_outdated else {}
    _set_latents(params, source, found, name, measured)
    if params.get("freeze_encoder"):
        _check_encoder(config, params, loaded, found, name)
    node["params"] = params
    cfg.check(config)

    weights, fresh = weights_that_fit(found, params, name)
    if fresh:
        other = f"{name}: the config's decoder is another one, and"
        if params.get("freeze_decoder"):
            raise ConfigError(f"{other} frozen: leave freeze_decoder out")
        warnings.warn(f"{other} starts fresh", stacklevel=2)
    return weights, target.config


def _network(found: Any, given: Any, added: Any, where: str, name: str) -> Any:
    """Return the value of a config's key for what was found, with the additions given there.

    Where another class replaces the config's, those are what overrides have ``added``, which count
    always. ``where`` and ``name`` are the key and the autoencoder, for a warning.
    """
    if not isinstance(found, Mapping) or not isinstance(given, Mapping):
        return found
    if "target" in given and not _extends(given, found):
        if not added and given["target"] != found["target"]:
            ours, theirs = (node["target"].rpartition(".")[2] for node in (given, found))
            warnings.warn(
                f"{where}: its {ours} is replaced by the {theirs} of {name}; params without a "
                "target are added to that",
                stacklevel=3,
            )
        given = added or {}
    if "target" not in given:
        return OmegaConf.to_container(OmegaConf.merge(found, given))

    # Params of a class that extends the one found, but for defaults that it leaves out.
    base = inspect.signature(cfg.resolve_target(found["target"])).parameters
    kind = inspect.signature(cfg.resolve_target(given["target"])).parameters
    params = {}
    for key, value in found["params"].items():
        if key in kind or value != base[key].default:
            params[key] = value
    return OmegaConf.to_container(OmegaConf.merge(given, {"params": params}, added or {}))


def _extends(given: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a config's network is of a class that extends the class of the one found."""
    kind = cfg.resolve_class(given["target"], nn.Module)
    base = cfg.resolve_class(found["target"], nn.Module)
    return kind is not base and issubclass(kind, base)


def _set_latents(
    params: Config,
    source: Autoencoder,
    found: LiteVAE,
    name: str,
    measured: Mapping[str, Any],
) -> None:
    """Set the factors for a diffusion model, and whether the encoder is frozen.

    Leaves both alone if a part brings its own latents. Those in ``measured`` are the user's.
    """
    latents = rules_of_latents(params)
    if "given" in latents:
        return
    if not source.factors_known and params.get("scaling_factor") is None:
        raise ConfigError(f"{name}: {TEACHER_HAS_NO_FACTORS}")
    for key, value in found.for_diffusion.items():
        given = params.get(key) is not None
        if not given or (source.factors_known and measured.get(key) is None):
            params[key] = value
    params.setdefault("freeze_encoder", not ("kept" in latents or params.get("freeze_decoder")))


def _check_encoder(
    config: Config, params: Config, loaded: LiteVAE, found: LiteVAE, name: str
) -> None:
    """Raise ConfigError if a frozen encoder changes, or gets images of another range."""
    pixels = entry_of(config, "data.params.range")
    if pixels and not loaded.pixel_range.eight_bits:
        loaded.pixel_range.check_data(PixelRange.from_node(pixels))
    old = found.config["encoder_config"]["params"].get("padding")
    new = params["encoder_config"]["params"].get("padding")
    if old != new:
        raise ConfigError(
            f"model.params.encoder_config.params.padding: {new}, but {name} has {old}: with a "
            "frozen encoder the latents would change at the borders: leave it out, or set "
            "freeze_encoder to false"
        )
    # From one channel, weights are repeated; else further channels get zeros, which see nothing.
    if 1 < loaded.in_channels < found.in_channels:
        raise ConfigError(
            f"{name}: its encoder does not see the channels that are added: set "
            "model.params.freeze_encoder to false, or add the part anchor.Anchor"
        )


def with_channels(model: LiteVAE, channels: int, name: str) -> LiteVAE:
    """Adapt an autoencoder to images of another number of channels.

    The first and the last convolution are widened by zeros or narrowed; the rest is kept. From and
    to one channel, an image of equal channels and its mean are encoded and decoded as before.

    ConfigError if more than these convolutions depends on the channels, as in a LiteVAE's wavelets.
    """
    # Build it for these channels: networks have the number in their params, or one level below.
    old = model.in_channels
    config = copy.deepcopy(model.config)
    for half in ("encoder_config", "decoder_config"):
        params = config[half]["params"]
        for node in (params, params.get("config") or {}):
            node |= {key: channels for key in CHANNELS if node.get(key) == old}
    with torch.random.fork_rng(devices=[]):
        out = LiteVAE.from_config(**config).set_for_diffusion(model.for_diffusion)

    # Resize the tensors whose shapes differ: only along their image channels.
    weights = model.state_dict()
    wanted = out.state_dict()
    other = {key: tensor for key, tensor in weights.items() if tensor.shape != wanted[key].shape}
    remedy = (
        f"it can't be adapted to {channels}: set data.params.channels to {old}, or train without it"
    )
    if not other:
        raise ConfigError(f"{name}: sees patches of pixels of {old} channels: {remedy}")
    for tensor_name, tensor in other.items():
        axis = int(tensor_name.startswith("encoder"))  # inputs of a convolution; 0 is its outputs
        each = 1 if axis else model.enlarge**2  # outputs for a channel, which are shuffled
        shape = list(tensor.shape)
        resized = [*shape[:axis], each * channels, *shape[axis + 1 :]]
        is_image = len(shape) > axis and shape[axis] == each * old
        if not is_image or resized != list(wanted[tensor_name].shape):
            raise ConfigError(
                f"{name}: is for images of {old} channels, which {tensor_name} depends on in "
                f"another way: {remedy}"
            )
        by_channel = tensor.unflatten(axis, (old, each))
        weights[tensor_name] = _resized(by_channel, axis, channels).flatten(axis, axis + 1)
    out.load_state_dict(weights)
    return out.train(model.training)


def _resized(tensor: Tensor, axis: int, channels: int) -> Tensor:
    """Widen or narrow a convolution's weight or bias along its image channels.

    ``axis``: 1 for the inputs of the first convolution, 0 for the outputs of the last one.
    """
    # For equal channels: inputs' weights are summed or shared out, outputs averaged or repeated.
    old = tensor.shape[axis]
    if channels == 1:
        return tensor.sum(axis, keepdim=True) / (1 if axis else old)
    if old == 1:
        return tensor.repeat_interleave(channels, axis) / (channels if axis else 1)
    kept = tensor.narrow(axis, 0, min(old, channels))
    added = list(tensor.shape)
    added[axis] = max(0, channels - old)
    return torch.cat((kept, tensor.new_zeros(added)), axis)


def enlarged_as(model: LiteVAE, node: Mapping[str, Any], name: str) -> LiteVAE:
    """Enlarge an autoencoder's images as a config's decoder does, if that is the same network.

    ConfigError if that network can't, or the autoencoder's own images are larger already.
    """
    by = node["params"].get("enlarge", model.enlarge)
    if by == model.enlarge or node["target"] != model.decoder.node["target"]:
        return model
    here = "model.params.decoder_config.params.enlarge"
    if model.enlarge > 1:
        raise ConfigError(
            f"{here}: {by}, but the images of {name} are {model.enlarge} times larger already: "
            f"set it to {model.enlarge}, or start from the autoencoder that it was made of"
        )
    if "enlarge" not in model.decoder.node["params"]:
        raise ConfigError(
            f"{here}: {type(model.decoder).__name__}, the decoder of {name}, has none: leave it out"
        )

    config = copy.deepcopy(model.config)
    config["decoder_config"]["params"]["enlarge"] = by
    with torch.random.fork_rng(devices=[]):
        out = LiteVAE.from_config(**config).set_for_diffusion(model.for_diffusion)
    weights = model.state_dict()
    inside = {key.removeprefix("decoder."): key for key in weights if key.startswith("decoder.")}
    decoder = out.decoder.enlarged({short: weights[key] for short, key in inside.items()})
    out.load_state_dict(weights | {f"decoder.{short}": value for short, value in decoder.items()})
    return out.train(model.training)


def weights_that_fit(
    model: LiteVAE, params: Mapping[str, Any], name: str
) -> tuple[dict[str, Tensor], bool]:
    """Select the weights for a config's networks; leave out the decoder's if it is another one.

    A decoder whose class extends the model's is the same one, with tensors that it adds.

    Returns the weights, and whether the decoder is another one. ConfigError if the encoder is
    another one, as its latents would be others.
    """
    # Shapes of the config's networks. Ours can be built without memory.
    weights = model.state_dict()
    ours = all(
        str(params[f"{half}_config"]["target"]).startswith(OURS) for half in ("encoder", "decoder")
    )
    with torch.random.fork_rng(devices=[]), torch.device("meta" if ours else "cpu"):
        wanted = LiteVAE.from_config(**{key: params[key] for key in model.config}).state_dict()

    # Names in one of them alone, or of different shapes.
    shapes = {(key, tensor.shape) for key, tensor in weights.items()}
    different = {key for key, _ in shapes ^ {(key, t.shape) for key, t in wanted.items()}}
    if _extends(params["decoder_config"], model.decoder.node):
        added = {key for key in wanted if key.startswith("decoder.") and key not in weights}
        different -= added
    elsewhere = sorted(key for key in different if not key.startswith("decoder."))
    if elsewhere:
        raise ConfigError(
            f"{name}: has another {elsewhere[0]} than the config's: "
            "only the decoder may be another one"
        )
    if not different:
        return dict(weights), False
    return {key: tensor for key, tensor in weights.items() if not key.startswith("decoder.")}, True
