"""When checkpoints are saved: by intervals, validations, stops, errors; and which is the best."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from olvae.data.read_errors import TooManyUnreadableError
from olvae.runs import Run
from olvae.training import saving
from olvae.training.saving import CheckpointError, KeepCheckpoints


class Batches:
    """A training, as Lightning tells a callback of it: what is saved, and at which step."""

    def __init__(self, folder: Path, validates_every: int | None = None, **settings) -> None:
        self.saved: list[tuple[int, str]] = []
        self.keep = KeepCheckpoints(**settings)
        self.module = SimpleNamespace(
            images_seen=0,
            update_is_complete=True,
            validation_values={},
            state_dict=lambda: {
                "a": torch.zeros(2),
                "b": torch.zeros(2, dtype=torch.int64),
                "_extra_state": {"a part's": 1},
            },
        )
        self.trainer = SimpleNamespace(
            default_root_dir=folder,
            global_step=0,
            max_steps=10,
            should_stop=False,
            sanity_checking=False,
            is_global_zero=True,
            world_size=1,
            callbacks=[],
            enable_validation=True,
            limit_val_batches=1.0,
            val_check_batch=validates_every,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=-1)),
            save_checkpoint=self.save,
            strategy=SimpleNamespace(checkpoint_io=None, broadcast=lambda failure: failure),
        )

    def save(self, path: Path, storage_options: object) -> None:
        self.saved.append((self.trainer.global_step, path.name))

    def start(self, step: int = 0) -> None:
        self.trainer.global_step = step
        self.keep.on_train_start(self.trainer, self.module)

    def batch(self, step: bool = True, stops: bool = False, **values: float) -> None:
        """Train on a batch, and validate after it where it is due."""
        trainer = self.trainer
        trainer.should_stop = stops
        self.keep.on_train_batch_start()
        trainer.fit_loop.epoch_loop.total_batch_idx += 1
        trainer.global_step += step
        self.module.images_seen += 4
        self.module.update_is_complete = step
        self.keep.on_train_batch_end(trainer, self.module, None, None, 0)
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if trainer.val_check_batch is not None and done % trainer.val_check_batch == 0:
            self.module.validation_values = values
            self.keep.on_validation_end(trainer, self.module)


def test_checkpoints_are_saved_at_their_intervals_and_at_the_last_step(tmp_path):
    training = Batches(tmp_path, every_n_steps=3, keep_every_n_steps=4)
    training.start()
    for _ in range(10):
        training.batch()
    training.keep.on_train_end(training.trainer, training.module)
    last, kept = "last.ckpt", "step=0000000{}.ckpt"
    assert training.saved == [
        (3, last),
        (4, kept.format(4)),
        (6, last),
        (8, kept.format(8)),
        (9, last),
        (10, last),
    ]


def test_a_resumed_step_is_not_saved_again(tmp_path):
    """Nor at each of several batches of an update."""
    training = Batches(tmp_path, every_n_steps=3, keep_every_n_steps=3)
    training.start(3)
    for step in (False, True, False, True, False, True, False):
        training.batch(step)
    assert training.saved == [(6, "step=00000006.ckpt"), (6, "last.ckpt")]


def test_checkpoints_without_an_interval_are_the_last_alone(tmp_path, monkeypatch):
    """It is begun when one save at most is not on the disk yet, so that two are in memory."""
    asked: list[object] = []
    monkeypatch.setattr(saving, "check_written", lambda *given: asked.append(given))
    training = Batches(tmp_path)
    training.start()
    for _ in range(10):
        training.batch()
    assert training.saved == [(10, "last.ckpt")]
    assert asked == [(training.trainer, 1)]


def test_a_validated_step_is_saved_after_its_validation(tmp_path):
    """Batches 3, 6 and 9 are validated; the best is of those."""
    training = Batches(tmp_path, 3, every_n_steps=1, best="val/psnr")
    training.keep._sign = 1
    training.start()
    training.trainer.max_steps = 9
    for step in range(1, 10):
        training.batch(**{"val/psnr": {3: 20.0, 6: 19.0, 9: 21.0}.get(step, 99.0)})
    last, best = "last.ckpt", "best.ckpt"
    assert training.saved == [
        *((1, last), (2, last), (3, best), (3, last), (4, last), (5, last)),
        *((6, last), (7, last), (8, last), (9, best), (9, last)),
    ]


@pytest.mark.parametrize("change", [{"enable_validation": False}, {"limit_val_batches": 0}])
def test_a_step_that_would_be_validated_is_saved_where_nothing_is(tmp_path, change):
    training = Batches(tmp_path, 1, every_n_steps=1)
    vars(training.trainer).update(change)
    training.start()
    training.trainer.global_step = 1
    training.module.images_seen = 4
    training.keep.on_train_batch_end(training.trainer, training.module, None, None, 0)
    assert training.saved == [(1, "last.ckpt")]


def test_a_stop_saves_images_that_no_checkpoint_has(tmp_path):
    """At a step that has stood still since the last save, as in a warm-up."""
    training = Batches(tmp_path, every_n_steps=1, best=None)
    training.start()
    training.batch(stops=True)
    assert training.saved == []  # a validation follows, which Lightning then ends
    training.keep.on_validation_end(training.trainer, training.module)
    assert training.saved == [(1, "last.ckpt")]
    training.keep.on_validation_end(training.trainer, training.module)
    assert len(training.saved) == 1
    training.module.images_seen += 4
    training.keep.on_validation_end(training.trainer, training.module)
    training.keep.on_train_end(training.trainer, training.module)
    assert training.saved == [(1, "last.ckpt")] * 2


FULL = TooManyUnreadableError("too many")


@pytest.mark.parametrize(
    ("error", "changes", "saves"),
    [
        (ValueError("of a callback"), {}, True),
        (KeyboardInterrupt(), {}, True),
        (FloatingPointError("nan"), {}, False),
        (CheckpointError("a full disk"), {}, False),
        (ValueError("in one process"), {"world_size": 2}, False),
        (FULL, {"world_size": 2}, True),
        (FULL, {"global_step": 9}, True),
        (FULL, {"global_step": 10}, False),
    ],
)
def test_an_error_between_updates_is_saved_where_that_helps(tmp_path, error, changes, saves):
    training = Batches(tmp_path)
    keep, trainer, module = training.keep, training.trainer, training.module
    keep.on_exception(trainer, module, error)
    module.images_seen = 4
    keep.on_exception(trainer, module, error)
    assert training.saved == []  # before training starts
    keep.on_train_start(trainer, module)
    keep.on_exception(trainer, module, error)
    assert training.saved == []  # nothing was seen since
    training.batch()
    vars(trainer).update(changes)
    keep.on_exception(trainer, module, error)
    assert [name for _, name in training.saved] == ["last.ckpt"] * saves


@pytest.mark.parametrize(
    ("processed", "complete", "error", "saves"),
    [
        (3, True, ValueError("after the update"), True),
        (2, True, ValueError("in the batch"), False),
        (3, False, ValueError("in the update"), False),
        (3, True, KeyboardInterrupt(), False),
    ],
)
def test_an_error_within_a_step_is_saved_after_a_whole_update(
    tmp_path, monkeypatch, processed, complete, error, saves
):
    training = Batches(tmp_path)
    training.start()
    training.batch()
    training.keep.on_train_batch_start()
    training.module.update_is_complete = complete
    counts = {"current": {"processed": processed, "ready": 3}}
    training.trainer.fit_loop.epoch_loop.batch_progress = SimpleNamespace(state_dict=lambda: counts)
    moved = []
    average = SimpleNamespace(on_train_batch_end=moved.append)
    monkeypatch.setattr(saving, "find_average", lambda _: average)
    training.keep.on_exception(training.trainer, training.module, error)
    assert len(training.saved) == saves
    assert moved == [training.trainer] * saves


def test_a_validation_without_the_value_warns_once_in_the_first_process(tmp_path, caplog):
    for first, values, warned in (
        (True, {}, "no validation image could be read"),
        (True, {"val/ssim": 1.0}, "val/psnr has no finite value"),
        (False, {}, None),
    ):
        caplog.clear()
        training = Batches(tmp_path)
        training.trainer.is_global_zero = first
        training.module.validation_values = values
        for _ in range(2):
            training.keep._keep_best(training.trainer, training.module)
        expected = [] if warned is None else [f"{warned}, so best.ckpt is not kept"]
        assert caplog.messages == expected
        assert training.saved == []


def test_the_best_value_has_the_names_of_its_metric_step_and_images(tmp_path):
    notes = []
    for sign, values, best in ((1, (2.0, 1.0, 2.0), [2.0]), (-1, (2.0, 3.0, 1.0), [2.0, 1.0])):
        notes.clear()
        training = Batches(tmp_path)
        training.keep._sign = sign
        training.keep._val_set = None if sign > 0 else "4 images"
        training.trainer.global_step = 3
        training.keep._save = lambda *given: notes.append(given[2:])
        for value in values:
            training.module.validation_values = {"val/psnr": value}
            training.keep._keep_best(training.trainer, training.module)
        of_images = {} if sign > 0 else {"val_set": "4 images"}
        expected = [
            ("best.ckpt", {"metric": "val/psnr", "value": value, "step": 3} | of_images)
            for value in best
        ]
        assert notes == expected
        training.trainer.sanity_checking = True
        training.module.validation_values = {"val/psnr": 100.0 * sign}
        training.keep._keep_best(training.trainer, training.module)
        assert notes == expected


@pytest.mark.parametrize(
    ("note", "now", "before", "found"),
    [
        ({"value": 3}, None, None, 3.0),
        ({"value": 3}, "A", None, 3.0),
        ({"value": 3, "val_set": "A"}, "A", "B", 3.0),
        ({"value": 3, "val_set": "B"}, "A", "A", None),
        ({"value": 3}, "A", "A", 3.0),
        ({"value": 3}, "A", "B", None),
        ({"value": "x"}, None, None, None),
        ({}, None, None, None),
    ],
)
def test_a_best_value_is_of_the_same_images(tmp_path, caplog, note, now, before, found):
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    keep = KeepCheckpoints()
    assert keep._best_before(run) is None
    (run.checkpoints / "best.json").write_text(json.dumps({"metric": "val/psnr", **note}))
    keep._val_set = now
    keep.on_load_checkpoint(None, {"val_set": before})
    assert keep._best_before(run) == found
    unreadable = note.get("value") != 3
    assert len(caplog.messages) == unreadable


@pytest.mark.parametrize(
    ("best", "metrics", "use_ema", "sign"),
    [
        ("val/psnr", [], False, 1),
        (None, [], False, 1),
        ("val/lpips", ["lpips"], False, -1),
        ("val_raw/psnr", [], True, 1),
        ("val_raw/lpips", ["lpips"], True, -1),
        ("val/latent_rmse", [], True, -1),
        ("val/lpips", [], True, None),
        ("val_raw/psnr", [], False, None),
        ("val_raw/latent_rmse", [], True, None),
        ("val/other", ["other"], False, None),
    ],
)
def test_the_best_is_of_a_value_that_is_computed(tmp_path, best, metrics, use_ema, sign):
    if metrics == ["other"]:
        metrics = ["lpips"]
    module = SimpleNamespace(
        each_part=[SimpleNamespace(better={"latent_rmse": "lower"})],
        val_metrics=metrics,
        use_ema=use_ema,
        val_set="4 images",
    )
    training, keep = Batches(tmp_path), KeepCheckpoints(best=best)
    if sign is None:
        with pytest.raises(ValueError, match=f"best: {best} "):
            keep.on_fit_start(training.trainer, module)
        return
    keep.on_fit_start(training.trainer, module)
    assert (keep._sign, keep._val_set, keep._best_value) == (sign, "4 images", None)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_knows_the_best_value_for_all(tmp_path, monkeypatch, first):
    training, keep = Batches(tmp_path), KeepCheckpoints()
    training.trainer.is_global_zero = first
    training.trainer.strategy.broadcast = lambda value: ("to all", value)
    monkeypatch.setattr(keep, "_best_before", lambda run: (run, 20.0))
    module = SimpleNamespace(each_part=[], val_metrics=[], use_ema=False, val_set=None)
    keep.on_fit_start(training.trainer, module)
    assert keep._best_value == ("to all", (Run(tmp_path), 20.0) if first else None)


def test_intervals_of_checkpoints_have_a_range():
    with pytest.raises(ValueError, match=r"every_n_steps must .*0"):
        KeepCheckpoints(every_n_steps=0)
    with pytest.raises(ValueError, match="keep_every_n_steps must"):
        KeepCheckpoints(keep_every_n_steps=-1)
    assert KeepCheckpoints().keep_every_n_steps == 0
    assert KeepCheckpoints().every_n_steps == 1000


def test_nothing_is_saved_by_a_trial_of_validation(tmp_path):
    """Which comes before the first step, when optimizers may not be restored yet."""
    training = Batches(tmp_path, best=None)
    training.keep.on_validation_end(training.trainer, training.module)
    assert training.saved == []
    training.start()
    training.keep.on_validation_end(training.trainer, training.module)
    assert training.saved == []


def test_an_error_outside_of_a_step_is_saved_as_it_is(tmp_path):
    """Without a look at Lightning's count of batches."""
    training = Batches(tmp_path)
    training.start()
    training.module.images_seen = 4
    training.keep.on_exception(training.trainer, training.module, ValueError())
    assert training.saved == [(0, "last.ckpt")]
