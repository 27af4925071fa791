"""What a run does before and after its steps, stage by stage: who is asked what, in which order."""

import logging
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olvae.config import ConfigError
from olvae.data.picture_folder import FolderSource
from olvae.runs import Run, Settings
from olvae.training import run as training
from olvae.training.run import _locate_data, _open_data, _run_folder, prepare, quieten, train
from olvae.training.settings import Plan, TrainOptions


def a_plan(folder: Path, resumed: Run | None = None, **changes: Any) -> Plan:
    options = TrainOptions(logdir=folder, **changes.pop("options", {}))
    parts = {
        "config": {"model": {"params": {}}, "data": {"target": "a.Source"}},
        "settings": Settings("mine", seed=3, gpus="0"),
        "time_limit": None,
        "previous": None,
    }
    return Plan(options=options, resumed=resumed, **{**parts, **changes})


@pytest.fixture
def calls(monkeypatch):
    """Replace functions of the module by ones that note their arguments, in order."""
    noted: list[tuple] = []

    def replace(**answers: Any) -> list[tuple]:
        for path, answer in answers.items():
            name = path.rpartition("__")[2]

            def note(*given: Any, name: str = name, answer: Any = answer, **more: Any) -> Any:
                noted.append((name, *given, *more.values()))
                if isinstance(answer, Exception):
                    raise answer
                return answer

            place: Any = training
            for part in path.split("__")[:-1]:
                place = getattr(place, part)
            monkeypatch.setattr(place, name, note)
        return noted

    return replace


@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_is_done_ends_at_once(tmp_path, calls, first):
    run = Run(tmp_path / "run")
    prepared = SimpleNamespace(steps_done=4, trainer_args={"max_steps": 4})
    noted = calls(prepare=prepared, processes__is_first=first, print_ending=None)
    assert train(a_plan(tmp_path, run)) == run
    ended = noted[2:]
    assert [(name, path) for name, path, _ in ended] == [("print_ending", run)] * first
    assert all("done, after 4 steps: " in title for _, _, title in ended)


def test_a_run_is_fitted_and_finished_in_its_folder(tmp_path, calls):
    run = Run(tmp_path / "run")
    plan = a_plan(tmp_path, run)
    prepared = SimpleNamespace(steps_done=4, trainer_args={"max_steps": 5}, plan=plan)
    noted = calls(prepare=prepared, fit="trainer", finish=None)
    assert train(plan) == run
    assert noted[0][1] is plan
    assert noted[1:] == [("fit", prepared, run), ("finish", prepared, run, "trainer")]


class Prepares(SimpleNamespace):
    """A model that is prepared for training; notes its checks."""

    def set_up_validation(self) -> None:
        self.noted.append("validation")

    def check(self, source: object) -> None:
        self.noted.append(("check", source))


