"""What a training's options and files become before anything is built."""

import os

import pytest

from olvae.config import ConfigError, save
from olvae.data.places import load
from olvae.runs import Run, Settings
from olvae.training.settings import (
    TrainOptions,
    check_changes,
    current_job,
    find_changes,
    parse_time,
    read_plan,
    requeued_run,
    restarted,
    slurm_job,
)
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
    plan = read_plan(TrainOptions([tmp_path / "cfg.yaml"], **named))
    model = plan.config["model"]
    assert model["from"] == model["params"]["parts"]["teacher"]["params"]["autoencoder"] == str(run)
    assert plan.settings.weights == str(run)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_plan(TrainOptions([tmp_path / "cfg.yaml"], start_from="nothing"))


def test_parse_time_takes_days_hours_minutes_and_seconds():
    texts = {"3h50m": 13800, "45m": 2700, "90s": 90, "1d12h": 129600, "1h0m5s": 3605}
    assert {text: parse_time(text) for text in texts} == texts
    for text in ("", "3", "1.5h", "50m3h", "3 h", "-1h"):
        with pytest.raises(ConfigError, match=r"`time_limit` .*: give days"):
            parse_time(text)


LAUNCHERS = (
    *("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


@pytest.fixture
def launched(monkeypatch):
    """Set a launcher's variables, and no others."""

    def set_only(**variables: str) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_only()
    return set_only


@pytest.mark.parametrize(
    ("variables", "slurm", "job"),
    [
        ({}, None, None),
        ({"SLURM_JOB_ID": "12"}, "12", "12"),
        (
            {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "0"},
            *["10_0"] * 2,
        ),
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10"}, "12", "12"),
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12", "12"),
        ({"TORCHELASTIC_RUN_ID": "none"}, None, None),
        ({"TORCHELASTIC_RUN_ID": "mine"}, None, "torchrun mine"),
        ({"TORCHELASTIC_RUN_ID": "mine", "SLURM_JOB_ID": "12"}, "12", "12"),
    ],
)
def test_the_job_of_a_process_is_its_launchers(launched, variables, slurm, job):
    launched(**variables)
    assert (slurm_job(), current_job()) == (slurm, job)


@pytest.mark.parametrize(
    ("variables", "again"),
    [
        ({}, False),
        ({"SLURM_RESTART_COUNT": "0"}, False),
        ({"SLURM_RESTART_COUNT": ""}, False),
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_RESTART_COUNT": "0", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
    ],
)
def test_a_launcher_counts_its_restarts(launched, variables, again):
    launched(**variables)
    assert restarted() == again


def begun(logdir, stamp: str, name: str, job: str | None, age: int = 0, complete: bool = True):
    """A run folder of a job, some seconds old."""
    run = Run(logdir / f"{stamp}_{name}_bf16")
    run.checkpoints.mkdir(parents=True)
    save({"run": {"name": name} | ({} if job is None else {"job": job})}, run.config)
    os.utime(run.config, ns=(10**18 - age * 10**9,) * 2)
    if complete:
        run.last_checkpoint.touch()
    return run


def test_a_restarted_job_finds_its_newest_run_of_the_name(launched, tmp_path):
    begun(tmp_path, "2026-01-03", "mine", "13")
    begun(tmp_path, "2026-01-04", "mine", None)
    begun(tmp_path, "2026-01-05", "mine", "12", complete=False)
    begun(tmp_path, "2026-01-06", "not_mine", "12")
    older = begun(tmp_path, "2026-01-02", "mine", "12", age=20)
    newest = begun(tmp_path, "2026-01-01", "mine", "12", age=10)
    launched(SLURM_JOB_ID="12")
    assert requeued_run(tmp_path, "mine") is None
    launched(SLURM_RESTART_COUNT="1")
    assert requeued_run(tmp_path, "mine") is None
    launched(SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1")
    assert requeued_run(tmp_path, "mine") == newest
    assert requeued_run(tmp_path, "other") is None
    newest.config.write_text("a: [")
    assert requeued_run(tmp_path, "mine") == older
    older.config.unlink()
    assert requeued_run(tmp_path, "mine") is None


def test_a_job_that_was_queued_again_continues_its_run_by_its_config(
    launched, tmp_path, image_folder
):
    """Whatever the files say now; the time limit, devices and the trace are the command's."""
    config = student(image_folder)
    save(config, tmp_path / "mine.yaml")
    run = begun(tmp_path / "runs", "2026-01-01", "mine", "12")
    own = {"run": {"name": "mine", "job": "12", "seed": 7}}
    save({**config, **own}, run.config)
    given = {"logdir": tmp_path / "runs", "time_limit": "1m", "gpus": "2", "profile": 3, "seed": 5}
    launched(SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1")
    plan = read_plan(TrainOptions([tmp_path / "mine.yaml"], ["data.params.size=32"], **given))
    assert plan.resumed == run
    assert (plan.settings.seed, plan.settings.gpus, plan.time_limit) == (7, "2", 60.0)
    assert (plan.options.profile, plan.options.base, plan.options.overrides) == (3, (), ())
    assert plan.config["data"]["params"]["size"] == 16
    launched(SLURM_JOB_ID="12")
    assert read_plan(TrainOptions([tmp_path / "mine.yaml"], **given)).resumed is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ([], None),
        (["run.seed", "lightning.trainer.max_steps", "model.params.betas"], None),
        (["model.params.parts.teacher.params.autoencoder"], None),
        (["model.params.betas_of"], "model.params.betas_of: this"),
        (["run.seed", "data.params.size"], "data.params.size: this"),
        (["a", "b", "c"], "a, b, c: this"),
        (["a", "b", "run.gpus", "c", "d"], "a, b, c and 1 more: this"),
        (["a", "b", "c", "d", "e"], "a, b, c and 2 more: this"),
    ],
)
def test_a_resumed_run_may_change_settings_that_keep_its_data_and_networks(changed, named):
    if named is None:
        check_changes(changed)
        return
    with pytest.raises(ConfigError, match=rf"^`resume`: {named}.*`allow_changes`"):
        check_changes(changed)


def test_changes_of_a_resumed_run_have_both_values():
    previous = {"a": {"b": 1, "c": "x"}, "run": {"seed": 3, "gpus": "0", "name": "mine"}}
    config = {"a": {"b": 2, "d": [1, "é"]}, "run": {"name": "other"}}
    settings = Settings(seed=4, gpus=None, precision="bf16")
    assert find_changes(previous, config, settings) == {
        "a.b": "1 -> 2",
        "a.c": "x -> not set",
        "a.d": 'not set -> [1, "é"]',
        "run.gpus": "0 -> null",
        "run.precision": "32 -> bf16",
        "run.seed": "3 -> 4",
    }


@pytest.fixture
def recipe(tmp_path, image_folder):
    """A config's file in the folder of a run's paths."""
    path = tmp_path / "my config?.yaml"
    save(student(image_folder), path)
    return path


def test_settings_of_a_new_run(launched, recipe):
    """Defaults, the file's name, and what the options say."""
    plain = read_plan(TrainOptions([recipe])).settings
    assert plain == Settings(name="my-config-")
    given = {"name": "a", "precision": "bf16", "gpus": "0,1", "seed": 3}
    launched(SLURM_JOB_ID="5")
    settings = read_plan(TrainOptions([recipe], **given)).settings
    assert settings == Settings(**given, initial_seed=3, job="5")
    with pytest.raises(ConfigError, match="`name`"):
        read_plan(TrainOptions([recipe], name="a/b"))
    config = load([recipe])
    config["lightning"]["trainer"] |= {"precision": "bf16-mixed", "devices": 2}
    save(config, recipe)
    settings = read_plan(TrainOptions([recipe])).settings
    assert (settings.precision, settings.gpus) == ("bf16-mixed", None)


@pytest.mark.parametrize(
    ("trainer", "options", "precision", "gpus"),
    [
        ((), {}, "16", "1"),
        (("devices=2",), {}, "16", None),
        (("devices=4",), {}, "16", None),  # as it was, but given
        (("accelerator=cpu",), {}, "16", None),
        (("devices=2",), {"gpus": "3"}, "16", "3"),
        (("precision=bf16",), {}, "bf16", "1"),
        (("precision=bf16",), {"precision": "32"}, "32", "1"),
        (("max_steps=9",), {}, "16", "1"),
    ],
)
def test_devices_and_precision_of_the_trainer_count_as_options(
    launched, tmp_path, image_folder, trainer, options, precision, gpus
):
    """In a resumed run only where they are new."""
    run = begun(tmp_path / "runs", "2026-01-01", "mine", None)
    own = {"name": "mine", "precision": "16", "gpus": "1", "seed": 7, "initial_seed": 2}
    config = student(image_folder)
    config["lightning"]["trainer"] |= {"devices": 4, "precision": "64"}
    save({**config, "run": own}, run.config)
    overrides = [f"lightning.trainer.{text}" for text in trainer]
    plan = read_plan(TrainOptions(resume=run.path, overrides=overrides, **options))
    found = plan.settings
    assert (found.precision, found.gpus) == (precision, gpus)
    assert (found.seed, found.initial_seed, found.name) == (7, 2, "mine")
    assert found.begun is not None
    assert plan.previous["run"] == own


def test_a_resumed_run_keeps_its_name_and_takes_a_seed(launched, tmp_path, image_folder):
    run = begun(tmp_path / "runs", "2026-01-01", "mine", None)
    own = {"name": "mine", "seed": 7, "initial_seed": 2, "weights": "start"}
    save({**student(image_folder), "run": own}, run.config)
    settings = read_plan(TrainOptions(resume=run.path, name="mine", seed=0)).settings
    assert (settings.seed, settings.initial_seed, settings.weights) == (0, 2, "start")
    with pytest.raises(ConfigError, match="`name`"):
        read_plan(TrainOptions(resume=run.path, name="other"))


def test_files_beside_a_resumed_run_change_its_config(launched, tmp_path, image_folder):
    """Also where a job was queued again: the run that is named counts, not the job's."""
    logdir = tmp_path / "runs"
    run = begun(logdir, "2026-01-01", "mine", None)
    save({**student(image_folder), "run": {"name": "mine"}}, run.config)
    more = {"lightning": {"trainer": {"max_steps": 77}}}
    save(more, tmp_path / "more.yaml")
    begun(logdir, "2026-01-02", "more", "12")
    launched(SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1")
    options = TrainOptions([tmp_path / "more.yaml"], logdir=logdir, resume=run.path)
    plan = read_plan(options)
    assert plan.resumed == run
    assert plan.config["lightning"]["trainer"]["max_steps"] == 77


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"base": ()}, "`base` names"),
        ({"allow_changes": True}, "`allow_changes` is for `resume`"),
        ({"overrides": ["run.seed=3"]}, "^run: "),
        ({"overrides": ["data.params.sides=3"]}, r"^data\.params\.sides: "),
        (
            {"actual_resume": "x", "start_from": "olvae:photos-f8c12"},
            "`actual_resume`.*`start_from",
        ),
        ({"actual_resume": "x", "overrides": ["model.from=y"]}, "`actual_resume`.*model.from"),
        ({"time_limit": "soon"}, "`time_limit` soon"),
    ],
)
def test_options_that_exclude_each_other_are_refused(launched, recipe, options, wrong):
    with pytest.raises(ConfigError, match=wrong):
        read_plan(TrainOptions(**{"base": [recipe], **options}))


