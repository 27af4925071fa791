"""Observe several passes: what edit after edit makes of an image, encoded and decoded each time."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import fmean
from typing import Any

from markupsafe import Markup
from torch import Tensor

from olvae.devices import full_float32
from olvae.evaluation.cells import number, significant, texts
from olvae.evaluation.observers.observer import Observation, PerImageObserver, Subject
from olvae.evaluation.observers.pixels.bands import Bands
from olvae.evaluation.observers.pixels.colour import Colour
from olvae.evaluation.page import Page
from olvae.evaluation.results import Row
from olvae.models.autoencoder import Autoencoder
from olvae.modules.mixed_precision import in_float64

PASSES = (1, 2, 5, 10)
LEVELS = 255.0


class RoundTrips(PerImageObserver):
    """Encode and decode ten times, rounded to the images' levels in between, as edits do.

    The first pass is the protocol's; later ones decode the posterior's mode. An entry has, by the
    number of passes, compared with the original image:

    - ``psnr``, the mean over images, in dB; images that come back exactly are left out, None if all
      do;
    - ``shift``, ``shift_of_images``, ``saturation`` and ``contrast``, as :class:`Colour`'s;
    - ``fine_detail``, sharpness: the energy of the finest details of :class:`Bands`, out over in;
      None without any.
    """

    name = "round_trips"
    title = "After several passes"

    def __init__(self) -> None:
        super().__init__()
        self._models: dict[str, Autoencoder] = {}  # by target
        self._colour = Colour()
        self._bands = Bands(levels=1)

    def watch(
        self, target: str, draw: int, subject: Subject, keys: Sequence[str]
    ) -> AbstractContextManager[None]:
        if not subject.baseline:
            self._models[target] = subject.model
        return nullcontext()

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        """For each image, its squared error, Colour's and Bands' rows by number of passes."""
        model = self._models.get(batch.target)
        if model is None:
            return None
        original = in_float64(batch.x)
        y = batch.y
        passes = []
        for done in range(1, max(PASSES) + 1):
            if done > 1:
                y = self._pass(model, y, batch)
            if done in PASSES:
                again = replace(batch, y=y)
                errors = (in_float64(y) - original).square().mean((1, 2, 3)).tolist()
                bands = self._bands.measure(again) or [None] * len(errors)
                passes.append(zip(errors, self._colour.measure(again), bands, strict=True))
        return zip(*passes, strict=True)

    def _pass(self, model: Autoencoder, levels: Tensor, batch: Observation) -> Tensor:
        """Encode and decode levels, 0 to 255; ArithmeticError if the result is not finite."""
        images = batch.pixel_range.from_levels(levels.to(batch.latents.device))
        with full_float32(images):
            y = model.decode(model.encode(model.shrink(images)).mode())
        if not bool(y.isfinite().all()):
            raise ArithmeticError(
                f"{batch.target}: images that were decoded before are decoded to values that are "
                "not finite: leave `observe` round_trips out"
            )
        return batch.pixel_range.to_levels(y).cpu()

    def summarise(self, columns: Sequence[Any]) -> dict[str, Any]:
        entry = {}
        for done, images in zip(PASSES, columns, strict=True):
            errors, colours, bands = zip(*images, strict=True)
            decibels = [10 * math.log10(LEVELS**2 / error) for error in errors if error]
            colour = self._colour.summarise(list(zip(*colours, strict=True)))
            details = [image for image in bands if image is not None]
            signal = math.fsum(math.fsum(row[1:]) for _, row, _ in details)
            out = math.fsum(math.fsum(row[1:]) for _, _, row in details)
            entry[str(done)] = {
                "psnr": fmean(decibels) if decibels else None,
                "fine_detail": out / signal if signal else None,
                **colour,
            }
        return entry

    def columns(self, entry: Mapping[str, Mapping[str, Any]]) -> Mapping[str, str]:
        last = max(entry, key=int)
        return {f"{last} passes": _cells(entry[last])["PSNR"]}

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            entry = row.observed.get(self.name)
            if entry:
                parts = []
                for heading in ("PSNR", "fine detail", "colour shift"):
                    values = [_cells(content)[heading] for content in entry.values()]
                    parts.append(f"{heading} {', '.join(values)}")
                yield f"{row.target}: after {', '.join(entry)} passes {'; '.join(parts)}"

    def section(self, page: Page) -> Markup | None:
        table: dict[str, dict[str, str]] = {}
        for row in page.results.rows:
            for done, content in row.observed.get(self.name, {}).items():
                cells = {f"{name}, {done}": text for name, text in _cells(content).items()}
                table.setdefault(row.target, {}).update(cells)
        caption = (
            "Each image is encoded and decoded again and again, rounded in between, as by edit "
            "after edit, and compared with the original. Fine detail is the energy of the finest "
            "wavelet bands, out over in; the colour shift is the channels' root mean square over "
            "images, in steps of 8-bit values. The number in a heading is of passes."
        )
        return page.table(texts(table), "passes", caption) or None


def _cells(content: Mapping[str, Any]) -> dict[str, str]:
    """Format an entry's content for one number of passes."""
    psnr = content["psnr"]
    detail = content["fine_detail"]
    shift = math.sqrt(fmean(value**2 for value in content["shift_of_images"]))
    return {
        "PSNR": significant(None) if psnr is None else f"{number(psnr, 2)} dB",
        "fine detail": significant(None) if detail is None else f"{significant(100 * detail)} %",
        "colour shift": number(shift, 2),
    }
