"""What can be evaluated, exported, encoded with: anything that a command's TARGET may be."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import lightning.pytorch as pl

from olvae import config as cfg
from olvae.checkpoint import read_checkpoint, state_dict_of
from olvae.config import Config, ConfigError
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.hub import is_hub_id
from olvae.models.loading.diffusers import SUBFOLDER, find_folder, load_diffusers
from olvae.models.loading.latent_diffusion import from_latent_diffusion, latent_diffusion_prefix
from olvae.models.pretrained import find_weights, load_located, locate
from olvae.models.spec import CLASS_NAME, build_autoencoder, class_in
from olvae.runs import Run

__all__ = ["KINDS", "RAW", "Target", "find_target", "name_apart"]


KINDS = (
    "a run folder, a .ckpt or .safetensors file, an exported folder, an id of the Hugging Face hub (OWNER/NAME), or "
    "diffusers:ID_OR_FOLDER"
)

DIFFUSERS = "diffusers:"

RAW = ", raw weights"
"""Behind the name of a target whose weights as trained were asked for."""


@dataclass(frozen=True)
class Target:
    """An autoencoder that was found, not loaded yet."""

    name: str
    given: str
    """As the user wrote it, and which weights, where there is a choice."""
    config: Config = field(repr=False)
    """The training config; empty for exports, the hub, diffusers, and where the config only came along with weights,
    because its data would be built from it: name it with ``config``."""
    run: Run | None
    trained: Callable[[], Autoencoder] = field(repr=False)
    fresh: Callable[[], Autoencoder] = field(repr=False)
    raw: bool = False
    """The weights as trained were asked for, where averaged ones may be beside them."""

    def load(self) -> Autoencoder:
        """The autoencoder, in evaluation mode and in float32.

        Raises:
            ValueError: the weights are not readable, not finite, or of another model.
        """
        return self.trained()

    def usual_size(self, model: Autoencoder) -> int:
        """Pixels of the images that it was trained at, as far as that is known; else 256."""
        size = ((self.config.get("data") or {}).get("params") or {}).get("size")
        return int(size or (model.encoder.image_size if isinstance(model, LiteVAE) else 256))

    def untrained(self) -> Autoencoder:
        """The autoencoder as it was before the first step: a run's seed gives the same weights again."""
        run = self.config.get("run") or {}
        pl.seed_everything(run.get("initial_seed", run.get("seed", 0)), verbose=False)
        return self.fresh().eval()


def find_target(
    text: str | Path,
    config: str | Path | None = None,
    config_base: str | Path | None = None,
    raw: bool = False,
    allow_mismatch: bool = False,
) -> Target:
    """Find what a TARGET names; see :data:`KINDS`. Checkpoints of latent-diffusion's KL autoencoder are files too.

    Args:
        config: of a checkpoint, instead of the one that lies beside it.
        config_base: a folder in which a run's config is looked for by the run's name.
        raw: weights as trained, where there are averaged ones (EMA) besides.
        allow_mismatch: load the tensors that fit, and warn of the others.

    Raises:
        FileNotFoundError: there is no such thing, or the hub can't be reached.
        ConfigError: the config has mistakes, or there is none.
        ValueError: the file is not readable, or of a kind that is none of these.
    """
    given = str(text)
    if given.startswith(DIFFUSERS):
        return _diffusers_target(given, find_folder(given.removeprefix(DIFFUSERS)), raw, allow_mismatch)
    path = Path(given)
    if not path.exists() and not is_hub_id(given):
        raise FileNotFoundError(f"{given}: not there; a target is {KINDS}")
    if path.is_dir() and (class_in(path) not in (None, CLASS_NAME) or class_in(path / SUBFOLDER) is not None):
        raise ValueError(f"{given}: a folder of diffusers: as a target, {DIFFUSERS}{given}")
    weights = find_weights(given)
    exported = class_in(weights.parent) == CLASS_NAME
    if raw and exported:
        warnings.warn(f"{given}: an export has one kind of weights: --raw is ignored", stacklevel=2)
        raw = False
    suffix = RAW if raw else ""
    ours = weights.parent.name == "checkpoints" or exported
    if not ours and (found := _latent_diffusion(weights, given, raw, allow_mismatch)):
        return replace(found, name=found.name + suffix)
    if config is None and config_base is not None and weights.parent.name == "checkpoints":
        config = find_config(config_base, weights.parent.parent.resolve().name)
    located = locate(given, config=config)
    if located.config and (mistakes := cfg.validate(located.config)):
        raise ConfigError(*mistakes)
    return Target(
        name=(path.resolve().name if path.is_dir() else given) + suffix,
        given=given + suffix,
        config=located.config,
        run=located.run,
        trained=lambda: load_located(located, raw, allow_mismatch),
        fresh=lambda: build_autoencoder(**located.params),
        raw=raw,
    )