def test_options_are_overrides_that_the_users_own_refine(launched, recipe, tmp_path):
    (tmp_path / "images").mkdir()
    options = {"data": str(tmp_path / "images"), "wandb": "project"}
    refined = ["lightning.logger.wandb.params.project=other", "model.from=null"]
    plan = read_plan(TrainOptions([recipe], refined, **options))
    assert plan.config["data"]["params"]["root"] == str(tmp_path / "images")
    node = plan.config["lightning"]["logger"]["wandb"]
    assert node["target"].endswith("WandbLogger")
    assert node["params"]["project"] == "other"
    assert "from" not in plan.config["model"]
    assert plan.settings.weights is None
    node = read_plan(TrainOptions([recipe], wandb="project")).config["lightning"]["logger"]["wandb"]
    assert node["params"] == {"project": "project"}


def test_weights_and_teachers_are_noted_as_the_user_wrote_them(
    launched, recipe, target, tmp_path, monkeypatch
):
    """Relative paths with the absolute ones; a run by its name."""
    monkeypatch.chdir(tmp_path)
    weights = begun(tmp_path / "runs", "2026-01-01T00-00-00", "other", None)
    plan = read_plan(
        TrainOptions([recipe], actual_resume="other", teacher="diffusers:teacher")
    ).settings
    assert plan.weights == "runs/2026-01-01T00-00-00_other_bf16"
    assert plan.paths == {
        str(weights.path): "runs/2026-01-01T00-00-00_other_bf16",
        str(tmp_path / "teacher"): "teacher",
    }


