"""The tables of study/maps.py, from its files."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import spearmanr

from study.latent_maps import MAPS
from study.tables import spread
from study.tables import table as as_table

CONTROL = "plain"
SEEDS = (0, 1, 2)

AUTOENCODERS = {"f8c12": "olvae:photos-f8c12", "linear": "the linear code"}
"""Titles by name; the linear code is fitted on the crops and kept in OUT/linear."""

MEASURED = {
    "high_frequencies": "high frequencies",
    "spectrum_divergence": "spectrum's KL",
    "local_correlation": "local correlation",
    "equivariance_error": "EQ error",
    "ifid": "iFID, Lite0",
    "precision": "precision",
}
"""Headings of the predictors, each measured before the diffusion models are trained."""


FOUND = {"frechet_lite0_to_decoded": 1, "loss_in_linear": 3}
"""What a seed found, and digits after the point."""

WITHOUT = {
    "other_crops": "no model: latents of other crops",
    "normal": "no model: a normal distribution's",
}
"""Distances that no diffusion model is needed for."""


def read(folder: Path = Path(__file__).parent / "results" / "maps") -> dict[str, dict[str, Any]]:
    """The files of a folder by autoencoder and map: predictors, and the numbers of all seeds.

    An autoencoder's entry `baselines` has its distances without a diffusion model.
    """
    found: dict[str, dict[str, Any]] = {}
    for autoencoder in AUTOENCODERS:
        if not (folder / f"{autoencoder}.json").is_file():
            continue
        rows: dict[str, Any] = {"baselines": _read(folder / f"{autoencoder}.json")}
        for name in MAPS:
            stem = f"{autoencoder}_{name}"
            if not (folder / f"{stem}.json").is_file():
                continue
            paths = [folder / f"{stem}_{seed}.json" for seed in SEEDS]
            seeds = [_read(path) for path in paths if path.is_file()]
            rows[name] = {"predictors": _read(folder / f"{stem}.json"), "seeds": seeds}
        found[autoencoder] = rows
    return found


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def differs(control: list[float], row: list[float]) -> bool:
    """Whether two rows differ, by the rule that was written down before the runs."""
    if min(len(control), len(row)) < 2:
        return False
    gap = abs(fmean(control) - fmean(row))
    pooled = ((stdev(control) ** 2 + stdev(row) ** 2) / 2) ** 0.5
    return gap > 2 * pooled and gap > max(control) - min(control)


def table(rows: Mapping[str, Any]) -> str:
    """Markdown, of one autoencoder: what diffusion models found, then the predictors.

    * marks a difference from the control. Below the maps: distances without a diffusion model, and
    rank correlations over the maps, Spearman's, of the samples' distance with the other columns.
    """
    measured = {name: rows[name] for name in MAPS if name in rows and rows[name]["seeds"]}
    lines = []
    for name, row in measured.items():
        cells = [marked(measured[CONTROL], row, key, digits) for key, digits in FOUND.items()]
        of_row = [f"{row['predictors'][key]:.3g}" for key in MEASURED]
        lines.append([MAPS[name], *cells, *of_row])
    for key, title in WITHOUT.items() if lines else ():
        lines.append([title, f"{rows['baselines'][key]:.1f}", *[""] * (1 + len(MEASURED))])

    # Rank correlations, where there are ranks.
    if len(measured) > 2:
        distances, losses = (
            [fmean(of_seeds(row, key)) for row in measured.values()] for key in FOUND
        )
        columns = [[row["predictors"][key] for row in measured.values()] for key in MEASURED]
        ranks = [rank_correlation(distances, column) for column in (losses, *columns)]
        lines.append(["rank correlation with samples", "", *ranks])
    headings = ["map", "samples to decoded latents", "loss / linear", *MEASURED.values()]
    return as_table(headings, lines)


def of_seeds(row: Mapping[str, Any], key: str) -> list[float]:
    """A number of a row, seed by seed."""
    return [seed[key] for seed in row["seeds"]]


def marked(control: Mapping[str, Any], row: Mapping[str, Any], key: str, digits: int) -> str:
    """Mean and deviation of a row's number; * marks a difference from the control."""
    values = of_seeds(row, key)
    mark = " *" if differs(of_seeds(control, key), values) else ""
    return f"{spread(values, digits)}{mark}"


def rank_correlation(some: list[float], others: list[float]) -> str:
    """Spearman's, written with two digits; nothing where one list has a single value."""
    if len(set(others)) == 1:
        return ""
    return f"{spearmanr(some, others).statistic:.2f}"
