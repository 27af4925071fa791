"""The average against its recurrence in float64, what it holds, and where it is in checkpoints."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from olvae.checkpoint import AUTOENCODER, read_weights
from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.metrics.metric import psnr
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.averaging import WeightAverage
from olvae.models.updates.nonfinite import NonFiniteGuard
from tests.models.steps import WITHOUT_KL, Each, against, assert_same, build, fit, source, trainer

DECAY = 0.8


def states(model: LiteAutoencoderKL) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def run(model: LiteAutoencoderKL, root: Path, steps: int, *callbacks: pl.Callback) -> pl.Trainer:
    """Train with a validation every two steps."""
    every = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
    training, data = trainer(steps, callbacks=list(callbacks), **every), source(root)
    training.fit(
        model, data.train_loader(0, model.images_seen), data.val_loader(), weights_only=True
    )
    return training


def test_ema_is_its_recurrence_in_float64(image_folder):
    """In float64: the weights after the first step, then decay * average + (1 - decay) * weights.

    The first decays are lower. The discriminator's warm-up is no step. After training the model
    has the average.
    """
    model, seen = build(against(warmup_updates=2), use_ema=True, ema_decay=0.27), {}
    fit(
        model,
        image_folder,
        5,
        callbacks=[Each(lambda m: seen.setdefault(m.global_step, states(m)))],
    )
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    for name, tensor in model.state_dict().items():
        if name.startswith(AUTOENCODER):
            expected = seen[1][name].double()
            for step, decay in ((2, 2 / 11), (3, 3 / 12), (4, 0.27), (5, 0.27)):
                expected = decay * expected + (1 - decay) * seen[step][name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
            assert not torch.equal(tensor, seen[5][name])
        else:
            assert torch.equal(tensor, seen[5][name]), name


def test_validation_and_checkpoints_have_ema_and_trained_weights(image_folder, tmp_path):
    """The average by the published names, also where it is saved in the middle of a validation."""
    model, seen = build(against(), use_ema=True, ema_decay=DECAY), []

    class Look(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
            if not trainer.sanity_checking and not seen:
                seen.append(states(pl_module))
                trainer.save_checkpoint(tmp_path / "within.ckpt")

        def on_validation_end(self, trainer, pl_module) -> None:
            if not trainer.sanity_checking:
                seen.append(states(pl_module))
                trainer.save_checkpoint(tmp_path / "after.ckpt")

    training = run(model, image_folder, 2, Look())
    average, trained = seen
    assert not trained["encoder.aggregator.conv_out.weight"].equal(
        average["encoder.aggregator.conv_out.weight"]
    )
    training.save_checkpoint(tmp_path / "end.ckpt")
    ours = {n: t for n, t in trained.items() if n.startswith(AUTOENCODER)}
    expected = {n: average[n] if n in ours else t for n, t in trained.items()}
    for file in (tmp_path / name for name in ("within.ckpt", "after.ckpt", "end.ckpt")):
        checkpoint = torch.load(file, weights_only=True)
        assert list(checkpoint["state_dict"]) == list(model.state_dict())
        assert_same(checkpoint["state_dict"], expected)
        assert_same(checkpoint["current_model_state"], ours)
        assert int(checkpoint["averaging_state"]["n_averaged"]) == 2
        assert_same(read_weights(file, raw=True), ours)
    assert_same(model.state_dict(), expected)
    assert {"val/psnr", "val_raw/psnr"} <= model.validation_values.keys()
    assert model.validation_values["val/psnr"] != model.validation_values["val_raw/psnr"]


def test_ema_only_if_use_ema_is_set():
    assert build().configure_callbacks() == []
    (callback,) = build(use_ema=True, ema_decay=0.25).configure_callbacks()
    assert isinstance(callback, WeightAverage)
    assert callback.decay == 0.25
    with pytest.raises(ConfigError, match="ema_decay must"):
        build(ema_decay=2)


@pytest.mark.parametrize("has_average", [False, True])
def test_interrupt_while_ema_and_weights_are_swapped_saves_nothing(has_average):
    """Nothing is saved, and restoring gives each its own again, whichever the model had."""
    trained, average = torch.zeros(2), torch.ones(2)

    class Interrupted(torch.nn.Parameter):
        """Takes no other values."""

        def __setattr__(self, name: str, value: object) -> None:
            if name == "data" and stops:
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    stops: list[bool] = []
    first, second = torch.nn.Parameter(trained.clone()), Interrupted(trained.clone())
    averaging = WeightAverage(NonFiniteGuard([]))
    averaging._parameters = {"a": first, "b": second}
    averaging._other = {"a": average.clone(), "b": average.clone()}
    if has_average:
        averaging.on_validation_epoch_start(None, None)
    stops.append(True)
    with pytest.raises(KeyboardInterrupt):
        averaging.on_validation_epoch_start(None, None)
    assert not first.equal(second)
    state = {"a": first, "b": second}
    with pytest.raises(RuntimeError, match="nothing is"):
        averaging.on_save_checkpoint(None, None, {"state_dict": state})
    stops.clear()
    averaging.restore({"b": torch.full((2,), 5.0)})
    assert first.equal(trained)
    assert second.equal(trained)
    checkpoint = {"state_dict": state}
    averaging.on_save_checkpoint(None, None, checkpoint)
    assert checkpoint["state_dict"]["a"].equal(average)
    assert checkpoint["state_dict"]["b"].tolist() == [5.0, 5.0]
    assert checkpoint["current_model_state"]["a"].equal(trained)


def test_validation_numbers_are_those_of_the_ema(image_folder):
    model, data = build(use_ema=True, ema_decay=DECAY), source(image_folder)
    run(model, image_folder, 2)  # after which the model has the average
    with torch.no_grad():
        found = [
            psnr(b["image"], to_uint8(model(from_uint8(b["image"]))[0])) for b in data.val_loader()
        ]
    assert model.validation_values["val/psnr"] == pytest.approx(
        float(torch.cat(found).mean()), rel=1e-6
    )


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_frozen_half_is_neither_averaged_nor_saved_twice(image_folder, half):
    model = build(use_ema=True, lossconfig=WITHOUT_KL, **{f"freeze_{half}": True})
    average = WeightAverage(model.guard, DECAY)
    average.on_fit_start(None, model)
    checkpoint = {"state_dict": model.state_dict()}
    average.on_save_checkpoint(None, model, checkpoint)
    saved = {name.partition(".")[0] for name in checkpoint["current_model_state"]}
    assert saved == {"encoder", "decoder"} - {half}


def test_only_a_training_takes_the_average_of_a_checkpoint(image_folder):
    """A validation has the averaged weights already; a run without EMA has none to load."""
    model = build(use_ema=True)
    average = WeightAverage(model.guard, DECAY)
    state = states(model)
    saved = {
        "state_dict": {name: t + 1 for name, t in state.items()},
        "current_model_state": {n: t + 2 for n, t in state.items() if n.startswith(AUTOENCODER)},
        "averaging_state": {"n_averaged": torch.tensor(7)},
    }
    training = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING))
    validation = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.VALIDATING))
    average.on_load_checkpoint(validation, model, saved)
    average.on_load_checkpoint(training, model, {"state_dict": saved["state_dict"]})
    average.on_fit_start(None, model)
    name = next(name for name in state if name.startswith(AUTOENCODER))
    assert torch.equal(average._other[name], state[name])
    average.on_load_checkpoint(training, model, saved)
    average.on_fit_start(None, model)
    assert torch.equal(average._other[name], saved["state_dict"][name])
    assert torch.equal(model.state_dict()[name], state[name] + 2)


def test_a_step_that_changed_nothing_leaves_the_average_where_it_is():
    model = build(use_ema=True)
    average = WeightAverage(model.guard, DECAY)
    average.on_fit_start(None, model)
    (name, weight), *_ = average._parameters.items()
    for step, good, add in ((1, 1.0, 1.0), (2, 0.0, 5.0), (3, 1.0, 5.0)):
        model.guard.good = torch.tensor(good)
        with torch.no_grad():
            weight.add_(add)
        before = average._other[name].clone()
        average.on_train_batch_end(SimpleNamespace(global_step=step))
        moved = {1: weight, 2: before, 3: 0.25 * before + 0.75 * weight}[step]
        torch.testing.assert_close(average._other[name], moved.detach())
