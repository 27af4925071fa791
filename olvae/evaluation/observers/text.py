"""Observe text in images: compare OCR of reconstructions with OCR of the originals."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.text import char_error_rate

from olvae.data.image import image_to_tensor
from olvae.evaluation.cells import NONE, texts
from olvae.evaluation.observers.observer import Observation, Observer, PerImageObserver, Subject
from olvae.evaluation.page import Page
from olvae.evaluation.round_trip import RoundTrip

SIZES = (8, 10, 12, 16, 20, 24, 32)  # of the fonts, in pixels
STYLES = (  # font, ink, paper
    ("DejaVuSans", "black", "white"),
    ("DejaVuSerif", "#3b1f0b", "#f4e8c8"),
    ("DejaVuSansMono", "#ffd75e", "#16365c"),
)
COPIES = 3  # lines of each size and style
WORDS = (
    "quick brown fox jumps lazy dog Pack my box five Sphinx Vow 1984 3607 52.90 GATE 12B Exit Kg "
    "2026-03-14 Zebra Jelly"
)
CONFIDENCE = 0.5  # a line of an image counts if OCR is as sure of it in the original
TEXT_IMAGES = "images"  # the kind of lines of the evaluated images
DRAWN = "as drawn"  # a target's name for the pages themselves

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
# Its kind, which is IMAGES or the font's size; where it is; its text without spaces.
Line = tuple[str, Box, str]


class Text(PerImageObserver):
    """The character error rate of text in reconstructions, by OCR.

    OCR is rapidocr's, with the models of its wheel. The rate is the number of edits (Levenshtein)
    from the original's reading to the reconstruction's, both in the boxes that were found in the
    original, over the characters of the former, without spaces. An entry has ``error``, the rate,
    and its number of ``characters``:

    - for the evaluated ``images``, None without text in them;
    - for ``drawn`` pages of the same size, by the font's size in pixels;
    - ``unread``, OCR's own error: the pages' reading against the text that was drawn.

    Images have three channels.
    """

    name = "text"
    title = "Text"

    def __init__(self) -> None:
        super().__init__()  # rows of lines: kind, edits, characters
        self._lines: dict[str, list[Line]] = {}  # of images, by key
        self._pictures: dict[str, Tensor] = {}  # the first page, by DRAWN and by every target

    def conflicts(
        self, targets: Sequence[str], metrics: Sequence[str], observers: Sequence[Observer]
    ) -> Iterator[str]:
        if not find_spec("rapidocr"):
            yield "`observe` text needs rapidocr: pip install rapidocr onnxruntime"

    def measure(self, batch: Observation) -> Iterable[Any] | None:
        """Kind, edit distance and number of characters per text line of each image."""
        if batch.x.shape[1] != 3:
            return None
        # Read each original once, for all targets; boxes without text are dropped.
        for key, x in zip(batch.keys, batch.x, strict=True):
            if key in self._lines:
                continue
            lines: list[Line] = []
            for box in _find(x):
                text = _read(x, box, CONFIDENCE)
                if text:
                    lines.append((TEXT_IMAGES, box, text))
            self._lines[key] = lines
        return [_count(self._lines[key], y) for key, y in zip(batch.keys, batch.y, strict=True)]

    def examine(self, subjects: Mapping[str, Subject], size: int, device: str) -> None:
        if any(subject.model.in_channels != 3 for subject in subjects.values()):
            return
        trips = {
            target: RoundTrip(subject.model, device, name=target)
            for target, subject in subjects.items()
        }
        for number, (image, lines) in enumerate(draw_pages(size)):
            key = f"page {number}"
            self._rows.setdefault(DRAWN, {})[key] = _count(lines, image)
            self._pictures.setdefault(DRAWN, image)
            read = [(kind, box, _read(image, box)) for kind, box, _ in lines]
            for target, trip in trips.items():
                (y,) = trip([key], image[None]).images
                self._rows.setdefault(target, {})[key] = _count(read, y)
                self._pictures.setdefault(target, y)

    def result(self, target: str, draw: int) -> dict[str, Any]:
        found = self._rates(target)
        return {
            TEXT_IMAGES: found.pop(TEXT_IMAGES, None),
            "drawn": found,
            "unread": self._rates(DRAWN),
        }

    def _rates(self, target: str) -> dict[str, dict[str, float]]:
        """The character error rate by kind of lines."""
        sums: dict[str, tuple[int, int]] = {}  # edits and characters
        for kind, edits, n in chain.from_iterable(self._rows.get(target, {}).values()):
            edits_before, n_before = sums.get(kind, (0, 0))
            sums[kind] = (edits_before + edits, n_before + n)
        return {
            kind: {"error": edits / n, "characters": n} for kind, (edits, n) in sums.items() if n
        }

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        cells = {}
        if entry[TEXT_IMAGES]:
            cells["text errors"] = _percent(entry[TEXT_IMAGES])
        drawn = [rate["error"] for rate in entry["drawn"].values()]
        if drawn:
            cells["drawn text"] = _percent({"error": fmean(drawn)})
        return cells

    def section(self, page: Page) -> Markup | None:
        if not self._pictures:
            return None
        unread = self._rates(DRAWN)
        table = {}
        for target in self._pictures:
            if target != DRAWN:
                rates = self._rates(target)
                table[target] = {f"{kind} px": _percent(rates.get(kind)) for kind in unread}
        own = ", ".join(f"{kind} px {_percent(rate)}" for kind, rate in unread.items())
        return page.render("text.html", rates=texts(table), own=own, pictures=self._pictures)


def draw_pages(size: int) -> Iterator[tuple[Tensor, list[Line]]]:
    """Draw pages of text, uint8 (3, size, size), the same every time, with matplotlib's fonts.

    Each of :data:`STYLES` has :data:`COPIES` lines of each of :data:`SIZES` that fits, one style
    to a page.
    """
    from matplotlib import get_data_path

    rng = random.Random(0)
    words = WORDS.split()
    margin = 4
    room = size - 2 * margin
    for name, ink, paper in STYLES:
        file = str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf")
        picture = Image.new("RGB", (size, size), paper)
        lines: list[Line] = []
        top = margin
        for pixels in SIZES * COPIES:
            # Leave out fonts that are too large for the page; begin another page if it is full.
            font = ImageFont.truetype(file, pixels)
            height = sum(font.getmetrics())
            if max(height, 4 * pixels) > room:
                continue
            if top + height > size - margin:
                yield image_to_tensor(picture), lines
                picture = Image.new("RGB", (size, size), paper)
                lines = []
                top = margin

            # As many characters of some words as fit; their box has a little air.
            text = " ".join(rng.choices(words, k=size // pixels + 1))
            fitting = [n for n in range(len(text)) if font.getlength(text[:n]) <= room]
            text = max((text[:n].strip() for n in fitting), key=len)
            ImageDraw.Draw(picture).text((margin, top), text, ink, font)
            lines.append((str(pixels), (0, top - 2, size, top + height + 2), text.replace(" ", "")))
            top += height + margin
        if lines:
            yield image_to_tensor(picture), lines


def _count(lines: Iterable[Line], image: Tensor) -> list[tuple[str, int, int]]:
    return [(kind, edit_distance(text, _read(image, box)), len(text)) for kind, box, text in lines]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of characters to insert, delete or replace.

    torchmetrics' function of this name compares near positions alone; its error rate counts all.
    """
    return round(float(char_error_rate(b, a)) * len(a)) if a else len(b)


