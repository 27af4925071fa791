"""Set up a training: read its options and config, find an autoencoder to start from.

Importing this module takes no torch, so that mistakes of a config show at once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from olvae import config as cfg
from olvae import runs
from olvae.config import Config, ConfigError
from olvae.models.names import check_target
from olvae.runs import Run, Settings
from olvae.training.resuming import requeued_run, slurm_job

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from olvae.models.liteautoencoder import LiteAutoencoderKL


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``olvae train``, whose help describes them; None for one that was not given."""

    base: Sequence[str | Path] = ()
    overrides: Sequence[str] = ()
    logdir: str | Path = "runs"
    name: str | None = None
    precision: str | None = None
    gpus: str | None = None
    seed: int | None = None
    resume: str | Path | None = None
    actual_resume: str | Path | None = None
    start_from: str | None = None
    teacher: str | None = None
    allow_changes: bool = False
    time_limit: str | None = None


@dataclass(frozen=True)
class Plan:
    """A training as its options and config files describe it, checked as far as that takes no torch."""

    options: TrainOptions
    config: Config
    """Of the run, but for the networks that ``model.from`` names."""
    settings: Settings
    resumed: Run | None = None
    previous: Config | None = None
    """The resumed run's own config."""


def read_plan(options: TrainOptions) -> Plan:
    """Read and check the config that some options name: a resumed run's, the files over it, then the overrides.

    A SLURM job that was queued again continues its run.

    Raises:
        ConfigError: a mistake in the config or the options.
        FileNotFoundError: a config, a run or an autoencoder was not found.
    """
    if options.resume is None and options.base and (begun := requeued_run(Path(options.logdir), _name(options))):
        options = TrainOptions(resume=begun.path, time_limit=options.time_limit, gpus=options.gpus)
    resumed = None if options.resume is None else runs.open_run(options.resume)
    previous = None if resumed is None else runs.config_of(resumed)
    if resumed is None and not options.base:
        raise ConfigError("`base` names the config to train, such as demo")
    if resumed is None and options.allow_changes:
        raise ConfigError("`allow_changes` is for `resume`: leave it out")
    config = cfg.load([*([] if resumed is None else [resumed.config]), *options.base], options.overrides)
    for target in (options.start_from, options.teacher):
        if target is not None:
            check_target(target)
    if isinstance(config.get("model"), dict):
        if options.start_from is not None:
            config["model"]["from"] = options.start_from
        if options.teacher is not None:
            _set_teacher(config["model"], options.teacher)
    cfg.check(config)
    if config["model"].get("from") is None:
        config["model"].pop("from", None)
    _check_starts(options, config)
    return Plan(options, config, _settings(options, config, previous), resumed, previous)


def _check_starts(options: TrainOptions, config: Config) -> None:
    """Check that a run starts from one place."""
    starts = {
        "`resume` continues a run": options.resume,
        "`actual_resume` starts one from weights": options.actual_resume,
        "`start_from` starts one from an autoencoder's networks and weights": options.start_from,
        "model.from names an autoencoder to start from": None if options.start_from else config["model"].get("from"),
    }
    if len(given := [what for what, value in starts.items() if value is not None]) > 1:
        raise ConfigError(f"{', '.join(given)}: give one of them")


def _set_teacher(model: Config, target: str) -> None:
    """Let the autoencoder of a TARGET be the teacher; other settings of a teacher in the config stay."""
    params = model.get("params") or {}
    parts = (params.get("parts") or {}) if isinstance(params, dict) else None
    if not isinstance(parts, dict) or not isinstance(parts.get("teacher") or {}, dict):
        return  # the check of the config, which is next, names the mistake
    node = {"target": "olvae.models.parts.teacher.Teacher", **(parts.get("teacher") or {})}
    node["params"] = {**(node.get("params") or {}), "autoencoder": target}
    model["params"] = {**params, "parts": {**parts, "teacher": node}}


def _name(options: TrainOptions) -> str:
    return options.name or re.sub(r"[^\w.+=-]", "-", Path(options.base[0]).stem)


