"""Observe autoencoders in fp16 and bf16: their largest activations, what overflows, and the PSNR that is lost."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from olvae.config import ConfigError
from olvae.devices import FULL, PRECISIONS, autocast, precision_name
from olvae.evaluation.observers.cross import Cross
from olvae.evaluation.observers.observer import Observer, Subject
from olvae.evaluation.results import Row, finite, significant
from olvae.files import first_line
from olvae.models.autoencoder import Autoencoder
from olvae.modules.base import watch_outputs
from olvae.modules.distributions import Posterior, in_float32

AUTOCAST = "-autocast"  # ends the name of a precision
TOLERANCE = 0.1  # in dB: a precision whose PSNR is further from float32's is not safe


class InPrecision(Autoencoder):
    """An autoencoder with weights and inputs in a precision, as after ``vae.half()``; or as it is, under autocast.

    Images, latents and posteriors are float32 outside. In fp16 and bf16 a value of a reconstruction that is not finite
    becomes what a pipeline makes of it, so that metrics show the damage: plus infinity white, minus infinity and NaN
    black. The model is copied unless the precision is 32, or ends in :data:`AUTOCAST`.
    """

    def __init__(self, model: Autoencoder, precision: str) -> None:
        super().__init__()
        self.precision, self._autocast = (
            precision.removesuffix(AUTOCAST),
            precision.endswith(AUTOCAST),
        )
        self.dtype = torch.float32 if self._autocast else PRECISIONS[precision].dtype
        self.model = model if self.dtype == torch.float32 else copy.deepcopy(model).to(self.dtype)
        self.reconstruction = (
            nn.Identity()
        )  # gets reconstructions that are not finite, for hooks to see
        self.in_channels, self.pixel_range, self.side = (
            model.in_channels,
            model.pixel_range,
            model.side,
        )
        self.downscale, self.latent_channels = model.downscale, model.latent_channels

    def encode(self, x: Tensor) -> Posterior:
        with self._computing(x):
            return in_float32(self.model.encode(x.to(self.dtype)))

    def decode(self, z: Tensor) -> Tensor:
        with self._computing(z):
            y = self.model.decode(z.to(self.dtype)).float()
        if self.precision == FULL or y.is_meta or y.isfinite().all():
            return y
        self.reconstruction(y)
        return y.nan_to_num(nan=-1.0, posinf=1.0, neginf=-1.0)

    def state_dict(self, *args: Any, **settings: Any) -> Any:
        """The model's own, by whose sum results name its weights."""
        return self.model.state_dict(*args, **settings)

    @contextmanager
    def _computing(self, x: Tensor) -> Iterator[None]:
        """Under autocast if that is asked for, say what to do where torch lacks an operator in this precision."""
        cast = self._autocast and not x.is_meta
        try:
            with autocast(x.device.type, self.precision) if cast else nullcontext():
                yield
        except RuntimeError as error:
            if "not implemented for" not in str(error):
                raise
            wanted = f"choose another `device`, or leave {self.precision} out"
            raise ConfigError(
                f"`precision` {self.precision}: torch: {first_line(error)}: {wanted}"
            ) from error


def stage_of(name: str) -> str:
    """The part of the network that a module belongs to: ``encoder.down_blocks.0``, ``decoder.mid_block``, ....

    It is the module's name up to its second part, with the number that follows, but for ``model``, under which
    diffusers' and Stable Diffusion's networks stand inside ours. A network's name alone is its output.
    """
    network, *parts = [part for part in name.split(".") if part != "model"] or [name]
    return ".".join([network, *parts[: 2 if len(parts) > 1 and parts[1].isdecimal() else 1]])


