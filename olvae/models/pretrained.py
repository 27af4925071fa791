"""Trained autoencoders in and out: from a run, a checkpoint, an export or the hub, and saved as an export.

What an export is, and what its config says, is in description.py.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olvae.checkpoint import WEIGHT_SUFFIXES, load_weights, read_weights
from olvae.config import Config, ConfigError
from olvae.files import atomic_write, write_json
from olvae.models.autoencoder import LiteVAE
from olvae.models.hub import USUAL, HubAccess, fetch, is_hub_id
from olvae.models.spec import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    autoencoder_params,
    build_autoencoder,
    export_config,
    read_config,
)
from olvae.runs import Run

__all__ = ["Located", "check_saveable", "config_kept", "find_weights", "load_located", "locate", "write_export"]

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


VARIANTS = WEIGHTS_NAME.replace(".", ".*.")
"""What diffusers calls a copy of the weights in another precision, such as .fp16., that lies beside them."""


@dataclass(frozen=True)
class Located:
    """Weights, and what to build for them."""

    weights: Path
    params: Config
    """Arguments of :func:`build_autoencoder`."""
    origin: str
    """Where these are said, for the user."""
    config: Config
    """The training config that they are from, if it is the user's own, whose data may be built; else empty."""
    run: Run | None


def find_weights(path_or_id: str | Path, hub: HubAccess = USUAL) -> Path:
    """The file of weights that a path or an id of the hub stands for; see :func:`locate`."""
    path, given = Path(path_or_id), os.fspath(path_or_id)
    if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"{given}: not a file of weights ({', '.join(WEIGHT_SUFFIXES)})")
    if path.is_file():
        return path
    if path.is_dir():
        return _weights_in(path, given)
    if is_hub_id(given):
        return _weights_in(fetch(given, hub), given)
    raise FileNotFoundError(f"{given}: no such file or folder, and not an id of the hub (OWNER/NAME)")


def locate(
    path_or_id: str | Path, config: str | Path | Mapping[str, Any] | None = None, hub: HubAccess = USUAL
) -> Located:
    """Find the weights, and the config that belongs to them.

    Args:
        path_or_id: a run folder, an export, another folder with one file of weights and one config, a file of
            weights with its config beside it, or an id of the hub.
        config: the config, instead of the one beside the weights: a YAML file, a config.json, or its content.
        hub: how the hub is asked.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: a file that weights are not kept in.
        ConfigError: there is no config, or it has mistakes.
    """
    path, given = Path(path_or_id), os.fspath(path_or_id)
    weights = find_weights(path_or_id, hub)
    in_run = weights.parent.name == "checkpoints"
    run = Run(path) if in_run and path.is_dir() else None
    found = config if config is not None else _config_beside(weights)
    if found is None and given in PUBLISHED:
        return Located(weights, PUBLISHED[given], given, {}, None)
    if found is None:
        raise ConfigError(
            f"{given}: no config beside the weights (config.json, config.yaml or {weights.stem}.yaml): name it with "
            "--config, or config= in Python"
        )
    origin = given if isinstance(found, Mapping) else str(found)
    content = found if isinstance(found, Mapping) else read_config(found)
    trusted = "model" in content and (config is not None or in_run)  # a config of the user's own, not a received one
    params = autoencoder_params(content, origin, only_ours=not trusted)
    return Located(weights, params, origin, dict(content) if trusted else {}, run)


def load_located(
    located: Located, raw: bool = False, allow_mismatch: bool = False, dtype: torch.dtype = torch.float32
) -> LiteVAE:
    """Build the autoencoder and load its weights; in evaluation mode. See :meth:`LiteVAE.from_pretrained`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what allow_mismatch leaves as it is built is the same every time
        model = _build(located).to(dtype)
    load_weights(model, read_weights(located.weights, raw), located.weights, allow_mismatch)
    return model.eval()


def _build(located: Located) -> LiteVAE:
    try:
        return build_autoencoder(**located.params)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:  # by network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{located.origin}: no autoencoder can be built of this: {reason}") from error


def check_saveable(model: LiteVAE) -> None:
    """Raises:
    ValueError: a network is not of this package, or some weights are not finite.
    """
    export_config(model)
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{len(broken)} of the model's tensors have values that are not finite ({broken[0]}, ...)")


@contextmanager
def config_kept(folder: Path) -> Iterator[None]:
    """If saving fails, puts back the config that the mixin removes before: an export that is there stays one."""
    config = folder / CONFIG_NAME
    before = config.read_bytes() if config.is_file() else None
    try:
        yield
    finally:
        if before is not None and not config.exists():
            config.write_bytes(before)


def write_export(model: LiteVAE, folder: Path) -> None:
    """Write ``config.json`` and the weights, in the dtype that they have; see :meth:`LiteVAE.save_pretrained`."""
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / WEIGHTS_NAME) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors lets the owner alone read it
    write_json(export_config(model), folder / CONFIG_NAME)


def _weights_in(folder: Path, name: str) -> Path:
    if Run(folder).last_checkpoint.is_file():
        return Run(folder).last_checkpoint
    for suffix in WEIGHT_SUFFIXES:
        files = sorted(folder.glob(f"*{suffix}"))
        if folder / WEIGHTS_NAME in files:
            files = [file for file in files if file.name == WEIGHTS_NAME or not file.match(VARIANTS)]
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
