"""The autoencoders that a run builds on: one to start from (``--from``), a teacher (``--teacher``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.data.image import from_uint8
from olvae.data.sampler import LoaderProcess
from olvae.data.shards.pairs import PairSource
from olvae.data.source import Source
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.stable_diffusion import as_litevae
from olvae.models.loading.targets import find_target
from olvae.models.teacher import Teacher

__all__ = ["Found", "measure_teacher", "set_teacher", "start_from", "untrained_half"]

MEASURED_IMAGES = 64
"""Training images that the teacher's standard deviation per channel is measured on."""


@dataclass(frozen=True)
class Found:
    """An autoencoder to start from: the TARGET as the user wrote it, and its weights by our names."""

    target: str
    weights: Mapping[str, Tensor]


def start_from(config: Config) -> Found:
    """Find the autoencoder that ``model.from`` names, and put its networks into the config.

    Networks in the config are replaced, except for params without a target, such as ``padding: reflect``, which are
    added to those that were found. The decoder alone is trained unless the config says otherwise. The factors of a
    file that has none, latent-diffusion's, are the config's. A resolved config is complete without ``model.from``, so
    the key is removed.

    Raises:
        ConfigError: the autoencoder's networks can't be trained here.
        FileNotFoundError, ValueError: the autoencoder was not found or can't be loaded.
    """
    node = config["model"]
    target, params = node.pop("from"), node.setdefault("params", {})
    source = find_target(target).load()
    found = as_litevae(source, target)
    if found.folded:
        raise ConfigError(f"{target}: its convolutions are folded, for inference only: start from an export without it")
    for name, value in found.config.items():
        given = params.get(name)
        if name.endswith("_config") and isinstance(given, Mapping) and "target" not in given:
            value = {**value, "params": {**value["params"], **(given.get("params") or {})}}
        params[name] = value
    params.pop("initial_logvar", None)
    for name, value in found.for_diffusion.items():
        if source.factors_known or name not in params:  # a file that has none leaves the recipe's
            params[name] = value
    params.setdefault("freeze_encoder", not (params.get("anchor_weight") or params.get("freeze_decoder")))
    return Found(target, found.state_dict())


def set_teacher(config: Config, target: str) -> None:
    """Let the autoencoder of a TARGET be the teacher; the other settings of a teacher in the config stay."""
    params = config["model"].setdefault("params", {})
    node = params.get("teacher_config") or {"target": f"{Teacher.__module__}.Teacher"}
    params["teacher_config"] = {**node, "params": {**(node.get("params") or {}), "autoencoder": target}}


def measure_teacher(model: LiteAutoencoderKL, source: Source, seed: int) -> None:
    """Measure the teacher's standard deviation per channel on the first training images; the same in all processes.

    Raises:
        ConfigError: the data have latents of another autoencoder.
    """
    teacher = model.teacher
    assert teacher is not None
    if isinstance(source, PairSource):  # measured on all of them
        if source.encoded_by.described["weights"] != teacher.checksum:
            raise ConfigError(
                f"data.params.folder: its latents are of {source.encoded_by.described['target']}, whose weights are "
                f"not those of the teacher, {teacher.name}"
            )
        model.teacher_std.copy_(torch.tensor(source.encoded_by.latents_std))
        return
    process = LoaderProcess(0, 1, 0, 1, source.batch_size)
    images = (sample.image for sample in source.stream(seed, 0, process) if sample.image is not None)
    batches = (from_uint8(image[None]) for image in islice(images, MEASURED_IMAGES))
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
