"""Phase B's step through Lightning: two players, one forward pass,
each side's gradients its own.
"""

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from olvae.models import liteautoencoder
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.updates.optimizers import mix_seeds
from tests.conftest import plain_networks
from tests.models.steps import (
    PATCHGAN,
    UNETGAN,
    Each,
    against,
    assert_same,
    build,
    fit,
    metrics,
    moved,
    snapshot,
    source,
)


@pytest.mark.parametrize(
    ("discriminator", "size"), [(PATCHGAN, 16), (UNETGAN, 64)], ids=["patchgan", "unetgan"]
)
def test_adversarial_step_by_hand(image_folder, discriminator, size):
    """The first update of both sides, repeated without Lightning:
    each from its own loss, on one reconstruction.
    """
    settings = {"weight": 0.7, "learning_rate_ratio": 3.0, "betas": [0.2, 0.8], "loss": "logistic"}
    model = fit(build(against(discriminator, **settings)), image_folder, 1, size=size)
    other = build(against(discriminator, **settings))
    judge = other.adversary.discriminator
    autoencoders = torch.optim.Adam(
        other.autoencoder_parameters(), lr=1e-4, betas=(0.5, 0.9), fused=True
    )
    judges = torch.optim.Adam(judge.parameters(), lr=3e-4, betas=(0.2, 0.8), fused=True)
    x = other.images(next(iter(source(image_folder, size=size).train_loader())))

    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    reconstruction, posterior = other(x, sample_posterior=True)
    total, _ = other.objective(x, reconstruction, posterior)
    deceit = torch.stack([nn.functional.softplus(-t).mean() for t in judge(reconstruction)]).mean()
    parameters = other.autoencoder_parameters()
    for p, gradient in zip(
        parameters, torch.autograd.grad(total + 0.7 * deceit, parameters), strict=True
    ):
        p.grad = gradient
    loss = sum(
        torch.stack([nn.functional.softplus(sign * t).mean() for t in judge(image)]).mean()
        for sign, image in ((-1, x), (1, reconstruction.detach()))
    )
    loss.backward()
    autoencoders.step()
    judges.step()
    before = build(against(discriminator, **settings))
    for part in ("autoencoder", "adversary"):
        by_hand, first = snapshot(getattr(other, part)), snapshot(getattr(before, part))
        for name, tensor in snapshot(getattr(model, part)).items():
            torch.testing.assert_close(tensor, by_hand[name], atol=1e-6, rtol=1e-5, msg=name)
        assert len(moved(first, by_hand)) > 0.9 * len(first)
    assert model.adversary.updates == 1
    values = metrics(model)
    assert values["train/loss"] == pytest.approx((total + 0.7 * deceit).item(), rel=1e-5)
    assert values["train/adversarial"] == pytest.approx(deceit.item(), rel=1e-5)
    assert values["train/discriminator"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_autoencoder_runs_forward_once_a_step(image_folder):
    model = build(
        against(
            updates_per_step=2,
            adaptive_weight=True,
            r1_weight=1.0,
            lecam_weight=1.0,
            warmup_updates=2,
        )
    )
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    model.decoder.register_forward_hook(lambda *_: calls.append("decoder"))
    fit(model, image_folder, 3)
    assert calls == ["encoder", "decoder"] * (1 + 3)  # one batch warms up, with two updates


def test_an_update_of_the_discriminator_alone_leaves_the_autoencoder_untouched(image_folder):
    model = build(against(warmup_updates=3), use_quant=True, accumulate_grad_batches=2)
    start, start_d = snapshot(model.autoencoder), snapshot(model.adversary)
    history, graphs = [], []
    model.decoder.register_forward_hook(lambda _, __, y: graphs.append(y.requires_grad))

    def look(m: LiteAutoencoderKL) -> None:
        gradients = [p.grad for p in m.autoencoder.parameters()]
        history.append(
            (
                m.global_step,
                m.adversary.updates,
                snapshot(m.autoencoder),
                snapshot(m.adversary),
                gradients,
            )
        )
        if len(history) % 2 == 0:  # after an update neither side has gradients left
            assert all(p.grad is None for p in m.parameters())

    fit(model, image_folder, 2, callbacks=[Each(look)])
    assert graphs == [False] * 6 + [True] * 4
    # Two micro-batches a step.
    assert [step for step, *_ in history] == [
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        1,
        2,
    ]
    assert [count for _, count, *_ in history] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    for _, _, autoencoder, _, gradients in history[:6]:
        assert_same(autoencoder, start)
        assert all(g is None or not g.any() for g in gradients)
    for _, count, _, weights_d, _ in history:
        assert bool(moved(start_d, weights_d)) == (count > 0)
    _, _, after, _, _ = history[7]
    assert len(moved(start, after)) > 0.9 * len(start)
    assert model.trainer.global_step == 2
    assert model.images_seen == 5 * 2 * 4


@pytest.mark.parametrize(
    "settings", [{"weight": 0.0}, {"start_step": 9}, {"weight": 0.0, "cutmix_probability": 1.0}]
)
def test_adversarial_weight_0_trains_the_autoencoder_as_in_phase_a(image_folder, settings):
    discriminator, size = (UNETGAN, 64) if "cutmix_probability" in settings else (PATCHGAN, 16)
    networks = plain_networks()
    phase_a, phase_b = build(**networks), build(against(discriminator, **settings), **networks)
    start = snapshot(phase_b.adversary)
    fit(phase_a, image_folder, 2, size=size)
    fit(phase_b, image_folder, 2, size=size)
    assert_same(snapshot(phase_a.autoencoder), snapshot(phase_b.autoencoder))
    assert bool(moved(start, snapshot(phase_b.adversary))) == ("start_step" not in settings)
    judged = build(against(discriminator, weight=0.5), **networks)
    with_weight = fit(judged, image_folder, 2, size=size)
    assert moved(snapshot(phase_a.autoencoder), snapshot(with_weight.autoencoder))


def test_adversarial_ramp_is_in_the_loss(image_folder):
    model, seen = build(against(weight=0.4, start_step=1, ramp_steps=2)), []

    def look(m: LiteAutoencoderKL) -> None:
        values = metrics(m)
        pixels = sum(
            weight * values[f"train/{name}"] for name, weight in m.objective.weights.items()
        )
        adversarial = values.get("train/adversarial")
        seen.append(adversarial and (values["train/loss"] - pixels) / adversarial)

    fit(model, image_folder, 4, log_every_n_steps=1, callbacks=[Each(look)])
    assert seen == [
        None,
        pytest.approx(0.2, rel=1e-2),
        pytest.approx(0.4, rel=1e-2),
        pytest.approx(0.4, rel=1e-2),
    ]


def ratio_by_hand(model: LiteAutoencoderKL, root: Path) -> tuple[float, Tensor, Tensor, Tensor]:
    """|pixels| / |adversarial| of the first batch at the last layer;
    gradients with KL, of pixels, adversarial.
    """
    x = model.images(next(iter(source(root).train_loader())))
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    reconstruction, posterior = model(x, sample_posterior=True)
    total, terms = model.objective(x, reconstruction, posterior)
    weight = model.decoder.conv_out.weight
    pixels = total - model.objective.weights["kl"] * terms["kl"]
    deceit = -model.adversary.discriminator(reconstruction)[0].mean()
    gradients = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (total, pixels, deceit)
    ]
    return (gradients[1].norm() / gradients[2].norm()).item(), *gradients


