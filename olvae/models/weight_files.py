"""Find the files of a trained autoencoder, local or on the hub; write them as an export."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from olvae.checkpoint import header_of, write_tensors
from olvae.config import ADDRESS, Config, ConfigError, recipes
from olvae.config.reading import CONFIG_BYTES
from olvae.files import WEIGHT_SUFFIXES, atomic_write, write_json
from olvae.models.spec import (
    AUTO_MAP,
    CLASS_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    AutoencoderSpec,
    class_in,
    read_config,
)
from olvae.models.target_names import SHIPPED, is_hub_id, shipped_folder
from olvae.runs import Run, find_run, run_of

CONFIG_KEY = "config"  # in the header of a safetensors file: an export's config.json
LOADER_NAME = f"{AUTO_MAP['AutoModel'].partition('.')[0]}.py"
LOADER = f"""# diffusers' AutoModel.from_pretrained(..., trust_remote_code=True) runs this file.
from importlib.util import find_spec

if find_spec("olvae") is None:
    raise ImportError("this autoencoder needs open-LiteVAE: pip install git+{ADDRESS}")
{CLASS_NAME} = __import__("olvae").{CLASS_NAME}
"""
# diffusers', of weights that it divides into several files
WEIGHTS_INDEX = f"{WEIGHTS_NAME}.index.json"
ONE_KIND = "an export has one kind of weights: `raw` is ignored"
# Ends a message where the command has an option for the config.
OR_CONFIG = ", or name it with `config`"
CONFIG_PATTERNS = ("*.json", "*.yaml", "*.yml")


PUBLISHED = {"RGenDiff/olitevaeB_im_f8c12": "olitevaeB_im_f8c12"}
"""Models of the hub without a config in their repository, and the recipes that trained them."""


@dataclass(frozen=True)
class Located:
    """A file of weights, and the autoencoder that it belongs to."""

    weights: Path
    spec: AutoencoderSpec
    origin: str  # of the spec, for messages
    config: Config  # of the training, if that is the user's own: its data may then be built
    run: Run | None


def locate(
    path_or_id: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    fetched: bool = False,
    **access: Any,
) -> Located:
    """Find the weights, and the config that belongs to them; see ``LiteVAE.from_pretrained``.

    ``fetched``: they are a file of a repository that the user named.

    FileNotFoundError if there are none, ValueError for another file, ConfigError if the config is
    missing or wrong.
    """
    folder = Run(Path(find_run(path_or_id)))
    given = os.fspath(path_or_id)
    weights = locate_weights(path_or_id, **access)
    run = folder if weights == folder.newest_checkpoint else None

    # The config: as given, inside the file, beside it, or known by the name on the hub.
    inside = config_inside(weights) if config is None else None
    found = config or inside or _config_beside(weights, named=folder.path.is_file() and not fetched)
    if found is None and given in PUBLISHED:
        found = recipes()[PUBLISHED[given]]
    if found is None:
        raise ConfigError(
            f"{given}: no config beside the weights (config.json, config.yaml or "
            f"{weights.stem}.yaml): put one there{OR_CONFIG}"
        )

    # Is it the user's, or a received one, which may name networks of this package only?
    own = config is not None or (inside is None and run_of(weights) is not None)
    if isinstance(found, Mapping):
        origin = given
        content = found
    else:
        origin = str(found)
        content = read_config(found, received=not own)
    trusted = "model" in content and own
    spec = AutoencoderSpec.from_content(content, origin, only_ours=not trusted)
    return Located(weights, spec, origin, dict(content) if trusted else {}, run)


def locate_weights(path_or_id: str | Path, **access: Any) -> Path:
    """Find the file of weights of a path, a model of this package, or an id of the hub.

    See :func:`locate`.
    """
    folder = Path(find_run(path_or_id))
    given = os.fspath(path_or_id)
    if folder.is_file():
        if folder.suffix not in WEIGHT_SUFFIXES:
            raise ValueError(f"{given}: not a file of weights ({', '.join(WEIGHT_SUFFIXES)})")
        return folder

    # The folder. From the hub: files at the top of the repository, safetensors before pickles.
    if given.startswith(SHIPPED):
        folder = shipped_folder(given)
    elif not folder.is_dir() and is_hub_id(given):
        from olvae.models.on_the_hub import snapshot  # slow to import

        for suffix in WEIGHT_SUFFIXES:
            folder = snapshot(given, [*CONFIG_PATTERNS, f"*{suffix}"], ["*/*"], **access)
            if any(folder.glob(f"*{suffix}")):
                break
    if not given or not folder.is_dir():  # "" would be the current folder
        raise FileNotFoundError(
            f"{given or '(empty)'}: no such file or folder, and not an id of the hub (OWNER/NAME)"
        )
    newest = Run(folder).newest_checkpoint
    if newest.is_file():
        return newest

    # The only file of the first suffix that has one.
    for suffix in WEIGHT_SUFFIXES:
        files = _weights_in(folder, suffix)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            split = (folder / WEIGHTS_INDEX).is_file()
            remedy = (
                "save them as one, with a larger max_shard_size" if split else "name one of them"
            )
            raise FileNotFoundError(f"{given}: several files of weights ({names}): {remedy}")
        if files:
            return files[0]
    raise FileNotFoundError(
        f"{given}: neither a run folder (checkpoints/last.ckpt is missing) nor a folder with "
        f"weights ({', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)})"
    )


def _weights_in(folder: Path, suffix: str) -> list[Path]:
    """A folder's files of weights, without the ones that a killed process was writing.

    Beside diffusers' file, its copies in another precision, such as ``.fp16.``, do not count.
    """
    files = sorted(folder.glob(f"[!.]*{suffix}"))
    if folder / WEIGHTS_NAME not in files:
        return files
    copies = WEIGHTS_NAME.replace(".", ".*.")
    return [file for file in files if not file.match(copies)]


def config_inside(weights: Path, kinds: Sequence[str | None] = (CLASS_NAME,)) -> Config | None:
    """The config.json in a safetensors file's header; None if it is not of one of these classes.

    ``None`` among the classes: of no class.
    """
    if weights.suffix != ".safetensors":
        return None
    try:
        content = json.loads(header_of(weights)[CONFIG_KEY][:CONFIG_BYTES])
    except (OSError, KeyError, ValueError, RecursionError):
        return None  # it has none; reading the weights will find out whether the file is whole
    if not isinstance(content, dict) or content.get("_class_name") not in kinds:
        return None
    return None if "model" in content else content


def is_export(weights: Path) -> bool:
    """Whether a file of weights is of an export of ours."""
    return class_in(weights.parent) == CLASS_NAME or config_inside(weights) is not None


def _config_beside(weights: Path, named: bool) -> Path | None:
    """The config in the run folder or beside the weights, by its name.

    A folder's only YAML file counts too, unless the weights alone were ``named``: then it may be
    about something else.
    """
    run = run_of(weights)
    folder = weights.parent if run is None else run.path
    for name in (CONFIG_NAME, "config.yaml", f"{weights.stem}.yaml", f"{weights.stem}.yml"):
        if (folder / name).is_file():
            return folder / name
    if named:
        return None
    yaml = [*folder.glob("[!.]*.yaml"), *folder.glob("[!.]*.yml")]
    return yaml[0] if len(yaml) == 1 else None


def write_export(state: Mapping[str, Tensor], config: Config, folder: Path) -> None:
    """Write the weights, ``config.json``, and the Python file that it names.

    The weights keep their dtype, and get a checksum. Weights in several parts, which diffusers had
    written there and would prefer, are removed.
    """
    with atomic_write(folder / WEIGHTS_NAME) as partial:
        write_tensors(partial, state)
    if "auto_map" in config:
        (folder / LOADER_NAME).write_text(LOADER, encoding="utf-8")
    write_json(config, folder / CONFIG_NAME)
    for stale in (folder / WEIGHTS_INDEX, *folder.glob(WEIGHTS_NAME.replace(".", "-*-of-*."))):
        stale.unlink(missing_ok=True)
