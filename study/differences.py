"""Differences between the study's rows, and whether they count, for the tables of docs/results.md.

A difference counts if the means over the seeds are apart by more than two standard deviations,
taken from the row whose seeds vary more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from study.rows import BASELINE, ENCODERS, LONGER, SEEDS, details
from study.tables import Found, spread, table

LINEAR = "linear"
"""Instead of a row's stem: the linear code, which has no seeds."""

TITLES = {
    **ENCODERS,
    "litevae_time": "LiteVAE-S, SD's time",
    "no_wavelet": "LiteVAE-S without the wavelet term",
}


class Difference(NamedTuple):
    """Two rows, named by their files without the seed, in one of :data:`MEASURES`."""

    measure: str
    row: str
    other: str


def between(row: str, other: str, *measures: str) -> Iterator[Difference]:
    """List the differences of two rows in some measures."""
    return (Difference(measure, row, other) for measure in measures)


def _of_level(level: int) -> Callable[[Mapping[str, Any]], float]:
    return lambda row: mean(
        row["sizes"]["256"]["bands"][f"{kind}{level}"]["mse"] for kind in ("LH", "HL", "HH")
    )


MEASURES: Mapping[str, tuple[Callable[[Mapping[str, Any]], float], int]] = {
    "dB at 64": (lambda row: row["sizes"]["64"]["psnr"], 2),
    "dB at 256": (lambda row: row["sizes"]["256"]["psnr"], 2),
    "LL3": (lambda row: row["sizes"]["256"]["bands"]["LL3"]["mse"], 1),
    "details": (details, 1),
    "level 3": (_of_level(3), 1),
    "level 2": (_of_level(2), 1),
    "level 1": (_of_level(1), 1),
    "green-magenta, %": (lambda row: 100 * row["unexplained"]["green_magenta"], 1),
    "SSIM": (lambda row: row["sizes"]["256"]["ssim"], 3),
    "Fréchet, Lite0": (lambda row: row["frechet_lite0"], 1),
}
"""A row's numbers, at 256 pixels unless the heading names others, and digits after the point."""

FOUR = ("dB at 64", "dB at 256", "details", "level 3")
ERRORS = ("dB at 256", "details", "Fréchet, Lite0")

DIFFERENCES = {
    "colour": (
        *between("litevae_2e-3", "sd_1e-3", "dB at 256", "details"),
        *between(
            "litevae_longer",
            "sd_longer",
            "dB at 256",
            "LL3",
            "details",
            "SSIM",
            "Fréchet, Lite0",
            "green-magenta, %",
        ),
        *between("litevae_longer", "sd_free_longer", "green-magenta, %"),
        *between("litevae_longer", "tiny_longer", "green-magenta, %"),
    ),
    "path": (
        *between("sd_short_1e-3", "sd_1e-3", "dB at 256"),
        *between("sd_short_1e-3", "litevae_1e-3", "dB at 256"),
        *between("sd_short_longer", "sd_longer", "green-magenta, %"),
        *between("sd_short_longer", "litevae_longer", "dB at 256", "details", "Fréchet, Lite0"),
        *between("litevae_shuffle_longer", "sd_longer", "green-magenta, %"),
    ),
    "wavelets": (
        *between("litevae_2e-3", "litevae_shuffle_2e-3", "dB at 256", "details"),
        *between(
            "litevae_longer",
            "litevae_shuffle_longer",
            "dB at 64",
            "dB at 256",
            "details",
            "level 3",
            "level 2",
            "level 1",
            "SSIM",
            "Fréchet, Lite0",
        ),
    ),
    "norm": (
        *between("litevae_2e-3", "litevae_norm_2e-3", "dB at 256"),
        *between(
            "litevae_longer", "litevae_norm_longer", "dB at 256", "details", "green-magenta, %"
        ),
        *between("sd_free_5e-4", "sd_5e-4", "dB at 256"),
        *between("sd_free_1e-3", "sd_1e-3", "dB at 256"),
        *between("sd_free_longer", "sd_longer", "dB at 256", "green-magenta, %", "details"),
    ),
    "start": (
        *between("litevae_linear_1e-3", "sd_short_1e-3", "dB at 256"),
        *between("litevae_linear_1e-3", "sd_short_5e-4", "dB at 256"),
        *between("litevae_linear_longer", "sd_short_longer", "dB at 256"),
        *between("sd_linear_longer", "sd_short_longer", "dB at 256"),
        *between("sd_linear_longer", "litevae_linear_longer", "dB at 256"),
        *between("litevae_linear_longer", LINEAR, "dB at 256"),
        *between("sd_linear_longer", LINEAR, "dB at 256"),
        *between("sd_short_longer", LINEAR, "level 3", "level 2", "level 1"),
    ),
    "fan_in": (
        *between("litevae_packets_longer", "litevae_shuffle_longer", *FOUR),
        *between("litevae_packets_longer", "litevae_longer", *FOUR),
    ),
    "alone": (
        *between("linear_alone_longer", LINEAR, "dB at 256"),
        *between("litevae_linear_longer", "linear_alone_longer", *ERRORS),
        *between("sd_linear_longer", "linear_alone_longer", *ERRORS),
    ),
    "time": (
        *between("litevae_time", "sd_1e-3", "dB at 256", "SSIM", "Fréchet, Lite0", "details"),
        *between("litevae_time", "sd_short_1e-3", "dB at 256", "SSIM", "Fréchet, Lite0", "details"),
    ),
    "tiny": (
        *between("tiny_longer", "sd_longer", "dB at 256", "details"),
        *between("tiny_longer", "litevae_longer", "dB at 256"),
        *between("tiny_whole_longer", "tiny_longer", "dB at 256", "details"),
        *between("tiny_whole_longer", "litevae_norm_longer", "dB at 256"),
    ),
    "term": (*between("litevae_1e-3", "no_wavelet", "dB at 256", "level 3", "Fréchet, Lite0"),),
}
"""What each claim of docs/results.md rests on, and what it does not say."""

