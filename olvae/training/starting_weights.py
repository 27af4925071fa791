"""Load the weights that a training starts from: networks, another run's, or a resumed one's."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from olvae import runs
from olvae.checkpoint import load_weights, read_checkpoint, read_weights, state_dict_of
from olvae.config import Config, ConfigError
from olvae.data.places import load
from olvae.files import warn_once
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.loader import factors_outdated
from olvae.models.spec import UNMEASURED
from olvae.models.weight_files import locate_weights
from olvae.modules.base import HALVES
from olvae.runs import Run, Settings
from olvae.training import processes
from olvae.training.progress import notify


def load_networks(
    model: LiteAutoencoderKL, weights: Mapping[str, Tensor] | None, settings: Settings
) -> Collection[str]:
    """Load the weights of ``model.from``; return the halves that keep their initial weights.

    Tensors that a decoder adds to the one that it extends keep their initial values.
    """
    if weights is None:
        return HALVES if settings.weights is None else ()
    loaded = {name.partition(".")[0] for name in weights}  # without a decoder that starts fresh
    prefixes = tuple(f"{half}." for half in loaded)
    own = model.state_dict()
    added = {name: own[name] for name in own if name.startswith(prefixes) and name not in weights}
    load_weights(model, {**added, **weights}, str(settings.weights), prefixes=prefixes)
    return tuple(half for half in HALVES if half not in loaded)


def load_other_run(model: LiteAutoencoderKL, path: str | Path, own: Config) -> Config:
    """Load the weights of another run, a checkpoint or an export.

    Factors in this run's ``own`` config that the other one's training outdated are reset.

    Returns the other run's config; an empty one if the file belongs to no run.
    """
    file = locate_weights(path)
    load_weights(model, read_weights(file), file)
    run = runs.run_of(file.resolve())
    config: Config = {}
    if run is not None:
        config = load([run.config])
    _drop_outdated_factors(model, own, config)

    # A frozen half's latents suit the parts, such as a teacher, that it was trained with.
    learned = runs.settings_of(config).checksums
    if model.frozen_halves:
        frozen = f"the {model.frozen_halves[0]} of {path}, frozen here,"
        for part in model.each_part:
            checksum = part.checksum()
            if part.stand_in is not None and learned.get(part.name, checksum) != checksum:
                other = f"learned from another model than model.params.parts.{part.name}"
                warn_once(f"{frozen} {other}: are their latents the same?")
    return config


def _drop_outdated_factors(model: LiteAutoencoderKL, config: Config, other: Config) -> None:
    """Reset factors in the config that the other run has too, if its training outdated them.

    Other numbers may be measured on its weights, and a teacher's are of the teacher's latents.
    """
    params = config["model"]["params"]
    theirs = runs.entry_of(other, "model.params") or {}
    equal = all(params.get(name) == theirs.get(name) for name in UNMEASURED)
    if equal and model.stand_in is None and factors_outdated(other):
        params.update(UNMEASURED)
        model.for_diffusion.update(UNMEASURED)
        model.autoencoder.set_for_diffusion(UNMEASURED)


def untrained_half(model: LiteAutoencoderKL, before: Config | None) -> str | None:
    """Return the frozen half that has never been trained, if there is one.

    ``before``: config of the run that trained the weights to start from; None for initial weights.
    """
    untrained = model.frozen_halves if before is None else [runs.settings_of(before).untrained]
    for half in model.frozen_halves:
        if half not in untrained:
            continue
        # Some halves need no training: without parameters, or with a linear path that was fitted to
        # images. With a stand-in, such as a teacher, it is fitted to the stand-in's latents.
        network = getattr(model, half)
        if network.linear is not None:
            whole = model.stand_in is None
        else:
            whole = model.quantizer is None and next(network.parameters(), None) is None
        if not whole:
            return half
    return None


def load_resumed(model: LiteAutoencoderKL, run: Run, settings: Settings) -> dict[str, Any]:
    """Load the weights of a resumed run, check that it can continue, and return its checkpoint."""
    file = run.newest_checkpoint
    checkpoint = read_checkpoint(file)
    if file != run.last_checkpoint and processes.is_first():
        step = checkpoint.get("global_step")
        notify(f"{run.last_checkpoint}: is missing: continuing from {file.name}, at step {step}")
    other = "start a new run from its weights with `actual_resume`"
    if not checkpoint.get("optimizer_states") or "images_seen" not in checkpoint:
        raise ValueError(
            f"{file}: has weights only, without what training needs to continue: {other}"
        )
    if ("averaging_state" in checkpoint) != model.use_ema:
        raise ConfigError(
            f"model.params.use_ema: {model.use_ema}, but the run has {not model.use_ema}: {other}"
        )

    # Frozen weights of parts, such as a teacher, or the adversary: none added, removed or changed.
    before = settings.checksums
    now = model.checksums
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        why = f"a resumed run keeps it, with the same weights: {other}"
        where = {"adversary": "adversary_config"}
        raise ConfigError(
            *(f"model.params.{where.get(name, f'parts.{name}')}: {why}" for name in changed)
        )

    # The optimizer's state is by position: the same groups (Muon has two), as many parameters.
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    if len(groups) != (2 if model.optimizer == "muon" else 1):
        raise ConfigError(
            f"model.params.optimizer: {model.optimizer}, but the run has another: {other}"
        )
    if sum(len(group["params"]) for group in groups) != len(model.autoencoder_parameters()):
        raise ConfigError(
            f"model.params: these settings train other weights, as of a frozen half: {other}"
        )
    load_weights(model, state_dict_of(checkpoint, file), file, prefixes=("",))
    return checkpoint
