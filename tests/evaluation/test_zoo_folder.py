"""The folder of the zoo: what is evaluated, skipped, left out, and refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from olvae.config import ConfigError
from olvae.evaluation import zoo
from olvae.evaluation.observers.observer import Evaluated, Observer
from olvae.evaluation.protocol import Protocol
from olvae.evaluation.results import Row
from olvae.evaluation.runner import Request
from olvae.evaluation.zoo import Listed, _asked, _outdated, evaluate_zoo, read_zoo
from olvae.files import lines_sha256
from olvae.launcher import FailedProcessError
from olvae.models.loading.loader import Target
from olvae.pretrained_networks import INCEPTION, VGG16, MissingWeights
from tests.conftest import tiny
from tests.evaluation.test_results import results_of

PROTOCOLS = (Protocol("mine", size=64, posterior="sample", seed=3), Protocol())


class Choosing(Observer):
    """Has a name and a choice; notes what it derives from."""

    def __init__(self, name: str, tells_apart: bool = True, **chosen: str) -> None:
        self.name = name
        self.tells_apart = tells_apart
        self.chosen = chosen
        self.derived: list[dict] = []

    def choices(self) -> dict[str, str]:
        return self.chosen

    def derive(self, subjects: Any) -> dict:
        self.derived.append(subjects)
        return dict(subjects)


def request_of(data: str | Path, **changes: Any) -> Request:
    given = {"protocols": PROTOCOLS, "metrics": ("ssim", "psnr"), "images": 5}
    return Request([], data=str(data), **{**given, **changes})


def test_a_folder_is_of_one_request_by_its_settings(tmp_path):
    """Files of data by name and size: images and shards, or the one file that is named."""
    for name, content in (("b.png", b"123"), ("a.tar", b"1234"), ("notes.txt", b"1")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "c.jpg").write_bytes(b"12")
    data = tmp_path.resolve()
    files = [f"{data}/a.tar 4", f"{data}/b.png 3", f"{data}/folder.png/c.jpg 2"]
    observers = [Choosing("two", size="8"), Choosing("one"), Choosing("not", tells_apart=False)]
    asked = {
        "data": str(data),
        "files of data": lines_sha256(files),
        "observe": "one, two",
        "size": "8",
        "protocol": "mine",
        "posterior": "sample, seed 3",
        "metrics": "psnr, ssim",
        "images": "5",
        "precision": "[]",
    }
    assert _asked(request_of(tmp_path, observers=observers)) == asked
    one = _asked(request_of(tmp_path / "notes.txt"))
    assert one["files of data"] == lines_sha256([f"{data}/notes.txt 1"])
    assert (one["size"], one["observe"]) == ("64", "")
    elsewhere = _asked(request_of("hf://images"))
    assert elsewhere["data"] == "hf://images"
    assert elsewhere["files of data"] == lines_sha256([])


@pytest.mark.parametrize("here", [True, False])
def test_results_that_lack_a_metric_are_outdated_once_its_network_is_here(
    tmp_path, monkeypatch, here
):
    asked = []

    def find(file: Any, folder: Path) -> None:
        asked.append((file, folder))
        if not here:
            raise MissingWeights("not here")

    monkeypatch.setattr(zoo, "find_weights", find)
    lacking = Row("x", 2, {}, {"lpips": f"{VGG16.name} is not in y"})
    whole = Row("x", 2, {}, {"rfid": "needs more images"})
    found = {"a": results_of(whole, lacking), "b": results_of(whole)}
    assert _outdated(found, tmp_path) == ({"a"} if here else set())
    assert asked == [(VGG16, tmp_path)]
    assert INCEPTION not in dict(asked)


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Evaluate entries by name, with a stand-in for the evaluation; returns table and calls."""
    calls: list[Request] = []

    def run(names: list[str], sha256: str = "00", error: Exception | None = None, **changes: Any):
        def evaluated(one: Request, progress: Any) -> list[Evaluated]:
            assert progress == "progress"
            calls.append(one)
            (target,) = one.targets
            if target.name == "sd1-mse":
                raise error or ValueError("broken\nat length")
            row = Row(target.name, 90, {"psnr": 20.0})
            return [Evaluated(results_of(row, sha256=sha256), one.observers)]

        monkeypatch.setattr(zoo, "evaluate", evaluated)
        calls.clear()
        table = evaluate_zoo(
            read_zoo(names),
            lambda text: Target(lambda: tiny(), config={"not": "kept"}, name="x", given=text),
            request_of(tmp_path, **{"weights_dir": tmp_path, **changes}),
            tmp_path / "a" / "out",
            None,
            "progress",
        )
        return table, calls

    return run