class Activations:
    """The largest activations of modules, and which were not finite, over all images of :meth:`recorded`."""

    def __init__(self) -> None:
        self._largest: dict[
            str, float
        ] = {}  # by module, in the order of the forward pass; of finite outputs
        self._broken: set[str] = set()  # modules
        self._lost: dict[str, int] = {}  # by image, non-finite values

    def recorded(self, model: InPrecision, keys: Sequence[str]) -> AbstractContextManager[None]:
        """Record the outputs of all modules that give a tensor, while a batch with these keys goes through."""
        modules = {name: module for name, module in model.model.named_modules() if name}
        return watch_outputs(
            {**modules, "reconstruction": model.reconstruction}, partial(self._add, keys)
        )

    def _add(self, keys: Sequence[str], name: str, output: Tensor) -> None:
        """Add a module's output for a batch: (B, ...), or with a multiple of B in front, as where heads are split.

        Of an output of another shape it is not known which image a non-finite value belongs to: then to all.
        """
        if not output.is_floating_point():
            return
        finite = output.isfinite()
        self._largest[name] = max(
            self._largest.get(name, 0.0), float(output.where(finite, 0.0).abs().max())
        )
        if not finite.all():
            self._broken.add(name)
            by_image = output.ndim > 0 and output.shape[0] % len(keys) == 0
            lost = (~finite).reshape(len(keys) if by_image else 1, -1).sum(1).expand(len(keys))
            for key, count in zip(keys, lost.tolist(), strict=True):
                self._lost[key] = self._lost.get(key, 0) + count

    def merge(self, other: "Activations") -> None:
        """Add another process's."""
        for name, value in other._largest.items():
            self._largest[name] = max(self._largest.get(name, 0.0), value)
        self._broken |= other._broken
        self._lost = other._lost | self._lost

    def compute(self, precision: str) -> dict[str, Any]:
        """The entry of a row; where several modules have the largest activation, the innermost is named."""
        stages: dict[str, float] = {}
        for name, value in self._largest.items():
            stages[stage_of(name)] = max(stages.get(stage_of(name), 0.0), value)
        lost = [count for count in self._lost.values() if count]
        largest = max(self._largest, key=self._largest.__getitem__)
        return {
            "dtype": (dtype := precision.removesuffix(AUTOCAST)),
            "autocast": dtype != precision,
            "largest": stages,
            "largest_name": largest,
            "largest_value": self._largest[largest],
            "limit": torch.finfo(PRECISIONS[dtype].dtype).max,
            "non_finite": {
                "images": len(lost),
                "values": sum(lost),
                "first": next((name for name in self._largest if name in self._broken), None),
            },
        }


