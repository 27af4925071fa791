"""Updates of the two optimizers: accumulation, clipping, rates, and fp16's loss scale."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from olvae.data.pixels.size_and_range import from_uint8
from olvae.models import liteautoencoder
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.nonfinite import NonFiniteGuard
from olvae.models.updates.optimizers import mix_seeds
from tests.models.steps import (
    UNETGAN,
    Each,
    against,
    assert_same,
    build_shallow,
    fit,
    metrics,
    moved,
    norm,
    snapshot,
)


def test_accumulation_equals_a_larger_batch_for_both_optimizers(image_folder, updates):
    """3 x 1 images give the gradients of 3; in float64, because hinge and ReLU turn a rounding
    into a jump.
    """
    settings = {"sample_posterior": False}
    small = build_shallow(against(UNETGAN, weight=0.5), accumulate_grad_batches=3, **settings)
    large = build_shallow(against(UNETGAN, weight=0.5), **settings)
    for model in (small, large):
        model.images = lambda batch: from_uint8(batch["image"]).double()
        torch.manual_seed(1)
        # Away from the orthogonal start, where power iterations change no weight.
        with torch.no_grad():
            for p in model.adversary.parameters():
                p.add_(0.1 * torch.randn_like(p))
    kept: list[int] = []  # pairs for further updates, of which there are none
    look = [Each(lambda m: kept.append(len(m._pairs)))]
    fit(small, image_folder, 2, batch_size=1, size=64, precision="64-true", callbacks=look)
    assert kept == [0] * 6
    fit(large, image_folder, 2, batch_size=3, size=64, precision="64-true")
    assert small.trainer.global_step == large.trainer.global_step == 2
    assert small.images_seen == large.images_seen == 6
    assert type(small.images_seen) is int
    assert small.adversary.updates == large.adversary.updates == 2
    for part in ("autoencoder", "adversary"):
        accumulated, whole = (updates.of(getattr(model, part)) for model in (small, large))
        assert len(accumulated) == len(whole) == 2
        for one, other in zip(accumulated, whole, strict=True):
            assert norm(other.gradients) > 0.1
            for a, b in zip(one.gradients, other.gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_logged_losses_are_means_over_the_micro_batches(image_folder, updates_per_step):
    """Of the update that logs alone, and of the discriminator's last one in it."""
    logged = []
    for k in (3, 1):
        model = build_shallow(
            against(UNETGAN, weight=0.5, updates_per_step=updates_per_step),
            accumulate_grad_batches=k,
            sample_posterior=False,
        )
        model.images = lambda batch: from_uint8(batch["image"]).double()
        settings = {"size": 64, "precision": "64-true", "log_every_n_steps": 2 * k}
        fit(model, image_folder, 2, batch_size=3 // k, **settings)
        logged.append(metrics(model))
    means, whole = logged
    # The ratio of gradients is measured in the last micro-batch alone.
    assert means.pop("health/gradient_ratio") != whole.pop("health/gradient_ratio")
    assert {"train/loss", "train/rec", "train/discriminator", "health/accuracy"} <= set(means)
    assert means["train/lr"] == pytest.approx(1e-4)
    assert means == pytest.approx(whole, rel=1e-5)


GUARDED = {
    "begin_step": lambda: None,
    "begin_update": lambda: None,
    "begin_micro_batch": len,
    "return_to": lambda batch: batch,
    "observe": lambda terms: list(terms)[-1],
    "is_bad": list,
    "skip_if": lambda *_: None,
    "end_update": lambda: None,
    "end_step": lambda step, scaler: step,
}
"""The guard's methods, and what to note of their arguments."""


def spy_on(guard: NonFiniteGuard) -> list[tuple[str, object]]:
    """Note each call of a guard."""
    calls: list[tuple[str, object]] = []
    for name, note in GUARDED.items():
        whole = getattr(guard, name)

        def spy(*given, name=name, note=note, whole=whole):
            calls.append((name, note(*given)))
            return whole(*given)

        setattr(guard, name, spy)
    return calls


def guarded_step(step: int) -> list[tuple[str, object]]:
    """The calls of a step of two micro-batches, with three updates of the discriminator."""
    calls: list[tuple[str, object]] = [("begin_step", None), ("begin_update", None)]
    of_losses = ("observe", "the discriminator's loss")
    for i in (0, 1):
        calls += [("begin_micro_batch", 4), ("return_to", i), ("observe", "loss"), of_losses]
    both, alone = ["autoencoder", "discriminator"], ["discriminator"]
    of_gradients = ("observe", "gradient of the discriminator")
    skips = ("skip_if", None)
    calls += [("is_bad", both), of_gradients, skips, skips, ("end_update", None)]
    further = [("begin_update", None)]
    further += [("return_to", 0), of_losses, ("return_to", 1), of_losses]
    further += [("is_bad", alone), of_gradients, skips, ("end_update", None)]
    return [*calls, *further, *further, ("end_step", step)]


def test_several_updates_of_the_discriminator_a_step(image_folder, updates):
    model, counts = build_shallow(against(updates_per_step=3), accumulate_grad_batches=2), []
    calls, lasts, backward = spy_on(model.guard), [], model._backward
    model.__dict__["_backward"] = lambda player, loss, last: (
        lasts.append((player, last)),
        backward(player, loss, last),
    )
    seen: list[Tensor] = []
    model.adversary.discriminator.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach().clone())
    )
    fit(
        model,
        image_folder,
        2,
        callbacks=[Each(lambda m: counts.append((m.global_step, m.adversary.updates)))],
    )
    assert counts == [(0, 0), (1, 3), (1, 3), (2, 6)]
    assert calls == guarded_step(1) + guarded_step(2)
    both = [(player, last) for last in (False, True) for player in ("autoencoder", "discriminator")]
    alone = [("discriminator", False), ("discriminator", True)]
    assert lasts == [*both, *alone, *alone] * 2
    discriminators, autoencoders = updates.of(model.adversary), updates.of(model.autoencoder)
    assert (len(discriminators), len(autoencoders)) == (6, 2)
    assert model.trainer.global_step == 2
    for i in (0, 3):  # the same images each time, by weights that have moved on
        first, second, third = discriminators[i : i + 3]
        assert norm([a - b for a, b in zip(first.gradients, second.gradients, strict=True)]) > 0
        assert norm([a - b for a, b in zip(second.gradients, third.gradients, strict=True)]) > 0
    # A step: for each micro-batch generator, real, fake; then twice real, fake of each.
    assert len(seen) == 2 * (2 * 3 + 2 * 2 * 2)
    _, r1, f1, _, r2, f2, *again = seen[:14]
    for pair in (again[:4], again[4:]):
        assert all(torch.equal(a, b) for a, b in zip(pair, (r1, f1, r2, f2), strict=True))
    assert not torch.equal(seen[14 + 1], r1)


