"""What is checked of model and data together before a run begins."""

from typing import Literal

from rich.console import Console

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.models.footprint import advice, footprints
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.activation_bound import ActivationBound

__all__ = ["check_memory"]


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
        bounded = any(isinstance(part, ActivationBound) for part in model.each_part)  # it excludes checkpointing
        checkpointed = footprint if bounded else counted[phase, True]
        sentence = advice(free, source.batch_size, model.accumulate_grad_batches, footprint, checkpointed)
        if footprint.least(1) > free:
            raise ConfigError(f"data.params.batch_size: not even one image fits: {sentence}")
    if warns and sentence is not None:
        Console(stderr=True).print(f"[yellow]warning:[/] memory: {sentence}", highlight=False, soft_wrap=True)
