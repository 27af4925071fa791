import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from olvae.evaluation.protocol import Protocol
from olvae.evaluation.results import INFINITE, Results, Row
from olvae.evaluation.round_trip import Cost
from olvae.evaluation.statistics import confidence, difference
from olvae.files import write_json

IMAGES = {
    "source": "photos",
    "n": 90,
    "sha256": "00",
    "unreadable": 0,
    "unreadable_files": {},
    "enlarged": 0,
}

NAMES = ("psnr", "ssim", "ms_ssim", "l1", "lpips", "lpips_alex", "rfid", "kid")

VALUES = dict(
    zip(NAMES, (25.704, 0.721, 0.961, 0.0312, 0.138, 0.079, 1234.5, 0.00042), strict=True)
)

NAME = "2026-01-31T12-00-00_A2_bf16"


def results_of(*rows: Row, protocol: Protocol | None = None, **images) -> Results:
    protocol = protocol or Protocol(n=90)
    return Results(protocol.as_dict(), protocol.hash(), IMAGES | images, list(rows))


def row(target: str = NAME, sha256: str = "aa", published: bool = True, **more) -> Row:
    weights = {"file": "vgg.pth", "sha256": sha256, "published": published}
    details = {"lpips": {"weights": weights}}
    return Row(target, 90, dict(VALUES), intervals={"psnr": (25.0, 26.5)}, details=details, **more)


def read_back(results: Results, tmp_path) -> Results:
    write_json(results.as_dict(), tmp_path / "metrics.json")
    return Results.read(tmp_path / "metrics.json")


def test_what_is_written_is_read_again(tmp_path):
    full = row(
        cost=Cost(1, 2, 3, 4.5, None, None, 8, "CPU"),
        observed={"bands": {"LL1": {"mse": 1.5, "share_of_signal": None}}, "mine": [1, "two"]},
    )
    equal = Row("equal", 90, {"psnr": math.inf, "ssim": 1.0}, {"rfid": "no weights"})
    results = results_of(full, equal)
    first, second = results.as_dict()["results"]
    assert first["mine"] == [1, "two"]
    assert second.keys().isdisjoint({"bands", "mine", "baseline"})
    assert second["metrics"] == {"ssim": 1.0}  # JSON has no infinity
    assert second["skipped"] == {"psnr": INFINITE, "rfid": "no weights"}
    assert read_back(results, tmp_path) == results


def test_a_file_with_the_least_that_a_row_has(tmp_path):
    protocol = {"name": "mine", "version": 1}
    result = {"target": "a", "n": 3, "metrics": {"psnr": 20}}
    content = {"protocol": protocol, "protocol_hash": "0", "results": [result]}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert Results.read(tmp_path / "metrics.json").rows == [Row("a", 3, {"psnr": 20.0})]


def test_equal_names_are_counted(tmp_path):
    earlier = read_back(results_of(row()), tmp_path)
    together = results_of(row()).beside({Path("a.json"): earlier, Path("b.json"): earlier})
    assert [row["target"] for row in together.as_dict()["results"]] == [
        NAME,
        f"{NAME} (2)",
        f"{NAME} (3)",
    ]


@pytest.mark.parametrize(
    ("earlier", "what"),
    [
        (
            results_of(row(), protocol=Protocol(n=80, posterior="sample")),
            "another protocol (n, posterior)",
        ),
        (results_of(row(), sha256="11"), "other images"),
        (results_of(row(sha256="bb")), "other weights of the networks behind LPIPS"),
    ],
)
def test_results_that_are_not_comparable_are_refused_unless_mixed(tmp_path, earlier, what):
    other = {Path("a.json"): read_back(earlier, tmp_path)}
    with pytest.raises(
        ValueError, match=re.escape(f"a.json: has results of {what}, which are not comparable")
    ):
        results_of(row()).beside(other)
    (added,) = results_of(row()).beside(other, mix=True).earlier
    assert added.target == f"{NAME} [{what}]"


