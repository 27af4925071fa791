"""What can be wrong between the parts of a run, found before its folder is made."""

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.losses.objective import IMAGE_TERMS
from olvae.models.liteautoencoder import LiteAutoencoderKL

__all__ = ["check_adversary", "check_images", "check_torchrun", "process_count"]


def process_count(trainer_args: Mapping[str, Any]) -> int:
    """Processes of a run, over all nodes."""
    devices = trainer_args["devices"]
    return (devices if isinstance(devices, int) else len(devices)) * int(trainer_args.get("num_nodes", 1))


def check_torchrun(processes: int) -> None:
    """With one device Lightning would leave each of torchrun's processes to train a model of its own, in one folder.

    Raises:
        ConfigError: torchrun started another number.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else processes
    if started != processes:
        raise ConfigError(
            f"torchrun started {started} processes, and the flags and lightning.trainer name {processes} "
            f"device{'' if processes == 1 else 's'}: --gpus {started}, or on the CPU lightning.trainer.accelerator=cpu "
            f"lightning.trainer.devices={started} (devices of each node, times num_nodes)"
        )


def check_images(model: LiteAutoencoderKL, source: Source) -> None:
    """Whether the model takes the source's images.

    Raises:
        ConfigError: their size or channels do not fit.
    """
    f, channels = model.autoencoder.downscale, model.autoencoder.encoder.in_channels
    if source.size % f:
        raise ConfigError(
            f"data.params.size: {source.size} is not a multiple of {f}, by which the model shrinks images: "
            f"use {max(f, source.size // f * f)} or {(source.size // f + 1) * f}"
        )
    if source.channels != channels:
        raise ConfigError(
            f"the images have {source.channels} channels, the model takes {channels}: set "
            "data.params.channels, or in_channels of encoder_config.params and out_channels of decoder_config.params"
        )
    if model.equivariance and model.objective.lpips is not None and source.size < 64:
        raise ConfigError(
            f"data.params.size: {source.size}: equivariance shrinks images to a quarter, and LPIPS needs 16 pixels: "
            "use 64 or more, or set lpips_weight to 0"
        )


def check_adversary(model: LiteAutoencoderKL, source: Source, max_steps: int) -> None:
    """Whether the adversary, if there is one, will play, and can.

    Raises:
        ConfigError, ValueError: it begins too late, has no term beside it, or does not take such images.
    """
    adversary = model.adversary
    if adversary is None:
        return
    if adversary.start_step >= max_steps:
        raise ConfigError(
            f"adversary_config.params.start_step: {adversary.start_step} is not before the last of "
            f"{max_steps} steps, so the adversary would never play"
        )
    if not set(IMAGE_TERMS) & set(model.objective.weights):
        raise ConfigError("lossconfig.params: beside an adversary, one of the terms that compare images must be on")
    adversary.check_image(model.autoencoder.encoder.in_channels, source.size)
