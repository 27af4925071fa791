"""The contract of a kind of TARGET: a loader finds the autoencoder that a text names, and loads it later."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from olvae.config import Config, ConfigError
from olvae.models.autoencoder import Autoencoder
from olvae.runs import Run, settings_of


@dataclass(frozen=True)
class LoadOptions:
    """Options for finding and loading a target."""

    config: str | Path | None = None  # of a checkpoint, instead of the one beside it
    config_base: str | Path | None = (
        None  # a folder in which a run's config is looked for by the run's name
    )
    raw: bool = False  # the weights as trained, not the averaged ones (EMA)
    allow_mismatch: bool = False  # load the tensors that fit, and warn of the others


@dataclass(frozen=True)
class Target:
    """An autoencoder that was found, and is not loaded yet.

    ``load`` loads it with its weights, in evaluation mode and float32, anew at each call; ValueError if they are not
    readable, non-finite, or of another model. ``fresh`` builds it with fresh weights; None if that is not known.
    ``config`` is the training's; empty without one, or for a received one, whose data must not be built.
    """

    load: Callable[[], Autoencoder] = field(repr=False)
    fresh: Callable[[], Autoencoder] | None = field(repr=False, default=None)
    config: Config = field(repr=False, default_factory=dict)
    run: Run | None = None
    raw: bool = (
        False  # whether it has the raw weights that were asked for, not the averaged ones (EMA)
    )
    name: str = ""  # by default what the user wrote
    given: str = ""  # what the user wrote; find_target sets it

    def untrained(self) -> Autoencoder:
        """Build the autoencoder as before the first step, by the run's seed; ConfigError if its loader can't."""
        if self.fresh is None:
            raise ConfigError(f"{self.given}: can't be built without its weights")
        import lightning.pytorch as pl  # a second, which most commands save

        pl.seed_everything(settings_of(self.config).initial_seed, verbose=False)
        return self.fresh().eval()


class Loader(ABC):
    """A kind of TARGET. One of your own is named by its class: TARGET ``package.module.Class:ARGUMENT``."""

    @abstractmethod
    def accepts(self, text: str) -> bool:
        """Whether this names a target of this kind, judged quickly by the text and local files."""

    @abstractmethod
    def find(self, text: str, options: LoadOptions) -> Target | Path:
        """Find what the text names, or fetch it: a path is given to the other loaders; errors as ``find_target``'s."""
