"""What can be evaluated: a run folder, or a checkpoint with a config."""

from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl

from olvae import config as cfg
from olvae.checkpoint import load_weights, read_weights
from olvae.config import Config, ConfigError
from olvae.models.autoencoder import LiteVAE
from olvae.runs import Run, open_run

__all__ = ["Target", "build_autoencoder", "find_target"]

AUTOENCODER_KEYS = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "initial_logvar")


@dataclass(frozen=True)
class Target:
    """A config and the weights that belong to it."""

    name: str
    config: Config
    weights: Path
    run: Run | None

    def load(self) -> LiteVAE:
        """The autoencoder, in evaluation mode; averaged weights where the checkpoint has them."""
        model = build_autoencoder(self.config)
        load_weights(model, read_weights(self.weights), self.weights)
        return model.eval()

    def untrained(self) -> LiteVAE:
        """The autoencoder as it was before the first step: the run's seed gives the same weights again."""
        run = self.config.get("run") or {}
        pl.seed_everything(run.get("initial_seed", run.get("seed", 0)), verbose=False)
        return build_autoencoder(self.config).eval()


def find_target(path: str | Path, config: str | Path | None = None) -> Target:
    """A run folder, or a checkpoint together with its config.

    Raises:
        FileNotFoundError: the path is neither, or lacks its parts.
        ConfigError: the config has mistakes, or a checkpoint came without one.
    """
    path = Path(path)
    if path.is_dir():
        run = open_run(path)
        weights, source = run.last_checkpoint, config or run.config
    elif path.is_file():
        run, weights = None, path
        if config is None:
            raise ConfigError(f"{path}: a checkpoint needs its config: add --config CFG, or give the run folder")
        source = config
    else:
        raise FileNotFoundError(f"{path}: neither a run folder nor a checkpoint")
    loaded = cfg.load([source])
    if mistakes := cfg.validate(loaded):
        raise ConfigError(*mistakes)
    return Target(run.path.name if run else str(path), loaded, weights, run)


def build_autoencoder(config: Config) -> LiteVAE:
    """The plain autoencoder of a config's model node, with fresh weights."""
    params = config["model"]["params"]
    return LiteVAE.from_config(**{key: params[key] for key in AUTOENCODER_KEYS if key in params})