def test_further_discriminator_updates_have_gradients_of_their_own(image_folder, updates):
    """The second update of a step equals a first one from the weights after it,
    on the same images.
    """
    model, second = (
        build_shallow(against(UNETGAN, updates_per_step=2)),
        build_shallow(against(UNETGAN)),
    )
    between = {}

    def look(module, inputs):
        if module.training and not between and len(updates.of(model.adversary)) == 1:
            between.update(copy.deepcopy(module.state_dict()))

    model.adversary.discriminator.register_forward_pre_hook(look)
    fit(model, image_folder, 1, batch_size=2, size=64)
    second.adversary.discriminator.load_state_dict(between)
    fit(second, image_folder, 1, batch_size=2, size=64)
    _, expected = updates.of(model.adversary)
    (update,) = updates.of(second.adversary)
    for a, b in zip(update.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_clipping_applies_to_both_sides_each_by_its_own_norm(image_folder, updates):
    free = fit(build_shallow(against(weight=1.0)), image_folder, 1)
    clipped = fit(build_shallow(against(weight=1.0), gradient_clip_val=1e-3), image_folder, 1)
    values = metrics(clipped)
    names = {"autoencoder": "train/grad_norm", "adversary": "train/grad_norm_discriminator"}
    for part, name in names.items():
        (before,), (after,) = updates.of(getattr(free, part)), updates.of(getattr(clipped, part))
        assert norm(before.gradients) > 0.01
        assert norm(after.gradients) == pytest.approx(1e-3, rel=1e-2)
        assert values[name] == pytest.approx(norm(before.gradients), rel=1e-4)


def test_learning_rates_and_betas_of_both_optimizers(image_folder, updates):
    schedule = {
        "scheduler": "cosine",
        "warmup_steps": 2,
        "min_lr_factor": 0.5,
        "learning_rate": 1e-2,
    }
    model = build_shallow(
        against(learning_rate_ratio=0.25, betas=[0.1, 0.7]), betas=[0.6, 0.95], **schedule
    )
    fit(model, image_folder, 4, batch_size=1)
    rates = pytest.approx([0.5e-2, 1e-2, 1e-2, 0.75e-2])
    assert [u.lr for u in updates.of(model.autoencoder)] == rates
    assert [4 * u.lr for u in updates.of(model.adversary)] == rates
    assert {u.betas for u in updates.of(model.autoencoder)} == {(0.6, 0.95)}
    assert {u.betas for u in updates.of(model.adversary)} == {(0.1, 0.7)}


@pytest.mark.parametrize("start_step", [0, 3])
def test_the_discriminators_rate_follows_the_schedule_whenever_it_begins(image_folder, start_step):
    model = build_shallow(
        against(start_step=start_step, learning_rate_ratio=2.0),
        scheduler="cosine",
        learning_rate=1e-3,
    )
    rates = []

    def look(m: LiteAutoencoderKL) -> None:
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in m.trainer.optimizers])

    fit(model, image_folder, 6, batch_size=1, callbacks=[Each(look)])
    assert all(theirs == pytest.approx(2 * ours) for ours, theirs in rates[start_step + 1 :])
    assert rates[-1][0] < rates[0][0]


