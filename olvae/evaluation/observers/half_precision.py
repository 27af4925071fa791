"""Observe autoencoders in fp16 and bf16: largest activations, overflows, and the loss of PSNR."""

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
from olvae.devices import FULL, PRECISIONS, autocast, precision_name, tf32
from olvae.evaluation.cells import significant
from olvae.evaluation.observers.observer import Observer, Subject
from olvae.evaluation.results import Row
from olvae.evaluation.statistics import finite
from olvae.files import first_line
from olvae.models.autoencoder import Autoencoder
from olvae.modules.counting import watch_outputs
from olvae.modules.distributions import Posterior, in_float32

AUTOCAST = "-autocast"  # ends the name of a precision
SAFE_DB = 0.1  # in dB: a precision whose PSNR is further from float32's is not safe


class InPrecision(Autoencoder):
    """An autoencoder in a precision, as after ``vae.half()``, or as it is, under autocast.

    Images, latents and posteriors are float32 outside. In fp16 and bf16, values of a reconstruction
    that are not finite become what a pipeline makes of them, so that metrics show the damage: plus
    infinity white, minus infinity and NaN black. The model is copied unless the precision is 32,
    or ends in :data:`AUTOCAST`.
    """

    def __init__(self, model: Autoencoder, precision: str) -> None:
        super().__init__()
        # The weights: copied in another dtype, or the model's own.
        self.precision = precision.removesuffix(AUTOCAST)
        self._autocast = precision.endswith(AUTOCAST)
        self.dtype = torch.float32 if self._autocast else PRECISIONS[precision].dtype
        self.model = model if self.dtype == torch.float32 else copy.deepcopy(model).to(self.dtype)

        # A module for hooks to watch: it gets the reconstructions that are not finite.
        self.reconstruction = nn.Identity()

        # What every autoencoder states.
        self.in_channels = model.in_channels
        self.pixel_range = model.pixel_range
        self.side = model.side
        self.downscale = model.downscale
        self.enlarge = model.enlarge
        self.latent_channels = model.latent_channels

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
        """The model's own: results name its weights by a checksum of it."""
        return self.model.state_dict(*args, **settings)

    @contextmanager
    def _computing(self, x: Tensor) -> Iterator[None]:
        """Compute under autocast if asked for; explain operators that this precision lacks."""
        computing = tf32(PRECISIONS[self.precision].tf32)
        if self._autocast:
            computing = autocast(x.device.type, self.precision)
        try:
            with computing:
                yield
        except RuntimeError as error:
            if "not implemented for" not in str(error):
                raise
            wanted = f"choose another `device`, or leave {self.precision} out"
            raise ConfigError(
                f"`precision` {self.precision}: torch: {first_line(error)}: {wanted}"
            ) from error


def stage_of(name: str) -> str:
    """The stage of a network that a module belongs to, as in ``encoder.down_blocks.0``.

    It is the module's name up to its second part, with the number that follows. The part ``model``
    is left out: it holds diffusers' and Stable Diffusion's networks inside ours. A network's name
    alone is its output.
    """
    network, *parts = [part for part in name.split(".") if part != "model"] or [name]
    numbered = len(parts) > 1 and parts[1].isdecimal()
    return ".".join([network, *parts[: 2 if numbered else 1]])


