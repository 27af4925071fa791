"""The study's rows and the order in which they run.

The commands themselves are replaced, but for one slow test.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage import data

from olvae import config as cfg
from olvae.data.places import load
from study.corpus import FOLDERS
from study.rows import QUESTIONS, RECIPE, Row, rows
from study.run import Study, StudyError


@pytest.mark.parametrize("quick", [False, True])
def test_every_row_of_the_study_is_a_valid_config(quick):
    found = rows(quick)
    assert len({row.name for row in found}) == len(found)
    for row in found:
        assert row.question in QUESTIONS
        assert cfg.validate(load([RECIPE], list(row.overrides))) == [], row.name


def finish(study: Study, name: str, **found: Any) -> None:
    path = study.out / "rows" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))


def test_rows_run_in_order_and_finished_ones_are_kept(tmp_path, monkeypatch, capsys):
    study = Study(tmp_path, tmp_path, [Row(name, "encoder") for name in "abc"])
    finish(study, "b", kept=True)
    (tmp_path / "speed.json").write_text("{}")
    ran = []

    def run(row: Row) -> dict[str, Any]:
        ran.append(row.name)
        return {"sizes": {"256": {"psnr": 20.0}}, "processor_seconds": 1.0}

    monkeypatch.setattr(study, "run_row", run)
    study.run(jobs=1)
    assert ran == ["a", "c"]
    assert study.result("b") == {"kept": True}
    shown = capsys.readouterr().out
    assert "2/3 a: 20.00 dB at 256, 1 s" in shown
    assert "3/3 c: 20.00 dB at 256, 1 s" in shown


def test_no_row_is_begun_after_one_that_fails(tmp_path, monkeypatch):
    study = Study(tmp_path, tmp_path, [Row(name, "encoder") for name in "abcd"])
    (tmp_path / "speed.json").write_text("{}")
    ran = []

    def run(row: Row) -> dict[str, Any]:
        ran.append(row.name)
        if row.name == "b":
            raise StudyError("too bad")
        time.sleep(0.2)
        return {"sizes": {"256": {"psnr": 20.0}}, "processor_seconds": 1.0}

    monkeypatch.setattr(study, "run_row", run)
    with pytest.raises(StudyError, match="too bad"):
        study.run(jobs=2)
    assert "d" not in ran
    assert study.is_done("a")


def test_a_command_that_fails_names_its_row_and_its_log(tmp_path):
    study = Study(tmp_path, tmp_path, [])
    with pytest.raises(StudyError, match=r"a: python -c .*3: .*a\.txt") as error:
        study.command("a", "-c", "print('too bad'); raise SystemExit(3)")
    assert min(study.command("a", "-c", "sum(range(10**6))"), error.value.seconds) > 0


@pytest.mark.slow
def test_a_row_of_the_study_stopped_and_continued(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus"
    for folder in FOLDERS:
        (corpus / folder).mkdir(parents=True)
        for name in ("astronaut", "coffee", "chelsea", "rocket"):
            Image.fromarray(getattr(data, name)()).resize((512, 512)).save(
                corpus / folder / f"{name}.png"
            )
    row = Row("a", "latent", ("model.params.lossconfig.params.wavelet_weight=0.5",), 4, sizes=(64,))
    study = Study(corpus, tmp_path / "out", [row])
    command = study.command
    monkeypatch.setattr(study, "command", lambda *words: command(*words, "--time-limit", "1s"))
    with pytest.raises(StudyError, match="stopped"):
        study._train(row, 4)
    monkeypatch.setattr(study, "command", command)
    before = json.loads((study.out / "evaluations" / "a" / "seconds.json").read_text())
    assert before > 1
    found = study.run_one(row)
    assert found["processor_seconds"] > 1.5 * before
    assert found["sizes"]["64"]["images"] == 4
    assert found["images"] == 16
    assert found["curve"][0] == [4]
    assert found["frechet_lite0"] > 1
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    assert Path(study.out / "rows" / "a.json").is_file()
