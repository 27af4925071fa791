"""What a run does about bad steps, through the command's own function."""

import json
import math
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch

from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.ddp import PlayersStrategy
from olvae.models.updates.nonfinite import BadStep
from olvae.training.callbacks import BadSteps
from tests.conftest import plain_config
from tests.forks import fork_each
from tests.models.steps import against, build, trainer
from tests.models.test_liteautoencoder_updates import Scaled
from tests.training.conftest import torchrun
from tests.training.events import scalars
from tests.training.origins import checkpoint, one_line

BAD = "lightning.callbacks.bad"
SAVES = ("lightning.callbacks.keep.target=olvae.training.saving.KeepCheckpoints",)


def settings(**params) -> tuple[str, ...]:
    return (
        f"{BAD}.target=olvae.training.callbacks.BadSteps",
        *(f"{BAD}.params.{name}={value}" for name, value in params.items()),
    )


@pytest.fixture
def spoil(monkeypatch):
    """Give the iterations that a condition holds for a KL of nan."""

    def patch(condition) -> None:
        whole = LiteAutoencoderKL.autoencoder_loss

        def spoilt(self, step):
            total = whole(self, step)
            if condition(self._iteration):
                step.losses["kl"] = step.losses["kl"] * math.nan
                total = total + step.losses["kl"]
            return total

        monkeypatch.setattr(LiteAutoencoderKL, "autoencoder_loss", spoilt)

    return patch


@pytest.fixture
def config(image_folder) -> dict:
    return plain_config(image_folder, adversary_config=against(), use_ema=True)


def test_bad_steps_are_printed_counted_and_noted(train_with, config, spoil, capfd):
    spoil(lambda iteration: iteration in (1, 2, 4))
    run = train_with(
        "lightning.trainer.max_steps=6", "lightning.trainer.log_every_n_steps=2", config=config
    )
    notes = [json.loads(line) for line in run.bad_steps.read_text().splitlines()]
    assert [(note["step"], note["rank"], note["term"]) for note in notes] == [
        (2, 0, "kl"),
        (3, 0, "kl"),
        (5, 0, "kl"),
    ]
    assert all(len(note["keys"]) == 4 for note in notes)
    printed = capfd.readouterr().err
    assert "step 2: kl is not finite: this step changed nothing (1 in this run so far)" in printed
    assert "step 5: kl " in printed
    assert scalars(run.path)["health/bad_steps"] == {2: 1, 4: 2, 6: 3}
    saved = checkpoint(run)
    assert all(t.isfinite().all() for t in saved["state_dict"].values())


def test_unread_bad_steps_are_counted_in_the_last_checkpoint(train_with, config, spoil):
    spoil(lambda iteration: iteration in (1, 2))
    run = train_with(
        "lightning.trainer.max_steps=4", "lightning.trainer.log_every_n_steps=50", config=config
    )
    assert checkpoint(run)["callbacks"]["BadSteps"]["bad"] == 2


def test_bad_steps_in_a_row_return_to_the_checkpoint_with_lower_rates(
    train_with, config, spoil, capfd
):
    spoil(lambda iteration: iteration in (5, 6, 7))
    overrides = (
        *SAVES,
        "lightning.callbacks.keep.params.every_n_steps=4",
        *settings(in_a_row=3, rate_factor=0.25),
    )
    first = ("lightning.trainer.max_steps=8", "lightning.trainer.val_check_interval=20")
    run = train_with(*overrides, *first, config=config)
    assert "back at step 4, the learning rate is multiplied by 0.25 (return 1 of 3)" in (
        " ".join(capfd.readouterr().err.split())
    )
    spoil(lambda iteration: False)
    again = train_with(*overrides, "lightning.trainer.max_steps=4", *first[1:], config=config)
    saved, fourth = checkpoint(run), checkpoint(again)
    for part in ("state_dict", "current_model_state"):
        for name, tensor in fourth[part].items():
            assert torch.equal(tensor, saved[part][name]), f"{part} {name}"
    for one, other in zip(saved["optimizer_states"], fourth["optimizer_states"], strict=True):
        for i, state in other["state"].items():
            assert all(torch.equal(value, one["state"][i][name]) for name, value in state.items())
        assert one["param_groups"][0]["lr"] == pytest.approx(0.25 * other["param_groups"][0]["lr"])
    assert saved["global_step"] == 8
    assert saved["images_seen"] > fourth["images_seen"]

    resumed = train_with("lightning.trainer.max_steps=10", resume=run.path, allow_changes=True)
    assert checkpoint(resumed)["rate_factor"] == 0.25
    assert checkpoint(resumed)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(
        0.25e-3
    )
    assert checkpoint(resumed)["callbacks"]["BadSteps"] == {"bad": 3, "returned": 1, "row": 0}


