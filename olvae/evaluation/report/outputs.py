"""The files of an evaluation: numbers, a table, values per image, a figure, a page."""

from collections.abc import Iterator
from pathlib import Path

import torch

from olvae.config import ConfigError
from olvae.evaluation.report.page import write_page
from olvae.evaluation.report.present import page_of
from olvae.evaluation.report.tables import ImageValues, write_csv, write_markdown
from olvae.evaluation.results import Evaluation, write_figure, write_metrics
from olvae.evaluation.runner import Assessment
from olvae.files import check_folder
from olvae.runs import Run

__all__ = ["results_folder", "write_outputs"]


SHOWN = 8
"""Images of the figure, chosen by nothing but the hash of their keys."""


def results_folder(out: Path | None, target: str, run: Run | None) -> Path:
    """Where results go, checked before the work rather than after it.

    Args:
        out: what the user said; else it is the run, or a folder beside a file of weights.
        target: as the user wrote it.
        run: that it is, if it is one.

    Raises:
        ConfigError: the user has to say it.
        OSError: the folder could not be made or written.
    """
    if out is not None:
        folder = out
    elif run is not None:
        folder = Path(target)
    elif Path(target).is_file():
        folder = Path(target).with_name(f"{Path(target).stem}_results")
    else:
        raise ConfigError("--out DIR says where the results go: the first target is no run folder and no file")
    return check_folder(folder)


def write_outputs(
    assessment: Assessment, evaluation: Evaluation, folder: Path, suffix: str, page: bool = True
) -> list[tuple[str, Path]]:
    """Write everything; metrics.json last, so that it is there only if all of it is.

    Args:
        suffix: of the files' names, for the second protocol and on.
        page: write the report too.

    Returns:
        What was written, and where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if assessment.galleries:
        examples = {name: gallery.spread(SHOWN) for name, gallery in assessment.galleries.items()}
        inputs = torch.stack([example.x for example in next(iter(examples.values()))])
        reconstructions = {name: torch.stack([example.y for example in shown]) for name, shown in examples.items()}
        written.append(("figure", folder / f"reconstructions{suffix}.png"))
        write_figure(inputs, reconstructions, written[-1][1])
    if page:
        written.append(("report", folder / f"report{suffix}.html"))
        write_page(page_of(assessment, evaluation), written[-1][1])
    written.append(("images", folder / f"per_image{suffix}.csv"))
    write_csv(written[-1][1], _values(evaluation))
    written.append(("table", folder / f"metrics{suffix}.md"))
    write_markdown(evaluation, written[-1][1])
    written.append(("numbers", folder / f"metrics{suffix}.json"))
    write_metrics(evaluation, written[-1][1])
    return written


def _values(evaluation: Evaluation) -> Iterator[ImageValues]:
    for result in evaluation.results:
        for key in sorted({key for values in result.per_image.values() for key in values}):
            metrics = {name: values[key] for name, values in result.per_image.items() if key in values}
            yield ImageValues(result.target, key, metrics)
