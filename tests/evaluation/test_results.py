import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from olvae.evaluation.protocol import Protocol
from olvae.evaluation.results import INFINITE, Results, Row
from olvae.evaluation.round_trip import Cost
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


def test_results_are_read_as_they_were_written(tmp_path):
    full = row(
        cost=Cost(1, 2, 3, 4.5, None, None, 8, "CPU"),
        observed={"bands": {"LL1": {"mse": 1.5, "share_of_signal": None}}, "mine": [1, "two"]},
        weights="ff",
    )
    baseline = Row("bicubic", 90, {"psnr": 20.0}, baseline=True)
    equal = Row("equal", 90, {"psnr": math.inf, "ssim": 1.0}, {"rfid": "no weights"})
    results = results_of(full, equal, baseline)
    first, second, third = results.as_dict()["results"]
    assert first["mine"] == [1, "two"]
    assert first["weights"] == "ff"
    assert third["baseline"] is True
    assert second.keys().isdisjoint({"bands", "mine", "baseline", "weights"})
    assert second["metrics"] == {"ssim": 1.0}  # JSON has no infinity
    assert second["skipped"] == {"psnr": INFINITE, "rfid": "no weights"}
    assert read_back(results, tmp_path) == results


def test_results_file_with_the_least_that_a_row_has(tmp_path):
    protocol = {"name": "mine", "version": 1}
    result = {"target": "a", "n": 3, "metrics": {"psnr": 20}}
    content = {"protocol": protocol, "protocol_hash": "0", "results": [result]}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert Results.read(tmp_path / "metrics.json").rows == [Row("a", 3, {"psnr": 20.0})]


def test_a_file_that_is_missing_or_of_an_unnamed_protocol_is_refused(tmp_path):
    path = tmp_path / "metrics.json"
    with pytest.raises(FileNotFoundError, match=r"no such metrics\.json"):
        Results.read(path)
    for missing in ("name", "version"):
        content = results_of(row()).as_dict()
        del content["protocol"][missing]
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"KeyError '{missing}'"):
            Results.read(path)


class Wording:
    """An observer that may be unable to word an entry."""

    name = "mine"

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.worded: list = []

    def columns(self, entry: object) -> dict[str, str]:
        if self.fails == "columns":
            raise KeyError("of a column")
        self.worded.append(entry)
        return {}

    def lines(self, rows: list) -> Iterator[str]:
        if self.fails == "lines":
            raise TypeError("of a line")
        yield ""


def test_entries_that_no_observer_can_word_are_refused(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(results_of(row(observed={"mine": 5}), row("b")).as_dict(), path)
    wording = Wording()
    Results.read(path, [wording])
    assert wording.worded == [5]
    for fails in ("columns", "lines"):
        with pytest.raises(ValueError, match=r"metrics\.json: .*Error .*of a"):
            Results.read(path, [Wording(fails)])


def test_equal_names_of_rows_are_counted(tmp_path):
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
    with pytest.raises(ValueError, match=re.escape(f"a.json: has results of {what}")):
        results_of(row()).beside(other)
    (added,) = results_of(row()).beside(other, mix=True).earlier
    assert added.target == f"{NAME} [{what}]"


def test_few_images_give_a_warning():
    assert results_of(Row("a", 19, {})).warnings() == [
        "few images, 19: other ones give other numbers"
    ]
    assert results_of(Row("a", 20, {})).warnings() == []
    assert results_of(Row("a", 20, {}), groups=3).warnings() == [
        "few groups, 3: intervals over so few are too narrow; of one there are none"
    ]
    assert results_of(Row("a", 20, {}), groups=20).warnings() == []


def test_warnings_of_metrics_and_images_come_once():
    details = {"kid": {"warning": "few subsets"}, "lpips": {}}
    rows = (Row("a", 20, {}, details=details), Row("b", 20, {}, details=details))
    found = results_of(*rows, unreadable=2, enlarged=3).warnings()
    assert [re.findall(r"\d+", line) for line in found] == [[], ["2"], ["3"]]
    assert found[0] == "few subsets"
    assert "unreadable" in found[1]
    assert "enlarged" in found[2]


def test_images_without_a_psnr_give_a_warning():
    (warning,) = results_of(Row("a", 20, {}, details={"psnr": {"equal_images": 2}})).warnings()
    assert warning == "a gives 2 of 20 images back exactly: they are not in its PSNR"


def test_unpublished_weights_give_a_warning():
    assert results_of(row()).warnings() == []
    (warning,) = results_of(row(published=False)).warnings()
    assert "LPIPS rests on a vgg.pth" in warning


@pytest.mark.parametrize("value", ["many", None, float("nan"), float("inf")])
def test_results_file_with_values_that_are_not_finite_numbers_is_refused(tmp_path, value):
    path = tmp_path / "metrics.json"
    content = results_of(row()).as_dict()
    content["results"][0]["metrics"]["psnr"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"metrics\.json"):
        Results.read(path)
