"""Find the autoencoder that a command's TARGET names; load runs, checkpoints and exports."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from olvae import config as cfg
from olvae.checkpoint import read_checkpoint, read_weights, state_dict_of
from olvae.config import ConfigError
from olvae.models.autoencoder import LiteVAE, load_located
from olvae.models.loading.from_diffusers import DiffusersLoader
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.loading.monai_files import MonaiLoader
from olvae.models.loading.original_files import OriginalLoader
from olvae.models.loading.tiny_files import TinyLoader
from olvae.models.loading.vision_encoders import VisionLoader
from olvae.models.target_names import (
    DIFFUSERS,
    KINDS,
    SHIPPED,
    check_target,
    is_hub_id,
    split_class,
)
from olvae.models.weight_files import (
    ONE_KIND,
    OR_CONFIG,
    PUBLISHED,
    is_export,
    locate,
    locate_weights,
)
from olvae.runs import find_run, run_of, settings_of

# Ends the name of a target whose raw weights were asked for.
RAW = ", raw weights"


class PackageAndHubLoader(Loader):
    """Fetch ``olvae:NAME`` of this package, or OWNER/NAME of the hub, for any of the loaders."""

    def accepts(self, text: str) -> bool:
        return text.startswith(SHIPPED) or (is_hub_id(text) and not Path(text).exists())

    def find(self, text: str, options: LoadOptions) -> Target | Path:
        if text in PUBLISHED:
            return CheckpointLoader().find(text, options)
        return locate_weights(text)


class CheckpointLoader(Loader):
    """A run folder, a checkpoint, an export, or another file of weights with its config."""

    def accepts(self, text: str) -> bool:
        return Path(text).exists()

    def find(self, text: str, options: LoadOptions) -> Target:
        # The file: an export has one kind of weights; one from elsewhere may be diffusers'.
        weights = locate_weights(text)
        raw = options.raw
        exported = is_export(weights)
        if raw and exported:
            warnings.warn(f"{text}: {ONE_KIND}", stacklevel=2)
            raw = False
        if not exported and run_of(weights) is None:
            state = state_dict_of(read_checkpoint(weights, check=False), weights)
            if any(name.startswith("encoder.down_blocks.") for name in state):
                raise ValueError(
                    f"{text}: weights of a diffusers autoencoder: name it as {DIFFUSERS}FOLDER, "
                    "a folder with config.json"
                )

        # Its config: the one that is given, or found by the run's name, or beside it.
        config = options.config
        if (
            config is None
            and options.config_base is not None
            and weights.parent.name == "checkpoints"
        ):
            config = find_run_config(options.config_base, weights.parent.parent.resolve().name)
        located = locate(text, config, options.fetched)
        if located.config:
            # Without its trainer: a finished run may have settings that are refused today.
            loaded = {key: part for key, part in located.config.items() if key != "lightning"}
            mistakes = cfg.validate(loaded)
            if mistakes:
                raise ConfigError(*mistakes)
        half = settings_of(located.config).untrained
        if half:
            warnings.warn(f"{text}: its {half} has never been trained", stacklevel=2)
        return Target(
            lambda: load_located(located, read_weights(weights, raw), options.allow_mismatch),
            partial(LiteVAE.from_spec, located.spec),
            located.config,
            located.run,
            raw,
            name=Path(text).resolve().name if Path(text).is_dir() else text,
        )


def find_run_config(base: str | Path, run_name: str) -> Path:
    """Find the YAML file of a run, ``<timestamp>_<config>_<precision>`` [R], anywhere in a folder.

    It is ``<run's name>.yaml``, or else ``<config>.yaml``. ConfigError unless there is exactly one.
    """
    names = (run_name, "_".join(run_name.split("_")[1:-1]))
    files: list[Path] = []
    for name in names:
        files = sorted(file for file in Path(base).rglob("*.y*ml") if file.stem == name)
        if files:
            break
    if len(files) != 1:
        found = ", ".join(map(str, files)) or "none"
        wanted = " or ".join(f"{name}.yaml" for name in names if name)
        raise ConfigError(
            f"`config_base` {base}: expected one config {wanted}, found {found}: "
            "name it with `config`"
        )
    return files[0]


LOADERS: tuple[Loader, ...] = (
    DiffusersLoader(),
    VisionLoader(),
    PackageAndHubLoader(),
    TinyLoader(),
    OriginalLoader(),
    MonaiLoader(),
    CheckpointLoader(),
)
"""In this order: the first that accepts a text finds it."""


def find_target(
    text: str | Path,
    config: str | Path | None = None,
    config_base: str | Path | None = None,
    raw: bool = False,
    allow_mismatch: bool = False,
) -> Target:
    """Find the autoencoder that a TARGET names, one of :data:`~olvae.models.target_names.KINDS`.

    The options are :class:`LoadOptions`. FileNotFoundError if it was not found, or the hub can't be
    reached; ConfigError if the config has mistakes or is missing; ValueError if the file is not
    readable, or of another kind.
    """
    if config is not None and config_base is not None:
        raise ConfigError(
            "`config` names the config, `config_base` a folder to search for it: give one of them"
        )
    check_target(str(text))

    # The user's own loader, package.module.Class:ARGUMENT, or all of ours.
    given = str(find_run(text))
    place = given
    loaders = LOADERS
    named = None if Path(given).exists() else split_class(given)
    if named:
        loaders = (cfg.resolve_class(named[0], Loader)(),)  # type: ignore[type-abstract]
        place = named[1]

    # A loader may fetch files, and leave the finding to the others.
    fetched = False
    while True:
        loader = next((loader for loader in loaders if loader.accepts(place)), None)
        if loader is None:
            raise FileNotFoundError(f"{given}: not found; a target is {KINDS}")
        found = loader.find(place, LoadOptions(config, config_base, raw, allow_mismatch, fetched))
        if isinstance(found, Target):
            break
        place = str(found)
        loaders = LOADERS
        fetched = True

    # Fetched files have names that the user does not know.
    name = given if fetched or not found.name else found.name
    suffix = RAW if found.raw else ""
    return replace(found, name=name + suffix, given=given + suffix)


def find_without_options(text: str) -> Target:
    """Find a TARGET that a config names, which has no options: no message asks for one."""
    try:
        return find_target(text)
    except ConfigError as error:
        raise ConfigError(*(line.replace(OR_CONFIG, "") for line in error.mistakes)) from error


def name_apart(targets: Sequence[Target], taken: Sequence[str] = ()) -> list[Target]:
    """Rename targets whose names are equal or ``taken``: to what the user wrote.

    Names that are equal even then get a number.
    """
    renamed = list(targets)
    for numbered in (False, True):
        counts = Counter([*(target.name for target in renamed), *taken])
        seen = Counter[str]()
        for i, target in enumerate(renamed):
            seen[target.name] += 1
            if counts[target.name] > 1:
                name = f"{target.name} ({seen[target.name]})" if numbered else target.given
                renamed[i] = replace(target, name=name)
    return renamed