def test_bad_steps_after_the_last_return_stop_training_with_the_reason(
    train_with, tmp_path, config, spoil, capfd
):
    spoil(lambda iteration: iteration >= 2)
    overrides = (
        *SAVES,
        "lightning.callbacks.keep.params.every_n_steps=2",
        *settings(in_a_row=2, returns=2),
    )
    with pytest.raises(FloatingPointError) as caught:
        train_with(*overrides, "lightning.trainer.max_steps=20", config=config)
    (path,) = (tmp_path / "runs").iterdir()
    text = one_line(caught)
    assert text.startswith(
        "kl was not finite for 2 steps in a row until step 8, in spite of 2 returns to good w"
    )
    assert text.endswith(f"the last good weights are in {path / 'checkpoints' / 'last.ckpt'}")
    saved = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] in (2, 4, 6)
    assert all(t.isfinite().all() for t in saved["state_dict"].values())
    assert (path / "bad_steps.jsonl").is_file()


def test_bad_steps_before_the_first_checkpoint_keep_the_weights(
    train_with, tmp_path, config, spoil, capfd
):
    spoil(lambda iteration: True)
    steps = ("lightning.trainer.max_steps=20", "lightning.trainer.val_check_interval=20")
    message = (
        "for 2 steps in a row until step 4, in spite of a return.*lower model.base_learning_rate"
    )
    with pytest.raises(FloatingPointError, match=message):
        train_with(*settings(in_a_row=2, returns=1), *steps, config=config)
    assert "no checkpoint" in capfd.readouterr().err
    (noted,) = (tmp_path / "runs").glob("*/bad_steps.jsonl")  # the error says to look at it
    assert len(noted.read_text().splitlines()) == 4


def test_bad_steps_return_to_the_best_checkpoint_where_there_is_no_last(
    train_with, config, spoil, capfd
):
    """As in a run that is continued after a full disk."""
    overrides = settings(in_a_row=2, returns=1)
    run = train_with(*overrides, "lightning.trainer.max_steps=2", config=config)
    run.last_checkpoint.unlink()
    spoil(lambda iteration: iteration >= 2)
    steps = ("lightning.trainer.max_steps=20", "lightning.trainer.val_check_interval=20")
    with pytest.raises(FloatingPointError) as caught:
        train_with(*steps, resume=run.path)
    assert "at step 2" in " ".join(capfd.readouterr().err.split())
    best = run.checkpoints / "best.ckpt"
    assert one_line(caught).endswith(f"the last good weights are in {best}")


def test_under_fp16_all_processes_count_a_bad_step_of_one(tmp_path, under, spoil):
    """The others see gradients of nan alone, as they do after an overflow, which does not count."""

    def work(rank: int) -> None:
        under(torchrun(rank, per_node=2))
        spoil(lambda iteration: rank == 1 and iteration in (1, 2))
        bad = BadSteps(in_a_row=2)
        scaled = {
            "strategy": PlayersStrategy(),
            "devices": 2,
            "plugins": [Scaled(init_scale=2.0**10)],
        }
        batch = {"image": torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "key": [f"image {rank}"]}
        trained = trainer(
            4, limit_val_batches=0, callbacks=[bad], default_root_dir=tmp_path, **scaled
        )
        trained.fit(build(), repeat(batch, 5))
        assert (bad.bad, bad.returned, trained.global_step) == (2, 1, 4)

    fork_each(work)
    notes = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    terms = {(note["rank"], note["term"], *note["keys"]) for note in notes}
    assert terms == {(0, "gradient of the autoencoder", "image 0"), (1, "kl", "image 1")}


@pytest.mark.parametrize(
    "wrong", [{"in_a_row": 0}, {"returns": -1}, {"rate_factor": 0}, {"rate_factor": 1.5}], ids=str
)
def test_bad_steps_refuses_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BadSteps(**wrong)


def test_a_good_step_ends_a_row_of_bad_steps_and_an_overflow_does_not_count(monkeypatch):
    bad, returns = BadSteps(in_a_row=2), []
    monkeypatch.setattr(bad, "_report", lambda *_: None)
    monkeypatch.setattr(bad, "_return", lambda *_: returns.append(bad.bad))
    step, overflow = (BadStep(1, "kl", [], over) for over in (False, True))
    for steps in ([step], [None], [step], [overflow, None, step], [overflow, step]):
        bad._read(None, SimpleNamespace(guard=SimpleNamespace(collect=lambda s=steps: s)))
    assert returns == [4]
