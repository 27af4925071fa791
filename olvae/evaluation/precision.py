"""Half precision, told in advance: an autoencoder in fp16 or bf16, its largest activations, and what overflows."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from olvae.config import ConfigError
from olvae.evaluation.roundtrip import AutoencoderRoundTrip, Cost
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Posterior, in_float32
from olvae.modules.precision import FULL, PRECISION_SYNONYMS, PRECISIONS

__all__ = [
    "FULL",
    "TOLERANCE",
    "Activations",
    "InPrecision",
    "NonFinite",
    "Precision",
    "PrecisionRoundTrip",
    "in_precisions",
    "judged",
    "parse_precisions",
    "recorded",
    "stage_of",
]

TOLERANCE = 0.1
"""In dB: a precision whose PSNR is further from float32's is not safe."""

WRAPPER = "model"
"""The attribute under which an autoencoder of diffusers, and Stable Diffusion's networks, stand inside ours."""

T = TypeVar("T")


def parse_precisions(text: str) -> tuple[str, ...]:
    """The precisions of a list with commas; 32 is always among them, and first, because others are compared with it.

    Raises:
        ConfigError: a name is unknown, or there is none.
    """
    names = [PRECISION_SYNONYMS.get(name.strip(), name.strip()) for name in text.split(",") if name.strip()]
    if not names or not PRECISIONS.keys() >= {*names}:
        raise ConfigError(f"--precision {text}: choose from {', '.join(PRECISIONS)}")
    return tuple(dict.fromkeys([FULL, *names]))


@dataclass(frozen=True)
class NonFinite:
    """What was infinite or not a number.

    Args:
        images: with at least one such value in any module's output.
        values: over all modules' outputs, so one that spreads counts in each.
        first: the module, in the order of the forward pass, in whose output one was; None if there was none.
    """

    images: int
    values: int
    first: str | None


@dataclass(frozen=True)
class Precision:
    """The range of an autoencoder's activations over all images, in one precision.

    Args:
        dtype: fp16, bf16 or 32.
        largest: by stage (:func:`stage_of`), the largest magnitude of the outputs that are finite.
        largest_name, largest_value: of all modules, the one with the largest, and how large.
        limit: the largest number of the dtype.
        non_finite: what was not finite.
        psnr_lost: float32's PSNR minus this one's, in dB; None if it is infinite, or not known yet.
        safe: nothing was non-finite, and PSNR is within :data:`TOLERANCE` of float32's.
    """

    dtype: str
    largest: Mapping[str, float]
    largest_name: str
    largest_value: float
    limit: float
    non_finite: NonFinite
    psnr_lost: float | None = None
    safe: bool = False

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Precision":
        """The inverse of :func:`dataclasses.asdict`."""
        return cls(**{**content, "non_finite": NonFinite(**content["non_finite"])})


def judged(found: Precision, psnr: float, full: float) -> Precision:
    """With the verdict.

    Args:
        psnr: of this precision, in dB; may be infinite.
        full: of float32.
    """
    lost = 0.0 if psnr == full else full - psnr
    safe = not found.non_finite.values and abs(lost) <= TOLERANCE
    return replace(found, psnr_lost=lost if math.isfinite(lost) else None, safe=safe)


class InPrecision(Autoencoder):
    """An autoencoder with weights and inputs in a precision, as after ``vae.half()``: no autocast.

    Images and latents are float32 outside, so that everything else is computed as ever.

    Args:
        model: in float32; it is copied unless that is the precision.
        precision: fp16, bf16 or 32.
        name: of the model, for messages.
    """

    def __init__(self, model: Autoencoder, precision: str, name: str = "the autoencoder") -> None:
        super().__init__()
        self.name = name
        self.precision = precision
        self.dtype = PRECISIONS[precision]
        self.model = model if precision == FULL else copy.deepcopy(model).to(self.dtype)
        self.in_channels = model.in_channels
        self.downscale, self.latent_channels = model.downscale, model.latent_channels

    def encode(self, x: Tensor) -> Posterior:
        """Float32 images to a posterior in float32.

        Raises:
            ValueError: torch can't compute the network in this precision on this device.
        """
        return in_float32(self._run(lambda: self.model.encode(x.to(self.dtype)), x))

    def decode(self, z: Tensor) -> Tensor:
        """Float32 latents to float32 images; raises as :meth:`encode`."""
        return self._run(lambda: self.model.decode(z.to(self.dtype)), z).float()

    def _run(self, work: Callable[[], T], x: Tensor) -> T:
        try:
            return work()
        except RuntimeError as error:
            if self.precision == FULL or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{self.name}: torch can't compute it on {x.device.type}: {str(error).splitlines()[0]}: leave "
                f"{self.precision} out of --precision"
            ) from error


