"""Stopped and resumed in the middle of phase B, through the command's own function."""

import signal
import sys

import pytest

from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.optimizers import lr_factor
from olvae.runs import Run
from olvae.training.callbacks import GracefulStop
from olvae.training.run import TrainingStopped
from tests.conftest import plain_config
from tests.models.steps import Each, against, build, fit
from tests.training.events import scalars
from tests.training.origins import checkpoint, phase_b


@pytest.fixture
def go(train_with, image_folder):
    """Train a tiny phase B; returns the run."""

    def run(steps: int, *overrides: str, **options) -> Run:
        return train_with(
            f"lightning.trainer.max_steps={steps}",
            *overrides,
            config=phase_b(image_folder, plain_config),
            **options,
        )

    return run


def test_phase_b_saves_and_logs_both_players(go):
    run = go(3)
    saved = checkpoint(run)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {
        "encoder",
        "decoder",
        "adversary",
        "parts",
    }
    assert {name.split(".")[0] for name in saved["current_model_state"]} == {"encoder", "decoder"}
    assert len(saved["optimizer_states"]) == 2
    assert saved["global_step"] == 3
    assert saved["iteration"] == 4  # one batch, of two updates, warmed up
    assert int(saved["state_dict"]["adversary._extra_state"]) > 2
    assert saved["state_dict"]["adversary.lecam.real_anchors"].any()
    train_names = {"adversarial", "discriminator", "lecam", "r1", "anchor"}
    health_names = {"logits_real", "logits_fake", "accuracy", "gradient_ratio"}
    names = {f"train/{name}" for name in train_names} | {f"health/{name}" for name in health_names}
    logged = scalars(run.path)
    assert names <= set(logged)
    assert set(logged["train/loss"]) == {1, 2, 3}


def test_a_signal_stops_between_updates(image_folder):
    """In between, gradients would be lost, LeCam's anchors moved twice, and Lightning's count of
    batches no longer that of micro-batches: later validations would clear half an update's
    gradients."""
    model, sent = build(against(), accumulate_grad_batches=3), []

    def look(m: LiteAutoencoderKL) -> None:
        if m.global_step == 1 and not m.update_is_complete and not sent:
            sent.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    fit(model, image_folder, 9, batch_size=2, callbacks=[Each(look), GracefulStop()])
    assert model.trainer.global_step in (1, 2)
    assert sent
    assert model.update_is_complete


def test_a_signal_in_the_warm_up_leaves_a_checkpoint(go, tmp_path, monkeypatch):
    step = LiteAutoencoderKL.training_step

    def interrupt(self, batch, batch_idx):
        if self.adversary.updates == 2 and self.update_is_complete:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LiteAutoencoderKL, "training_step", interrupt)
    params = "model.params.adversary_config.params"
    with pytest.raises(KeyboardInterrupt):
        go(2, f"{params}.start_step=0", f"{params}.warmup_updates=20")
    (path,) = (tmp_path / "runs").iterdir()
    assert checkpoint(Run(path))["iteration"] >= 1


@pytest.mark.parametrize("saves", [False, True])
def test_a_second_signal_names_the_run_if_it_can_be_continued(
    train_with, tmp_path, image_folder, at_step, saves
):
    keep, every = "lightning.callbacks.keep", 2 if saves else 9
    settings = [
        f"{keep}.target=olvae.training.saving.KeepCheckpoints",
        f"{keep}.params.every_n_steps={every}",
    ]
    at_step(3, sys.exit)  # Lightning's answer to an interrupt
    with pytest.raises(KeyboardInterrupt) as stopped:
        train_with(
            "lightning.trainer.val_check_interval=9", *settings, config=plain_config(image_folder)
        )
    assert isinstance(stopped.value, TrainingStopped) == saves
    assert (tmp_path / "runs").exists() == saves


def test_both_players_take_another_schedule_when_resumed(go, monkeypatch):
    run, rates, update = go(2), [], LiteAutoencoderKL._update

    def note(self, *args, **kwargs):
        rates.append(
            [
                optimizer.param_groups[0]["lr"] / optimizer.defaults["lr"]
                for optimizer in self.optimizers()
            ]
        )
        update(self, *args, **kwargs)

    monkeypatch.setattr(LiteAutoencoderKL, "_update", note)
    go(5, "model.params.warmup_steps=1", "model.params.decay_steps=4", resume=run.path)
    assert rates[0] == pytest.approx(2 * [lr_factor(2, "cosine", 1, 4, 0.0)])


def test_the_time_limit_stops_as_a_signal_does(train_with, tmp_path, image_folder, capfd):
    with pytest.raises(TrainingStopped) as caught:
        train_with(
            "lightning.trainer.max_steps=100000", config=plain_config(image_folder), time_limit="1s"
        )
    assert caught.value.preempted
    (path,) = (tmp_path / "runs").iterdir()
    assert 0 < checkpoint(Run(path))["global_step"] < 100000
    assert caught.value.run == Run(path)
    assert "time limit: " in capfd.readouterr().err
