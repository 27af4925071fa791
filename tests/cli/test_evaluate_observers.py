"""An observer of a user's own, from outside of the package, through the real command."""

import json
import sys
import textwrap

import pytest

TOY = """
    from markupsafe import Markup

    from olvae.evaluation.observers.observer import Observer


    class Brightness(Observer):
        name, title = "brightness", "Brightness"

        def __init__(self):
            self.changes = {}  # by target, image by image

        def update(self, batch):
            change = (batch.y.double() - batch.x.double()).mean((1, 2, 3)).tolist()
            self.changes.setdefault(batch.target, {}).update(zip(batch.keys, change))

        def state(self):
            return self.changes

        def merge(self, state):
            for target, changes in state.items():
                self.changes.setdefault(target, {}).update(changes)

        def result(self, target, draw):
            return {"mean": sum(self.changes[target].values()) / len(self.changes[target])}

        def columns(self, entry):
            return {"brighter by": f"{entry['mean']:+.2f}"}

        def lines(self, rows):
            seen = [row for row in rows if "brightness" in row.observed]
            yield from (f"{row.target}: image by image" for row in seen)

        def section(self, page):
            return Markup("<p>{}</p>").format(f"<{len(self.changes)} targets>")


    class Overflowing(Brightness):
        name = "overflowing"

        def examine(self, subjects, size, device):
            raise ArithmeticError("a picture of its own is not finite")


    Nothing = dict
"""


@pytest.fixture
def evaluate(olvae, trained, tmp_path, monkeypatch):
    (tmp_path / "toys.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toys", raising=False)
    arguments = (
        "evaluate",
        trained,
        "--metrics",
        "psnr",
        "--images",
        4,
        "--data",
        trained.parent.parent / "photos",
    )

    def run(*more):
        return olvae(*arguments, "--out", tmp_path / "out", *more)

    return run


def test_an_observer_is_in_metrics_json_in_the_tables_and_on_the_page(evaluate, trained, tmp_path):
    out = tmp_path / "out"
    code, _, err = evaluate("--observe", "toys.Brightness")
    assert code == 0, err
    rows = json.loads((out / "metrics.json").read_text())["results"]
    change = f"{rows[0]['brightness']['mean']:+.2f}"
    assert f"{trained.name}: image by image" in err
    for text in (err, (out / "metrics.md").read_text(), (out / "report.html").read_text()):
        assert change in text
    assert "brighter by" in (out / "metrics.md").read_text()
    page = (out / "report.html").read_text()
    assert '<a href="#brightness">Brightness</a>' in page
    assert "<p>&lt;1 targets&gt;</p>" in page


def test_observe_takes_a_list_as_metrics_does(evaluate, tmp_path):
    code, _, err = evaluate("--observe", "colour, toys.Brightness", "--observe", "round_trips")
    assert code == 0, err
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    assert {"colour", "brightness", "round_trips"} <= row.keys()


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (["colour,"], "--observe : choose from colour, ifid, "),
        (["roundtrips"], "--observe roundtrips: choose from colour, ifid, "),
        (["toys.Nothing"], "toys.Nothing is not a kind of"),
        (["toys.Brighter"], "toys has no Brighter; did you mean Brightness"),
        (
            ["toys.Brightness", "toys.Brightness"],
            "two entries of metrics.json would be called brightness",
        ),
    ],
)
def test_mistakes_in_observe_are_one_line(evaluate, tmp_path, classes, text):
    code, _, err = evaluate(*(argument for name in classes for argument in ("--observe", name)))
    assert code == 2
    assert text in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_observer_whose_own_pictures_overflow_costs_no_metric(evaluate, tmp_path, caplog):
    code, _, _ = evaluate("--observe", "toys.Overflowing")
    assert code == 0
    assert "overflowing: left out: " in caplog.text
    (result,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    assert "overflowing" not in result
    assert result["metrics"]["psnr"] > 0
