"""Loggers of ``lightning.logger`` beside TensorBoard: the same scalars, pictures, and the same place after a resume."""

import csv
import json
import struct
from collections.abc import Iterator
from types import ModuleType

import pytest
from PIL import Image

from olvae.config import ConfigError
from olvae.runs import Run
from olvae.training.loggers import make_loggers
from tests.conftest import tiny_config
from tests.training.events import scalars

CSV = "lightning.logger.csv.target=lightning.pytorch.loggers.CSVLogger"
STEPS = ("lightning.trainer.val_check_interval=2", "lightning.trainer.log_every_n_steps=1")


def scalars_of_tensorboard(run) -> dict[tuple[str, int], float]:
    return {(tag, step): value for tag, values in scalars(run.path).items() for step, value in values.items()}


def scalars_of_csv(run) -> dict[tuple[str, int], float]:
    with (run.path / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (name, int(row["step"])): float(value)
        for row in rows
        for name, value in row.items()
        if value and name not in ("step", "epoch")
    }


def test_the_same_scalars_also_after_a_resume(train_with, image_folder):
    run = train_with("lightning.trainer.max_steps=2", CSV, *STEPS, config=tiny_config(image_folder))
    first = scalars_of_csv(run)
    assert {step for _, step in first} == {1, 2}
    train_with("lightning.trainer.max_steps=4", resume=run.path)
    found = scalars_of_csv(run)
    assert first.items() <= found.items()
    expected = scalars_of_tensorboard(run)
    names = {name for name, _ in found}
    assert {"train/total", "val/psnr", "lr"} & names >= {"val/psnr"}
    assert found == pytest.approx({key: value for key, value in expected.items() if key[0] in names}, rel=1e-6)
    assert {name for name, _ in expected} - names <= {"epoch", "step"}
    assert [path.name for path in (run.path / "csv").iterdir()] == ["metrics.csv"]


def test_what_was_logged_after_the_checkpoint_is_not_there_twice(train_with, image_folder):
    run = train_with("lightning.trainer.max_steps=2", CSV, *STEPS, config=tiny_config(image_folder))
    path = run.path / "csv" / "metrics.csv"
    lines = path.read_text().splitlines()
    names = lines[0].split(",")
    lost = ",".join("3" if name == "step" else "99.0" if name == "val/psnr" else "" for name in names)
    path.write_text("\n".join([*lines, lost]) + "\n")  # of a third step, before a kill
    train_with("lightning.trainer.max_steps=4", resume=run.path)
    found = scalars_of_csv(run)
    assert 99.0 not in found.values()
    assert {step for _, step in found} == {1, 2, 3, 4}


def test_rows_are_on_disk_before_training_begins(tmp_path):
    """A kill in the first steps after a resume loses nothing; one that tore the last line is no mistake."""
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("a,epoch,step\n1.5,0,1\n2.5,0,2\n,0")
    make_loggers({"csv": {"target": "lightning.pytorch.loggers.CSVLogger"}}, Run(tmp_path), 1)
    assert scalars_of_csv(Run(tmp_path)) == {("a", 1): 1.5}


@pytest.fixture
def wandb(monkeypatch) -> Iterator[ModuleType]:
    """W&B offline. Afterwards its run is finished and its service ended: they hook into sys.stderr until then."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    yield wandb
    wandb.finish()
    wandb.teardown()


def test_wandb_offline(train_with, image_folder, wandb):
    logger = ("lightning.logger.wandb.target=lightning.pytorch.loggers.WandbLogger", CSV)
    run = train_with("lightning.trainer.max_steps=2", *logger, *STEPS, config=tiny_config(image_folder))
    wandb.finish()
    train_with("lightning.trainer.max_steps=4", resume=run.path)
    wandb.finish()  # as the end of the process does: all is written
    pieces = sorted((run.path / "wandb").glob("offline-run-*"))
    assert len(pieces) == 2
    assert {next(piece.glob("run-*.wandb")).stem.removeprefix("run-") for piece in pieces} == {run.path.name}
    found, pictures = {}, []
    for piece in pieces:
        for row in _history(next(piece.glob("run-*.wandb"))):
            step = row["trainer/global_step"]
            found |= {(name, step): value for name, value in row.items() if isinstance(value, float | int)}
            pictures += [piece / "files" / name for name in row.get("val/images/filenames", [])]
    expected = scalars_of_csv(run)
    assert expected == pytest.approx({key: found[key] for key in expected}, rel=1e-6)
    drawn = sorted(run.images.glob("step=*.png"))
    assert [Image.open(path).size for path in pictures] == [Image.open(path).size for path in drawn]


def _history(path) -> list[dict]:
    """The rows in W&B's file."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def _records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format after 7 bytes of W&B's: pieces of records with a header of 7 bytes, in blocks of 32 KiB."""
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"target": "lightning.pytorch.loggers.CometLogger"}, r"^lightning\.logger\.mine: .*comet"),
        (
            {"target": "lightning.pytorch.callbacks.Timer"},
            r"^lightning\.logger\.mine: .*Timer is no logger",
        ),
    ],
)
def test_what_is_no_logger(tmp_path, node, said):
    with pytest.raises(ConfigError, match=said):
        make_loggers({"mine": node}, Run(tmp_path), 0)