def test_without_warm_up_the_discriminators_first_update_has_its_whole_rate(image_folder, updates):
    model = build_shallow(against(learning_rate_ratio=2.0), learning_rate=1e-3)
    fit(model, image_folder, 2)
    assert [u.lr for u in updates.of(model.adversary)] == pytest.approx([2e-3, 2e-3])


def test_the_discriminators_warm_up_stays_below_the_schedule(image_folder, updates):
    model = build_shallow(
        against(start_step=4), scheduler="cosine", warmup_steps=3, learning_rate=1e-3
    )
    fit(model, image_folder, 9, batch_size=1)
    ours, theirs = (
        [u.lr for u in updates.of(side)] for side in (model.autoencoder, model.adversary)
    )
    assert theirs == pytest.approx([ours[4] / 3, ours[5] * 2 / 3, *ours[6:]])


# fp16's loss scale, with two optimizers: Lightning's own plugin and torch's own scaler, on the CPU.
# Only autocast is left out, so that float32 is exact under a scale that is a power of two, and a
# run must equal one without a scale.
class Scaler(torch.amp.GradScaler):
    """Counts its updates."""

    def __init__(self, **settings) -> None:
        super().__init__("cpu", **settings)
        self.scales: list[float] = []

    def update(self, new_scale=None) -> None:
        super().update(new_scale)
        self.scales.append(self.get_scale())


class Scaled(MixedPrecision):
    def __init__(self, **settings) -> None:
        super().__init__("16-mixed", "cpu", Scaler(**settings))

    def autocast_context_manager(self):
        return nullcontext()


SCALED_RUNS = {
    "plain": ({}, {}),
    "warm-up": ({"warmup_updates": 2}, {"gradient_clip_val": 0.01}),
    "several updates, accumulated": (
        {"updates_per_step": 3, "warmup_updates": 3},
        {"accumulate_grad_batches": 2},
    ),
    "adaptive": ({"adaptive_weight": True}, {}),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("plain", "adaptive") else ())
        for name in SCALED_RUNS
    ],
)
def test_loss_scale_changes_no_weights(image_folder, name):
    """The scale doubles at every update: one that came between the two sides' steps would show."""
    adversary, settings = SCALED_RUNS[name]
    adversary = {"weight": 0.5, **adversary}
    every = {"batch_size": 2, "log_every_n_steps": 1}
    plain = fit(build_shallow(against(**adversary), **settings), image_folder, 2, **every)
    plugin = Scaled(init_scale=2.0**10, growth_interval=1)
    scaled = fit(
        build_shallow(against(**adversary), **settings), image_folder, 2, plugins=[plugin], **every
    )
    assert_same(snapshot(plain), snapshot(scaled))
    assert moved(snapshot(build_shallow(against(**adversary))), snapshot(scaled))
    one, other = metrics(plain), metrics(scaled)
    assert one == pytest.approx(other, rel=1e-5)
    # A batch on which the discriminator learns alone.
    alone = 1 if "warmup_updates" in adversary else 0
    per_step = adversary.get("updates_per_step", 1)
    expected = (2 + alone) * per_step if per_step > 1 else 2 + adversary.get("warmup_updates", 0)
    assert plugin.scaler.scales == [2.0 ** (11 + i) for i in range(expected)]


