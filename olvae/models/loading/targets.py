"""Find what a command's TARGET names: the model to evaluate, export or encode with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from olvae import config as cfg
from olvae.config import ConfigError
from olvae.models.loading.checkpoints import CheckpointLoader, HubLoader, ShippedLoader
from olvae.models.loading.diffusers_models import DiffusersLoader
from olvae.models.loading.kl import LatentDiffusionLoader
from olvae.models.loading.loader import Loader, LoadOptions, Target
from olvae.models.names import KINDS, check_target, split_class

LOADERS: tuple[Loader, ...] = (
    ShippedLoader(),
    DiffusersLoader(),
    HubLoader(),
    LatentDiffusionLoader(),
    CheckpointLoader(),
)
"""The first that accepts a text finds it."""

RAW = ", raw weights"
"""Ends the name of a target whose raw weights were asked for."""


def find_target(
    text: str | Path,
    config: str | Path | None = None,
    config_base: str | Path | None = None,
    raw: bool = False,
    allow_mismatch: bool = False,
) -> Target:
    """Find what a TARGET names; see :data:`~olvae.models.names.KINDS`.

    Args:
        config, config_base, raw, allow_mismatch: see :class:`~olvae.models.loading.loader.LoadOptions`.

    Raises:
        FileNotFoundError: the target was not found, or the hub can't be reached.
        ConfigError: the config has mistakes, or is missing.
        ValueError: the file is not readable, or of another kind.
    """
    given = str(text)
    check_target(given)
    options = LoadOptions(config, config_base, raw, allow_mismatch)
    place, loaders = given, LOADERS
    if not Path(given).exists() and (named := split_class(given)):
        place, loaders = named[1], (_own_loader(named[0]),)
    fetched = False
    while True:
        loader = next((loader for loader in loaders if loader.accepts(place)), None)
        if loader is None:
            raise FileNotFoundError(f"{given}: not found; a target is {KINDS}")
        found = loader.find(place, options)
        if isinstance(found, Target):
            break
        place, loaders, fetched = str(found), LOADERS, True
    suffix = RAW if found.raw else ""
    return replace(found, name=((not fetched and found.name) or given) + suffix, given=given + suffix)


def _own_loader(path: str) -> Loader:
    kind = cfg.resolve_target(path)
    if not (isinstance(kind, type) and issubclass(kind, Loader)):
        raise ConfigError(f"{path} is not a kind of {Loader.__module__}.Loader")
    loader: Loader = kind()
    return loader


def name_apart(targets: Sequence[Target], taken: Sequence[str] = ()) -> list[Target]:
    """Give every target a name of its own: equal names become what the user wrote, and numbered if still equal.

    Args:
        taken: names that are in use already.
    """
    for rename in (lambda t, _: t.given, lambda t, n: f"{t.name} ({n})"):
        counts = Counter([*(target.name for target in targets), *taken])
        seen: Counter[str] = Counter()
        targets = list(targets)
        for i, target in enumerate(targets):
            seen[target.name] += 1
            if counts[target.name] > 1:
                targets[i] = replace(target, name=rename(target, seen[target.name]))
    return list(targets)
