"""Write one HTML page with everything about an evaluation. It needs no other file and no network."""

import importlib.metadata
import platform
from datetime import datetime
from pathlib import Path

from olvae import __version__
from olvae.evaluation.cells import conditions, costs, differences
from olvae.evaluation.html import Page
from olvae.evaluation.results import used_weights
from olvae.evaluation.runner import Evaluated
from olvae.evaluation.text import notes, quality
from olvae.files import atomic_write
from olvae.metrics.registry import METRICS

PACKAGES = ("torch", "torchmetrics", "torch-fidelity", "lpips", "diffusers", "pillow", "numpy")


def write_page(evaluated: Evaluated, path: Path, command: str = "", when: datetime | None = None) -> None:
    """Write the page, whole or not at all; see :func:`render_page`."""
    html = render_page(evaluated, command, when)
    with atomic_write(path) as partial:
        partial.write_text(html, encoding="utf-8", errors="backslashreplace")


def render_page(evaluated: Evaluated, command: str = "", when: datetime | None = None) -> str:
    """The page as HTML: no script, no request; its pictures are smaller the more there are.

    Args:
        command: the command line, to be shown.
        when: the evaluation was made, with the time zone; by default now.
    """
    results = evaluated.results
    page = Page(results)
    sections = [(observer, html) for observer in evaluated.observers if (html := observer.section(page)) is not None]
    weights = used_weights(results.rows)
    return page.render(
        "page.html",
        command=command,
        when=when or datetime.now().astimezone(),
        environment={
            "Python": platform.python_version(),
            "open-litevae": __version__,
            **{name: _version(name) for name in PACKAGES},
        },
        scores=quality(evaluated),
        counts={row.n for row in results.table},
        notes=list(notes(evaluated)),
        differences=differences(results),
        costs=costs(results.rows),
        conditions=conditions(results.rows),
        sections=sections,
        weights=weights,
        labels={name: METRICS[name].label for name in weights},
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # installed under another name, such as pillow-simd
        return "unknown"
