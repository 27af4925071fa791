"""Check that a training step fits the GPU before a run begins."""

from rich.console import Console

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.files import first_line
from olvae.models.footprint import MARGIN, advice, footprint
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.activation_bound import ActivationBound


def check_memory(model: LiteAutoencoderKL, source: Source, precision: str, free: int, warns: bool = True) -> None:
    """Compare what a step needs with the bytes that are free on the device, and warn where it is tight.

    Args:
        warns: in the first process.

    Raises:
        ConfigError: not even one image fits.
    """
    try:
        plain = footprint(model, source.size, precision)
        bounded = any(isinstance(part, ActivationBound) for part in model.each_part)  # it excludes checkpointing
        fits = MARGIN * plain.total(source.batch_size) <= free
        checkpointed = plain if fits or bounded else footprint(model, source.size, precision, checkpoint=True)
    except Exception as error:  # networks of the user's own may need tensors with values: an estimate stops nothing
        sentence: str | None = f"not counted: {first_line(error)}"
    else:
        sentence = advice(free, source.batch_size, model.accumulate_grad_batches, plain, checkpointed)
        if plain.total(1) > free:
            raise ConfigError(f"data.params.batch_size: not even one image fits: {sentence}")
    if warns and sentence is not None:
        Console(stderr=True).print(f"[yellow]warning:[/] memory: {sentence}", highlight=False, soft_wrap=True)
