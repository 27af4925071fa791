"""Find the files of a trained autoencoder, local or on the hub; write them as an export.

The hub is reached through huggingface_hub, with its environment: HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, HF_TOKEN.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from olvae.checkpoint import write_tensors
from olvae.config import CONFIG_BYTES, Config, ConfigError
from olvae.files import atomic_write, first_line, write_json
from olvae.models.names import SHIPPED, WEIGHT_SUFFIXES, is_hub_id, shipped_folder
from olvae.models.spec import CLASS_NAME, CONFIG_NAME, WEIGHTS_NAME, AutoencoderSpec, class_in, read_config
from olvae.runs import Run, run_of

CONFIG_KEY = "config"
"""In the header of a safetensors file: an export's config.json."""

CONFIG_PATTERNS = ("*.json", "*.yaml", "*.yml")

CARD = """---
{{ card_data }}
---

# {{ repo_id | default("LiteVAE", true) }}

An autoencoder for latent diffusion, a [LiteVAE](https://arxiv.org/abs/2405.14477), made with open-LiteVAE.

```python
from olvae import AutoencoderLiteVAE, LiteVAE

vae = LiteVAE.from_pretrained("{{ repo_id | default("OWNER/NAME", true) }}")  # a plain module
vae = AutoencoderLiteVAE.from_pretrained("{{ repo_id | default("OWNER/NAME", true) }}")  # in diffusers' pipelines
```
"""
"""The README.md that is written beside saved weights; ``olvae export`` writes a longer one."""


def snapshot(repo_id: str, patterns: Sequence[str], ignored: Sequence[str] = (), **access: Any) -> Path:
    """Download the files of these patterns, or find them in the cache; returns their folder.

    Args:
        access: further arguments of huggingface_hub's snapshot_download, such as revision and token.

    Raises:
        FileNotFoundError: the repository or revision does not exist, or the hub can't be reached.
        OSError: the download broke off.
    """
    where = f"{repo_id}@{access['revision']}" if access.get("revision") else repo_id
    try:
        folder = snapshot_download(repo_id, allow_patterns=[*patterns], ignore_patterns=[*ignored], **access)
    except Exception as error:
        for kind, message in _NOT_FOUND.items():
            if isinstance(error, kind):
                reason = message.format(error=first_line(error), cause=first_line(error.__cause__ or error))
                raise FileNotFoundError(f"{where}: {reason}") from error
        raise OSError(f"{where}: not downloaded: {first_line(error)}") from error  # the connection broke off
    return Path(folder)


_NOT_FOUND: dict[type[Exception], str] = {
    HFValidationError: "no such file or folder, and not an id of the hub",
    GatedRepoError: "access is restricted: ask for it on the hub, then set HF_TOKEN",
    RepositoryNotFoundError: "no such file or folder here, no such repository on the hub (private: set HF_TOKEN)",
    RevisionNotFoundError: "the repository has no such revision",
    LocalEntryNotFoundError: "no such file or folder here, not in the hub's cache, and the hub can't be reached: "
    "{cause}",
    HfHubHTTPError: "the hub answers: {error}",
}
"""Messages for huggingface_hub's errors; the first that fits, since some are kinds of others."""


@contextmanager
def upload_errors(repo_id: str) -> Iterator[None]:
    """Turn the errors of an upload into an OSError of one line."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id}: not uploaded: HF_HUB_OFFLINE is set") from error
    except HFValidationError as error:
        raise OSError(f"{repo_id}: not uploaded: not an id of the hub (OWNER/NAME)") from error
    except (TypeError, ValueError):  # the caller's
        raise
    except Exception as error:  # of HTTP, or of the connection: which class that is depends on the version
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise OSError(
                f"{repo_id}: not uploaded: the hub wants a token that may write there: set HF_TOKEN, or run "
                f"hf auth login ({error.response.status_code})"
            ) from error
        raise OSError(f"{repo_id}: not uploaded: {first_line(error)}") from error


PUBLISHED = {
    "RGenDiff/olitevaeB_im_f8c12": AutoencoderSpec(
        encoder_config={"target": "olvae.modules.litevae.encoder_model.LiteVAE_Encoder", "params": {"scale": "B"}},
        decoder_config={
            "target": "olvae.modules.litevae.decoder_model.LiteVAE_Decoder",
            "params": {"z_channels": 12},
        },
        embed_dim=12,
    )
}
"""Models of the hub that load without a config of their own, as in configs/olitevaeB_im_f8c12.yaml."""

VARIANTS = WEIGHTS_NAME.replace(".", ".*.")
"""diffusers' names for copies of the weights in another precision, such as .fp16., beside them."""


@dataclass(frozen=True)
class Located:
    """A file of weights, and the autoencoder that it belongs to."""

    weights: Path
    spec: AutoencoderSpec
    origin: str
    """Where the spec is from, for messages."""
    config: Config
    """The training config that it is from, if that is the user's own, so that its data may be built; else empty."""
    run: Run | None


