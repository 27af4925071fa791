"""What a config says of an autoencoder: a training config's model node, or the config.json of an export.

An export is a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``: diffusers' layout, with the
parameters under their published names, so that this package, the hub and diffusers read the same two files.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olvae import config as cfg
from olvae.config import Config, ConfigError, Node
from olvae.models.autoencoder import LiteVAE
from olvae.modules.base import Decoder, Encoder

__all__ = [
    "CLASS_NAME",
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "autoencoder_params",
    "build_autoencoder",
    "class_in",
    "export_config",
    "read_config",
]


OURS = "olvae."
"""How the targets begin that a config from outside may name."""

CLASS_NAME = "AutoencoderLiteVAE"

CONFIG_NAME = "config.json"

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

BUILT_FROM = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "initial_logvar")
"""What a training config says of the autoencoder itself."""

EXPORTED = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "folded", "scaling_factor", "shift_factor")
"""What an export says; whatever else its config.json has follows from these and is there for diffusers."""

DERIVED = (
    "block_out_channels",
    "force_upcast",
    "in_channels",
    "latent_channels",
    "latents_mean",
    "latents_std",
    "out_channels",
    "sample_size",
    "use_post_quant_conv",
    "use_quant_conv",
)


def build_autoencoder(
    encoder_config: Node,
    decoder_config: Node,
    embed_dim: int,
    use_quant: bool = False,
    initial_logvar: float = 0.0,
    folded: bool = False,
    scaling_factor: float | int = 1.0,
    shift_factor: float | int = 0.0,
) -> LiteVAE:
    """The autoencoder with fresh weights, of a training config's or an export's description."""
    model = LiteVAE.from_config(encoder_config, decoder_config, embed_dim, use_quant, initial_logvar)
    model = model.fold() if folded else model
    model.scaling_factor, model.shift_factor = float(scaling_factor), float(shift_factor)
    return model


def autoencoder_params(content: Mapping[str, Any], origin: str, only_ours: bool) -> Config:
    """The arguments of :func:`build_autoencoder` in a training config or in the config.json of an export.

    Args:
        only_ours: the config came from outside: it may build networks of this package, and nothing else.

    Raises:
        ConfigError: it has mistakes, or is the config of something else.
    """
    if "model" in content:
        node = content["model"]
        params = node.get("params") if isinstance(node, Mapping) else None
        params = {key: params[key] for key in BUILT_FROM if key in params} if isinstance(params, Mapping) else {}
        prefix = "model.params."
    else:
        _check_export(content, origin)
        params = {key: content[key] for key in EXPORTED if key in content}
        prefix = ""
    targets = {key: _target(params.get(key)) for key in ("encoder_config", "decoder_config")}
    foreign = [f"{key}.target: {target}" for key, target in targets.items() if target and not target.startswith(OURS)]
    if only_ours and foreign:  # before anything of it is imported
        raise ConfigError(*(f"{origin}: {prefix}{what} is not a network of this package: refused" for what in foreign))
    mistakes = cfg.validate({"model": {"target": f"{__name__}.{build_autoencoder.__name__}", "params": params}})
    for (key, target), kind in zip(targets.items(), (Encoder, Decoder), strict=True):
        if target is not None and (wrong := _wrong_target(target, kind)):
            mistakes = [f"{key}.target: {wrong}"]
    if mistakes:
        raise ConfigError(*(f"{origin}: {prefix}{mistake.removeprefix('model.params.')}" for mistake in mistakes))
    return params


def _target(node: Any) -> str | None:
    target = node.get("target") if isinstance(node, Mapping) else None
    return target if isinstance(target, str) else None


def _wrong_target(target: str, kind: type) -> str | None:
    try:
        built = cfg.resolve_target(target)
    except ConfigError:
        return None  # validate has said it better
    if not (isinstance(built, type) and issubclass(built, kind)):
        return f"{target} is not a kind of {kind.__module__}.{kind.__name__}"
    return None


def export_config(model: LiteVAE) -> Config:
    """The config.json of an export.

    Raises:
        ValueError: a network is not of this package, or has an argument that JSON can't hold.
    """
    for half in (model.encoder, model.decoder):
        if not half.node["target"].startswith(OURS):
            raise ValueError(
                f"{half.node['target']} is a network of your own: an export holds this package's only; keep the run "
                "folder, or save the state dict"
            )
    decoder = model.decoder.node["params"]
    content = {
        "_class_name": CLASS_NAME,
        **model.config,
        "folded": model.folded,
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor,
        # For diffusers: pipelines count the entries of block_out_channels to know by how much the latent is smaller.
        "block_out_channels": [decoder["channels"] * m for m in decoder["channel_mult"]],
        "force_upcast": False,
        "in_channels": model.encoder.in_channels,
        "latent_channels": model.latent_channels,
        "out_channels": model.decoder.out_channels,
        "sample_size": model.encoder.image_size,
        "use_post_quant_conv": model.quantizer is not None,
        "use_quant_conv": model.quantizer is not None,
    }
    try:
        return json.loads(json.dumps(content))  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"a network has an argument that config.json can't hold: {error}") from error


def read_config(path: str | Path) -> Config:
    """A training config (YAML) or the config.json of an export.

    Raises:
        ConfigError: it is not there, or not readable.
    """
    path = Path(path)
    if path.suffix != ".json":
        return cfg.load([path])
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config is a mapping, not a {type(content).__name__}")
    return content


def class_in(folder: Path) -> str | None:
    """The class of diffusers', or ours, that a folder's config.json names."""
    try:
        content = read_config(folder / CONFIG_NAME)
    except ConfigError:
        return None
    name = content.get("_class_name")
    return name if isinstance(name, str) else None


def _check_export(content: Mapping[str, Any], origin: str) -> None:
    name = content.get("_class_name", CLASS_NAME)
    if name != CLASS_NAME:
        raise ConfigError(f"{origin}: the config of diffusers' {name}: as a target, diffusers:FOLDER")
    known = (*EXPORTED, *DERIVED)
    if mistakes := [*cfg.unknown_keys({k: v for k, v in content.items() if not k.startswith("_")}, known)]:
        raise ConfigError(*(f"{origin}: {mistake}" for mistake in mistakes))
    for key in ("scaling_factor", "shift_factor"):
        value = content.get(key, 1.0)
        if not isinstance(value, int | float) or not math.isfinite(value) or (key == "scaling_factor" and value <= 0):
            raise ConfigError(f"{origin}: {key}: expected a number{' above 0' * (key[1] == 'c')}, got {value!r}")