def test_each_autoencoder_is_evaluated_once_and_what_fails_is_left_out(go, tmp_path, caplog):
    own = Choosing("own")
    (tmp_path / "sdxl").mkdir()  # a copy
    (table,), calls = go(["sd1-mse", "sdxl"], observers=[own])
    assert own.derived == [{}]
    names = [entry.name for entry in read_zoo(["sd1-mse", "sdxl"])]
    assert [call.targets[0].name for call in calls] == names
    assert calls[1].targets[0].given == str(tmp_path / "sdxl")
    assert calls[1].targets[0].config == {}
    assert calls[1].observers == [Listed(read_zoo(["sdxl"])[0]), own]
    assert caplog.messages == ["sd1-mse: broken"]
    assert [row.target for row in table.results.rows] == ["sdxl"]
    assert table.observers == [Listed(None, {"sd1-mse": "broken"}), own]
    out = tmp_path / "a" / "out"
    asked = json.loads((out / "request.json").read_text())
    assert asked["metrics"] == "psnr, ssim"
    assert {path.name for path in (out / "sdxl").iterdir()} == {"metrics.json", "metrics.md"}

    # A later command: what is there is skipped, and in the table.
    (table,), calls = go(["sdxl", "flux1"], observers=[own])
    assert [call.targets[0].name for call in calls] == ["flux1"]
    assert [row.target for row in table.results.rows] == ["sdxl", "flux1"]
    assert table.results.earlier == ()
    assert table.observers[0].missing == {}

    # Other requests, images and errors of another process.
    with pytest.raises(ConfigError, match=r"`out` .*other `metrics`, `images`: name"):
        go(["sdxl"], observers=[own], metrics=["psnr"], images=6)
    with pytest.raises(ValueError, match="sdxl there has results of other images: name"):
        go(["sd3"], observers=[own], sha256="11")
    with pytest.raises(FailedProcessError):
        go(["sd1-mse"], observers=[own], error=FailedProcessError("of one"))


def test_nothing_that_can_be_evaluated_is_an_error_with_its_reason(go, tmp_path):
    with pytest.raises(ValueError, match=r"^broken$"):
        go(["sd1-mse"])
    assert not (tmp_path / "a").exists()


def test_results_that_are_outdated_are_evaluated_again(go, monkeypatch):
    go(["sdxl"])
    monkeypatch.setattr(zoo, "_outdated", lambda found, folder: set(found))
    _, calls = go(["sdxl"])
    assert len(calls) == 1


def test_results_of_other_images_that_are_there_have_the_reason_in_their_names(go, tmp_path):
    go(["sdxl"])
    out = tmp_path / "a" / "out"
    content = json.loads((out / "sdxl" / "metrics.json").read_text())
    content["images"]["sha256"] = "11"
    content["results"][0]["target"] = "sd3"
    (out / "sd3").mkdir()
    (out / "sd3" / "metrics.json").write_text(json.dumps(content))
    (table,), calls = go(["sdxl"])
    assert calls == []
    assert [row.target for row in table.results.rows] == ["sdxl", "sd3 [other images]"]


@pytest.mark.parametrize("count", [1, 2])
def test_the_zoo_runs_in_one_process(go, monkeypatch, count):
    monkeypatch.setattr(zoo, "this_process", lambda: (0, count))
    if count == 1:
        assert len(go(["sdxl"])[1]) == 1
        return
    with pytest.raises(ConfigError, match="one process"):
        go(["sdxl"])