def _settings(options: TrainOptions, config: Config, previous: Config | None) -> Settings:
    """The options over the resumed run's settings, over the defaults."""
    settings = runs.settings_of(config)
    if previous is None:
        runs.check_name(_name(options))
        precision = ((config.get("lightning") or {}).get("trainer") or {}).get("precision", "32")
        settings = Settings(_name(options), str(precision), initial_seed=options.seed or 0, paths=settings.paths)
    elif options.name not in (None, settings.name):
        raise ConfigError("`name`: a resumed run keeps the name of its folder: leave it out")
    weights = config["model"].get("from") or options.actual_resume
    return replace(
        settings,
        precision=options.precision or settings.precision,
        gpus=settings.gpus if options.gpus is None else options.gpus,
        seed=settings.seed if options.seed is None else options.seed,
        weights=settings.weights if weights is None else str(weights),
        slurm_job=slurm_job(),
    )


@dataclass(frozen=True)
class Start:
    """The weights that a run starts from: their source as the user wrote it, the tensors, and their training config."""

    name: str
    weights: "Mapping[str, Tensor]"
    config: Config
    """Empty for weights without one."""


def start_from(config: Config) -> Start:
    """Load the autoencoder that ``model.from`` names, and put its networks into the config.

    Networks in the config are replaced, except for params without a target, such as ``padding: reflect``, which are
    added. The autoencoder's factors for a diffusion model replace the config's, unless its file has none, as
    latent-diffusion's, or the config has a part that brings latents. The decoder alone is trained unless the config
    says otherwise, or a part keeps or brings its latents. The resolved config is complete without ``model.from``, so
    the key is removed.

    Raises:
        ConfigError: the autoencoder's networks can't be trained here.
        FileNotFoundError, ValueError: the autoencoder was not found or can't be loaded.
    """
    from olvae.models.loading.diffusers_models import as_litevae
    from olvae.models.loading.targets import find_target
    from olvae.models.parts.part import latents_of
    from olvae.models.parts.teacher import NO_FACTORS

    node = config["model"]
    name, params = node.pop("from"), dict(node.get("params") or {})
    target = find_target(name)
    source = target.load()
    found = as_litevae(source, name)
    if found.folded:
        raise ConfigError(f"{name}: its convolutions are folded, for inference only: start from an export without it")
    for key, value in found.config.items():
        given = params.get(key)
        if key.endswith("_config") and isinstance(given, Mapping) and "target" not in given:
            value = {**value, **given, "params": {**value["params"], **(given.get("params") or {})}}
        params[key] = value
    params.pop("initial_logvar", None)
    latents = {latents_of(node["target"]) for node in (params.get("parts") or {}).values() if node is not None}
    if "given" not in latents:
        if not source.factors_known and params.get("scaling_factor") is None:
            raise ConfigError(f"{name}: {NO_FACTORS}")
        for key, value in found.for_diffusion.items():
            if source.factors_known or params.get(key) is None:
                params[key] = value
        params.setdefault("freeze_encoder", not ("kept" in latents or params.get("freeze_decoder")))
    old, new = (half["encoder_config"]["params"].get("padding") for half in (found.config, params))
    if params.get("freeze_encoder") and old != new:
        raise ConfigError(
            f"model.params.encoder_config.params.padding: {new}, but {name} has {old}: with a frozen "
            "encoder the latents would change at the borders: leave it out, or set freeze_encoder to false"
        )
    node["params"] = params
    cfg.check(config)
    return Start(name, found.state_dict(), target.config)


def untrained_half(model: "LiteAutoencoderKL", before: Config | None) -> str | None:
    """Find the half that keeps its initial weights: frozen, and not trained with the weights that training starts from.

    Args:
        before: the config of those weights; None if they are fresh.
    """
    if before is not None:
        fresh = runs.settings_of(before).untrained
    else:
        fresh = "encoder" if model.freeze_encoder else "decoder" if model.freeze_decoder else None
    trained = {"encoder": not model.freeze_encoder, "decoder": not model.freeze_decoder}
    return None if fresh is None or trained[fresh] else fresh