def test_the_adaptive_weight_by_hand(image_folder, updates):
    model = build(against(weight=0.3, adaptive_weight=True))
    by_hand, whole, _, deceit = ratio_by_hand(copy.deepcopy(model), image_folder)
    assert by_hand > 2.0
    fit(model, image_folder, 1)
    values = metrics(model)
    assert values["health/adaptive_weight"] == pytest.approx(by_hand, rel=1e-3)
    assert values["health/gradient_ratio"] == pytest.approx(0.3, rel=1e-3)  # what it is for
    pixels = sum(
        weight * values[f"train/{name}"] for name, weight in model.objective.weights.items()
    )
    assert values["train/loss"] == pytest.approx(
        pixels + 0.3 * by_hand * values["train/adversarial"], rel=1e-4
    )
    (update,) = updates.of(model.autoencoder)
    seen = next(
        g
        for p, g in zip(update.parameters, update.gradients, strict=True)
        if p is model.decoder.conv_out.weight
    )
    torch.testing.assert_close(seen, whole + 0.3 * by_hand * deceit, rtol=1e-3, atol=1e-6)


def test_the_adaptive_weight_is_clamped_and_off_by_default(image_folder):
    """In the unit of latent-diffusion's code: sums over an image of 3 x 16 x 16."""
    adversary = against(weight=0.3, adaptive_weight=True, adaptive_max=0.5 * 768)
    clamped = fit(build(adversary), image_folder, 1)
    by_hand, *_ = ratio_by_hand(build(against()), image_folder)
    values = metrics(clamped)
    assert values["health/adaptive_weight"] == 0.5
    assert values["health/gradient_ratio"] == pytest.approx(0.3 * 0.5 / by_hand, rel=1e-3)
    constant = metrics(fit(build(against(weight=0.3)), image_folder, 1))
    assert "health/adaptive_weight" not in constant
    assert constant["health/gradient_ratio"] == pytest.approx(0.3 / by_hand, rel=1e-3)


def test_rare_values_are_logged_once_at_the_next_logging_step(image_folder, tmp_path):
    logged = []

    class Logger(CSVLogger):
        def log_metrics(self, metrics, step=None) -> None:
            logged.append((step, "train/r1" in metrics, "train/loss" in metrics))

    adversary = against(r1_weight=1.0, r1_every=4)  # R1 in steps 1, 5 and 9
    model = build(adversary, **plain_networks())
    fit(model, image_folder, 12, batch_size=2, logger=Logger(tmp_path), log_every_n_steps=2)
    assert logged == [(step, step in (2, 6, 10), True) for step in range(2, 13, 2)]


@pytest.mark.parametrize(("accumulate", "warmup"), [(1, 0), (2, 0), (1, 1)])
def test_the_gradient_ratio_is_measured_where_the_loggers_take_it(
    image_folder, tmp_path, monkeypatch, accumulate, warmup
):
    measured, logged = [], []
    ratio = liteautoencoder.gradient_ratio

    def measure(model, *losses):
        measured.append(model.global_step + 1)
        return ratio(model, *losses)

    class Logger(CSVLogger):
        def log_metrics(self, metrics, step=None) -> None:
            logged.append(step)

    monkeypatch.setattr(liteautoencoder, "gradient_ratio", measure)
    model = build(
        against(warmup_updates=warmup), accumulate_grad_batches=accumulate, **plain_networks()
    )
    fit(
        model,
        image_folder,
        7,
        batch_size=2,
        logger=Logger(tmp_path),
        log_every_n_steps=3 * accumulate,
    )
    assert len(logged) >= 2
    assert measured == logged
