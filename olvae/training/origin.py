"""Start a run from an existing autoencoder (``model.from``)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.kl import as_litevae
from olvae.models.loading.targets import find_target
from olvae.models.parts.part import latents_of
from olvae.models.parts.teacher import NO_FACTORS

__all__ = ["Found", "start_from", "untrained_half"]


@dataclass(frozen=True)
class Found:
    """An autoencoder to start from: the TARGET as the user wrote it, its weights by our names, and its config."""

    target: str
    weights: Mapping[str, Tensor]
    config: Config
    """The training config, empty for what has none."""


def start_from(config: Config) -> Found:
    """Find the autoencoder that ``model.from`` names, and put its networks into the config.

    Networks in the config are replaced, except for params without a target, such as ``padding: reflect``, which are
    added to those that were found. Its factors for a diffusion model replace the config's, unless its file has none,
    as latent-diffusion's, or the config has a part that brings latents, whose factors count. The decoder alone is
    trained unless the config says otherwise, or a part keeps or brings latents. A resolved config is complete without
    ``model.from``, so the key is removed.

    Raises:
        ConfigError: the autoencoder's networks can't be trained here.
        FileNotFoundError, ValueError: the autoencoder was not found or can't be loaded.
    """
    node = config["model"]
    name, params = node.pop("from"), dict(node.get("params") or {})
    target = find_target(name)
    source = target.load()
    found = as_litevae(source, name)
    if found.folded:
        raise ConfigError(f"{name}: its convolutions are folded, for inference only: start from an export without it")
    for key, value in found.config.items():
        given = params.get(key)
        if key.endswith("_config") and isinstance(given, Mapping) and "target" not in given:
            value = {**value, **given, "params": {**value["params"], **(given.get("params") or {})}}
        params[key] = value
    params.pop("initial_logvar", None)
    latents = {latents_of(node["target"]) for node in (params.get("parts") or {}).values() if node is not None}
    if "given" not in latents:
        if not source.factors_known and params.get("scaling_factor") is None:
            raise ConfigError(f"{name}: {NO_FACTORS}")
        for key, value in found.for_diffusion.items():
            if source.factors_known or params.get(key) is None:  # a file that has none leaves the recipe's
                params[key] = value
        params.setdefault("freeze_encoder", not ("kept" in latents or params.get("freeze_decoder")))
    old, new = (half["encoder_config"]["params"].get("padding") for half in (found.config, params))
    if params.get("freeze_encoder") and old != new:
        raise ConfigError(
            f"model.params.encoder_config.params.padding: {new}, but {name} has {old}: with a frozen "
            "encoder the latents would change at the borders: leave it out, or set freeze_encoder to false"
        )
    node["params"] = params
    return Found(name, found.state_dict(), target.config)


def untrained_half(model: LiteAutoencoderKL, before: Config | None) -> str | None:
    """Which half keeps fresh weights: one that is frozen, unless it came with the weights that training starts from.

    Args:
        before: the config of those weights; None if they are fresh.
    """
    if before is not None:
        fresh: str | None = (before.get("run") or {}).get("untrained")
    else:
        fresh = "encoder" if model.freeze_encoder else "decoder" if model.freeze_decoder else None
    trained = {"encoder": not model.freeze_encoder, "decoder": not model.freeze_decoder}
    return None if fresh is None or trained[fresh] else fresh
