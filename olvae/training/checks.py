"""What is checked of model and data together before a run begins."""

from typing import Literal

from rich.console import Console

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.losses.objective import IMAGE_TERMS
from olvae.models.footprint import advice, footprints
from olvae.models.liteautoencoder import LiteAutoencoderKL

__all__ = ["check_adversary", "check_images", "check_memory"]


def check_images(model: LiteAutoencoderKL, source: Source) -> None:
    """Check that the model takes the source's images.

    Raises:
        ConfigError: their size or channels do not fit.
    """
    f, channels = model.autoencoder.downscale, model.autoencoder.encoder.in_channels
    if source.size % f:
        raise ConfigError(
            f"data.params.size: {source.size} is not a multiple of {f}, the model's downscaling factor: "
            f"use {max(f, source.size // f * f)} or {(source.size // f + 1) * f}"
        )
    if source.channels != channels:
        raise ConfigError(
            f"the images have {source.channels} channels, the model takes {channels}: set "
            "data.params.channels, or in_channels of encoder_config.params and out_channels of decoder_config.params"
        )
    if model.equivariance and model.objective.perceptual is not None and source.size < 64:
        raise ConfigError(
            f"data.params.size: {source.size}: equivariance shrinks images to a quarter, and the perceptual loss needs "
            "16 pixels: use 64 or more, or set lpips_weight to 0"
        )


def check_adversary(model: LiteAutoencoderKL, source: Source, max_steps: int) -> None:
    """Check that the adversary, if there is one, plays before the last step and takes the source's images.

    Raises:
        ConfigError, ValueError: it starts too late, no loss compares images beside it, or the images do not fit.
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
        raise ConfigError("lossconfig.params: an adversary needs one of the losses that compare images beside it")
    adversary.check_image(model.autoencoder.encoder.in_channels, source.size)


def check_memory(model: LiteAutoencoderKL, source: Source, precision: str, free: int, warns: bool = True) -> None:
    """Compare what a step needs with the bytes that are free on the device, and warn where it is tight.

    Args:
        warns: in the first process.

    Raises:
        ConfigError: not even one image fits.
    """
    phase: Literal["A", "B"] = "A" if model.adversary is None else "B"
    try:
        counted = footprints(model, source.size, precision)
    except Exception as error:  # networks of the user's own may need tensors with values: an estimate stops nothing
        sentence: str | None = f"not counted: {str(error).partition(chr(10))[0] or type(error).__name__}"
    else:
        footprint = counted[phase, model.checkpoint]
        checkpointed = counted[phase, True] if model.bound is None else footprint
        sentence = advice(free, source.batch_size, model.accumulate_grad_batches, footprint, checkpointed)
        if footprint.least(1) > free:
            raise ConfigError(f"data.params.batch_size: not even one image fits: {sentence}")
    if warns and sentence is not None:
        Console(stderr=True).print(f"[yellow]warning:[/] memory: {sentence}", highlight=False, soft_wrap=True)