def find_config(base: str | Path, run_name: str) -> Path:
    """The YAML file in a folder, or below it, that has the name of a run, whole or without its first and last part.

    A run's name is ``<timestamp>_<config>_<precision>`` [R].

    Raises:
        ConfigError: there is none, or there are several.
    """
    if not Path(base).is_dir():
        raise ConfigError(f"--config_base {base}: no such folder")
    names = [run_name, "_".join(run_name.split("_")[1:-1])]
    for name in names:
        files = sorted(file for file in Path(base).rglob("*.y*ml") if file.stem == name)
        if len(files) > 1:
            raise ConfigError(f"--config_base {base}: several files for {run_name}: {', '.join(map(str, files))}")
        if files:
            return files[0]
    tried = " nor ".join(f"{name}.yaml" for name in names if name)
    raise ConfigError(f"--config_base {base}: no config for {run_name}: neither {tried}; name it with --config")


def name_apart(targets: Sequence[Target], taken: Sequence[str] = ()) -> list[Target]:
    """The targets with names of which no two are equal: as the user wrote them, and counted, where that takes it.

    Args:
        taken: names that none of them may have.
    """
    for rename in (lambda t, _: t.given, lambda t, n: f"{t.name} ({n})"):
        counts = Counter([*(target.name for target in targets), *taken])
        seen: Counter[str] = Counter()
        out: list[Target] = []
        for target in targets:
            seen[target.name] += 1
            again = counts[target.name] > 1
            out.append(replace(target, name=rename(target, seen[target.name])) if again else target)
        targets = out
    return list(targets)


def _diffusers_target(given: str, folder: Path, raw: bool, allow_mismatch: bool) -> Target:
    if class_in(folder) == CLASS_NAME:  # an export of ours, in a pipeline
        return replace(find_target(folder, raw=raw, allow_mismatch=allow_mismatch), name=given, given=given)
    if raw:
        warnings.warn(f"{given}: diffusers has one kind of weights: --raw is ignored", stacklevel=3)
    return Target(
        name=given,
        given=given,
        config={},
        run=None,
        trained=lambda: load_diffusers(folder, allow_mismatch=allow_mismatch),
        fresh=lambda: load_diffusers(folder, trained=False),
    )


def _latent_diffusion(weights: Path, given: str, raw: bool, allow_mismatch: bool) -> Target | None:
    state = state_dict_of(read_checkpoint(weights), weights, raw)
    if any(name.startswith("encoder.down_blocks.") for name in state):
        raise ValueError(
            f"{given}: weights of a diffusers autoencoder: as a target, {DIFFUSERS}FOLDER, with config.json"
        )
    if latent_diffusion_prefix(state) is None:
        return None

    def load(trained: bool) -> Autoencoder:
        again = state_dict_of(read_checkpoint(weights), weights, raw)
        return from_latent_diffusion(again, weights, allow_mismatch, trained)

    return Target(
        name=given,
        given=given,
        config={},
        run=None,
        trained=lambda: load(True),
        fresh=lambda: load(False),
    )
