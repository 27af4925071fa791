"""Steps of non-finite numbers change nothing, bit for bit; the term that was the first is named."""

import math

import lightning.pytorch as pl
import pytest
import torch

from olvae.launcher import join, leave
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.averaging import find_average
from olvae.models.updates.nonfinite import BadStep, NonFiniteGuard
from tests.forks import fork_ranks
from tests.models.steps import Each, against, assert_same, build_shallow, fit

EVERYTHING = {"weight": 0.5, "lecam_weight": 0.1}
BAD = 1  # the iteration that is spoilt, between two good ones


class Before(pl.Callback):
    """The state before each micro-batch: an average moves after other callbacks."""

    def __init__(self) -> None:
        self.history = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.history.append(state(pl_module))


def state(model: LiteAutoencoderKL) -> dict[str, torch.Tensor]:
    """Weights, buffers, averages and the optimizers' states;
    not the count of the discriminator's updates.
    """
    found = {
        name: t.clone()
        for name, t in model.state_dict().items()
        if not name.endswith("_extra_state")
    }
    found |= {f"average.{n}": t.clone() for n, t in find_average(model.trainer)._other.items()}
    for i, optimizer in enumerate(model.trainer.optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{j}.{name}": value.clone() for name, value in values.items()}
    return found


def spoil_losses(model: LiteAutoencoderKL, term: str, value: float, micro_batch: int = 0) -> None:
    """Add a number to one of the autoencoder's losses in one micro-batch."""
    whole = model.autoencoder_loss

    def spoilt(step):
        total = whole(step)
        if model._iteration == BAD and model._micro_batch == micro_batch:
            step.losses[term] = step.losses[term] + value
            total = total + value
        return total

    model.autoencoder_loss = spoilt


def spoil_discriminator(model: LiteAutoencoderKL, name: str, value: float) -> None:
    whole = model.adversary.discriminator_loss

    def spoilt(real, fake):
        loss, logs = whole(real, fake)
        if model._iteration == BAD:
            logs[name] = logs[name] + value
            loss = loss + value
        return loss, logs

    model.adversary.discriminator_loss = spoilt


def spoil_gradient(model: LiteAutoencoderKL, side: str, factor: float) -> None:
    victim = next(p for p in getattr(model, side).parameters() if p.requires_grad)
    victim.register_hook(lambda g: g * factor if model._iteration == BAD else g)


CASES = {
    "a loss is nan": (lambda m: spoil_losses(m, "kl", math.nan), "kl"),
    "the discriminator's": (
        lambda m: spoil_discriminator(m, "discriminator", math.nan),
        "discriminator",
    ),
    "LeCam": (lambda m: spoil_discriminator(m, "lecam", math.inf), "lecam"),
    "a gradient": (
        lambda m: spoil_gradient(m, "autoencoder", math.inf),
        "gradient of the autoencoder",
    ),
    "the other gradient": (
        lambda m: spoil_gradient(m, "adversary", math.nan),
        "gradient of the discriminator",
    ),
    "an infinite square": (
        lambda m: spoil_gradient(m, "autoencoder", 1e30),
        "gradient of the autoencoder",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_step_changes_nothing(image_folder, case):
    """BatchNorm's and LeCam's buffers are moved by the forward passes before anything is known."""
    spoil, term = CASES[case]
    clip = 1.0 if "gradient" in case else None
    model = build_shallow(
        against(**EVERYTHING), use_ema=True, ema_decay=0.5, gradient_clip_val=clip
    )
    spoil(model)
    before = Before()
    fit(model, image_folder, 4, callbacks=[before])
    history = before.history
    assert_same(history[BAD], history[BAD + 1])
    for part in (
        "encoder.",
        "adversary.discriminator.",
        "adversary.lecam.",
        "average.",
        "optimizer.1.",
    ):
        assert any(
            not torch.equal(history[BAD][n], t) for n, t in history[3].items() if n.startswith(part)
        ), part
    assert all(t.isfinite().all() for t in history[3].values())
    seen = model.guard.collect()
    assert [step is None for step in seen] == [True, False, True, True]
    bad = seen[BAD]
    assert (bad.step, bad.term, bad.overflow) == (BAD + 1, term, False)
    assert len(bad.keys) == 4
    assert model.guard.collect() == []


def test_one_micro_batch_spoils_the_update_and_is_named(image_folder):
    model = build_shallow(accumulate_grad_batches=2, use_ema=True)
    spoil_losses(model, "kl", math.nan, micro_batch=1)
    before, keys = Before(), []
    whole = model.guard.begin_micro_batch
    model.guard.begin_micro_batch = lambda names: (keys.append(names), whole(names))
    fit(model, image_folder, 3, batch_size=2, callbacks=[before])
    assert_same(before.history[2 * BAD], before.history[2 * BAD + 2])
    (bad,) = (step for step in model.guard.collect() if step is not None)
    assert bad.keys == keys[2 * BAD + 1] != keys[2 * BAD]


def test_a_bad_update_of_several_of_the_discriminator(image_folder):
    """It alone is undone: what is left is a step with one update."""
    model = build_shallow(
        against(updates_per_step=2, **EVERYTHING), use_ema=True, accumulate_grad_batches=2
    )
    calls, keys = [], []
    whole, begin = model.adversary.discriminator_loss, model.guard.begin_micro_batch
    model.guard.begin_micro_batch = lambda names: (keys.append(names), begin(names))

    def spoilt(real, fake):
        loss, logs = whole(real, fake)
        calls.append(1)
        # The second update of the first step.
        return (loss * math.nan, logs) if len(calls) == 3 else (loss, logs)

    model.adversary.discriminator_loss = spoilt
    before, once = Before(), Before()
    fit(model, image_folder, 2, batch_size=2, callbacks=[before])
    first, second = model.guard.collect()
    assert (first.term, first.whole, first.keys) == ("the discriminator's loss", False, keys[0])
    assert second is None
    assert all(t.isfinite().all() for t in state(model).values())
    single = build_shallow(against(**EVERYTHING), use_ema=True, accumulate_grad_batches=2)
    fit(single, image_folder, 2, batch_size=2, callbacks=[once])
    assert_same(before.history[2], once.history[2])


def test_after_a_bad_first_update_further_ones_are_skipped(image_folder):
    model = build_shallow(against(updates_per_step=2, **EVERYTHING), use_ema=True)
    spoil_losses(model, "kl", math.nan)
    before = Before()
    fit(model, image_folder, 3, callbacks=[before])
    assert_same(before.history[BAD], before.history[BAD + 1])
    seen = model.guard.collect()
    assert [step and step.whole for step in seen] == [None, True, None]


def test_a_bad_step_in_the_discriminators_warm_up(image_folder):
    model = build_shallow(against(warmup_updates=3, **EVERYTHING))
    spoil_discriminator(model, "discriminator", math.nan)
    history = []

    def look(m: LiteAutoencoderKL) -> None:
        history.append(
            {n: t.clone() for n, t in m.adversary.state_dict().items() if n != "_extra_state"}
        )

    fit(model, image_folder, 1, callbacks=[Each(look)])
    assert_same(history[BAD - 1], history[BAD])
    assert [step is not None for step in model.guard.collect()] == [
        False,
        True,
        False,
        False,
    ]


def test_non_finite_loss_makes_all_gradients_non_finite():
    """Also where its own gradient is zero or finite: on another rank, the average of the gradients
    is all there is.
    """
    x = torch.ones(2, requires_grad=True)
    NonFiniteGuard.propagate(torch.where(x > 0, x * 0 + math.inf, x).sum()).backward()
    assert x.grad.isnan().all()
    x.grad = None
    loss = (3 * x).sum()
    assert NonFiniteGuard.propagate(loss) == loss
    NonFiniteGuard.propagate(loss).backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0))


def one_step(
    guard: NonFiniteGuard,
    step: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    gradient: float = 1.0,
    **losses: float,
) -> torch.Tensor:
    """Two micro-batches with these losses, and a gradient of this norm; whether it is bad."""
    guard.begin_step()
    for keys in (["a", "b"], ["c"]):
        guard.begin_micro_batch(keys)
        guard.observe({name: torch.tensor(value) for name, value in losses.items()})
    bad = guard.is_bad({"autoencoder": torch.tensor(gradient)})
    guard.end_update()
    guard.end_step(step, scaler)
    return bad


def test_steps_are_collected_once_with_their_terms_and_images():
    guard = NonFiniteGuard([None])
    assert guard.collect() == []
    assert guard.good == 1.0
    assert float(one_step(guard, kl=1.0)) == 0.0
    assert float(guard.good) == 1.0
    assert float(one_step(guard, 2, kl=math.inf, gradient=math.nan)) == 1.0
    assert float(guard.good) == 0.0
    one_step(guard, 3, gradient=1e30)
    assert guard.pending == 3
    of_gradient = "gradient of the autoencoder"
    assert guard.collect() == [
        None,
        BadStep(2, "kl", ["a", "b"], False, True),
        BadStep(3, of_gradient, ["a", "b", "c"], False, True),
    ]
    assert (guard.pending, guard.collect()) == (0, [])


@pytest.mark.parametrize(("scale", "overflow"), [(1024.0, True), (1.0, True), (0.5, False)])
def test_infinite_gradients_under_a_loss_scale_from_1_on_are_an_overflow(scale, overflow):
    """Where no loss is infinite itself."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    guard = NonFiniteGuard([])
    one_step(guard, 1, scaler, gradient=math.inf)
    one_step(guard, 2, scaler, gradient=math.inf, kl=math.nan)
    assert [step.overflow for step in guard.collect()] == [overflow, False]


@pytest.mark.posix
def test_a_step_is_no_overflow_if_a_loss_of_any_process_was_not_finite(monkeypatch):
    """Without a loss scale nothing is agreed on."""

    def work() -> None:
        rank, _ = join()
        guard, scaler = NonFiniteGuard([]), torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        one_step(guard, 1, scaler, kl=1.0)
        one_step(guard, 2, scaler, gradient=math.inf, kl=1.0)
        one_step(guard, 3, scaler, gradient=math.inf, kl=math.nan if rank else 1.0)
        steps = guard.collect()
        one_step(guard, 4, scaler, gradient=math.inf)
        steps += guard.collect()
        monkeypatch.setattr("torch.distributed.all_reduce", None)
        one_step(guard, 5, gradient=math.inf)
        steps += guard.collect()
        leave()
        assert [step and step.overflow for step in steps] == [None, True, False, True, False]

    fork_ranks(work)


def test_a_further_update_is_bad_after_a_bad_first_one():
    for first, further, expected in ((math.nan, 1.0, 1.0), (1.0, math.inf, 1.0), (1.0, 1.0, 0.0)):
        guard = NonFiniteGuard([])
        guard.begin_step()
        guard.begin_micro_batch(["a"])
        guard.is_bad({"autoencoder": torch.tensor(1.0), "discriminator": torch.tensor(first)})
        guard.end_update()
        guard.begin_update()
        guard.return_to(0)
        assert float(guard.is_bad({"discriminator": torch.tensor(further)})) == expected
        guard.end_update()
        guard.end_step(1, None)
        assert float(guard.good) == (first == 1.0)


def test_buffers_of_every_dtype_are_put_back_after_a_bad_update():
    norm = torch.nn.BatchNorm2d(2)
    guard = NonFiniteGuard([norm, None])
    for gradient, kept in ((1.0, True), (math.nan, False)):
        before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        guard.begin_step()
        guard.begin_micro_batch(["a"])
        norm(torch.randn(4, 2, 3, 3) + 5)
        guard.is_bad({"autoencoder": torch.tensor(gradient)})
        guard.end_update()
        for name, buffer in norm.named_buffers():
            assert torch.equal(buffer, before[name]) != kept, name


def test_an_update_is_skipped_by_what_the_optimizer_or_the_scaler_heeds():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(2)
    NonFiniteGuard.skip_if(torch.tensor(1.0), optimizer, None)
    assert weight.grad.tolist() == [1.0, 1.0]
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]
    NonFiniteGuard.skip_if(torch.tensor(0.0), optimizer, None)
    optimizer.step()
    assert (weight < 1).all()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad, gradient, scale in ((0.0, 1.0, 4.0), (1.0, 1.0, 2.0), (0.0, math.inf, 1.0)):
        scaler.scale(torch.zeros(()))
        weight.grad = torch.full((2,), gradient)
        before = weight.detach().clone()
        plain = torch.optim.Adam([weight])
        scaler.unscale_(plain)
        NonFiniteGuard.skip_if(torch.tensor(bad), plain, scaler)
        scaler.step(plain)
        scaler.update()
        assert scaler.get_scale() == scale
        assert torch.equal(weight, before) == (scale < 4.0)