HEADINGS = [
    "measured",
    "steps",
    "row",
    "its mean",
    "other row",
    "its mean",
    "apart",
    "two deviations",
    "counts",
]


def differences(claim: str, rows: Found) -> str:
    """The table of a claim: both rows' means with their deviations, and whether they differ.

    A difference is left out if one of its rows is not there.
    """
    lines = []
    for measure, stem, other_stem in DIFFERENCES[claim]:
        found, others = _seeds(stem, rows), _seeds(other_stem, rows)
        if not found or not others:
            continue
        # both rows' means, and the greater of their deviations
        value, digits = MEASURES[measure]
        values, other_values = [value(row) for row in found], [value(row) for row in others]
        apart = mean(values) - mean(other_values)
        deviations = [_deviation(stem, values), _deviation(other_stem, other_values)]
        known = [deviation for deviation in deviations if deviation is not None]
        deviation = max(known) if len(known) == len(deviations) else None
        lines.append(
            [
                measure,
                str(found[0]["steps"]),
                _title(stem),
                spread(values, digits),
                _title(other_stem),
                spread(other_values, digits),
                f"{apart:+.{digits}f}",
                "" if deviation is None else f"{2 * deviation:.{digits}f}",
                _counts(apart, deviation),
            ]
        )
    return table(HEADINGS, lines)


def _seeds(stem: str, rows: Found) -> list[Mapping[str, Any]]:
    """A row of each seed, or the linear code."""
    if stem == LINEAR:
        baseline = rows.get(BASELINE, {})
        return [{"sizes": baseline[LINEAR]}] if LINEAR in baseline else []
    names = [f"{stem}_{seed}" for seed in SEEDS]
    return [rows[name] for name in names if name in rows]


def _deviation(stem: str, values: Sequence[float]) -> float | None:
    """Over the seeds: none known of one seed, and 0 for the linear code, which has no seeds."""
    if stem == LINEAR:
        return 0.0
    return stdev(values) if len(values) > 1 else None


def _counts(apart: float, deviation: float | None) -> str:
    if deviation is None:
        return "one seed"
    return "yes" if abs(apart) > 2 * deviation else "no"


def _title(stem: str) -> str:
    """The network and its learning rate."""
    if stem == LINEAR:
        return "linear code"
    if stem in TITLES:  # at the recipe's rate
        return f"{TITLES[stem]}, 1e-3"
    network, _, rate = stem.rpartition("_")
    return f"{TITLES[network]}, {LONGER[network][0] if rate == 'longer' else rate}"
