"""Runs whose validation images change: what is compared with what."""

import json

import pytest
import torch
from PIL import Image

from olvae.config import ConfigError
from olvae.data.picture_folder import FolderSource
from olvae.runs import Run
from olvae.training.run import validation_limit
from tests.conftest import plain_config
from tests.models.test_linear_code import linear_config
from tests.training.origins import checkpoint


def best_step(run: Run) -> int:
    return json.loads((run.checkpoints / "best.json").read_text())["step"]


@pytest.fixture
def perfect(train_with, image_folder, tmp_path) -> Run:
    """A run whose best weights no validation of the same images can beat, with four of them."""
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for path in sorted(image_folder.rglob("*.png"))[:4]:
        path.rename(held_out / path.name)
    config = plain_config(image_folder)
    config["data"]["params"] |= {"val_root": str(held_out), "batch_size": 1}
    run = train_with(config=config)
    note = run.checkpoints / "best.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"value": 99.0}))
    return run


def add(folder) -> None:
    Image.new("RGB", (48, 40), "red").save(folder / "new.png")


def replace(folder) -> None:
    for path in folder.iterdir():
        Image.new("RGB", (48, 40), "red").save(path)


@pytest.mark.parametrize(
    ("change", "overrides"),
    [
        pytest.param(add, (), marks=pytest.mark.slow),
        (replace, ()),
        (None, ("lightning.trainer.limit_val_batches=2",)),
        pytest.param(None, ("data.params.size=32",), marks=pytest.mark.slow),
    ],
)
def test_best_starts_anew_on_other_images(train_with, perfect, tmp_path, capfd, change, overrides):
    if change is not None:
        change(tmp_path / "held_out")
    before = checkpoint(perfect)["val_set"]
    capfd.readouterr()
    train_with("lightning.trainer.max_steps=6", *overrides, resume=perfect.path, allow_changes=True)
    now = checkpoint(perfect)["val_set"]
    line = f"validation images that differ from the run's own: {before} -> {now}: scores before"
    assert capfd.readouterr().err.count(line) == 1
    assert before.startswith("4 images, 16x16, ")
    assert best_step(perfect) == 6


def test_best_without_the_name_of_its_images_is_of_the_checkpoints(train_with, perfect, tmp_path):
    """As of a run that was begun before they had one, and has been resumed since."""
    note = perfect.checkpoints / "best.json"
    content = json.loads(note.read_text())
    del content["val_set"]
    note.write_text(json.dumps(content))
    best = best_step(perfect)
    train_with("lightning.trainer.max_steps=6", resume=perfect.path)
    assert best_step(perfect) == best
    add(tmp_path / "held_out")
    train_with("lightning.trainer.max_steps=8", resume=perfect.path, allow_changes=True)
    assert best_step(perfect) == 8


def test_a_run_that_did_not_note_its_images_is_noted(train_with, perfect, capfd):
    """As of earlier versions, for which train/ and valid/ were one set; then it is noted."""
    content = torch.load(perfect.last_checkpoint, weights_only=False)
    del content["val_set"]
    torch.save(content, perfect.last_checkpoint)
    line = "this run was begun by a version that did not note its validation images: they may be"
    for steps, times in ((6, 1), (8, 0)):
        capfd.readouterr()
        train_with(f"lightning.trainer.max_steps={steps}", resume=perfect.path)
        assert capfd.readouterr().err.count(line) == times


def test_a_resume_without_validation_keeps_the_name_of_its_images(
    train_with, perfect, tmp_path, capfd
):
    before = checkpoint(perfect)["val_set"]
    without = "lightning.trainer.limit_val_batches=0"
    train_with("lightning.trainer.max_steps=5", without, resume=perfect.path)
    assert checkpoint(perfect)["val_set"] == before
    add(tmp_path / "held_out")
    again = ("lightning.trainer.max_steps=6", "lightning.trainer.limit_val_batches=1.0")
    capfd.readouterr()
    train_with(*again, resume=perfect.path, allow_changes=True)
    assert f"run's own: {before} -> 5 images" in capfd.readouterr().err


def test_best_stays_on_the_same_images(train_with, perfect, tmp_path, capfd):
    """Also where they have moved, and where a limit is larger than their number."""
    best = best_step(perfect)
    for path in (tmp_path / "held_out").iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    limit = "lightning.trainer.limit_val_batches=9"
    train_with("lightning.trainer.max_steps=6", limit, resume=perfect.path)
    assert "differ from the run's own: 4 images" not in capfd.readouterr().err
    assert best_step(perfect) == best


def test_the_linear_code_is_compared_on_the_same_images(train_with, image_folder, capfd):
    config = linear_config(image_folder)
    config["data"]["params"]["batch_size"] = 1
    limit = "lightning.trainer.limit_val_batches"
    run = train_with(f"{limit}=2", config=config)
    lines = capfd.readouterr().err
    assert " dB on 2 " in lines
    assert "linear code" in lines.splitlines()[-5]
    train_with("lightning.trainer.max_steps=5", f"{limit}=1", resume=run.path)
    lines = capfd.readouterr().err
    assert "5 steps" in lines
    assert "the linear code" not in lines


@pytest.mark.parametrize(
    ("limit", "count", "batches"),
    [
        (None, 1, None),
        (1.0, 1, None),
        (0.5, 1, (1, 1)),
        (1, 1, (1, 1)),
        (2, 1, None),
        (1, 2, None),
        (1, 3, None),
    ],
)
def test_a_limit_that_holds_all_images_is_none(image_folder, limit, count, batches):
    source = FolderSource(image_folder, 16, 2, val_root=image_folder / "class0")
    assert source.val_images == 4
    assert validation_limit(source, limit, count) == batches


def test_a_fraction_of_less_than_a_batch_is_refused(train_with, image_folder):
    config = linear_config(image_folder)
    for given in ("0.001", "0.3"):
        with pytest.raises(ConfigError, match=rf"limit_val_batches: {given}: "):
            train_with(f"lightning.trainer.limit_val_batches={given}", config=config)