def locate(
    path_or_id: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    **access: Any,
) -> Located:
    """Find the weights, and the config that belongs to them.

    Args:
        path_or_id: see ``LiteVAE.from_pretrained``.
        config: the config, instead of the one beside the weights: a YAML file, a config.json, or its content.
        access: see :func:`snapshot`.

    Raises:
        FileNotFoundError: nothing of that name was found.
        ValueError: it is a file, but not one of weights.
        ConfigError: the config is missing, or has mistakes.
    """
    path, given = Path(path_or_id), os.fspath(path_or_id)
    weights = locate_weights(path_or_id, **access)
    run = Run(path) if weights == Run(path).last_checkpoint else None
    inside = config_inside(weights) if config is None else None
    found: str | Path | Mapping[str, Any] | None = config
    if found is None:
        found = inside or _config_beside(weights)
    if found is None and given in PUBLISHED:
        return Located(weights, PUBLISHED[given], given, {}, None)
    if found is None:
        raise ConfigError(
            f"{given}: no config beside the weights (config.json, config.yaml or {weights.stem}.yaml): put one "
            "there, or name it with `config`"
        )
    origin = given if isinstance(found, Mapping) else str(found)
    own = config is not None or (inside is None and run_of(weights) is not None)  # the user's, not a received one
    content = found if isinstance(found, Mapping) else read_config(found, received=not own)
    trusted = "model" in content and own
    spec = AutoencoderSpec.from_content(content, origin, only_ours=not trusted)
    return Located(weights, spec, origin, dict(content) if trusted else {}, run)


def locate_weights(path_or_id: str | Path, **access: Any) -> Path:
    """Find the file of weights of a path, a model of this package, or an id of the hub; see :func:`locate`."""
    path, given = Path(path_or_id), os.fspath(path_or_id)
    if given.startswith(SHIPPED):
        return _weights_in(shipped_folder(given), given)
    if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"{given}: not a file of weights ({', '.join(WEIGHT_SUFFIXES)})")
    if path.is_file():
        return path
    if path.is_dir():
        return _weights_in(path, given)
    if is_hub_id(given):
        for suffix in WEIGHT_SUFFIXES:  # files at the top of the repository, and safetensors rather than pickles
            folder = snapshot(given, [*CONFIG_PATTERNS, f"*{suffix}"], ["*/*"], **access)
            if any(folder.glob(f"*{suffix}")):
                break
        return _weights_in(folder, given)
    raise FileNotFoundError(f"{given}: no such file or folder, and not an id of the hub (OWNER/NAME)")


def _weights_in(folder: Path, name: str) -> Path:
    if Run(folder).last_checkpoint.is_file():
        return Run(folder).last_checkpoint
    for suffix in WEIGHT_SUFFIXES:
        files = _visible(folder, f"*{suffix}")
        if folder / WEIGHTS_NAME in files:
            files = [file for file in files if file.name == WEIGHTS_NAME or not file.match(VARIANTS)]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise FileNotFoundError(f"{name}: several files of weights ({names}): name one of them")
        if files:
            return files[0]
    raise FileNotFoundError(
        f"{name}: neither a run folder (checkpoints/last.ckpt is missing) nor a folder with weights "
        f"({', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)})"
    )


def config_inside(weights: Path) -> Config | None:
    """The config.json that a safetensors file of ours has in its header; None if there is none."""
    if weights.suffix != ".safetensors":
        return None
    try:
        with safe_open(weights, framework="pt") as file:
            content = json.loads((file.metadata() or {})[CONFIG_KEY][:CONFIG_BYTES])
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
        return None  # it has none; reading the weights will say whether the file is whole
    is_export = isinstance(content, dict) and content.get("_class_name") == CLASS_NAME and "model" not in content
    return content if is_export else None


def is_export(weights: Path) -> bool:
    """Whether a file of weights is of an export of ours."""
    return class_in(weights.parent) == CLASS_NAME or config_inside(weights) is not None


def _config_beside(weights: Path) -> Path | None:
    """The run's config, or one in the same folder; a folder's only YAML file counts as its config."""
    run = run_of(weights)
    folder = weights.parent if run is None else run.path
    for name in (CONFIG_NAME, "config.yaml", f"{weights.stem}.yaml"):
        if (folder / name).is_file():
            return folder / name
    yaml = [*_visible(folder, "*.yaml"), *_visible(folder, "*.yml")]
    return yaml[0] if len(yaml) == 1 else None


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Files without those that a killed process was writing, whose names begin with a dot."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def write_export(state: Mapping[str, Tensor], config: Config, folder: Path) -> None:
    """Write the weights, in their dtype and with a checksum, and ``config.json``."""
    with atomic_write(folder / WEIGHTS_NAME) as partial:
        write_tensors(partial, state)
    write_json(config, folder / CONFIG_NAME)


@contextmanager
def config_kept(folder: Path) -> Iterator[None]:
    """Put ``config.json`` back if saving fails: huggingface_hub's mixin removes it first."""
    config = folder / CONFIG_NAME
    before = config.read_bytes() if config.is_file() else None
    try:
        yield
    finally:
        if before is not None and not config.exists():
            config.write_bytes(before)
