"""Differences between the study's rows: what counts, and that each is of rows that there are."""

from pathlib import Path

import pytest

from study.differences import DIFFERENCES, LINEAR, differences
from study.rows import BASELINE, rows

ROOT = Path(__file__).parent.parent.parent


def of_psnr(stem, values):
    """Rows of as many seeds."""
    bands = {f"{kind}{level}": {"mse": 3.0} for level in (1, 2, 3) for kind in ("LH", "HL", "HH")}
    return {
        f"{stem}_{seed}": {
            "steps": 6000,
            "frechet_lite0": 100.0,
            "unexplained": {"green_magenta": 0.5},
            "sizes": {"256": {"psnr": value, "bands": bands}},
        }
        for seed, value in enumerate(values)
    }


def lines(claim, found):
    """The cells of a table's lines."""
    return [line.strip("| ").split(" | ") for line in differences(claim, found).splitlines()[2:]]


def test_a_difference_counts_beyond_two_deviations_of_the_row_that_varies_more():
    steady = of_psnr("tiny_longer", [20.0, 20.0, 20.0])
    varying = [23.0, 25.0, 27.0]  # by 2: it needs more than 4
    for shift, counts in ((-1.1, "no"), (-0.9, "yes"), (0.0, "yes"), (-9.1, "yes"), (-8.9, "no")):
        found = steady | of_psnr("sd_longer", [value + shift for value in varying])
        psnr = lines("tiny", found)[0]
        assert psnr[:5] == ["dB at 256", "6000", "TAESD's, 64 channels, 1e-3", "20.00 ± 0.00",
                            "SD, 48 channels, 1e-3"]  # fmt: skip
        assert psnr[5:] == [f"{25 + shift:.2f} ± 2.00", f"{-5 - shift:+.2f}", "4.00", counts]


def test_one_seed_has_no_deviation_and_the_linear_code_none_to_have():
    found = of_psnr("tiny_longer", [20.0]) | of_psnr("sd_longer", [30.0, 30.0, 30.0])
    assert lines("tiny", found)[0][-2:] == ["", "one seed"]
    sizes = {"256": {"psnr": 27.5, "bands": found["sd_longer_0"]["sizes"]["256"]["bands"]}}
    found = of_psnr("sd_linear_longer", [27.5, 27.6, 27.7]) | {BASELINE: {LINEAR: sizes}}
    line = next(line for line in lines("start", found) if line[4] == "linear code")
    assert line[5:] == ["27.50", "+0.10", "0.20", "no"]


def test_a_difference_without_its_rows_is_left_out():
    assert differences("tiny", of_psnr("sd_longer", [30.0])) == "Nothing is measured yet."


@pytest.mark.parametrize("claim", DIFFERENCES)
def test_differences_are_of_rows_of_the_study_and_in_the_document(claim):
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"<!-- table: differences_{claim} -->" in document  # its contents: test_draw.py
    stems = {row.name.rpartition("_")[0] for row in rows()} | {LINEAR}
    for _, row, other in DIFFERENCES[claim]:
        assert {row, other} <= stems
