"""The autoencoders that a run builds on: one to start from (``--from``), a teacher (``--teacher``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.data.image import from_uint8
from olvae.data.mix import MixSource
from olvae.data.shards.pairs import PairSource
from olvae.data.source import LoaderProcess, Source
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.stable_diffusion import as_litevae
from olvae.models.loading.targets import find_target
from olvae.models.teacher import NO_FACTORS, Teacher

__all__ = ["Found", "check_teacher", "measure_teacher", "set_teacher", "start_from", "untrained_half"]

MEASURED_IMAGES = 64
"""Training images that the teacher's standard deviation per channel is measured on."""


@dataclass(frozen=True)
class Found:
    """An autoencoder to start from: the TARGET as the user wrote it, its weights by our names, and its config."""

    target: str
    weights: Mapping[str, Tensor]
    config: Config
    """The training config, empty for what has none."""


def start_from(config: Config) -> Found:
    """Find the autoencoder that ``model.from`` names, and put its networks into the config.

    Networks in the config are replaced, except for params without a target, such as ``padding: reflect``, which are
    added to those that were found. Its factors for a diffusion model replace the config's, unless its file has none,
    as latent-diffusion's, or the config has a teacher, whose factors count. The decoder alone is trained unless the
    config says otherwise; a teacher does. A resolved config is complete without ``model.from``, so the key is removed.

    Raises:
        ConfigError: the autoencoder's networks can't be trained here.
        FileNotFoundError, ValueError: the autoencoder was not found or can't be loaded.
    """
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
    if not params.get("teacher_config"):
        if not source.factors_known and params.get("scaling_factor") is None:
            raise ConfigError(f"{name}: {NO_FACTORS}")
        for key, value in found.for_diffusion.items():
            if source.factors_known or params.get(key) is None:  # a file that has none leaves the recipe's
                params[key] = value
        params.setdefault("freeze_encoder", not (params.get("anchor_weight") or params.get("freeze_decoder")))
    old, new = (half["encoder_config"]["params"].get("padding") for half in (found.config, params))
    if params.get("freeze_encoder") and old != new:
        raise ConfigError(
            f"model.params.encoder_config.params.padding: {new}, but {name} has {old}: with a frozen "
            "encoder the latents would change at the borders: leave it out, or set freeze_encoder to false"
        )
    node["params"] = params
    return Found(name, found.state_dict(), target.config)


def set_teacher(config: Config, target: str) -> None:
    """Let the autoencoder of a TARGET be the teacher; the other settings of a teacher in the config stay."""
    params = config["model"].get("params") or {}
    node = {"target": f"{Teacher.__module__}.Teacher", **(params.get("teacher_config") or {})}
    node["params"] = {**(node.get("params") or {}), "autoencoder": target}
    config["model"]["params"] = {**params, "teacher_config": node}


def check_teacher(teacher: Teacher | None, source: Source) -> None:
    """Raise ConfigError if the data, or one of the sources in them, have latents of another autoencoder, or in vain."""
    for part in source.sources if isinstance(source, MixSource) else ():
        check_teacher(teacher, part)
    if not isinstance(source, PairSource):
        return
    if teacher is None:
        raise ConfigError(
            "data: it has the latents of a teacher, but there is none: name it with --teacher, or take the images alone"
        )
    if source.encoded_by.described["weights"] != teacher.checksum:
        raise ConfigError(
            f"data: its latents are of {source.encoded_by.described['target']}, whose weights are not those of the "
            f"teacher, {teacher.name}"
        )


def measure_teacher(model: LiteAutoencoderKL, source: Source, seed: int, device: torch.device) -> None:
    """Measure the standard deviation of the teacher's means per channel, on the first training images.

    The images are the same in all processes; each measures on its own device.

    Raises:
        ValueError: the teacher's latents are not finite, or a channel is constant.
    """
    teacher = model.teacher
    assert teacher is not None
    teacher.to(device)
    if isinstance(source, PairSource):  # measured on all of them
        model.teacher_std.copy_(teacher.check_std(torch.tensor(source.encoded_by.means_std)))
        return
    process = LoaderProcess(0, 1, 0, 1, source.batch_size)
    images = (sample.image for sample in source.stream(seed, 0, process) if sample.image is not None)
    batches = (from_uint8(image[None].to(device)) for image in islice(images, MEASURED_IMAGES))
    model.teacher_std.copy_(teacher.measure(batches))


def untrained_half(model: LiteAutoencoderKL, before: Config | None) -> str | None:
    """Which half keeps fresh weights: one that is frozen, unless it came with the weights that training starts from.

    Args:
        before: the config of those weights; None if they are fresh.
    """
    if before is not None:
        fresh: str | None = (before.get("run") or {}).get("untrained")
    else:
        fresh = "encoder" if model.freeze_encoder else "decoder" if model.freeze_decoder else None
    trained = {"encoder": not model.freeze_encoder, "decoder": not model.freeze_decoder}
    return None if fresh is None or trained[fresh] else fresh