@pytest.mark.parametrize("how", ["new", "from", "weights", "resumed"])
@pytest.mark.parametrize("stand_in", [None, "a teacher"])
def test_a_training_is_prepared_in_order(tmp_path, calls, how, stand_in):
    """Lock, data, devices, model, weights, and what later runs have to know of them."""
    run = Run(tmp_path / "run") if how == "resumed" else None
    options = {"actual_resume": "x"} if how == "weights" else {}
    plan = a_plan(
        tmp_path,
        run,
        options={**options, "overrides": ["a=1"]},
        previous={"of": "run"} if run else None,
    )
    config = {"model": {"params": {"a": 1}}, "lightning": {"trainer": {"devices": 2}}}
    if how == "from":
        config["model"]["from"] = "y"
    model = Prepares(noted=[], checksums={"c": "1"}, stand_in=stand_in, for_diffusion={"b": 2})
    checkpoint = {"images_seen": 8, "global_step": 4}
    noted = calls(
        processes__meet=None,
        _lock_resumed=None,
        _locate_data=(config, plan.settings),
        start_from=("weights", {"of": "start"}),
        resolve_devices={"accelerator": "cpu"},
        processes__process_count=2,
        resolve_precision="32-true",
        _open_data="source",
        make_data_absolute={"/a": "a"},
        quieten=None,
        pl__seed_everything=3,
        build_model=model,
        load_networks=("decoder",),
        runs__find_run="found",
        load_other_run={"of": "other"},
        load_resumed=checkpoint,
        untrained_half="encoder",
        _fit_trainer_args={"max_steps": 9},
        _name_val_set=None,
        continue_order=None,
    )
    held = ExitStack()
    prepared = prepare(plan, held)

    settings = Settings("mine", seed=3, gpus="0", paths={"/a": "a"})
    args = {"devices": 2, "accelerator": "cpu", "precision": "32-true"}
    weights_of = {"new": None, "resumed": {"of": "run"}, "weights": {"of": "other"}}
    found = checkpoint if run else {}
    expected = [
        ("meet",),
        ("_lock_resumed", run, held),
        ("_locate_data", plan),
        *([("start_from", config, ["a=1"])] if how == "from" else []),
        ("resolve_devices", "0", args),
        ("process_count", args),
        ("resolve_precision", "32", "cpu"),
        ("_open_data", plan, config, 2, 1),
        ("make_data_absolute", config),
        ("quieten",),
        ("seed_everything", 3, True, False),
        ("build_model", config, args),
        ("load_networks", model, "weights" if how == "from" else None, settings),
        *([("find_run", "x", tmp_path)] if how == "weights" else []),
        *([("load_other_run", model, "found", config)] if how == "weights" else []),
        *([("load_resumed", model, run, settings)] if run else []),
        ("untrained_half", model, weights_of.get(how, {"of": "start"})),
        ("_fit_trainer_args", args, model, "source", 2, found),
        ("_name_val_set", model, "source", {"max_steps": 9}, 2, found),
        ("continue_order", model, "source", found, 2),
    ]
    # Lightning's settings are gathered in one dict, which is whole at the end.
    assert [call for call in noted if call[0] != "resolve_devices"] == [
        call for call in expected if call[0] != "resolve_devices"
    ]
    assert next(call[1] for call in noted if call[0] == "resolve_devices") == "0"

    assert model.noted == ["validation", ("check", "source")]
    assert model.seed == 3
    assert config["model"]["params"] == ({"a": 1, "b": 2} if stand_in else {"a": 1})
    assert config["run"]["untrained"] == "encoder"
    assert config["run"]["checksums"] == {"c": "1"}
    assert (prepared.images_seen, prepared.steps_done) == ((8, 4) if run else (0, 0))
    assert (prepared.fresh, prepared.trainer_args) == (("decoder",), {"max_steps": 9})


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_is_compared_where_its_data_are_now(
    tmp_path, monkeypatch, calls, capsys, allowed, first
):
    """Both configs have the paths of today, and the user's own words for them are kept."""
    node = {"target": "olvae.data.picture_folder.FolderSource"}
    old, now, other = (str(tmp_path / name) for name in ("old", "now", "other"))
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    before = {"data": {**node, "params": {"root": old, "val_root": "other"}}, "model": {"a": 1}}
    plan = a_plan(
        tmp_path,
        Run(tmp_path),
        config={"data": {**node, "params": {"root": old}}, "model": {"a": 2}},
        previous=before,
        settings=Settings(paths={old: "old"}),
        options={"allow_changes": allowed},
    )
    noted = calls(
        find_moved_data={old: now},
        find_changes={"model.a": "1 -> 2"},
        processes__is_first=first,
        check_changes=None,
    )
    config, settings = _locate_data(plan)
    assert config == {"data": {**node, "params": {"root": now}}, "model": {"a": 2}}
    assert settings.paths[old] == settings.paths[now] == "old"
    assert settings.paths[other] == "other"  # of the run's own config
    _, previous, *new = next(call for call in noted if call[0] == "find_changes")
    assert previous["data"]["params"] == {"root": now, "val_root": other}
    assert new == [config, settings]
    checks = [call for call in noted if call[0] == "check_changes"]
    assert checks == [("check_changes", {"model.a": "1 -> 2"})] * (not allowed)
    printed = capsys.readouterr().err.splitlines()[1:]
    assert printed == ["  model.a: 1 -> 2"] * first
    # The plan keeps what the files say.
    assert before["data"]["params"]["root"] == old


