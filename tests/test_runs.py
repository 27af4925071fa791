import re

import pytest

from olvae.runs import create, open_run, run_of


def test_names(tmp_path):
    run = create(tmp_path / "logs", "my_demo", "bf16")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_my_demo_bf16", run.path.name)
    _timestamp, *name, precision = run.path.name.split("_")
    assert "_".join(name) == "my_demo"
    assert precision == "bf16"
    assert run.checkpoints.is_dir()
    assert run.images.is_dir()


def test_two_in_a_second_do_not_meet(tmp_path):
    runs = [create(tmp_path, "a", "32").path for _ in range(5)]
    assert len(set(runs)) == 5
    assert all(len(path.name.split("_")) == 3 for path in runs)


@pytest.mark.parametrize("name", ["", "a/b", "..\\x", "a b"])
def test_names_that_are_no_folders(tmp_path, name):
    with pytest.raises(ValueError, match="--name"):
        create(tmp_path, name, "32")
    assert not list(tmp_path.iterdir())


def test_open(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        open_run(tmp_path / "missing")
    run = create(tmp_path, "a", "32")
    with pytest.raises(FileNotFoundError, match=r"config\.yaml is missing"):
        open_run(run.path)
    run.config.write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"checkpoints.last\.ckpt is missing"):
        open_run(run.path)
    run.last_checkpoint.write_bytes(b"")
    assert open_run(run.path) == open_run(run.last_checkpoint) == run
    (run.checkpoints / "best.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"a file: name its run folder, or start a new run from these weights"):
        open_run(run.checkpoints / "best.ckpt")
    with pytest.raises(FileNotFoundError, match=r"a file: name its run folder$"):
        open_run(run.config)
    assert run_of(run.last_checkpoint) == run_of(run.checkpoints / "best.ckpt") == run
    assert run_of(run.images / "x.ckpt") is None
    run.config.unlink()
    assert run_of(run.last_checkpoint) is None