def _percent(rate: Mapping[str, float] | None) -> str:
    return f"{100 * rate['error']:.1f} %" if rate else NONE


@lru_cache(maxsize=1)
def _engine() -> Any:
    """OCR by rapidocr, with its default models, which are in its wheel."""
    from rapidocr import RapidOCR

    settings = {
        "Global.log_level": "critical",
        # By default onnxruntime's threads would spin on all cores.
        "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
    }
    return RapidOCR(params=settings)


def _ocr(image: Tensor, find: bool) -> Any:
    """Find the lines of an image, uint8 (3, H, W), or read it as one line."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[:, :, ::-1])  # blue first
    return _engine()(pixels, use_det=find, use_cls=False, use_rec=not find)


def _find(image: Tensor) -> list[Box]:
    """The upright boxes around the lines of an image, uint8 (3, H, W)."""
    quads = _ocr(image, find=True).boxes
    if quads is None:
        return []
    corners = np.asarray(quads)  # (N, 4, 2)
    ends = np.concatenate((np.floor(corners.min(1)), np.ceil(corners.max(1))), axis=1)
    ends = ends.clip(min=0).astype(int)
    return [(left, top, right, bottom) for left, top, right, bottom in ends.tolist()]


def _read(image: Tensor, box: Box, sure: float = 0.0) -> str:
    """The text of one line without spaces; nothing if OCR is less ``sure`` of it."""
    left, top, right, bottom = box
    found = _ocr(image[:, top:bottom, left:right], find=False)
    readings = zip(found.txts or (), found.scores or (), strict=True)
    return "".join("".join(text.split()) for text, score in readings if score >= sure)