def test_a_resumed_runs_teacher_is_found_from_another_folder(
    launched, target, tmp_path, image_folder, monkeypatch
):
    run = begun(tmp_path / "runs", "2026-01-01", "mine", None)
    config = student(image_folder, parts=parts(teacher={"autoencoder": "diffusers:teacher"}))
    (tmp_path / "user").mkdir()
    paths = {"/gone": "teacher", str(tmp_path): "runs", str(tmp_path / "teacher"): "teacher"}
    own = {"name": "mine", "paths": paths | {str(tmp_path / "user"): "user"}}
    save({**config, "run": own}, run.config)

    def found() -> str:
        model = read_plan(TrainOptions(resume=run.path)).config["model"]
        return model["params"]["parts"]["teacher"]["params"]["autoencoder"]

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert found() == f"diffusers:{tmp_path / 'teacher'}"
    monkeypatch.chdir(tmp_path)
    assert found() == "diffusers:teacher"

    # A name that is also a part of the word before it, and a subfolder.
    config["model"]["params"]["parts"] = parts(teacher={"autoencoder": "diffusers:user::vae"})
    save({**config, "run": own}, run.config)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert found() == f"diffusers:{tmp_path / 'user'}::vae"


def test_networks_of_the_target_are_not_replaced_by_overrides():
    for override in (
        "model.params.decoder_config.target=olvae.modules.sdvae.SDDecoder",
        "model.params.embed_dim=4",
    ):
        with pytest.raises(ConfigError, match="comes from olvae:photos-f8c12"):
            read_plan(TrainOptions(["folder"], [override], start_from="olvae:photos-f8c12"))


def test_overrides_beside_a_target_may_refer_to_other_settings(tmp_path):
    """Whose values they get from the whole config."""
    save({"data": {"params": {"size": 48}}}, tmp_path / "size.yaml")
    overrides = [
        "data.params.batch_size=${data.params.size}",
        "model.params.decoder_config.params.channels=${data.params.size}",
    ]
    files = ["folder", tmp_path / "size.yaml"]
    config = read_plan(TrainOptions(files, overrides, start_from="olvae:photos-f8c12")).config
    assert config["data"]["params"]["batch_size"] == 48
    assert "channels" in config["model"]["params"]["decoder_config"]["params"]
