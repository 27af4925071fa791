"""Loggers of ``lightning.logger`` beside TensorBoard: the same scalars, pictures,
and the same place after a resume."""

import csv
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import Logger
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from olvae.config import ConfigError
from olvae.data.places import load
from olvae.runs import Run
from olvae.training import loggers
from olvae.training.loggers import make_loggers, read_curves
from tests.conftest import plain_config
from tests.training.events import scalars

CSV = "lightning.logger.csv.target=lightning.pytorch.loggers.CSVLogger"
STEPS = ("lightning.trainer.val_check_interval=2", "lightning.trainer.log_every_n_steps=1")


def scalars_of_tensorboard(run) -> dict[tuple[str, int], float]:
    return {
        (tag, step): value
        for tag, values in scalars(run.path).items()
        for step, value in values.items()
    }


def scalars_of_csv(run) -> dict[tuple[str, int], float]:
    """Of all starts of the run: each has a file of its own."""
    found = {}
    for path in sorted((run.path / "csv").glob("version_*/metrics.csv")):
        with path.open(newline="") as file:
            found |= {
                (name, int(row["step"])): float(value)
                for row in csv.DictReader(file)
                for name, value in row.items()
                if value and name not in ("step", "epoch")
            }
    return found


def test_the_csv_logger_has_tensorboards_scalars_also_after_a_resume(train_with, image_folder):
    run = train_with(
        "lightning.trainer.max_steps=2", CSV, *STEPS, config=plain_config(image_folder)
    )
    first = scalars_of_csv(run)
    assert {step for _, step in first} == {1, 2}
    train_with("lightning.trainer.max_steps=4", resume=run.path)
    found = scalars_of_csv(run)
    assert first.items() <= found.items()
    expected = scalars_of_tensorboard(run)
    names = {name for name, _ in found}
    assert "val/psnr" in names
    assert found == pytest.approx(
        {key: value for key, value in expected.items() if key[0] in names}, rel=1e-6
    )
    assert {name for name, _ in expected} - names <= {"epoch", "step", "hp_metric"}
    assert found["speed/memory_gib", 2] > 0 < found["speed/images_per_s", 2]
    assert 0 <= found["speed/waiting_for_data", 2] < 1
    for folder in ("tensorboard", "csv/version_0", "csv/version_1"):
        held, whole = load([run.path / folder / "hparams.yaml"]), load([run.config])
        assert [held[name] for name in ("model", "data")] == [
            whole[name] for name in ("model", "data")
        ]


@pytest.fixture
def wandb(monkeypatch) -> Iterator[ModuleType]:
    """W&B offline.

    Afterwards its run is finished and its service ended: they hook into sys.stderr until then.
    """
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    yield wandb
    wandb.finish()
    wandb.teardown()


def test_wandb_offline_has_the_project_and_pictures_of_a_resumed_run(
    train_with, image_folder, wandb
):
    options = {"config": plain_config(image_folder), "wandb": "faces"}
    run = train_with("lightning.trainer.max_steps=2", *STEPS, **options)
    assert wandb.run.project == "faces"
    hyperparameters = wandb.run.config.as_dict()
    wandb.finish()
    train_with("lightning.trainer.max_steps=4", resume=run.path)
    wandb.finish()  # as the end of the process does: all is written
    assert "olvae.models.liteautoencoder.LiteAutoencoderKL" in str(hyperparameters)
    pieces = sorted((run.path / "wandb").glob("offline-run-*"))
    assert len(pieces) == 2
    assert {next(piece.glob("run-*.wandb")).stem.removeprefix("run-") for piece in pieces} == {
        run.path.name
    }
    pictures = sorted((run.path / "wandb").glob("offline-run-*/files/media/images/val/*.png"))
    drawn = sorted(run.images.glob("step=*.png"))
    assert [Image.open(path).size for path in pictures] == [Image.open(path).size for path in drawn]


@pytest.mark.parametrize(
    ("target", "message"),
    [("loggers.CometLogger", "comet"), ("callbacks.Timer", "Timer is no logger")],
)
def test_make_loggers_refuses_what_is_no_logger(tmp_path, target, message):
    node = {"target": f"lightning.pytorch.{target}"}
    with pytest.raises(ConfigError, match=rf"^lightning\.logger\.mine: .*{message}"):
        make_loggers({"mine": node}, Run(tmp_path))