def test_few_images_give_a_warning():
    assert results_of(Row("a", 19, {})).warnings() == [
        "few images, 19: other ones give other numbers"
    ]
    assert results_of(Row("a", 20, {})).warnings() == []


def test_images_without_a_psnr_give_a_warning():
    (warning,) = results_of(Row("a", 20, {}, details={"psnr": {"equal_images": 2}})).warnings()
    assert warning == "a gives 2 of 20 images back exactly: they are not in its PSNR"


def test_unpublished_weights_give_a_warning():
    assert results_of(row()).warnings() == []
    (warning,) = results_of(row(published=False)).warnings()
    assert "LPIPS rests on a vgg.pth that is not the published file" in warning


@pytest.mark.parametrize("value", ["many", None, float("nan"), float("inf")])
def test_an_earlier_file_with_values_that_are_not_finite_numbers(tmp_path, value):
    path = tmp_path / "metrics.json"
    content = results_of(row()).as_dict()
    content["results"][0]["metrics"]["psnr"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not a metrics\.json"):
        Results.read(path)


def keyed(values) -> dict[str, float]:
    return {f"{i:05}": float(value) for i, value in enumerate(values)}


def test_two_images_by_hand():
    """The mean of two draws from {0, 1} is 0 in 1/4, 1/2 in 1/2, and 1 in 1/4 of the cases."""
    values = keyed([0.0, 1.0])
    assert confidence(values, level=0.95, samples=4000) == (0.0, 1.0)
    assert confidence(values, level=0.4, samples=4000) == (0.5, 0.5)


def test_many_images_give_the_normal_interval():
    values = np.random.default_rng(3).gamma(4.0, size=2000)
    low, high = confidence(keyed(values), samples=8000)
    reach = 1.959964 * values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - reach, abs=0.05 * reach)
    assert high == pytest.approx(values.mean() + reach, abs=0.05 * reach)


def test_the_order_of_images_makes_no_difference_and_the_seed_does():
    values = keyed(np.random.default_rng(0).normal(size=50))
    backwards = dict(reversed(values.items()))
    assert confidence(values) == confidence(backwards)
    assert confidence(values) != confidence(values, seed=1)


def test_memory_is_bounded_without_changing_the_draws(monkeypatch):
    values = keyed(np.random.default_rng(0).normal(size=50))
    whole = confidence(values, samples=100)
    monkeypatch.setattr("olvae.evaluation.statistics.DRAWS_AT_ONCE", 64)  # a row at a time
    assert confidence(values, samples=100) == pytest.approx(whole, rel=1e-12)


def test_what_has_no_interval():
    assert confidence({"a": 3.0}) is None
    assert confidence(keyed([30.0, math.inf])) is None
    assert difference({"a": 3.0}, {"a": 2.0}) is None
    assert difference(keyed([30.0, math.inf]), keyed([30.0, 31.0])) is None


def test_infinite_values_are_left_out():
    a = [30.0, 33.0, 31.0]
    b = [30.5, 32.0, 31.0]
    assert confidence(keyed([*a, math.inf])) == confidence(keyed(a))
    assert difference(keyed([*a, math.inf, 9.0]), keyed([*b, 9.0, math.inf])) == difference(
        keyed(a), keyed(b)
    )


def test_a_difference_is_paired():
    rng = np.random.default_rng(4)
    hard = rng.normal(30.0, 5.0, size=200)  # what both find hard
    a = hard + rng.normal(0.3, 0.5, size=200)
    b = hard + rng.normal(0.0, 0.5, size=200)
    found = difference(keyed(a), keyed(b), samples=4000)
    assert found.value == pytest.approx((a - b).mean(), rel=1e-9)
    assert (found.low, found.high) == pytest.approx(
        confidence(keyed(a - b), samples=4000), rel=1e-9
    )
    low, high = confidence(keyed(a))
    assert found.high - found.low < (high - low) / 5
    assert found.low > 0
    other = difference(keyed(b), keyed(a), samples=4000)
    assert (other.value, other.low, other.high) == pytest.approx(
        (-found.value, -found.high, -found.low)
    )
