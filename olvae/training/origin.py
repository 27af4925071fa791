"""Start a training from an existing autoencoder, which ``model.from`` names."""

import warnings
from collections.abc import Mapping

from omegaconf import OmegaConf
from torch import Tensor

from olvae import config as cfg
from olvae.config import Config, ConfigError
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.adaptation import weights_that_fit, with_channels
from olvae.models.loading.targets import find_target
from olvae.models.parts.part import Part
from olvae.models.parts.teacher import NO_FACTORS


def start_from(config: Config) -> tuple[Mapping[str, Tensor], Config]:
    """Load the autoencoder that ``model.from`` names, and put its networks into the config.

    Networks in the config are replaced, except for params without a target, such as ``padding: reflect``, which are
    added. A decoder that they change in its shapes starts fresh; with images of another number of channels, by
    ``data.params.channels``, the first and the last convolution change. The autoencoder's factors for a diffusion model
    replace the config's, unless its file has none, as latent-diffusion's, or the config has a part that brings latents.
    The decoder alone is trained unless the config says otherwise, or a part keeps or brings its latents. ``model.from``
    is removed from the config, now complete. ConfigError if the networks can't be trained here, or adapted.

    Returns the weights for the config's networks, and the autoencoder's training config, empty if it has none.
    """
    node = config["model"]
    name, params = node.pop("from"), dict(node.get("params") or {})
    target = find_target(name)
    source = target.load()
    loaded = source.as_litevae(name)
    if loaded.folded:
        raise ConfigError(f"{name}: its convolutions are folded, for inference only: start from an export without it")
    channels = ((config.get("data") or {}).get("params") or {}).get("channels") or loaded.in_channels
    found = loaded if channels == loaded.in_channels else with_channels(loaded, channels, name)
    for key, value in found.config.items():
        given = params.get(key)
        added = key.endswith("_config") and isinstance(given, Mapping) and "target" not in given
        params[key] = OmegaConf.to_container(OmegaConf.merge(value, given)) if added else value
    params.pop("initial_logvar", None)
    _set_latents(params, source, found, name)
    if params.get("freeze_encoder"):
        _check_encoder(params, loaded, found, name)
    node["params"] = params
    cfg.check(config)
    weights, fresh = weights_that_fit(found, params, name)
    if fresh and params.get("freeze_decoder"):
        raise ConfigError(f"{name}: the config's decoder is another one, and frozen: leave freeze_decoder out")
    if fresh:
        warnings.warn(f"{name}: the config's decoder is another one, and starts fresh", stacklevel=2)
    return weights, target.config


def _set_latents(params: Config, source: Autoencoder, found: LiteVAE, name: str) -> None:
    """Set the factors for a diffusion model, and whether the encoder is frozen, unless a part brings its latents."""
    nodes = [node for node in (params.get("parts") or {}).values() if node is not None]
    latents = {cfg.resolve_class(node["target"], Part).latents for node in nodes}
    if "given" in latents:
        return
    if not source.factors_known and params.get("scaling_factor") is None:
        raise ConfigError(f"{name}: {NO_FACTORS}")
    for key, value in found.for_diffusion.items():
        if source.factors_known or params.get(key) is None:
            params[key] = value
    params.setdefault("freeze_encoder", not ("kept" in latents or params.get("freeze_decoder")))


def _check_encoder(params: Config, loaded: LiteVAE, found: LiteVAE, name: str) -> None:
    """Raise ConfigError if an encoder that is frozen changes."""
    old, new = (half["encoder_config"]["params"].get("padding") for half in (found.config, params))
    if old != new:
        raise ConfigError(
            f"model.params.encoder_config.params.padding: {new}, but {name} has {old}: with a frozen "
            "encoder the latents would change at the borders: leave it out, or set freeze_encoder to false"
        )
    if 1 < loaded.in_channels < found.in_channels:
        raise ConfigError(
            f"{name}: its encoder does not see the channels that are added: set model.params.freeze_encoder to false, "
            "or add the part anchor.Anchor"
        )
