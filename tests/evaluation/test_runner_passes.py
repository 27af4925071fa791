"""What a request asks of whom: its parts, its images, its round trips, and their rows."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import Sides
from olvae.evaluation import runner
from olvae.evaluation.observers.observer import Observer, Subject
from olvae.evaluation.protocol import Protocol
from olvae.evaluation.round_trip import RoundTrip
from olvae.evaluation.runner import (
    Request,
    _describe_images,
    _measure_subjects,
    _open,
    evaluate,
    fingerprint,
    found_by,
    is_examined,
    observe,
)
from olvae.models.loading.loader import Target
from tests.conftest import tiny


class Mine(Observer):
    """Has conflicts, and notes what it is asked."""

    def __init__(self, name: str = "mine", *conflicts: str) -> None:
        self.name = name
        self.found = conflicts
        self.asked: list[tuple] = []

    def conflicts(self, *given: Any) -> tuple[str, ...]:
        self.asked.append(given)
        return self.found

    def examine(self, *given: Any) -> None:
        self.asked.append(given)

    def result(self, *given: Any) -> Any:
        self.asked.append(given)
        return {"of": given[0]} if given[1] == 0 else None


TARGET = Target(lambda: tiny(), config={}, name="a", given="a")


def test_parts_of_a_request_fit_together():
    observers = [Mine(), Mine(""), Mine(""), Mine("other")]
    Request([TARGET], metrics=["psnr"], observers=observers)
    assert observers[0].asked == [(["a"], ["psnr"], observers)]
    for wrong, message in (
        ([Mine("metrics")], "called metrics"),
        ([Mine(), Mine("other"), Mine()], "called mine"),
        ([Mine("mine", "first"), Mine("other", "second")], "first\nsecond"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            Request([TARGET], observers=wrong)
        assert len(caught.value.mistakes) == message.count("\n") + 1


class WithBaseline(Mine):
    """Derives a baseline, and completes rows from all of their protocol."""

    def derive(self, subjects: Any) -> dict[str, Subject]:
        return {**subjects, "base": Subject(tiny(), baseline=True)}

    def complete(self, row: Any, rows: Any) -> Any:
        return replace(row, skipped={**row.skipped, "among": ", ".join(rows)})


def test_a_baseline_is_reconstructed_once_and_a_target_in_every_sampling_mode(
    image_folder, monkeypatch
):
    """Of two protocols in one pass over the first images, some of which are enlarged."""
    made, grouped, seen = [], [], []
    whole = runner.observe
    rows_under = runner.rows_under

    def trip(model: Any, *given: Any) -> RoundTrip:
        made.append((given[2], given[0], given[1]))
        return RoundTrip(model, *given)

    def observed(*given: Any) -> Any:
        digests = whole(*given)
        given[-1].update(dict.fromkeys(digests, "one patient"))
        seen.append((given[-2], digests))
        return digests

    def noted(*given: Any) -> Any:
        grouped.append(given[3])
        return rows_under(*given)

    monkeypatch.setattr(runner, "RoundTrip", trip)
    monkeypatch.setattr(runner, "observe", observed)
    monkeypatch.setattr(runner, "rows_under", noted)
    protocols = [Protocol("one", posterior="sample"), Protocol("two", posterior="sample", seed=5)]
    request = Request(
        [TARGET],
        protocols,
        ["psnr"],
        data=str(image_folder),
        size=64,
        images=3,
        observers=[WithBaseline()],
    )
    first, second = evaluate(request)
    assert made == [("a", "cpu", 0), ("base", "cpu", None), ("a", "cpu", 5)]
    ((shards, digests),) = seen
    assert (shards, len(digests)) == (False, 3)
    assert grouped == [dict.fromkeys(digests, "one patient")] * 2

    # Results of each.
    images = first.results.images
    assert images == {
        "source": str(image_folder),
        "n": 3,
        "groups": 1,
        "sha256": fingerprint(digests),
        "unreadable": 0,
        "unreadable_files": {},
        "enlarged": 3,
    }
    for found, protocol in ((first, protocols[0]), (second, protocols[1])):
        assert found.results.protocol["name"] == protocol.name
        assert found.results.protocol_hash == replace(protocol, size=64, n=3).hash()
        model, baseline = found.results.rows
        assert (model.target, model.baseline, model.skipped) == ("a", False, {"among": "a, base"})
        assert (baseline.target, baseline.baseline, baseline.cost) == ("base", True, None)
        assert baseline.weights is None
        assert len(model.weights) == 64
        # Of the first sampling mode alone.
        assert model.observed == ({"mine": {"of": "a"}} if found is first else {})
    one, two = (found.results.rows for found in (first, second))
    assert one[0].metrics != two[0].metrics
    assert one[1].metrics == two[1].metrics


@pytest.mark.parametrize(
    ("data", "trains", "warned"), [("x", True, True), ("x", False, False), (None, True, False)]
)
def test_images_are_opened_as_the_request_says(monkeypatch, data, trains, warned):
    """With a warning where a target trains on them."""
    asked, lines, given = [], [], []
    source = SimpleNamespace(size=Sides(16, 24), evaluate_with=asked.append, limit=asked.append)
    monkeypatch.setattr(
        runner, "open_images_for", lambda *arguments: given.append(arguments) or source
    )
    monkeypatch.setattr(runner, "trains_on", lambda *arguments: given.append(arguments) or trains)
    monkeypatch.setattr(runner, "warn_once", lines.append)
    model = tiny()
    targets = [Target(lambda: model, config={"c": 1}, name="a"), Target(lambda: model, name="b")]
    request = Request(targets, data=data, size=16, images=4 if data else None)
    protocol = Protocol(resample="bilinear", size=64)
    assert _open(request, protocol, {"a": Subject(model)}) is source
    assert given[0] == ({"a": model}, {"c": 1}, data, 16, 64)
    assert given[1:] == ([({"c": 1}, "x"), ({}, "x")] if data else [])
    assert [line.partition(" ")[0] for line in lines] == ["a", "b"] * warned
    transform = replace(protocol, size=Sides(16, 24)).transform
    assert asked == [transform, 4] if data else [transform]


@pytest.mark.parametrize("data", [None, "x"])
def test_images_that_are_gone_are_named_with_a_remedy(monkeypatch, data):
    def gone(*_: Any) -> None:
        raise FileNotFoundError("/images: no such folder")

    monkeypatch.setattr(runner, "open_images_for", gone)
    with pytest.raises(FileNotFoundError) as caught:
        _open(Request([TARGET], data=data), Protocol(), {})
    message = str(caught.value)
    assert message.startswith("/images: no such folder")
    assert ("`data`" in message) == (data is None)


@pytest.mark.parametrize("first", [True, False])
def test_images_of_all_processes_are_described(monkeypatch, first):
    """Files that one could not read, groups, and an image that is its own group."""
    shared = []
    errors = SimpleNamespace(share=lambda: shared.append(True), lost=7)
    loader: Any = SimpleNamespace(read_errors=errors, enlarged=2)
    source: Any = SimpleNamespace(unreadable=SimpleNamespace(reasons={"a.png": "cut off"}))

    def gather(own: tuple) -> Any:
        assert own == ({"a.png": "cut off"}, 2)
        return [own, ({"b.png": "no image"}, 3)] if first else None

    monkeypatch.setattr(runner, "gather", gather)
    digests = {"x": b"1", "y": b"2", "z": b"3"}
    config = {"data": {"target": "olvae.data.picture_folder.FolderSource", "params": {"root": "r"}}}
    other = Target(lambda: tiny(), config=config, name="a")
    found = _describe_images(
        Request([other], data=None), source, loader, digests, {"x": "g", "y": "g"}
    )
    assert found == {
        "source": "r",
        "n": 3,
        "groups": 2,
        "sha256": fingerprint(digests),
        "unreadable": 7,
        "unreadable_files": {"a.png": "cut off", "b.png": "no image"} if first else {},
        "enlarged": 5 if first else 0,
    }
    assert shared == [True]
    plain = _describe_images(Request([other], data="s"), source, loader, digests, {})
    assert plain["source"] == "s"
    assert "groups" not in plain


def test_states_of_metrics_and_errors_of_other_processes_are_heard(monkeypatch):
    """After each batch; an image that comes once is no repeat."""
    merged, looked, lines = [], [], []
    monkeypatch.setattr(runner, "check_others", lambda: looked.append(True))
    monkeypatch.setattr(runner, "warn_once", lines.append)
    monkeypatch.setattr(
        runner, "gather_parts", lambda states: [(key, f"of {state}") for key, state in states]
    )
    metrics: Any = SimpleNamespace(states=lambda: ["one", "two"], merge=merged.append)
    batches = [
        {"image": torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "key": [key]} for key in ("a", "b")
    ]
    assert len(observe(batches, {}, {}, {("x", 1): metrics})) == 2
    assert merged == ["of one", "of two"]
    assert looked == [True] * 2
    assert lines == []


def test_an_observer_runs_models_alone_at_the_shorter_side(monkeypatch):
    observer = Mine()
    source: Any = SimpleNamespace(size=Sides(32, 16))
    assert is_examined(observer, {"a": 1}, source, "cuda")
    assert found_by(observer, "a", 0) == {"of": "a"}
    assert found_by(observer, "a", 1) is None
    assert observer.asked == [({"a": 1}, 16, "cuda"), ("a", 0), ("a", 1)]


def test_costs_are_of_the_first_sampling_mode_and_of_no_baseline(monkeypatch):
    model = tiny()
    trips: Any = {
        ("a", draw): SimpleNamespace(cost=lambda size, d=draw: (d, size)) for draw in (0, 1)
    }
    metrics: Any = dict.fromkeys([("a", 0), ("a", 1), ("base", 0)])
    subjects = {"a": Subject(model), "base": Subject(model, baseline=True)}
    monkeypatch.setattr(runner, "measure", lambda name, found, n, **more: (name, n, more))
    source: Any = SimpleNamespace(size=Sides(32, 16))
    broken = Mine("broken")
    broken.examine = lambda *_: [][0]  # type: ignore[method-assign]
    rows = _measure_subjects(subjects, trips, metrics, [Mine(), broken], source, "cpu", 9)
    weights = runner.tensors_sum(model.state_dict())
    own = {"cost": (0, source.size), "weights": weights, "baseline": False}
    none = {"cost": None, "weights": None, "baseline": True}
    assert rows == {
        ("a", 0): ("a", 9, {**own, "observed": {"mine": {"of": "a"}}}),
        ("a", 1): ("a", 9, {**own, "observed": {}}),
        ("base", 0): ("base", 9, {**none, "observed": {"mine": {"of": "base"}}}),
    }