def test_equal_settings_print_nothing(tmp_path, calls, capsys):
    plan = a_plan(tmp_path, Run(tmp_path), config={"data": {}}, previous={"data": {}})
    calls(find_moved_data={}, find_changes={}, make_data_absolute={})
    _locate_data(plan)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("resumed", [False, True])
def test_loader_processes_of_a_new_run_are_chosen(tmp_path, image_folder, calls, resumed):
    source = FolderSource(str(image_folder), 16, 2)
    plan = a_plan(tmp_path, Run(tmp_path) if resumed else None)
    node = {"target": "a.Source"}
    noted = calls(share_indexes=None, cfg__instantiate=source, processes__choose_workers=None)
    assert _open_data(plan, {"data": node}, 4, 2) is source
    assert noted == [
        ("share_indexes", node),
        ("instantiate", node),
        *([] if resumed else [("choose_workers", source, node, 4, 2)]),
    ]


@pytest.fixture
def folder_of(tmp_path, monkeypatch):
    """Make a run folder as a process with these variables does."""

    def enter(held: ExitStack, rank: int = 0, launched: bool = False, **variables: str) -> Any:
        for name in (training.RUN_ENV, "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        processes = training.processes
        monkeypatch.setattr(processes, "meet", lambda: (rank, 2))
        monkeypatch.setattr(processes, "find_launcher", lambda: "torchrun" if launched else None)
        # What the first process says comes first.
        monkeypatch.setattr(training, "of_each", lambda text: [text or "from the first", "other"])
        prepared: Any = SimpleNamespace(
            plan=a_plan(tmp_path),
            settings=Settings("mine", precision="bf16"),
            config={"run": {}},
        )
        return _run_folder(prepared, held)

    return enter


@pytest.mark.parametrize(
    ("rank", "launched", "variables", "found"),
    [
        (0, False, {"OLVAE_RUN": "theirs", "LOCAL_RANK": "1"}, "theirs"),
        (1, True, {"OLVAE_RUN": "theirs", "LOCAL_RANK": "1"}, "from the first"),
        (1, True, {}, "from the first"),
        (0, True, {"OLVAE_RUN": "theirs", "LOCAL_RANK": "0"}, None),
        (0, False, {"OLVAE_RUN": "of an earlier training"}, None),
        (0, False, {"LOCAL_RANK": "0"}, None),
    ],
)
def test_a_process_finds_the_folder_of_the_first_one(
    tmp_path, folder_of, rank, launched, variables, found
):
    with ExitStack() as held, folder_of(held, rank, launched, **variables) as run:
        if found is not None:
            assert run == Run(Path(found))
            assert not any(tmp_path.iterdir())
            return
        assert run.path.parent == tmp_path
        assert run.path.name.endswith("_mine_bf16")
        assert os.environ[training.RUN_ENV] == str(run.path)
        assert "begun: " in run.config.read_text()
        assert run.lock.read_text().startswith("process ")


@pytest.mark.parametrize(
    ("error", "kept", "printed"),
    [
        (KeyboardInterrupt, False, True),
        (ValueError, False, False),
        (KeyboardInterrupt, True, False),
    ],
)
def test_a_folder_without_results_is_removed(
    tmp_path, monkeypatch, capsys, folder_of, error, kept, printed
):
    """Whatever of it can't be."""
    removed = []
    remove = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **how: removed.append(how) or remove(path, **how)
    )
    held = ExitStack()
    folder = folder_of(held)
    run = folder.__enter__()
    if kept:
        (run.checkpoints / "last.ckpt").touch()
    with pytest.raises(error):
        folder.gen.throw(error())
    held.close()
    assert run.path.exists() == kept
    assert removed == ([] if kept else [{"ignore_errors": True}])
    assert capsys.readouterr().err.startswith(f"{run.path}: removed") == printed


def test_a_lock_that_is_held_ends_the_preparation(tmp_path, calls):
    calls(processes__meet=None, _lock_resumed=ConfigError("is being trained"))
    with pytest.raises(ConfigError, match="being trained"):
        prepare(a_plan(tmp_path, Run(tmp_path)), ExitStack())


def test_lightnings_notices_are_silent(monkeypatch):
    names = ("lightning.pytorch", "lightning.fabric", "lightning")
    for name in names:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
    quieten()
    assert [logging.getLogger(name).level for name in names] == [logging.ERROR] * 3