class Activations:
    """The largest activations of modules, and which modules gave values that are not finite."""

    def __init__(self) -> None:
        # Largest finite magnitude by module, in the order of the forward pass.
        self._largest: dict[str, float] = {}
        self._broken: set[str] = set()  # modules with a non-finite value
        self._lost: dict[str, int] = {}  # non-finite values by image

    def recorded(self, model: InPrecision, keys: Sequence[str]) -> AbstractContextManager[None]:
        """Record the modules' outputs that are tensors, during a batch with these keys."""
        modules = {name: module for name, module in model.model.named_modules() if name}
        modules["reconstruction"] = model.reconstruction
        return watch_outputs(modules, partial(self._add, keys))

    def _add(self, keys: Sequence[str], name: str, output: Tensor) -> None:
        """Add a module's output for a batch: (B, ...), or (n B, ...) as where heads are split.

        In an output of another shape, non-finite values can't be assigned to an image: then they
        count for all.
        """
        if not output.is_floating_point():
            return
        finite = output.isfinite()
        largest = float(output.where(finite, 0.0).abs().max())
        self._largest[name] = max(self._largest.get(name, 0.0), largest)
        if not finite.all():
            self._broken.add(name)
            by_image = output.ndim > 0 and output.shape[0] % len(keys) == 0
            rows = len(keys) if by_image else 1
            lost = (~finite).reshape(rows, -1).sum(1).expand(len(keys))  # (B,)
            for key, count in zip(keys, lost.tolist(), strict=True):
                self._lost[key] = self._lost.get(key, 0) + count

    def merge(self, other: "Activations") -> None:
        """Add the activations of another process."""
        for name, value in other._largest.items():
            self._largest[name] = max(self._largest.get(name, 0.0), value)
        self._broken |= other._broken
        self._lost = other._lost | self._lost

    def compute(self, precision: str) -> dict[str, Any]:
        """A row's entry; if several modules have the largest activation, it names the innermost."""
        # The largest activation of each stage.
        stages: dict[str, float] = {}
        for name, value in self._largest.items():
            stage = stage_of(name)
            stages[stage] = max(stages.get(stage, 0.0), value)

        # Over all modules. Inner modules end first, so max finds the innermost.
        largest = max(self._largest, key=self._largest.__getitem__)
        broken = [name for name in self._largest if name in self._broken]
        lost = [count for count in self._lost.values() if count]
        dtype = precision.removesuffix(AUTOCAST)
        return {
            "dtype": dtype,
            "autocast": dtype != precision,
            "largest": stages,
            "largest_name": largest,
            "largest_value": self._largest[largest],
            "limit": torch.finfo(PRECISIONS[dtype].dtype).max,
            "non_finite": {
                "images": len(lost),
                "values": sum(lost),
                "first": broken[0] if broken else None,
            },
        }


