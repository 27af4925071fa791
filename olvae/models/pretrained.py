"""Trained autoencoders in and out: from a run, a checkpoint, an export or the hub, and saved as an export.

An export is a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``: diffusers' layout, with the
parameters under their published names, so that this package, the hub and diffusers read the same two files.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olvae import config as cfg
from olvae.checkpoint import WEIGHT_SUFFIXES, load_weights, read_weights
from olvae.config import Config, ConfigError, Node
from olvae.models.autoencoder import LiteVAE
from olvae.models.hub import fetch, is_hub_id
from olvae.modules.halves import Decoder, Encoder
from olvae.runs import Run

__all__ = [
    "CLASS_NAME",
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "Located",
    "autoencoder_params",
    "build_autoencoder",
    "class_in",
    "export_config",
    "find_weights",
    "load_located",
    "locate",
    "read_config",
    "save_pretrained",
]

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

PUBLISHED: dict[str, Config] = {
    "RGenDiff/olitevaeB_im_f8c12": {
        "encoder_config": {
            "target": "olvae.modules.litevae.encoder_model.LiteVAE_Encoder",
            "params": {"scale": "B"},
        },
        "decoder_config": {
            "target": "olvae.modules.litevae.decoder_model.LiteVAE_Decoder",
            "params": {"z_channels": 12},
        },
        "embed_dim": 12,
    }
}
"""Models of the hub that load without a config of their own, as in configs/olitevaeB_im_f8c12.yaml."""


@dataclass(frozen=True)
class Located:
    """Weights, and what to build for them."""

    weights: Path
    params: Config
    """Arguments of :func:`build_autoencoder`."""
    config: Config
    """The training config that they are from; empty if there is none."""
    run: Run | None


def find_weights(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The file of weights that a path or an id of the hub stands for; see :func:`locate`."""
    path, given = Path(path_or_id), os.fspath(path_or_id)
    if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"{given}: not a file of weights ({', '.join(WEIGHT_SUFFIXES)})")
    if path.is_file():
        return path
    if path.is_dir():
        return _weights_in(path, given)
    if is_hub_id(given):
        return _weights_in(fetch(given, revision), given)
    raise FileNotFoundError(f"{given}: no such file or folder, and not an id of the hub (OWNER/NAME)")


def locate(
    path_or_id: str | Path, revision: str | None = None, config: str | Path | Mapping[str, Any] | None = None
) -> Located:
    """Find the weights, and the config that belongs to them.

    Args:
        path_or_id: a run folder, an export, another folder with one file of weights and one config, a file of
            weights with its config beside it, or an id of the hub.
        revision: of the hub's repository.
        config: the config, instead of the one beside the weights: a YAML file, a config.json, or its content.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: a file that weights are not kept in.
        ConfigError: there is no config, or it has mistakes.
    """
    path, given = Path(path_or_id), os.fspath(path_or_id)
    weights = find_weights(path_or_id, revision)
    in_run = weights.parent.name == "checkpoints"
    run = Run(path) if in_run and path.is_dir() else None
    found = config if config is not None else _config_beside(weights)
    if found is None and given in PUBLISHED:
        return Located(weights, PUBLISHED[given], {}, None)
    if found is None:
        raise ConfigError(
            f"{given}: no config beside the weights (config.json, config.yaml or {weights.stem}.yaml): name it with "
            "--config, or config= in Python"
        )
    origin = given if isinstance(found, Mapping) else str(found)
    content = found if isinstance(found, Mapping) else read_config(found)
    trusted = "model" in content and (config is not None or in_run)  # a config of the user's own, not a received one
    params = autoencoder_params(content, origin, only_ours=not trusted)
    return Located(weights, params, dict(content) if "model" in content else {}, run)


def load_located(
    located: Located, raw: bool = False, allow_mismatch: bool = False, dtype: torch.dtype = torch.float32
) -> LiteVAE:
    """Build the autoencoder and load its weights; in evaluation mode. See :meth:`LiteVAE.from_pretrained`."""
    model = build_autoencoder(**located.params).to(dtype)
    load_weights(model, read_weights(located.weights, raw), located.weights, allow_mismatch)
    return model.eval()


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
    mistakes = cfg.validate({"model": {"target": f"{__name__}.{build_autoencoder.__name__}", "params": params}})
    for key, kind in (("encoder_config", Encoder), ("decoder_config", Decoder)):
        target = params[key].get("target") if isinstance(params.get(key), Mapping) else None
        if isinstance(target, str) and (wrong := _wrong_target(target, kind, only_ours)):
            mistakes = [f"{key}.target: {wrong}"]
    if mistakes:
        raise ConfigError(*(f"{origin}: {prefix}{mistake.removeprefix('model.params.')}" for mistake in mistakes))
    return params


def _wrong_target(target: str, kind: type, only_ours: bool) -> str | None:
    if only_ours and not target.startswith("olvae."):
        return f"{target} is not a network of this package: refused"
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
        if not half.node["target"].startswith("olvae."):
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


def save_pretrained(model: LiteVAE, folder: str | Path) -> None:
    """Write ``config.json`` and the weights, in the dtype that they have; see :meth:`LiteVAE.save_pretrained`."""
    from safetensors.torch import save_file

    config = export_config(model)
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{len(broken)} of the model's tensors have values that are not finite ({broken[0]}, ...)")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    partial = folder / f".{WEIGHTS_NAME}.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors lets the owner alone read it
    partial.replace(folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


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
    except (OSError, ValueError) as error:
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


def _weights_in(folder: Path, name: str) -> Path:
    if Run(folder).last_checkpoint.is_file():
        return Run(folder).last_checkpoint
    for suffix in WEIGHT_SUFFIXES:
        files = sorted(folder.glob(f"*{suffix}"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise FileNotFoundError(f"{name}: several files of weights ({names}): name one of them")
        if files:
            return files[0]
    raise FileNotFoundError(
        f"{name}: neither a run folder (it has no checkpoints/last.ckpt) nor one with weights "
        f"({', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)})"
    )


def _config_beside(weights: Path) -> Path | None:
    """The run's config, or one in the same folder; a folder's only YAML file counts as its config."""
    folder = weights.parent
    if folder.name == "checkpoints":
        folder = folder.parent
    for name in (CONFIG_NAME, "config.yaml", f"{weights.stem}.yaml"):
        if (folder / name).is_file():
            return folder / name
    yaml = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
    return yaml[0] if len(yaml) == 1 else None


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
