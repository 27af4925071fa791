"""Runs over shards that other processes continue: of an epoch, each image comes once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import Run
from tests.conftest import plain_config
from tests.data.images import write_shards

COUNTS = (13, 9, 16, 10)  # 48 images
STEPS = "lightning.trainer.max_steps={}".format


@pytest.fixture
def keys(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """The images that training has used, since the last call."""
    file, whole = tmp_path / "keys", LiteAutoencoderKL.training_step

    def step(self, batch, batch_idx):
        with file.open("a") as stream:
            stream.write("".join(f"{key}\n" for key in batch["key"]))
        return whole(self, batch, batch_idx)

    def take() -> list[str]:
        found = file.read_text().splitlines()
        file.unlink()
        return found

    monkeypatch.setattr(LiteAutoencoderKL, "training_step", step)
    return take


def config(tmp_path: Path, images: Path, **params: Any) -> dict[str, Any]:
    """Six batches of four, by two loader processes, are half of an epoch."""
    write_shards(tmp_path / "shards", COUNTS)
    write_shards(tmp_path / "val", (4,))
    found = plain_config(images)
    found["lightning"]["trainer"]["limit_val_batches"] = 0
    found["data"] = {
        "target": "olvae.data.shards.webdataset.WebDatasetSource",
        "params": {
            "shards": str(tmp_path / "shards"),
            "val_shards": str(tmp_path / "val"),
            "size": 16,
            "batch_size": 4,
            "shuffle": 5,
            "num_workers": 2,
            **params,
        },
    }
    return found


OTHERS = {
    "workers": ("data.params.num_workers=3", STEPS(12)),
    "no workers": ("data.params.num_workers=0", "data.params.batch_size=6", STEPS(10)),
    "batches": ("data.params.batch_size=2", STEPS(18)),
    "accumulated": (
        "data.params.batch_size=2",
        "lightning.trainer.accumulate_grad_batches=2",
        STEPS(12),
    ),
}


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(
            others, marks=pytest.mark.slow if name in ("workers", "batches") else (), id=name
        )
        for name, others in OTHERS.items()
    ],
)
def test_other_loader_processes_continue_an_epoch(train_with, tmp_path, image_folder, keys, others):
    run = train_with(STEPS(6), config=config(tmp_path, image_folder))
    train_with(*others, resume=run.path, allow_changes=True)
    found = keys()
    assert (len(found), len({*found})) == (48, 48)


def test_two_ranks_continue_an_epoch_and_one_after_them(
    train_with, train_two, tmp_path, image_folder, keys
):
    # Three seconds: four processes train, with two loader processes each or one.
    run = train_with(STEPS(6), config=config(tmp_path, image_folder))
    train_two(
        "data.params.batch_size=2",
        "data.params.num_workers=1",
        STEPS(9),
        name=None,
        resume=run.path,
        allow_changes=True,
    )
    train_with(
        STEPS(12),
        "lightning.trainer.devices=1",
        "data.params.num_workers=0",
        "data.params.batch_size=4",
        resume=run.path,
        allow_changes=True,
    )
    found = keys()
    assert (len(found), len({*found})) == (48, 48)


def without_layouts(run: Run) -> None:
    """As versions before November 2026 wrote a checkpoint."""
    content = torch.load(run.last_checkpoint, weights_only=True)
    del content["layouts"]
    torch.save(content, run.last_checkpoint)


def test_an_old_run_keeps_its_order_however_often_it_is_resumed(
    train_with, tmp_path, image_folder, keys
):
    train_with(STEPS(6), config=config(tmp_path, image_folder, interleave=1))
    whole = keys()
    run = train_with(STEPS(2), config=config(tmp_path, image_folder, interleave=1))
    without_layouts(run)
    for steps in (4, 6):
        train_with(STEPS(steps), "data.params.interleave=null", resume=run.path, allow_changes=True)
    assert keys() == whole