class HalfPrecision(Observer):
    """Evaluate every target in further precisions, record activations, and judge if they are safe.

    An entry has:

    - ``dtype``, and ``autocast``, true or false;
    - ``largest``, the largest finite magnitude by :func:`stage_of`; ``largest_name`` and
      ``largest_value`` over all modules; and ``limit``, the dtype's largest number;
    - ``non_finite``: the number of ``images`` with such a value in any module's output, of
      ``values`` over all modules, and the ``first`` module with one;
    - ``psnr_lost``, float32's PSNR minus this one's, over the images that neither gives back
      exactly, None without any;
    - ``safe``: nothing was non-finite, and PSNR is within :data:`SAFE_DB`.

    Args:
        precisions: fp16, bf16, tf32, 32, by any of their names, or fp16-autocast, bf16-autocast:
            weights in float32, under autocast, as in training and many pipelines. 32 is always
            among them, and first, because others are compared with it. With 32 alone, nothing is
            done and nothing recorded. ConfigError for an unknown name.
    """

    name = "precision"
    tells_apart = False  # by its choices

    def __init__(self, precisions: Sequence[str] = (FULL,)) -> None:
        names = [FULL]
        for precision in precisions:
            name = precision_name(precision.removesuffix(AUTOCAST))
            # float32 under autocast is float32.
            if precision.endswith(AUTOCAST) and PRECISIONS[name].dtype != torch.float32:
                name += AUTOCAST
            if name not in names:
                names.append(name)
        self.precisions = tuple(names)
        self.adds_rows = "precision" if len(names) > 1 else ""
        self._derived: dict[str, tuple[str, str]] = {}  # by row, its target and precision
        self._activations: dict[tuple[str, int], Activations] = {}  # by row and draw

    def choices(self) -> Mapping[str, str]:
        return {"precision": str([self.precisions])}

    def conflicts(
        self, targets: Sequence[str], metrics: Sequence[str], observers: Sequence[Observer]
    ) -> Iterator[str]:
        if len(self.precisions) > 1 and "psnr" not in metrics:
            yield "`precision` is judged by PSNR: add psnr to `metrics`"
        others = [o.adds_rows for o in observers if o is not self and o.adds_rows]
        if self.adds_rows and others:
            yield f"`{others[0]}` and `precision` are two evaluations: leave one of them out"

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        """Every autoencoder in every precision; except in 32, its name ends with the precision."""
        if len(self.precisions) == 1:
            return dict(subjects)
        derived: dict[str, Subject] = {}
        for name, subject in subjects.items():
            for precision in self.precisions:
                row = name
                if precision != FULL:
                    row += f", {precision}"
                if row in derived:
                    raise ConfigError(
                        f"{row}: a target has the name of another's row with `precision`: rename it"
                    )
                derived[row] = Subject(InPrecision(subject.model, precision), subject.baseline)
                self._derived[row] = (name, precision)
        return derived

    def watch(
        self, target: str, draw: int, subject: Subject, keys: Sequence[str]
    ) -> AbstractContextManager[None]:
        if not isinstance(subject.model, InPrecision):
            return nullcontext()
        activations = self._activations.setdefault((target, draw), Activations())
        return activations.recorded(subject.model, keys)

    def state(self) -> Any:
        return self._activations

    def merge(self, state: Any) -> None:
        for key, activations in state.items():
            self._activations.setdefault(key, activations).merge(activations)

    def result(self, target: str, draw: int) -> dict[str, Any] | None:
        activations = self._activations.get((target, draw))
        if activations is None:
            return None
        _, precision = self._derived[target]
        return activations.compute(precision)

    def complete(self, row: Row, rows: Mapping[str, Row]) -> Row:
        """Add the verdict, and leave out speed: recording takes time."""
        entry = row.observed.get(self.name)
        if entry is None:
            return row

        # Compare images that have a finite PSNR in both: the two means may be over different ones.
        name, _ = self._derived[row.target]
        full = rows[name]
        lost = 0.0
        if row.metrics["psnr"] != full.metrics["psnr"]:
            pairs = finite(full.per_image["psnr"], row.per_image["psnr"])  # (2, n)
            lost = float((pairs[0] - pairs[1]).mean()) if pairs.size else math.inf
        safe = not entry["non_finite"]["values"] and abs(lost) <= SAFE_DB
        entry = {**entry, "psnr_lost": lost if math.isfinite(lost) else None, "safe": safe}

        cost = row.cost
        if cost:
            cost = replace(
                cost, encode_images_per_s=None, decode_images_per_s=None, peak_memory_bytes=None
            )
        return replace(row, observed={**row.observed, self.name: entry}, cost=cost)

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        full: Mapping[str, Any] | None = None
        for row in rows:
            entry = row.observed.get(self.name)
            if entry:
                # A target's row in float32 comes before its others.
                if entry["dtype"] == FULL:
                    full = entry
                yield f"{row.target}: {_in_words(row.n, entry, full)}"


def _in_words(n: int, entry: Mapping[str, Any], full: Mapping[str, Any] | None) -> str:
    """The verdict on a precision, over ``n`` images; ``full`` is the same target in float32."""
    broken = entry["non_finite"]
    half = entry["dtype"] != FULL

    # The largest activation; only float32 knows the value that overflows.
    largest = full if full and broken["images"] else entry
    value = largest["largest_value"]
    first = f"largest activation {significant(value)} at {largest['largest_name']}"
    if largest is not entry:
        first += " in float32"
    if value > entry["limit"]:
        first += f", beyond {significant(entry['limit'])}"
    parts = [first]

    # In float32, the limit of fp16 to compare it with; in others, the damage.
    if not half:
        parts.append(f"fp16 ends at {significant(torch.finfo(torch.float16).max)}")
    if broken["images"]:
        parts.append(f"{broken['images']} of {n} images non-finite, first at {broken['first']}")
    if half and entry["psnr_lost"] is not None:
        parts.append(f"PSNR {-entry['psnr_lost']:+.3f} dB")
    text = "; ".join(parts)
    if half:
        text += ": safe" if entry["safe"] else ": not safe"
    return text
