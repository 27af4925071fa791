"""Observe autoencoders in fp16 and bf16: their largest activations, what overflows, and the PSNR that is lost."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from markupsafe import Markup
from torch import Tensor, nn

from olvae.config import ConfigError
from olvae.devices import FULL, PRECISIONS, precision_name
from olvae.evaluation.cells import NONE, magnitude, number, texts
from olvae.evaluation.html import Page
from olvae.evaluation.observers.cross import Cross
from olvae.evaluation.observers.observer import Observer, Subject
from olvae.evaluation.results import Row
from olvae.files import first_line
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Posterior, in_float32

TOLERANCE = 0.1
"""In dB: a precision whose PSNR is further from float32's is not safe."""

FP16 = torch.finfo(torch.float16).max

WRAPPER = "model"
"""The attribute under which an autoencoder of diffusers, and Stable Diffusion's networks, stand inside ours."""

T = TypeVar("T")


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


class InPrecision(Autoencoder):
    """An autoencoder with weights and inputs in a precision, as after ``vae.half()``: no autocast.

    Images and latents are float32 outside, so that everything else is computed as ever. In fp16 and bf16 a value of a
    reconstruction that is not finite becomes what a pipeline makes of it: plus infinity white, minus infinity and NaN
    black. So metrics show the damage.

    Args:
        model: in float32; it is copied unless that is the precision.
        precision: fp16, bf16 or 32.
        name: of the model, for messages.
    """

    def __init__(self, model: Autoencoder, precision: str, name: str = "the autoencoder") -> None:
        super().__init__()
        self.name = name
        self.precision = precision
        self.dtype = PRECISIONS[precision].dtype
        self.model = model if precision == FULL else copy.deepcopy(model).to(self.dtype)
        self.reconstruction = nn.Identity()
        """Gets reconstructions that are not finite, for hooks to see."""
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
        y = self._run(lambda: self.model.decode(z.to(self.dtype)), z).float()
        if self.precision == FULL or y.is_meta or y.isfinite().all():
            return y
        self.reconstruction(y)
        return y.nan_to_num(nan=-1.0, posinf=1.0, neginf=-1.0)

    def _run(self, work: Callable[[], T], x: Tensor) -> T:
        try:
            return work()
        except RuntimeError as error:
            if self.precision == FULL or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{self.name}: torch can't compute it on {x.device.type}: {first_line(error)}: leave "
                f"{self.precision} out of `precision`"
            ) from error


def stage_of(name: str) -> str:
    """The part of the network that a module belongs to: ``encoder.down_blocks.0``, ``decoder.mid_block``, ....

    It is the module's name up to its second part, with the number that follows. A network's name alone is its output.
    """
    network, *parts = [part for part in name.split(".") if part != WRAPPER] or [name]
    return ".".join([network, *parts[: 2 if len(parts) > 1 and parts[1].isdecimal() else 1]])


