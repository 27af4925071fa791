"""Make HTML for the evaluation's page: tables, pictures as data URIs, and templates that use both."""

import base64
import io
import math
import re
from string import ascii_uppercase
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from olvae.evaluation.cells import Table, number, significant
from olvae.evaluation.results import Results
from olvae.figures import rgb
from olvae.metrics.registry import METRICS

ARROWS = {"higher": "↑", "lower": "↓"}

COLOURS = 7
"""Of the style sheet, for badges and bars."""

EXACT = 128
"""Pictures up to this side are kept to the pixel."""

LOSSLESS = {"lossless": True, "quality": 20, "method": 0}  # the last two are effort: more saves 5 % of the bytes

PIXELS = 15e6
"""Of all photographs of a page together: about 3 MB."""

SIDES = (96, 256)


class Inline(NamedTuple):
    """A picture as a data URI, its size, and whether its pixels should be shown at a whole multiple."""

    uri: str
    width: int
    height: int
    exact: bool


class Page:
    """Results on their way to the page: renders what observers show of them.

    Templates see ``results``, the functions ``mark`` and ``picture`` of this class and ``table``, and the filters
    ``number``, ``significant`` and ``breakable``.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.colours = {row.target: i % COLOURS + 1 for i, row in enumerate(results.table)}
        self._letters = {row.target: ascii_uppercase[i : i + 1] or str(i + 1) for i, row in enumerate(results.table)}
        self._environment = Environment(
            loader=PackageLoader("olvae.evaluation", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(number=number, significant=significant, breakable=breakable)
        self._environment.globals.update(
            results=results,
            colours=self.colours,
            arrows={kind.label: "\N{NO-BREAK SPACE}" + ARROWS[kind.better] for kind in METRICS.values()},
            mark=self.mark,
            picture=self.picture,
            table=self.table,
        )

    def render(self, template: str, **values: Any) -> Markup:
        """Fill in one of the package's templates; values are escaped, but for Markup."""
        return Markup(self._environment.get_template(template).render(**values))

    def table(self, table: Table, label: str, caption: str = "") -> Markup:
        """A table with a row per target, or nothing if it has no rows."""
        return self.render("table.html", content=table, label=label, caption=caption) if table.rows else Markup()

    def mark(self, target: str) -> Markup:
        """A target's letter in its colour."""
        return Markup('<span class="badge c{}">{}</span>').format(self.colours[target], self._letters[target])

    def picture(
        self, image: Tensor, alt: str, limit: int | None = None, style: str = "", swatch: bool = False
    ) -> Markup:
        """A picture, uint8 (C, H, W); see :func:`inline` for ``limit``."""
        shown = inline(image, limit)
        names = " ".join(["exact"] * shown.exact + ["swatch"] * swatch)
        attributes = Markup("").join(
            Markup(' {}="{}"').format(key, value) for key, value in (("class", names), ("style", style)) if value
        )
        return Markup('<img src="{}" width="{}" height="{}" alt="{}"{}>').format(
            shown.uri, shown.width, shown.height, alt, attributes
        )


def side_limit(pictures: int) -> int:
    """The longest side at which this number of photographs keeps the page within a few MB."""
    smallest, largest = SIDES
    return max(smallest, min(largest, math.isqrt(int(PIXELS / max(pictures, 1)))))


def inline(image: Tensor, limit: int | None = None) -> Inline:
    """Encode a picture for the page, lossless up to 128 pixels.

    A limit means that the page scales it: then a small picture is enlarged pixel by pixel to at least 256, so that
    scaling adds no grid of its own; one above the limit is shrunk, and lossy.

    Args:
        image: uint8 (C, H, W).
        limit: of the longest side, in pixels.
    """
    picture = rgb(image)
    longest = max(picture.size)
    exact = longest <= EXACT
    if limit is not None and longest > limit and not exact:
        size = (max(1, round(side * limit / longest)) for side in picture.size)
        picture = picture.resize((next(size), next(size)), Image.Resampling.LANCZOS)
    elif limit is not None and exact:
        factor = -(-SIDES[1] // longest)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    options = LOSSLESS if exact else {"quality": 82}
    picture.save(buffer, "WEBP", **options)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Inline(uri, picture.width, picture.height, exact and limit is None)


def breakable(name: str) -> Markup:
    """HTML of a name, which may break after the separators of runs and paths."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_:-])", name))