def test_all_that_a_logger_writes_is_attempted(tmp_path, monkeypatch):
    """And TensorBoard's thread is silent."""
    attempted, silenced = [], []
    monkeypatch.setattr(loggers, "_silence_tensorboard", lambda: silenced.append(True))
    monkeypatch.setattr(loggers, "_attempt", lambda *given: attempted.append(given))
    (board,) = make_loggers({}, Run(tmp_path))
    assert isinstance(board, loggers.TensorBoardLogger)
    for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
        getattr(board, name)(name)
        logger, action, argument = attempted.pop()
        assert (logger, action.__name__, argument) == (board, name, name)
    assert silenced == [True]


def test_curves_are_the_scalars_of_training_and_validation(tmp_path):
    """In the order of their steps; of a step that was repeated after a resume the later value."""
    run = Run(tmp_path)
    assert read_curves(run) == {}
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        for time, (tag, value, step) in enumerate(
            [
                ("train/loss", 3.0, 1),
                ("train/loss", 2.0, 2),
                ("train/loss", 2.5, 2),
                ("train/loss", 1.0, 0),
                ("val/psnr", 20.0, 2),
                ("speed/images_per_s", 9.0, 2),
            ]
        ):
            writer.add_scalar(tag, value, step, walltime=1000.0 + time)
    assert read_curves(run) == {
        "train/loss": ([0.0, 1.0, 2.0], [1.0, 3.0, 2.5]),
        "val/psnr": ([2.0], [20.0]),
    }


class Broken(Logger):
    """A logger that can't write, or has another mistake."""

    name = version = None

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.calls = 0

    def log_hyperparams(self, params: object) -> None: ...

    def log_metrics(self, metrics: object, step: int | None = None) -> None:
        self.calls += 1
        raise self.error


def test_a_logger_that_cannot_write_is_left_alone(caplog):
    """Warned of once; its other mistakes are raised."""
    full = OSError(28, "No space left on device")
    wrapped = ValueError("of TensorBoard")
    wrapped.__cause__ = full
    for error in (full, wrapped):
        caplog.clear()
        logger = Broken(error)
        for _ in range(2):
            assert loggers._attempt(logger, logger.log_metrics, {}) is None
        assert logger.calls == 1
        assert caplog.messages == ["Broken: nothing more is logged there: No space left on device"]
    for error in (ValueError("a mistake"), TypeError("another")):
        logger = Broken(error)
        for _ in range(2):
            with pytest.raises(type(error)):
                loggers._attempt(logger, logger.log_metrics, {})
        assert logger.calls == 2
    assert loggers._attempt(Broken(full), lambda a, b: (a, b), 1, b=2) == (1, 2)


def test_pictures_go_to_tensorboard_and_wandb_alone(monkeypatch):
    picture, seen = Image.new("RGB", (4, 2), "red"), []

    def add_image(name: str, pixels: np.ndarray, step: int, dataformats: str) -> None:
        seen.append((name, pixels.shape, step, dataformats))

    class Board(loggers.TensorBoardLogger):
        def __init__(self) -> None: ...

        experiment = SimpleNamespace(add_image=add_image)

    class Wandb(loggers.WandbLogger):
        def __init__(self) -> None: ...

        def log_image(self, name: str, images: list, step: int) -> None:
            seen.append((name, images, step))

    for logger in (Board(), Wandb(), Broken(OSError())):
        loggers.log_picture(logger, "val/images", picture, 3)
    assert seen == [("val/images", (2, 4, 3), 3, "HWC"), ("val/images", [picture], 3)]


def test_errors_of_tensorboards_thread_print_no_traceback(monkeypatch):
    """An error of writing is raised by the next call as well; others are told."""
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    loggers._silence_tensorboard.__wrapped__()
    writer = type("Writer", (), {"__module__": "tensorboard.summary.writer"})()
    other = threading.Thread()
    for thread, error in ((writer, OSError()), (writer, ValueError()), (other, OSError())):
        threading.excepthook(SimpleNamespace(thread=thread, exc_value=error))
    assert [(args.thread, type(args.exc_value)) for args in told] == [
        (writer, ValueError),
        (other, OSError),
    ]
