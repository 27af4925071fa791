"""One HTML page that puts an evaluation together: nothing but the file itself is needed to read it."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from olvae.evaluation.report.content import Page
from olvae.evaluation.report.parts import badges, band_table, cost_table, difference_table, gallery_parts, result_table
from olvae.evaluation.report.patterns import artefact_summary, artefact_tables
from olvae.figures import ERROR_RANGE
from olvae.files import atomic_write

__all__ = ["render_page", "write_page"]


def render_page(page: Page) -> str:
    """The page as HTML: no script, no request; pictures are in it, smaller the more there are."""
    environment = Environment(
        loader=PackageLoader("olvae.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    badge = badges(page)
    return environment.get_template("page.html").render(
        page=page,
        badge=badge,
        error_range=ERROR_RANGE,
        results=result_table(page, badge),
        differences=difference_table(page, badge),
        costs=cost_table(page, badge),
        galleries=gallery_parts(page, badge),
        bands=band_table(page, badge),
        artefact_summary=artefact_summary(page.artefacts, badge),
        artefact_tables=artefact_tables(page.artefacts, badge),
    )


def write_page(page: Page, path: Path) -> None:
    """The page as a file, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(render_page(page), encoding="utf-8", errors="backslashreplace")