class HalfPrecision(Observer):
    """Evaluate every target in further precisions, record activations, and judge whether each precision is safe.

    An entry has ``dtype``; ``autocast``, if it is; ``largest``, the largest finite magnitude by :func:`stage_of`;
    ``largest_name`` and ``largest_value`` of all modules; ``limit`` of the dtype; ``non_finite``: ``images`` with such
    a value in any module's output, ``values`` over all modules, and the ``first`` module with one; ``psnr_lost``,
    float32's PSNR minus this one's, over the images that neither gives back exactly, None without any; and ``safe``:
    nothing was non-finite, and PSNR is within :data:`TOLERANCE`.

    Args:
        precisions: fp16, bf16, 32, by any of their names, or fp16-autocast, bf16-autocast: weights in float32, under
            autocast, as in training and many pipelines. 32 is always among them, and first, because others are compared
            with it. With 32 alone, nothing is done and nothing recorded. ConfigError for an unknown name.
    """

    name = "precision"

    def __init__(self, precisions: Sequence[str] = (FULL,)) -> None:
        names = [
            precision_name(p.removesuffix(AUTOCAST)) + AUTOCAST * p.endswith(AUTOCAST)
            for p in precisions
        ]
        self.precisions = tuple(
            dict.fromkeys([FULL, *(name for name in names if name != FULL + AUTOCAST)])
        )
        self._derived: dict[str, tuple[str, str]] = {}  # by row, its target and precision
        self._activations: dict[tuple[str, int], Activations] = {}

    def conflicts(
        self, targets: Sequence[str], metrics: Sequence[str], observers: Sequence[Observer]
    ) -> Iterator[str]:
        if len(self.precisions) > 1 and "psnr" not in metrics:
            yield "`precision` is judged by PSNR: add psnr to `metrics`"
        if len(self.precisions) > 1 and any(isinstance(observer, Cross) for observer in observers):
            yield "`cross` and `precision` are two evaluations: leave one of them out"

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        """Every autoencoder in every precision; in 32 it keeps its name, otherwise the precision ends it."""
        if len(self.precisions) == 1:
            return dict(subjects)
        derived: dict[str, Subject] = {}
        for name, subject in subjects.items():
            for precision in self.precisions:
                row = name if precision == FULL else f"{name}, {precision}"
                if row in derived:
                    raise ConfigError(
                        f"{row}: a target has the name of another's row with `precision`: rename it"
                    )
                derived[row] = Subject(InPrecision(subject.model, precision), subject.baseline)
                self._derived[row] = name, precision
        return derived

    def watch(
        self, target: str, draw: int, subject: Subject, keys: Sequence[str]
    ) -> AbstractContextManager[None]:
        if not isinstance(subject.model, InPrecision):
            return nullcontext()
        return self._activations.setdefault((target, draw), Activations()).recorded(
            subject.model, keys
        )

    def state(self) -> Any:
        return self._activations

    def merge(self, state: Any) -> None:
        for key, activations in state.items():
            self._activations.setdefault(key, activations).merge(activations)

    def result(self, target: str, draw: int) -> dict[str, Any] | None:
        activations = self._activations.get((target, draw))
        return activations.compute(self._derived[target][1]) if activations else None

    def complete(self, row: Row, rows: Mapping[str, Row]) -> Row:
        """Add the verdict, and leave out speed: recording takes time."""
        if (entry := row.observed.get(self.name)) is None:
            return row
        full, lost = rows[self._derived[row.target][0]], 0.0
        if (
            row.metrics["psnr"] != full.metrics["psnr"]
        ):  # the means may be of different images: without exact ones
            pairs = finite(full.per_image["psnr"], row.per_image["psnr"])  # (2, n)
            lost = float((pairs[0] - pairs[1]).mean()) if pairs.size else math.inf
        safe = not entry["non_finite"]["values"] and abs(lost) <= TOLERANCE
        entry = {**entry, "psnr_lost": lost if math.isfinite(lost) else None, "safe": safe}
        speed: dict[str, Any] = dict.fromkeys(
            ("encode_images_per_s", "decode_images_per_s", "peak_memory_bytes")
        )
        return replace(
            row,
            observed={**row.observed, self.name: entry},
            cost=row.cost and replace(row.cost, **speed),
        )

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        full: Mapping[str, Any] | None = None
        for row in rows:
            if entry := row.observed.get(self.name):
                full = entry if entry["dtype"] == FULL else full
                yield f"{row.target}: {_in_words(row.n, entry, full)}"


def _in_words(n: int, entry: Mapping[str, Any], full: Mapping[str, Any] | None) -> str:
    """The verdict on a precision of ``n`` images; ``full`` is the same target in float32."""
    broken, half = entry["non_finite"], entry["dtype"] != FULL
    largest = (
        full if full and broken["images"] else entry
    )  # in float32 the value that overflows is known
    first = (
        f"largest activation {significant(largest['largest_value'])} at {largest['largest_name']}"
    )
    if largest is not entry:
        first += " in float32"
    if largest["largest_value"] > entry["limit"]:
        first += f", beyond {significant(entry['limit'])}"
    parts = (
        [first] if half else [first, f"fp16 ends at {significant(torch.finfo(torch.float16).max)}"]
    )
    if broken["images"]:
        parts.append(f"{broken['images']} of {n} images non-finite, first at {broken['first']}")
    if half and entry["psnr_lost"] is not None:
        parts.append(f"PSNR {-entry['psnr_lost']:+.3f} dB")
    return "; ".join(parts) + (f": {'safe' if entry['safe'] else 'not safe'}" if half else "")
