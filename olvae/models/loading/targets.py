"""Find what a command's TARGET names: the model to evaluate, export or encode with."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor

from olvae import config as cfg
from olvae.checkpoint import pick_weights, read_checkpoint, read_weights, state_dict_of
from olvae.config import Config, ConfigError
from olvae.models.autoencoder import Autoencoder, LiteVAE, load_located
from olvae.models.loading.diffusers import SUBFOLDER, find_folder, load_diffusers
from olvae.models.loading.latent_diffusion import from_latent_diffusion, latent_diffusion_config, pick_latent_diffusion
from olvae.models.named import DIFFUSERS, check_target
from olvae.models.pretrained import config_inside, locate, locate_weights
from olvae.models.spec import CLASS_NAME, class_in
from olvae.runs import Run, run_of

__all__ = ["RAW", "Target", "find_target", "name_apart"]


RAW = ", raw weights"
"""Ends the name of a target whose raw weights were asked for."""


@dataclass(frozen=True)
class Target:
    """An autoencoder that was found, and is not loaded yet."""

    name: str
    given: str
    """As the user wrote it; ends with :data:`RAW` like the name."""
    trained: Callable[[], Autoencoder] = field(repr=False)
    fresh: Callable[[], Autoencoder] = field(repr=False)
    config: Config = field(repr=False, default_factory=dict)
    """The training config; empty for exports, the hub, diffusers, and for a config that came along with weights, whose
    data must not be built: name that one with ``config``."""
    run: Run | None = None
    raw: bool = False
    """The raw weights were asked for, not the averaged ones (EMA)."""

    def load(self) -> Autoencoder:
        """The autoencoder, in evaluation mode and in float32.

        Raises:
            ValueError: the weights are not readable, non-finite, or of another model.
        """
        return self.trained()

    def usual_size(self, model: Autoencoder) -> int:
        """Side in pixels of the images that it was trained on, if that is known; else 256."""
        size = ((self.config.get("data") or {}).get("params") or {}).get("size")
        return int(size or model.image_size)

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
    """Find what a TARGET names; see :data:`~olvae.models.named.KINDS`. latent-diffusion's checkpoints are files too.

    A file is read once: what was read to see its kind is kept for the first load.

    Args:
        config: of a checkpoint, instead of the one beside it.
        config_base: a folder in which a run's config is looked for by the run's name.
        raw: weights as trained, not the averaged ones (EMA).
        allow_mismatch: load the tensors that fit, and warn of the others.

    Raises:
        FileNotFoundError: the target was not found, or the hub can't be reached.
        ConfigError: the config has mistakes, or is missing.
        ValueError: the file is not readable, or of another kind.
    """
    given = str(text)
    check_target(given)
    path = Path(given)
    if given.startswith(DIFFUSERS) or _is_diffusers(path):
        return _diffusers_target(given, find_folder(given.removeprefix(DIFFUSERS)), raw, allow_mismatch)
    weights = locate_weights(given)
    exported = class_in(weights.parent) == CLASS_NAME or config_inside(weights) is not None
    if raw and exported:
        warnings.warn(f"{given}: an export has one kind of weights: --raw is ignored", stacklevel=2)
        raw = False
    suffix = RAW if raw else ""

    kept: list[dict[str, Tensor]] = []  # what was read already: the first load takes it, so that it is not held twice
    if not (run_of(weights) or exported):  # it may be a file of another project
        state = state_dict_of(read_checkpoint(weights), weights, raw)
        if any(name.startswith("encoder.down_blocks.") for name in state):
            raise ValueError(
                f"{given}: weights of a diffusers autoencoder: as a target, {DIFFUSERS}FOLDER, with config.json"
            )
        if (autoencoder := pick_latent_diffusion(state, weights)) is not None:
            return _latent_diffusion_target(autoencoder, given + suffix, weights, raw, allow_mismatch)
        kept.append(pick_weights(state, weights))
        del state  # whatever else the file holds

    if config is None and config_base is not None and weights.parent.name == "checkpoints":
        config = find_config(config_base, weights.parent.parent.resolve().name)
    located = locate(given, config=config)
    if located.config and (mistakes := cfg.validate(located.config)):
        raise ConfigError(*mistakes)
    if half := (located.config.get("run") or {}).get("untrained"):
        warnings.warn(f"{given}: its {half} has never been trained", stacklevel=2)
    return Target(
        name=(path.resolve().name if path.is_dir() else given) + suffix,
        given=given + suffix,
        trained=lambda: load_located(located, kept.pop() if kept else read_weights(weights, raw), allow_mismatch),
        fresh=lambda: LiteVAE.from_spec(located.spec),
        config=located.config,
        run=located.run,
        raw=raw,
    )


def find_config(base: str | Path, run_name: str) -> Path:
    """Find the YAML file of a run in a folder and those below: ``<run's name>.yaml``, or ``<config>.yaml``.

    A run's name is ``<timestamp>_<config>_<precision>`` [R].

    Raises:
        ConfigError: it is missing, or there are several.
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


def _is_diffusers(path: Path) -> bool:
    """Whether this is a folder of diffusers, an autoencoder's or a pipeline's, and no export of ours."""
    return path.is_dir() and (class_in(path) not in (None, CLASS_NAME) or class_in(path / SUBFOLDER) is not None)


def _diffusers_target(given: str, folder: Path, raw: bool, allow_mismatch: bool) -> Target:
    if class_in(folder) == CLASS_NAME:  # an export of ours, in a pipeline
        return replace(find_target(folder, raw=raw, allow_mismatch=allow_mismatch), name=given, given=given)
    if raw:
        warnings.warn(f"{given}: diffusers has one kind of weights: --raw is ignored", stacklevel=3)
    return Target(
        name=given,
        given=given,
        trained=lambda: load_diffusers(folder, allow_mismatch=allow_mismatch),
        fresh=lambda: load_diffusers(folder, trained=False),
    )


def _latent_diffusion_target(
    tensors: dict[str, Tensor], name: str, weights: Path, raw: bool, allow_mismatch: bool
) -> Target:
    config, kept = latent_diffusion_config(tensors, weights), [tensors]

    def read() -> dict[str, Tensor]:
        again = pick_latent_diffusion(state_dict_of(read_checkpoint(weights), weights, raw), weights)
        if again is None:
            raise ValueError(f"{weights}: the file has been replaced by something else")
        return again

    return Target(
        name=name,
        given=name,
        trained=lambda: from_latent_diffusion(config, kept.pop() if kept else read(), weights, allow_mismatch),
        fresh=lambda: from_latent_diffusion(config),
    )
