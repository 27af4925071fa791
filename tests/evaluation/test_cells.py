"""Numbers as text: digits and signs typed in, marks by hand."""

import math
from dataclasses import replace

import pytest

from olvae.evaluation.cells import (
    INFINITY,
    MINUS,
    Cell,
    conditions,
    costs,
    differences,
    headings,
    meaning,
    number,
    scores,
    significant,
    texts,
)
from olvae.evaluation.results import Row
from olvae.evaluation.round_trip import Cost
from olvae.evaluation.statistics import Difference
from olvae.metrics import METRICS
from tests.evaluation.test_results import results_of

PSNR, SSIM, L1 = (METRICS[name].label for name in ("psnr", "ssim", "l1"))
COST = Cost(1_500_000, 2_000_000_000, 3_450_000_000, 12.34, 0.5678, None, 4, "CPU, 1 thread")


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (25.7041, 2, "25.70"),
        (-0.125, 2, f"{MINUS}0.12"),
        (0.0, 3, "0.000"),
        (0.0005, 3, "0.001"),
        (0.0004, 3, "4.0e-04"),
        (-0.0004, 3, f"{MINUS}4.0e-04"),
        (999.94, 1, "999.9"),
        (1000.4, 3, "1000"),
        (1000.0, 2, "1000"),
        (-123456.7, 2, f"{MINUS}123457"),
        (math.inf, 2, INFINITY),
        (-math.inf, 2, f"{MINUS}{INFINITY}"),
    ],
)
def test_numbers_have_fixed_decimals(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.03124, "0.0312"),
        (0.00099, "0.00099"),
        (0.001, "0.00100"),
        (0.0000123, "1.23e-05"),
        (1.0, "1.00"),
        (9.996, "10.00"),
        (71234.0, "71,234"),
        (3.39e38, "3.39e+38"),
        (1e9, "1e+09"),
        (-12.34, "-12.3"),
        (math.inf, INFINITY),
    ],
)
def test_costs_have_three_significant_digits(value, text):
    assert significant(value) == text


def test_scores_mark_the_best_of_values_that_differ():
    rows = [
        Row("a", 9, {"psnr": 25.0, "l1": 0.03, "ssim": 0.5}, intervals={"psnr": (24.0, 26.5)}),
        Row("b", 9, {"psnr": 26.0, "l1": 0.04, "ssim": 0.5}),
        Row("c", 9, {"ssim": 0.5}),
    ]
    table = scores(results_of(*rows))
    assert table["a"][PSNR] == Cell("25.000", "[24.000, 26.500]", "±1.25")
    assert table["b"][PSNR] == Cell("26.000", mark="best")
    assert table["c"][PSNR] == Cell("-")
    assert [table[name][L1].mark for name in "ab"] == ["best", ""]  # less is better
    assert {table[name][SSIM].mark for name in "abc"} == {""}
    assert headings(table) == [PSNR, SSIM, L1]  # in the order of all metrics


def test_a_difference_is_marked_if_its_interval_excludes_0():
    rows = [
        Row("first", 9, {}),
        Row("b", 9, {}, differences={"psnr": Difference(0.5, 0.25, 0.75)}),
        Row("c", 9, {}, differences={"psnr": Difference(-0.5, -1.0, 0.0)}),
        Row("d", 9, {}, differences={"l1": Difference(0.25, 0.125, 0.5)}),
        Row("e", 9, {}, differences={"psnr": Difference(0.5, 0.0, 1.0)}),
    ]
    table = differences(results_of(*rows))
    assert [*table] == ["b", "c", "d", "e"]
    assert table["e"][PSNR].mark == ""
    assert table["b"][PSNR] == Cell("+0.500", "[+0.250, +0.750]", mark="better")
    assert table["c"][PSNR] == Cell(f"{MINUS}0.500", f"[{MINUS}1.000, 0.000]", mark="")
    assert table["d"][L1].mark == "worse"
    assert differences(results_of(*rows[:1])) == {}
    assert differences(results_of(rows[0], Row("e", 9, {}))) == {}


@pytest.mark.parametrize(
    ("difference", "ending"),
    [
        (None, "."),
        (Difference(1.25, 0.5, 2.0), "; the best of the others is 1.25 dB better: b."),
        (
            Difference(-1.25, -2.0, 0.5),
            "; the best of the others is 1.25 dB worse, which other images may reverse: b.",
        ),
        (
            Difference(1.25, 0.0, 2.0),
            "; the best of the others is 1.25 dB better, which other images may reverse: b.",
        ),
        (Difference(0.004, -1.0, 1.0), "; the best of the others is as good: b."),
    ],
)
def test_the_sentence_has_the_error_in_levels(difference, ending):
    """By hand: 20 dB is a tenth of the range, 25.5 levels."""
    other = Row("b", 9, {}, differences={} if difference is None else {"psnr": difference})
    text = meaning(results_of(Row("a", 9, {"psnr": 20.0}), other))
    assert text == f"a misses a pixel's values by about 25.5 of 255 (PSNR 20.00 dB){ending}"
    assert meaning(results_of(Row("a", 9, {"psnr": math.inf}), other)) == ""
    assert meaning(results_of(Row("a", 9, {}), other)) == ""


def test_costs_are_in_the_headings_units_without_what_was_not_measured():
    rows = [Row("a", 9, {}, cost=COST), Row("b", 9, {})]
    assert costs(rows) == texts(
        {
            "a": {
                "M params": "1.50",
                "GMACs encode": "2.00",
                "GMACs decode": "3.45",
                "img/s encode": "12.3",
                "img/s decode": "0.568",
            }
        }
    )
    measured = replace(COST, peak_memory_bytes=3 * 2**20)
    assert costs([Row("a", 9, {}, cost=measured)])["a"]["MiB peak"] == Cell("3.00")


def test_conditions_name_targets_where_machines_differ():
    a, b = Row("a", 9, {}, cost=COST), Row("b", 9, {}, cost=COST)
    assert conditions([a, b]) == "CPU, 1 thread, batches of 4"
    gpu = replace(COST, device="a GPU", peak_memory_bytes=1)
    assert conditions([a, b, Row("c", 9, {}, cost=gpu)]) == (
        "CPU, 1 thread, batches of 4 (a, b); a GPU, batches of 4 (c); "
        "memory beyond weights and images"
    )
    assert conditions([Row("d", 9, {})]) == ""
