"""What a training's options and files become before anything is built."""

import pytest

from olvae.config import ConfigError, save
from olvae.training.settings import TrainOptions, parse_time, read_plan
from tests.conftest import parts
from tests.training.origins import (
    save_teacher,
    student,
)


@pytest.fixture
def target(tmp_path) -> str:
    return save_teacher(tmp_path / "teacher")


@pytest.mark.parametrize("node", [{}, {"target": "olvae.models.parts.teacher.Teacher"}])
def test_the_teacher_option_replaces_the_autoencoder_of_the_configs_teacher(
    tmp_path, image_folder, target, node
):
    given = {**node, "params": {"autoencoder": "another", "decoder_weight": 0.5}}
    save(student(image_folder, parts={"teacher": given}), tmp_path / "cfg.yaml")
    config = read_plan(TrainOptions([tmp_path / "cfg.yaml"], teacher=target)).config
    assert config["model"]["params"]["parts"] == parts(
        teacher={"autoencoder": target, "decoder_weight": 0.5}
    )


def test_names_of_runs_are_looked_up_in_the_folder_of_runs(tmp_path, image_folder):
    run = tmp_path / "mine" / "2026-01-02T03-04-05_sdxl_abc"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    save(student(image_folder), tmp_path / "cfg.yaml")
    named = {"logdir": run.parent, "start_from": "sdxl", "teacher": "last"}
    model = read_plan(TrainOptions([tmp_path / "cfg.yaml"], **named)).config["model"]
    assert model["from"] == model["params"]["parts"]["teacher"]["params"]["autoencoder"] == str(run)


def test_read_plan_keeps_overrides_for_the_networks_of_a_target():
    """Not to those of the recipe, which it replaces."""
    added = ["model.params.decoder_config.params.padding=reflect"]
    params = read_plan(TrainOptions(["folder"], added, start_from="olvae:photos-f8c12")).config[
        "model"
    ]["params"]
    assert params["decoder_config"] == {"params": {"padding": "reflect"}}
    assert "target" in params["encoder_config"]


def test_parse_time_takes_days_hours_minutes_and_seconds():
    texts = {"3h50m": 13800, "45m": 2700, "90s": 90, "1d12h": 129600, "1h0m5s": 3605}
    assert {text: parse_time(text) for text in texts} == texts
    for text in ("", "3", "1.5h", "50m3h", "3 h", "-1h"):
        with pytest.raises(ConfigError, match=r"`time_limit` .*: give days"):
            parse_time(text)