@pytest.mark.parametrize(("side", "clip"), [("autoencoder", 1.0), ("adversary", None)])
def test_an_overflow_on_one_side_skips_the_step_and_lowers_the_scale(image_folder, side, clip):
    plugin = Scaled(init_scale=2.0**10)
    model = build_shallow(against(weight=0.5), gradient_clip_val=clip)
    overflow, history = {"now": True}, [snapshot(model)]
    victim = next(p for p in getattr(model, side).parameters())
    victim.register_hook(lambda g: g * float("inf") if overflow["now"] else g)

    def look(m: LiteAutoencoderKL) -> None:
        overflow["now"] = False
        history.append(snapshot(m))

    fit(model, image_folder, 2, plugins=[plugin], callbacks=[Each(look)])
    assert_same(history[0], history[1])
    assert {name.split(".")[0] for name in moved(history[1], history[2])} == {
        "encoder",
        "decoder",
        "adversary",
    }
    assert all(p.isfinite().all() for p in history[2].values())
    assert plugin.scaler.scales == [2.0**9, 2.0**9]
    first, second = model.guard.collect()
    player = {"autoencoder": "autoencoder", "adversary": "discriminator"}[side]
    assert first.term == f"gradient of the {player}"
    assert first.overflow
    assert second is None


def test_fp16_overflow_in_the_adaptive_weight_is_one(image_folder):
    model = build_shallow(against(weight=0.5, adaptive_weight=True))
    before = snapshot(model)
    # The gradients are finite, their norm is not.
    fit(model, image_folder, 1, plugins=[Scaled(init_scale=2.0**120)])
    (step,) = model.guard.collect()
    assert (step.term, step.overflow) == ("gradient of the decoder's last layer", True)
    assert_same(before, snapshot(model))


def test_non_finite_gradients_below_a_loss_scale_of_one_are_no_overflow(image_folder):
    model = build_shallow(gradient_clip_val=1.0)
    next(model.autoencoder.parameters()).register_hook(lambda g: g * float("inf"))
    fit(model, image_folder, 2, plugins=[Scaled(init_scale=2.0)])
    assert [step.overflow for step in model.guard.collect()] == [True, False]


def test_noise_seeds_are_each_batchs_and_processes_own_and_shared_draws_the_steps(
    image_folder, monkeypatch
):
    """And batches are counted for Lightning's logs, of which the third update's last has one."""
    monkeypatch.setattr(LiteAutoencoderKL, "global_rank", 5)
    counted, reports = [], []
    monkeypatch.setattr(
        liteautoencoder, "count_batches", lambda _, batches: counted.append(batches)
    )
    model, noise, shared = build_shallow(accumulate_grad_batches=2), [], []
    model.seed, forward = 3, model.forward_pass
    model.forward_pass = lambda s: (
        noise.append(torch.initial_seed()),
        shared.append(s.rng.random()),
        forward(s),
    )
    look = [Each(lambda m: reports.append(m.reports))]
    fit(model, image_folder, 3, batch_size=2, log_every_n_steps=6, callbacks=look)
    assert noise == [mix_seeds(3, update, batch, 5) for update in (0, 1, 2) for batch in (0, 1)]
    assert shared == [
        np.random.default_rng(mix_seeds(3, update)).random() for update in (0, 0, 1, 1, 2, 2)
    ]
    assert counted == list(range(6))
    assert reports == [False] * 5 + [True]


def test_schedule_ends_at_decay_steps(image_folder, updates):
    model = build_shallow(scheduler="cosine", decay_steps=2, min_lr_factor=0.5, learning_rate=1e-2)
    fit(model, image_folder, 4, log_every_n_steps=0)
    assert [u.lr for u in updates.of(model.autoencoder)] == pytest.approx(
        [1e-2, 0.75e-2, 0.5e-2, 0.5e-2]
    )
    assert model.logged == {}


def test_the_discriminators_values_are_logged_though_few_steps_have_them():
    """By what they show: health, or a loss of training."""
    model, reported, observed, passed = build_shallow(), [], [], []
    values = {name: torch.tensor(1.0) for name in ("discriminator", "accuracy", "logits_real")}
    loss = torch.tensor(2.0)
    adversary = SimpleNamespace(discriminator_loss=lambda *pair: (loss, {**values, "pair": pair}))
    model.guard.observe = observed.append
    model.__dict__["report"] = lambda terms, rare=False: reported.append((*terms, rare))
    model.__dict__["_backward"] = lambda *given: passed.append(given)
    model._discriminator_backward(adversary, ("real", "fake"), True)
    names = ["train/discriminator", "health/accuracy", "health/logits_real", "train/pair"]
    assert reported == [(name, True) for name in names]
    logs = {**values, "pair": ("real", "fake")}
    assert observed == [{**logs, "the discriminator's loss": loss}]
    assert passed == [("discriminator", loss, True)]
