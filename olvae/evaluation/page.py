"""Render results in the package's HTML templates, with pictures inside the page."""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from olvae.evaluation.cells import NONE, Cell, Table, headings, significant
from olvae.evaluation.results import Results
from olvae.figures import rgb
from olvae.metrics import METRICS
from olvae.runs import FOLDER_NAME

ARROWS = {"higher": "\N{NO-BREAK SPACE}↑", "lower": "\N{NO-BREAK SPACE}↓"}

# The longest side of a photograph, in pixels: the smallest that it may become, and the largest.
SIDES = (96, 256)


class Page:
    """Results to be shown on the page; observers render their sections with it."""

    def __init__(self, results: Results) -> None:
        self.results = results

        self._names = shown_names([row.target for row in results.table])

        # Badges: a letter, and one of seven colours of the style sheet, which bars use as well.
        self.colours: dict[str, int] = {}
        self._letters: dict[str, str] = {}
        for i, row in enumerate(results.table):
            self.colours[row.target] = i % 7 + 1
            self._letters[row.target] = ascii_uppercase[i : i + 1] or str(i + 1)

        # Undefined names raise: a template with a typo must not leave a hole in the page.
        self._environment = Environment(
            loader=PackageLoader("olvae.evaluation", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(
            significant=significant,
            shown=self.shown,
            breakable=lambda target: breakable(self.shown(target)),
        )
        self._environment.globals.update(
            results=results,
            colours=self.colours,
            arrows={kind.label: ARROWS[kind.better] for kind in METRICS.values()},
            dash=Cell(NONE),
            headings=headings,
            mark=self.mark,
            picture=picture,
            table=self.table,
        )

    def render(self, template: str, **values: Any) -> Markup:
        """Fill in one of the package's templates; values are escaped, except Markup."""
        return Markup(self._environment.get_template(template).render(**values))

    def table(self, table: Table, label: str, caption: str = "") -> Markup:
        """Render a table with a row per target, or nothing if it has no rows."""
        if not table:
            return Markup()
        return self.render("table.html", content=table, label=label, caption=caption)

    def shown(self, text: str) -> str:
        """Write the folders of runs in a target, or in a sentence about targets, as on the page."""
        return FOLDER_NAME.sub(lambda match: self._names.get(match[0], match[0]), text)

    def mark(self, target: str) -> Markup:
        """Render a target's letter in its colour."""
        return Markup('<span class="badge c{}">{}</span>').format(
            self.colours[target], self._letters[target]
        )


def shown_names(targets: Sequence[str]) -> dict[str, str]:
    """Map the folders of runs in the targets to the runs' names.

    With the time where two have one name; as they are where two have that too.
    """
    folders = {match[0]: match for target in targets for match in FOLDER_NAME.finditer(target)}
    shown: dict[str, str] = {}
    for form in ("{1}", "{1} ({0})"):
        names = {folder: form.format(*match.groups()) for folder, match in folders.items()}
        counts = Counter([*targets, *shown.values(), *names.values()])
        for folder, name in names.items():
            if counts[name] == 1:
                shown.setdefault(folder, name)
    return shown


def side_limit(pictures: int) -> int:
    """Return the longest side for this number of photographs: 15 million pixels, about 3 MB."""
    smallest, largest = SIDES
    return max(smallest, min(largest, math.isqrt(15_000_000 // max(pictures, 1))))


def picture(image: Tensor, alt: str, limit: int = SIDES[1]) -> Markup:
    """Embed a picture, uint8 (C, H, W), in the page, which scales it to the space there.

    Up to 128 pixels a side it is lossless, and enlarged pixel by pixel to at least 256, so that
    scaling adds no grid of its own; otherwise it is shrunk to the ``limit`` and lossy.
    """
    shown = rgb(image)
    longest = max(shown.size)
    if longest <= 128:
        factor = -(-SIDES[1] // longest)
        larger = (shown.width * factor, shown.height * factor)
        shown = shown.resize(larger, Image.Resampling.NEAREST)
        # Of a lossless picture, quality and method are effort: more saves 5 % of the bytes.
        options = {"lossless": True, "quality": 20, "method": 0}
    else:
        shown.thumbnail((limit, limit), Image.Resampling.LANCZOS)
        options = {"quality": 82}
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img src="data:image/webp;base64,{}" width="{}" height="{}" alt="{}">').format(
        data, shown.width, shown.height, alt
    )


def breakable(name: str) -> Markup:
    """Render a name that may break after the separators of runs and paths."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_:-])", name))
