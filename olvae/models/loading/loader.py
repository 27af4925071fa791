"""Contract of a loader: it finds the autoencoder that a TARGET names, and loads it later."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olvae.config import Config, ConfigError, resolve_target
from olvae.models.autoencoder import Autoencoder
from olvae.models.spec import UNMEASURED
from olvae.runs import Run, entry_of, settings_of


@dataclass(frozen=True)
class LoadOptions:
    """Options for finding and loading a target."""

    # Config of a checkpoint, instead of the one beside it.
    config: str | Path | None = None
    # A folder in which a run's config is looked for by the run's name.
    config_base: str | Path | None = None
    # Load the weights as trained, not the averaged ones (EMA).
    raw: bool = False
    # Load the tensors that fit, and warn of the others.
    allow_mismatch: bool = False
    # Whether another loader has fetched the file, from a repository that the user named.
    fetched: bool = False


@dataclass(frozen=True)
class Target:
    """An autoencoder that was found, and is not loaded yet.

    ``load`` loads it with its weights, in evaluation mode and float32, anew at each call;
    ValueError if they are not readable, non-finite, or of another model. ``fresh`` builds it with
    fresh weights; None if that is not known. ``config`` is the training's; empty without one, or
    for a received one, whose data must not be built.
    """

    load: Callable[[], Autoencoder] = field(repr=False)
    fresh: Callable[[], Autoencoder] | None = field(repr=False, default=None)
    config: Config = field(repr=False, default_factory=dict)
    run: Run | None = None
    # Whether it has the raw weights that were asked for, not the averaged ones (EMA).
    raw: bool = False
    # By default what the user wrote.
    name: str = ""
    # What the user wrote; find_target sets it.
    given: str = ""

    @property
    def factors_outdated(self) -> bool:
        """As :func:`factors_outdated` of its config."""
        return factors_outdated(self.config)

    def untrained(self) -> Autoencoder:
        """Build the autoencoder as before the first step, by the run's seed.

        Raises ConfigError: its loader can't build it.
        """
        if self.fresh is None:
            raise ConfigError(f"{self.given}: can't be built without its weights")
        # Takes a second, which most commands save.
        import lightning.pytorch as pl

        pl.seed_everything(settings_of(self.config).initial_seed, verbose=False)
        return self.fresh().eval()


def factors_outdated(config: Config) -> bool:
    """Whether the factors in a run's config are of the weights that it started from.

    Its encoder was trained since, and no part held the latents.
    """
    params = entry_of(config, "model.params") or {}
    if settings_of(config).weights is None or params.get("freeze_encoder"):
        return False
    measured = [params.get(name) not in (None, value) for name, value in UNMEASURED.items()]
    return any(measured) and not {"given", "kept"} & rules_of_latents(params)


def rules_of_latents(params: Mapping[str, Any]) -> set[str]:
    """Collect what the parts in a config's ``model.params`` say of latents: free, kept or given."""
    nodes = [node for node in (params.get("parts") or {}).values() if node is not None]
    return {str(getattr(resolve_target(node["target"]), "latents", "free")) for node in nodes}


class Loader(ABC):
    """A kind of TARGET. Name a loader of yours by its class: ``package.module.Class:ARGUMENT``."""

    @abstractmethod
    def accepts(self, text: str) -> bool:
        """Whether a text names a target of this kind; look at the text and local files only."""

    @abstractmethod
    def find(self, text: str, options: LoadOptions) -> Target | Path:
        """Find the target that a text names, or fetch it; raise errors as ``find_target`` does.

        The other loaders get a path that is returned.
        """
