"""Contracts of a kind of TARGET: a loader finds what a text names; a family is trained here, and handed back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.data.pixels.size_and_range import Sides, Size
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.spec import AutoencoderSpec
from olvae.modules.base import Decoder, Encoder
from olvae.runs import Run, entry_of, settings_of


@dataclass(frozen=True)
class LoadOptions:
    """What a user may ask for besides the target itself."""

    config: str | Path | None = None  # of a checkpoint, instead of the one beside it
    config_base: str | Path | None = None  # a folder in which a run's config is looked for by the run's name
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
    raw: bool = False  # whether it has the raw weights that were asked for, not the averaged ones (EMA)
    name: str = ""  # by default what the user wrote
    given: str = ""  # what the user wrote; find_target sets it

    def usual_size(self, model: Autoencoder) -> Size:
        """The size of the images that it was trained on, if that is known; else the model's."""
        return Sides.of(entry_of(self.config, "data.params.size") or model.image_size).node

    def untrained(self) -> Autoencoder:
        """Build the autoencoder as before the first step, by the run's seed; ConfigError if its loader can't."""
        if self.fresh is None:
            raise ConfigError(f"{self.given}: can't be built without its weights")
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


class Family(ABC):
    """Classes of diffusers whose networks are networks of ours: one becomes a LiteVAE, to be trained, and goes back."""

    kinds: ClassVar[Sequence[str]]  # names of the classes
    networks: ClassVar[tuple[type[Encoder], type[Decoder]]]  # of ours

    @abstractmethod
    def spec(self, theirs: Any, name: str) -> AutoencoderSpec:
        """What builds the networks of a DiffusersAutoencoder here; ConfigError if they lack a part."""

    @abstractmethod
    def ours(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rename diffusers' weights to ours."""

    def holds(self, model: LiteVAE) -> bool:
        """Whether a model's networks are of this family."""
        return isinstance(model.encoder, self.networks[0]) and isinstance(model.decoder, self.networks[1])

    def kind(self, model: LiteVAE) -> str:  # noqa: ARG002
        """The class of diffusers that a model is."""
        return self.kinds[0]

    @abstractmethod
    def config(self, model: LiteVAE) -> dict[str, Any]:
        """The arguments of that class; ValueError if it has none for a setting of the model."""

    @abstractmethod
    def theirs(self, model: LiteVAE) -> Mapping[str, Tensor]:
        """Rename a model's weights to diffusers'; ValueError if one has no place there."""

    def units(self, model: LiteVAE) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """Mean and deviation, (n_z, 1, 1) each, if the class has its latents in a diffusion model's units."""
        return None