class Activations:
    """The largest activations of modules, and which were not finite, over all images of :meth:`recorded`."""

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
        limit = torch.finfo(PRECISIONS[precision].dtype).max
        return Precision(precision, stages, name, self.largest[name], limit, NonFinite(len(lost), sum(lost), first))

    @contextmanager
    def recorded(self, model: InPrecision, keys: Sequence[str]) -> Iterator[None]:
        """Record the outputs of all modules that give a tensor, while a batch with these keys goes through."""

        def hook(name: str, module: nn.Module, given: Any, output: Any) -> None:  # noqa: ARG001  (torch's signature)
            if isinstance(output, Tensor) and output.is_floating_point():
                self.add(keys, name, output)

        modules = {**dict(model.model.named_modules()), "reconstruction": model.reconstruction}
        handles = [module.register_forward_hook(partial(hook, name)) for name, module in modules.items() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class HalfPrecision(Observer):
    """Evaluate every target in further precisions, record activations, and judge whether each precision is safe.

    Args:
        precisions: fp16, bf16, 32, by any of their names; 32 is always among them, and first, because others are
            compared with it. With 32 alone, nothing is done and nothing recorded.

    Raises:
        ConfigError: a name is unknown.
    """

    name = "precision"
    title = "Precision"

    def __init__(self, precisions: Sequence[str] = (FULL,)) -> None:
        self.precisions = tuple(dict.fromkeys([FULL, *map(precision_name, precisions)]))
        self._of: dict[str, str] = {}  # by target, its precision
        self._activations: dict[tuple[str, int], Activations] = {}

    def conflicts(self, targets: Sequence[str], metrics: Sequence[str], observers: Sequence[Observer]) -> Iterator[str]:
        if len(self.precisions) > 1 and "psnr" not in metrics:
            yield "`precision` is judged by PSNR: add psnr to `metrics`"
        if len(self.precisions) > 1 and any(isinstance(observer, Cross) for observer in observers):
            yield "`cross` and `precision` are two evaluations: leave one of them out"

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        """Every autoencoder in every precision; in 32 it keeps its name, otherwise the precision ends it.

        Raises:
            ConfigError: another autoencoder has such a name.
        """
        if len(self.precisions) == 1:
            return dict(subjects)
        derived: dict[str, Subject] = {}
        for name, subject in subjects.items():
            for precision in self.precisions:
                row = name if precision == FULL else f"{name}, {precision}"
                if row in derived or (row != name and row in subjects):
                    raise ConfigError(f"{row}: a target has the name of another's row with `precision`: rename it")
                derived[row] = Subject(InPrecision(subject.model, precision, row), subject.baseline)
                self._of[row] = precision
        return derived

    def watch(self, target: str, draw: int, subject: Subject, keys: Sequence[str]) -> AbstractContextManager[None]:
        if not isinstance(subject.model, InPrecision):
            return nullcontext()
        return self._activations.setdefault((target, draw), Activations()).recorded(subject.model, keys)

    def state(self) -> Any:
        return self._activations

    def merge(self, state: Any) -> None:
        for key, activations in state.items():
            self._activations.setdefault(key, activations).merge(activations)

    def result(self, target: str, draw: int) -> dict[str, Any] | None:
        activations = self._activations.get((target, draw))
        return asdict(activations.compute(self._of[target])) if activations else None

    def complete(self, rows: Sequence[Row]) -> list[Row]:
        """Rows with the verdict, each after its target's in float32, and without speed: recording takes time."""
        full, done = math.inf, []
        for row in rows:
            if found := _found(row):
                full = row.metrics["psnr"] if found.dtype == FULL else full
                found = judged(found, row.metrics["psnr"], full)
                cost = row.cost and replace(
                    row.cost, encode_images_per_s=None, decode_images_per_s=None, peak_memory_bytes=None
                )
                row = replace(row, observed={**row.observed, self.name: asdict(found)}, cost=cost)
            done.append(row)
        return done

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        full: Precision | None = None
        for row in rows:
            if found := _found(row):
                full = found if found.dtype == FULL else full
                yield f"{row.target}: {_in_words(row, found, full)}"

    def section(self, page: Page) -> Markup | None:
        found = {row.target: precision for row in page.results.table if (precision := _found(row))}
        if not found:
            return None
        items = Markup("").join(Markup("<li>{}</li>").format(line) for line in self.lines(page.results.table))
        caption = (
            "Weights and inputs in each precision, without autocast. Safe: no activation is infinite or not a number, "
            f"and PSNR is within {TOLERANCE} dB of float32's. Of activations, magnitudes of those that are finite."
        )
        verdicts = texts({target: _verdict(precision) for target, precision in found.items()})
        stages = texts({name: {s: magnitude(v) for s, v in one.largest.items()} for name, one in found.items()})
        about = "The largest activation of each part of the network; a network's name alone is its output."
        return (
            Markup("<ul>{}</ul>").format(items)
            + page.table(verdicts, "precision", caption)
            + page.table(stages, "activations", about)
        )


def judged(found: Precision, psnr: float, full: float) -> Precision:
    """With the verdict.

    Args:
        psnr: of this precision, in dB; may be infinite.
        full: of float32.
    """
    lost = 0.0 if psnr == full else full - psnr
    safe = not found.non_finite.values and abs(lost) <= TOLERANCE
    return replace(found, psnr_lost=lost if math.isfinite(lost) else None, safe=safe)


def _found(row: Row) -> Precision | None:
    entry = row.observed.get("precision")
    return Precision.from_dict(entry) if entry else None


def _verdict(found: Precision) -> dict[str, str]:
    return {
        "safe": "yes" if found.safe else "no",
        "PSNR lost, dB": NONE if found.psnr_lost is None else number(found.psnr_lost, 3),
        "largest": magnitude(found.largest_value),
        "at": found.largest_name,
        "limit": magnitude(found.limit),
        "images non-finite": str(found.non_finite.images),
        "first at": found.non_finite.first or NONE,
    }


def _in_words(row: Row, found: Precision, full: Precision | None) -> str:
    """A precision in words.

    Args:
        full: the same target in float32.
    """
    broken = found.non_finite
    largest = full if full and broken.images else found  # in float32 the value that overflows is known
    parts = [f"largest activation {magnitude(largest.largest_value)} at {largest.largest_name}"]
    if largest is not found:
        parts[0] += " in float32"
    if largest.largest_value > found.limit:
        parts[0] += f", beyond {magnitude(found.limit)}"
    elif found.dtype == FULL:
        parts[0] += f"; fp16 ends at {magnitude(FP16)}"
    if broken.images:
        parts.append(f"{broken.images} of {row.n} images non-finite, first at {broken.first}")
    if found.dtype == FULL:
        return "; ".join(parts)
    if found.psnr_lost is not None:
        parts.append(f"PSNR {-found.psnr_lost:+.3f} dB")
    return f"{'; '.join(parts)}: {'safe' if found.safe else 'not safe'}"