def in_precisions(models: Mapping[str, Autoencoder], precisions: Sequence[str]) -> dict[str, Autoencoder]:
    """Every autoencoder in every precision; in 32 it keeps its name, otherwise the precision ends it.

    Raises:
        ConfigError: another autoencoder has such a name.
    """
    found: dict[str, Autoencoder] = {}
    for name, model in models.items():
        for precision in precisions:
            row = name if precision == FULL else f"{name}, {precision}"
            if row in found or (row != name and row in models):
                raise ConfigError(f"{row}: a target has the name of another's row with --precision: rename it")
            found[row] = InPrecision(model, precision, row)
    return found


def stage_of(name: str) -> str:
    """The part of the network that a module belongs to: ``encoder.down_blocks.0``, ``decoder.mid_block``, ....

    It is the module's name up to its second part, with the number that follows. A network's name alone is its output.
    """
    network, *parts = [part for part in name.split(".") if part != WRAPPER] or [name]
    return ".".join([network, *parts[: 2 if len(parts) > 1 and parts[1].isdecimal() else 1]])


class Activations:
    """The largest activations of modules, and which were not finite, over all images that :func:`recorded` saw."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}
        """By module, in the order of the forward pass: the largest magnitude of its outputs that are finite."""
        self._broken: set[str] = set()  # modules
        self._lost: dict[str, int] = {}  # by image, non-finite values

    def add(self, keys: Sequence[str], name: str, output: Tensor) -> None:
        """Add a module's output for a batch: (B, ...), or with a multiple of B in front, as where heads are split.

        Of an output of another shape it is not known which image a non-finite value belongs to: then to all.
        """
        low, high = output.aminmax()
        largest = float(torch.maximum(-low, high))
        if not math.isfinite(largest):
            finite = output.isfinite()
            largest = float(torch.where(finite, output, 0.0).abs().max())
            self._broken.add(name)
            by_image = output.ndim > 0 and output.shape[0] % len(keys) == 0
            lost = (~finite).reshape(len(keys) if by_image else 1, -1).sum(1).expand(len(keys))
            for key, count in zip(keys, lost.tolist(), strict=True):
                self._lost[key] = self._lost.get(key, 0) + count
        self.largest[name] = max(self.largest.get(name, 0.0), largest)

    def merge(self, other: "Activations") -> None:
        """Add what another process has seen."""
        for name, value in other.largest.items():
            self.largest[name] = max(self.largest.get(name, 0.0), value)
        self._broken |= other._broken
        self._lost = other._lost | self._lost

    def compute(self, precision: str) -> Precision:
        """What was found, without a verdict; a network whose largest activation has several names has the innermost."""
        stages: dict[str, float] = {}
        for name, value in self.largest.items():
            stage = stage_of(name)
            stages[stage] = max(stages.get(stage, 0.0), value)
        lost = [count for count in self._lost.values() if count]
        first = next((name for name in self.largest if name in self._broken), None)
        name = max(self.largest, key=self.largest.__getitem__)
        limit = torch.finfo(PRECISIONS[precision]).max
        return Precision(precision, stages, name, self.largest[name], limit, NonFinite(len(lost), sum(lost), first))


@contextmanager
def recorded(model: nn.Module, keys: Sequence[str], into: Activations) -> Iterator[None]:
    """Record the outputs of all modules that give a tensor, while a batch with these keys goes through."""

    def hook(name: str, module: nn.Module, given: Any, output: Any) -> None:  # noqa: ARG001  (torch's signature)
        if isinstance(output, Tensor) and output.is_floating_point():
            into.add(keys, name, output)

    handles = [module.register_forward_hook(partial(hook, name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PrecisionRoundTrip(AutoencoderRoundTrip):
    """A round trip in one precision that records the activations.

    In fp16 and bf16 a value of a reconstruction that is not finite becomes what a pipeline makes of it: plus infinity
    255, minus infinity and NaN 0. So metrics show the damage. In 32 it is an error, as ever.
    """

    model: InPrecision

    def __init__(self, model: InPrecision, device: str = "cpu", seed: int | None = None, name: str = "") -> None:
        super().__init__(model, device, seed, name)
        self.activations = Activations()

    def __call__(self, keys: Sequence[str], x: Tensor) -> Tensor:
        with recorded(self.model.model, keys, self.activations):
            return super().__call__(keys, x)

    def cost(self, size: int) -> Cost:
        """Without speed and memory: recording takes some of both."""
        counted = super().cost(size)
        return replace(counted, encode_images_per_s=None, decode_images_per_s=None, peak_memory_bytes=None)

    def finite(self, keys: Sequence[str], y: Tensor) -> Tensor:
        if self.model.precision == FULL:
            return super().finite(keys, y)
        if not y.isfinite().all():
            self.activations.add(keys, "reconstruction", y)
        return y.nan_to_num(nan=-1.0, posinf=1.0, neginf=-1.0)
