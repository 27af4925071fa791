"""Phase B's step through Lightning: two players, one forward pass, each side's gradients its own."""

import copy
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from olvae.config import save
from olvae.data.folder import FolderSource
from olvae.data.pixels import from_uint8
from olvae.losses.kl import kl_loss
from olvae.models import liteautoencoder
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.step import mix_seeds
from olvae.modules.spectral import fixed_spectral_norm
from olvae.runs import Run
from olvae.training import run as training
from olvae.training import summary
from olvae.training.callbacks import GracefulStop
from olvae.training.run import TrainOptions, train
from tests.conftest import tiny_config

PATCHGAN = {"target": "olvae.modules.basicgan.patchgan.PatchGAN", "params": {"base_channels": 4, "n_layers": 1}}
UNETGAN = {"target": "olvae.modules.unetgan.unetgan.UNetGAN", "params": {"base_channels": 2, "image_size": 128}}


def against(discriminator: dict = PATCHGAN, **params) -> dict:
    """An adversary_config."""
    node = {"discriminator_config": discriminator, **params}
    return {"target": "olvae.models.adversary.Adversary", "params": node}


def build(adversary: dict | None = None, **model) -> LiteAutoencoderKL:
    """The autoencoder starts from the same weights with and without an adversary."""
    torch.manual_seed(0)
    return LiteAutoencoderKL(**tiny_config(adversary_config=adversary, **model)["model"]["params"])


def source(root: Path, batch_size: int = 4, size: int = 16) -> FolderSource:
    return FolderSource(str(root), size, batch_size, val_fraction=0.2)


def fit(
    model: LiteAutoencoderKL, root: Path, steps: int, batch_size: int = 4, size: int = 16, **trainer
) -> LiteAutoencoderKL:
    settings = {"logger": False, "log_every_n_steps": 1, **trainer}
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **settings,
    ).fit(model, source(root, batch_size, size).train_loader())
    return model


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


def metrics(model: LiteAutoencoderKL) -> dict[str, float]:
    return {name: float(value) for name, value in model.trainer.callback_metrics.items()}


def norm(gradients: list[Tensor]) -> float:
    return torch.stack([g.double().norm() for g in gradients]).norm().item()


class Each(pl.Callback):
    """Calls a function after every batch."""

    def __init__(self, look) -> None:
        self.look = look

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.look(pl_module)


@dataclass
class Update:
    """An update as Adam sees it."""

    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    lr: float
    betas: tuple[float, float]


class Updates(list[Update]):
    def of(self, module: nn.Module) -> "Updates":
        """Those of a module's parameters."""
        own = {id(p) for p in module.parameters()}
        return Updates(u for u in self if any(id(p) in own for p in u.parameters))


@pytest.fixture
def updates(monkeypatch) -> Updates:
    """Every update of either optimiser, in order."""
    seen = Updates()
    step = torch.optim.Adam.step

    def record(self, *args, **kwargs):
        (group,) = self.param_groups
        closure = kwargs.get("closure") or (args[0] if args else None)
        if closure is not None:
            closure()
        gradients = [p.grad.clone() for p in group["params"]]
        seen.append(Update(group["params"], gradients, group["lr"], group["betas"]))
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    return seen


# One step


@pytest.mark.parametrize(("discriminator", "size"), [(PATCHGAN, 16), (UNETGAN, 64)], ids=["patchgan", "unetgan"])
def test_a_step_by_hand(image_folder, discriminator, size):
    """The first update of both sides, repeated without Lightning: each from its own loss, on one reconstruction."""
    settings = {"weight": 0.7, "learning_rate_ratio": 3.0, "betas": [0.2, 0.8], "loss": "logistic"}
    model = fit(build(against(discriminator, **settings)), image_folder, 1, size=size)
    other = build(against(discriminator, **settings))
    judge = other.adversary.discriminator
    autoencoders = torch.optim.Adam(other.autoencoder_parameters(), lr=1e-4, betas=(0.5, 0.9), fused=True)
    judges = torch.optim.Adam(judge.parameters(), lr=3e-4, betas=(0.2, 0.8), fused=True)
    x = other.images(next(iter(source(image_folder, size=size).train_loader())))

    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    reconstruction, posterior = other(x, sample_posterior=True)
    total, _ = other.objective(x, reconstruction, posterior)
    with fixed_spectral_norm(judge):
        deceit = torch.stack([nn.functional.softplus(-t).mean() for t in judge(reconstruction)]).mean()
        parameters = other.autoencoder_parameters()
        for p, gradient in zip(parameters, torch.autograd.grad(total + 0.7 * deceit, parameters), strict=True):
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
    model = build(against(updates_per_step=2, adaptive_weight=True, r1_weight=1.0, lecam_weight=1.0, warmup_updates=2))
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    model.decoder.register_forward_hook(lambda *_: calls.append("decoder"))
    fit(model, image_folder, 3)
    assert calls == ["encoder", "decoder"] * (1 + 3)  # one batch warms up, with two updates


def test_the_discriminator_sees_images_and_their_reconstructions_of_this_step(image_folder):
    model, images, seen = build(against()), [], []
    model.decoder.register_forward_hook(lambda _, __, y: images.append(y.detach().clone()))
    model.adversary.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fit(model, image_folder, 1)
    x = model.images(next(iter(source(image_folder).train_loader())))
    for_generator, real, fake = seen
    assert torch.equal(for_generator, images[0])
    assert for_generator.requires_grad
    assert torch.equal(real, x)
    assert torch.equal(fake, images[0])
    assert not fake.requires_grad


# The discriminator alone


def test_an_update_of_the_discriminator_alone_leaves_the_autoencoder_untouched(image_folder):
    model = build(against(warmup_updates=3), use_quant=True, accumulate_grad_batches=2)
    start, start_d = snapshot(model.autoencoder), snapshot(model.adversary)
    history, graphs = [], []
    model.decoder.register_forward_hook(lambda _, __, y: graphs.append(y.requires_grad))

    def look(m: LiteAutoencoderKL) -> None:
        gradients = [p.grad for p in m.autoencoder.parameters()]
        history.append((m.global_step, m.adversary.updates, snapshot(m.autoencoder), snapshot(m.adversary), gradients))
        if len(history) % 2 == 0:  # after an update neither side has gradients left
            assert all(p.grad is None for p in m.parameters())

    fit(model, image_folder, 2, callbacks=[Each(look)])
    assert graphs == [False] * 6 + [True] * 4
    assert [step for step, *_ in history] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 2]  # two micro-batches a step
    assert [count for _, count, *_ in history] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    for _, _, autoencoder, _, gradients in history[:6]:
        assert_same(autoencoder, start)
        assert all(g is None or not g.any() for g in gradients)
    for _, count, _, adversary, _ in history:
        assert bool(moved(start_d, adversary)) == (count > 0)
    _, _, after, _, _ = history[7]
    assert len(moved(start, after)) > 0.9 * len(start)
    assert model.trainer.global_step == 2
    assert model.images_seen == 5 * 2 * 4


def test_the_warm_up_waits_for_the_start_step(image_folder):
    model, history = build(against(start_step=2, warmup_updates=2)), []
    fit(model, image_folder, 4, callbacks=[Each(lambda m: history.append((m.global_step, m.adversary.updates)))])
    assert history == [(1, 0), (2, 0), (2, 1), (2, 2), (3, 3), (4, 4)]


# What it leaves alone


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"start_step": 9}, {"weight": 0.0, "cutmix_weight": 1.0}])
def test_without_its_weight_the_autoencoder_goes_as_in_phase_a(image_folder, settings):
    discriminator, size = (UNETGAN, 64) if "cutmix_weight" in settings else (PATCHGAN, 16)
    phase_a, phase_b = build(), build(against(discriminator, **settings))
    start = snapshot(phase_b.adversary)
    fit(phase_a, image_folder, 4, size=size)
    fit(phase_b, image_folder, 4, size=size)
    assert_same(snapshot(phase_a.autoencoder), snapshot(phase_b.autoencoder))
    assert bool(moved(start, snapshot(phase_b.adversary))) == ("start_step" not in settings)
    with_weight = fit(build(against(discriminator, weight=0.5)), image_folder, 4, size=size)
    assert moved(snapshot(phase_a.autoencoder), snapshot(with_weight.autoencoder))


def test_from_the_start_step_on_both_sides_play(image_folder):
    phase_a, phase_b = build(), build(against(start_step=2, weight=0.5))
    history_a, history_b = [], []
    fit(phase_a, image_folder, 4, callbacks=[Each(lambda m: history_a.append(snapshot(m.autoencoder)))])
    fit(phase_b, image_folder, 4, callbacks=[Each(lambda m: history_b.append(snapshot(m.autoencoder)))])
    differ = [bool(moved(a, b)) for a, b in zip(history_a, history_b, strict=True)]
    assert differ == [False, False, True, True]


def test_the_ramp_is_in_the_loss(image_folder):
    model, seen = build(against(weight=0.4, start_step=1, ramp_steps=2)), []

    def look(m: LiteAutoencoderKL) -> None:
        values = metrics(m)
        pixels = sum(weight * values[f"train/{name}"] for name, weight in m.objective.weights.items())
        adversarial = values.get("train/adversarial")
        seen.append(adversarial and (values["train/loss"] - pixels) / adversarial)

    fit(model, image_folder, 4, callbacks=[Each(look)])
    assert seen == [None, pytest.approx(0.2, rel=1e-2), pytest.approx(0.4, rel=1e-2), pytest.approx(0.4, rel=1e-2)]


# Accumulation, several updates, clipping


def test_accumulation_equals_a_larger_batch_for_both_optimisers(image_folder, updates):
    """3 x 2 images give the gradients of 6; in float64, because hinge and ReLU turn a rounding into a jump."""
    settings = {"sample_posterior": False}
    small = build(against(UNETGAN, weight=0.5), accumulate_grad_batches=3, **settings)
    large = build(against(UNETGAN, weight=0.5), **settings)
    for model in (small, large):
        model.images = lambda batch: from_uint8(batch["image"]).double()
        torch.manual_seed(1)
        with torch.no_grad():  # away from the orthogonal start, where power iterations change no weight
            for p in model.adversary.parameters():
                p.add_(0.1 * torch.randn_like(p))
    fit(small, image_folder, 2, batch_size=2, size=64, precision="64-true")
    fit(large, image_folder, 2, batch_size=6, size=64, precision="64-true")
    assert small.trainer.global_step == large.trainer.global_step == 2
    assert small.images_seen == large.images_seen == 12
    assert small.adversary.updates == large.adversary.updates == 2
    for part in ("autoencoder", "adversary"):
        accumulated, whole = (updates.of(getattr(model, part)) for model in (small, large))
        assert len(accumulated) == len(whole) == 2
        for one, other in zip(accumulated, whole, strict=True):
            assert norm(other.gradients) > 0.1
            for a, b in zip(one.gradients, other.gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_several_updates_of_the_discriminator_a_step(image_folder, updates):
    model, counts = build(against(updates_per_step=3), accumulate_grad_batches=2), []
    seen: list[Tensor] = []
    model.adversary.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    fit(model, image_folder, 2, callbacks=[Each(lambda m: counts.append((m.global_step, m.adversary.updates)))])
    assert counts == [(0, 0), (1, 3), (1, 3), (2, 6)]
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


def test_further_updates_have_gradients_of_their_own(image_folder, updates):
    """The second update of a step equals a first one from the weights after it, on the same images."""
    model, second = build(against(UNETGAN, updates_per_step=2)), build(against(UNETGAN))
    between = {}

    def look(module, inputs):
        if module.training and not between and len(updates.of(model.adversary)) == 1:
            between.update(copy.deepcopy(module.state_dict()))

    model.adversary.discriminator.register_forward_pre_hook(look)
    fit(model, image_folder, 1, size=64)
    second.adversary.discriminator.load_state_dict(between)
    fit(second, image_folder, 1, size=64)
    _, expected = updates.of(model.adversary)
    (update,) = updates.of(second.adversary)
    for a, b in zip(update.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_max_steps_counts_updates_of_the_autoencoder(image_folder, updates):
    model = fit(build(against(updates_per_step=3, warmup_updates=3)), image_folder, 4)
    assert model.trainer.global_step == 4
    assert len(updates.of(model.autoencoder)) == 4
    assert len(updates.of(model.adversary)) == 3 + 3 * 4


def test_clipping_applies_to_both_sides_each_by_its_own_norm(image_folder, updates):
    free = fit(build(against(weight=1.0)), image_folder, 1)
    clipped = fit(build(against(weight=1.0), gradient_clip_val=1e-3), image_folder, 1)
    values = metrics(clipped)
    names = {"autoencoder": "train/grad_norm", "adversary": "train/grad_norm_discriminator"}
    for part, name in names.items():
        (before,), (after,) = updates.of(getattr(free, part)), updates.of(getattr(clipped, part))
        assert norm(before.gradients) > 0.01
        assert norm(after.gradients) == pytest.approx(1e-3, rel=1e-2)
        assert values[name] == pytest.approx(norm(before.gradients), rel=1e-4)


def test_rates_and_betas_of_the_two(image_folder, updates):
    schedule = {"scheduler": "cosine", "warmup_steps": 2, "min_lr_factor": 0.5, "learning_rate": 1e-2}
    model = build(against(learning_rate_ratio=0.25, betas=[0.1, 0.7]), betas=[0.6, 0.95], **schedule)
    fit(model, image_folder, 4)
    rates = pytest.approx([0.5e-2, 1e-2, 1e-2, 0.75e-2])
    assert [u.lr for u in updates.of(model.autoencoder)] == rates
    assert [4 * u.lr for u in updates.of(model.adversary)] == rates
    assert {u.betas for u in updates.of(model.autoencoder)} == {(0.6, 0.95)}
    assert {u.betas for u in updates.of(model.adversary)} == {(0.1, 0.7)}


def test_each_optimiser_has_its_own_parameters(image_folder, updates):
    model = fit(build(against(lecam_weight=1.0), use_quant=True, anchor_weight=1.0), image_folder, 1)
    (autoencoder,), (adversary,) = updates.of(model.autoencoder), updates.of(model.adversary)
    assert {id(p) for p in autoencoder.parameters} == {id(p) for p in model.autoencoder.parameters()}
    assert {id(p) for p in adversary.parameters} == {id(p) for p in model.adversary.parameters()}


# The adaptive weight, and health


def ratio_by_hand(model: LiteAutoencoderKL, root: Path) -> tuple[float, Tensor, Tensor, Tensor]:
    """|pixels| / |adversarial| of the first batch at the last layer; gradients with KL, of pixels, adversarial."""
    x = model.images(next(iter(source(root).train_loader())))
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    reconstruction, posterior = model(x, sample_posterior=True)
    total, terms = model.objective(x, reconstruction, posterior)
    weight = model.decoder.conv_out.weight
    pixels = total - model.objective.weights["kl"] * terms["kl"]
    deceit = -model.adversary.discriminator(reconstruction)[0].mean()
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (total, pixels, deceit)]
    return (gradients[1].norm() / gradients[2].norm()).item(), *gradients


def test_the_adaptive_weight_by_hand(image_folder, updates):
    model = build(against(weight=0.3, adaptive_weight=True))
    by_hand, whole, _, deceit = ratio_by_hand(copy.deepcopy(model), image_folder)
    assert by_hand > 2.0
    fit(model, image_folder, 1)
    values = metrics(model)
    assert values["health/adaptive_weight"] == pytest.approx(by_hand, rel=1e-3)
    assert values["health/gradient_ratio"] == pytest.approx(0.3, rel=1e-3)  # what it is for
    pixels = sum(weight * values[f"train/{name}"] for name, weight in model.objective.weights.items())
    assert values["train/loss"] == pytest.approx(pixels + 0.3 * by_hand * values["train/adversarial"], rel=1e-4)
    (update,) = updates.of(model.autoencoder)
    seen = next(
        g for p, g in zip(update.parameters, update.gradients, strict=True) if p is model.decoder.conv_out.weight
    )
    torch.testing.assert_close(seen, whole + 0.3 * by_hand * deceit, rtol=1e-3, atol=1e-6)


def test_the_adaptive_weight_is_clamped_and_off_by_default(image_folder):
    clamped = fit(build(against(weight=0.3, adaptive_weight=True, adaptive_max=0.5)), image_folder, 1)
    by_hand, *_ = ratio_by_hand(build(against()), image_folder)
    values = metrics(clamped)
    assert values["health/adaptive_weight"] == 0.5
    assert values["health/gradient_ratio"] == pytest.approx(0.3 * 0.5 / by_hand, rel=1e-3)
    constant = metrics(fit(build(against(weight=0.3)), image_folder, 1))
    assert "health/adaptive_weight" not in constant
    assert constant["health/gradient_ratio"] == pytest.approx(0.3 / by_hand, rel=1e-3)


def test_reporting_changes_nothing(image_folder):
    often, never = (fit(build(against()), image_folder, 3, log_every_n_steps=n) for n in (1, 100))
    assert "health/gradient_ratio" in metrics(often)
    assert "health/gradient_ratio" not in metrics(never)
    assert_same(snapshot(often), snapshot(never))


def test_health_of_the_last_step_by_hand(image_folder):
    model, seen = build(against(loss="hinge")), {}

    def look(m: LiteAutoencoderKL) -> None:
        seen.update(metrics(m))

    model.adversary.discriminator.register_forward_hook(lambda _, __, y: outputs.append(y[0].detach().clone()))
    outputs: list[Tensor] = []
    fit(model, image_folder, 2, callbacks=[Each(look)])
    *_, real, fake = outputs
    assert seen["health/logits_real"] == pytest.approx(real.mean().item(), rel=1e-5)
    assert seen["health/logits_fake"] == pytest.approx(fake.mean().item(), rel=1e-5)
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    assert seen["health/accuracy"] == pytest.approx(right.item())


@pytest.mark.parametrize(("accumulate", "warmup"), [(1, 0), (2, 0), (1, 1)])
def test_the_gradient_ratio_is_measured_where_the_loggers_take_it(
    image_folder, tmp_path, monkeypatch, accumulate, warmup
):
    measured, logged = [], []
    ratio = liteautoencoder.gradient_ratio

    def measure(model, one, other):
        measured.append(model.global_step + 1)
        return ratio(model, one, other)

    class Logger(CSVLogger):
        def log_metrics(self, metrics, step=None) -> None:
            logged.append(step)

    monkeypatch.setattr(liteautoencoder, "gradient_ratio", measure)
    model = build(against(warmup_updates=warmup), accumulate_grad_batches=accumulate)
    fit(model, image_folder, 7, batch_size=2, logger=Logger(tmp_path), log_every_n_steps=3 * accumulate)
    assert len(logged) >= 2
    assert measured == logged


# Other modes


@pytest.mark.parametrize("adversary", [None, against(weight=0.5)], ids=["a", "b"])
def test_a_frozen_encoder(image_folder, updates, adversary):
    model = build(adversary, use_quant=True, freeze_encoder=True, use_ema=True, ema_decay=0.5)
    start, modes = snapshot(model), []
    fit(model, image_folder, 3, callbacks=[Each(lambda m: modes.append(m.encoder.training))])
    after = snapshot(model)
    for half in ("encoder.", "quantizer.quant_conv."):
        names = [name for name in start if name.startswith(half)]
        assert names
        assert all(torch.equal(start[name], after[name]) for name in names)
    for half in ("decoder.", "quantizer.post_quant_conv."):
        names = {name for name in start if name.startswith(half)}
        assert len(names & moved(start, after)) > 0.9 * len(names)
    assert modes == [False] * 3
    assert len(updates.of(model.decoder)) == 3
    assert len(updates.of(model.encoder)) == 0


def test_a_frozen_encoder_trains_the_decoder_as_the_whole_does(image_folder, updates):
    """The gradients of the decoder are those of full training; there are no others."""
    frozen, whole = build(freeze_encoder=True), build()
    for model in (frozen, whole):
        fit(model, image_folder, 1)
    (update,), (full,) = updates.of(frozen.decoder), updates.of(whole.decoder)
    decoder = dict(zip(map(id, full.parameters), full.gradients, strict=True))
    for gradient, p in zip(update.gradients, whole.decoder.parameters(), strict=True):
        torch.testing.assert_close(gradient, decoder[id(p)])


def test_the_anchor_is_where_training_started(image_folder):
    """From whatever weights were loaded after the model was built."""
    model, anchors = build(against(), anchor_weight=1e-6, use_quant=True, learning_rate=1e-3), []
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(0.05 * torch.randn_like(p))
    start = snapshot(model.encoder)
    fit(
        model,
        image_folder,
        8,
        callbacks=[Each(lambda m: anchors.append((metrics(m)["train/anchor"], snapshot(m.anchor.moments[0]))))],
    )
    distances = [distance for distance, _ in anchors]
    assert distances[0] == 0.0
    assert min(distances[1:]) > 0
    assert sum(distances[-4:]) / 4 > 1.5 * distances[1]  # it grows, as much as batches differ
    for _, weights in anchors:
        assert_same(weights, start)
    assert len(moved(start, snapshot(model.encoder))) > 0.9 * len(start)
    assert not model.anchor.training


def test_the_anchor_is_in_the_loss_and_keeps_latents(image_folder):
    values = metrics(fit(build(anchor_weight=7.0, learning_rate=1e-3), image_folder, 3))
    weights = build().objective.weights
    expected = sum(weight * values[f"train/{name}"] for name, weight in weights.items()) + 7 * values["train/anchor"]
    assert values["train/anchor"] > 0
    assert values["train/loss"] == pytest.approx(expected, rel=1e-5)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    old = build().encode(x).mean
    free, held = (fit(build(anchor_weight=w, learning_rate=1e-3), image_folder, 12) for w in (1e-6, 1e2))
    distances = [(m.encode(x).mean - old).square().mean().item() for m in (free, held)]
    assert distances[1] < 0.5 * distances[0]


def test_an_equivariance_step_pauses_the_adversary(image_folder):
    model = build(against(weight=0.5), equivariance=1.0)
    start, start_d = snapshot(model.autoencoder), snapshot(model.adversary)
    latents, images = [], []
    model.decoder.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0].shape))
    model.decoder.register_forward_hook(lambda _, __, y: images.append(y.shape))
    fit(model, image_folder, 12, size=32)
    assert model.trainer.global_step == 12
    assert model.adversary.updates == 0
    assert_same(snapshot(model.adversary), start_d)
    assert len(moved(start, snapshot(model.autoencoder))) > 0.9 * len(start)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.isfinite(model.trainer.callback_metrics["train/loss"])
    assert not [name for name in metrics(model) if "health" in name or "adversarial" in name]
    assert len(latents) == 12
    assert {shape[-1] for shape in latents} == {1, 2, 3, 4}
    assert [shape[-1] for shape in images] == [8 * shape[-1] for shape in latents]


def test_equivariance_is_decided_once_an_update_for_its_share_of_them(image_folder, monkeypatch):
    transform, model, calls = liteautoencoder.transform_alike, build(against(), equivariance=0.5), []
    model.accumulate_grad_batches = 2

    def record(z, x, generator):
        state = generator.get_state().clone()
        calls.append((model._iteration, state))
        return transform(z, x, generator)

    monkeypatch.setattr(liteautoencoder, "transform_alike", record)
    fit(model, image_folder, 30, batch_size=1)
    share = len(calls) / 2 / 30
    assert 0.1 < share < 0.9  # 0.5, and four standard deviations of 0.09
    assert model.adversary.updates == 30 - len(calls) // 2
    for (iteration, state), (again, other) in zip(calls[::2], calls[1::2], strict=True):
        assert iteration == again
        assert torch.equal(state, other)


def test_without_equivariance_nothing_is_transformed(image_folder, monkeypatch):
    monkeypatch.setattr(liteautoencoder, "transform_alike", None)
    assert fit(build(against()), image_folder, 2).trainer.global_step == 2


def test_equivariance_compares_with_the_transformed_image(image_folder, monkeypatch):
    """A decoder that knows the transformed image by heart has no pixel loss."""
    seen = {}

    def transform(z, x, generator):
        seen["x"] = x.rot90(1, (2, 3))[..., :8, :8]
        return z.rot90(1, (2, 3))[..., :1, :1], seen["x"]

    monkeypatch.setattr(liteautoencoder, "transform_alike", transform)
    model = build(equivariance=1.0)
    model.decoder.register_forward_hook(lambda _, z, y: 0 * y + seen["x"])
    fit(model, image_folder, 1)
    assert metrics(model)["train/rec"] == 0.0
    assert metrics(model)["train/gaussian"] == 0.0


def test_equivariance_leaves_the_kl_term_alone(image_folder):
    """It is per value of the image that was encoded."""
    plain = fit(build(), image_folder, 1, size=32)
    expected = metrics(plain)["train/kl"]
    kls = []
    for seed in range(6):
        model = build(equivariance=1.0)
        model._iteration = seed  # another transformation
        x = model.images(next(iter(source(image_folder, size=32).train_loader())))
        assert kl_loss(model.encode(x), x).item() == pytest.approx(expected, rel=1e-5)
        fit(model, image_folder, 1, size=32)
        kls.append(metrics(model)["train/kl"])
    assert kls == pytest.approx([expected] * 6, rel=1e-5)


# fp16's loss scale, with two optimisers: Lightning's own plugin and torch's own scaler, on the CPU. Only autocast is
# left out, so that float32 is exact under a scale that is a power of two, and a run must equal one without a scale.


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
    "clipped": ({}, {"gradient_clip_val": 0.01}),
    "accumulated": ({}, {"accumulate_grad_batches": 2}),
    "warm-up": ({"warmup_updates": 2}, {"gradient_clip_val": 0.01}),
    "several updates": ({"updates_per_step": 3}, {"gradient_clip_val": 0.01}),
    "several updates, accumulated": ({"updates_per_step": 3, "warmup_updates": 3}, {"accumulate_grad_batches": 2}),
    "adaptive": ({"adaptive_weight": True}, {}),
}


@pytest.mark.parametrize("name", SCALED_RUNS)
def test_a_loss_scale_changes_nothing(image_folder, name):
    """The scale doubles at every update: one that came between the two sides' steps would show."""
    adversary, settings = SCALED_RUNS[name]
    adversary = {"weight": 0.5, **adversary}
    plain = fit(build(against(**adversary), **settings), image_folder, 3)
    plugin = Scaled(init_scale=2.0**10, growth_interval=1)
    scaled = fit(build(against(**adversary), **settings), image_folder, 3, plugins=[plugin])
    assert_same(snapshot(plain), snapshot(scaled))
    assert moved(snapshot(build(against(**adversary))), snapshot(scaled))
    one, other = metrics(plain), metrics(scaled)
    assert one == pytest.approx(other, rel=1e-5)
    alone = 1 if "warmup_updates" in adversary else 0  # a batch on which the discriminator learns alone
    per_step = adversary.get("updates_per_step", 1)
    expected = (3 + alone) * per_step if per_step > 1 else 3 + adversary.get("warmup_updates", 0)
    assert plugin.scaler.scales == [2.0 ** (11 + i) for i in range(expected)]


def test_both_optimisers_see_unscaled_gradients(image_folder, updates):
    settings = {"gradient_clip_val": 1e6}  # without it the fused Adam takes the scale off itself
    plain = fit(build(against(), **settings), image_folder, 1)
    scaled = fit(build(against(), **settings), image_folder, 1, plugins=[Scaled(init_scale=2.0**16)])
    for part in ("autoencoder", "adversary"):
        (one,), (other,) = updates.of(getattr(plain, part)), updates.of(getattr(scaled, part))
        assert norm(one.gradients) > 0.01
        assert all(torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True))


@pytest.mark.parametrize("side", ["autoencoder", "adversary"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_overflow_on_one_side_skips_that_side_and_lowers_the_scale(image_folder, side, clip):
    plugin = Scaled(init_scale=2.0**10)
    model, plain = (build(against(weight=0.5), gradient_clip_val=clip) for _ in range(2))
    start = {part: snapshot(getattr(model, part)) for part in ("autoencoder", "adversary")}
    overflow = {"now": True}
    victim = next(p for p in getattr(model, side).parameters())
    victim.register_hook(lambda g: g * float("inf") if overflow["now"] else g)
    history = []

    def look(m: LiteAutoencoderKL) -> None:
        overflow["now"] = False
        history.append({part: snapshot(getattr(m, part)) for part in start})

    fit(model, image_folder, 2, plugins=[plugin], callbacks=[Each(look)])
    fit(plain, image_folder, 1)
    other = {"autoencoder": "adversary", "adversary": "autoencoder"}[side]
    assert_same(history[0][side], start[side])
    assert_same(history[0][other], snapshot(getattr(plain, other)))
    for part in start:
        assert moved(history[0][part], history[1][part])
        assert all(p.isfinite().all() for p in history[1][part].values())
    assert plugin.scaler.scales == [2.0**9, 2.0**9]


# Stopped and resumed, through the command's own function


@pytest.fixture
def go(tmp_path, image_folder, monkeypatch):
    """Train a tiny phase B with everything on that has a state; returns the run."""
    monkeypatch.delenv(training.RUN_ENV, raising=False)
    monkeypatch.setattr(summary, "draw_curves", lambda run: None)  # half of the time
    adversary = against(
        weight=0.3,
        start_step=1,
        ramp_steps=3,
        warmup_updates=2,
        updates_per_step=2,
        r1_weight=1.0,
        r1_every=3,
        lecam_weight=0.1,
        lecam_decay=0.5,
        learning_rate_ratio=2.0,
    )
    model = {"use_ema": True, "ema_decay": 0.8, "scheduler": "cosine", "warmup_steps": 2, "decay_steps": 7}
    config = tiny_config(image_folder, adversary_config=adversary, anchor_weight=0.1, equivariance=0.3, **model)
    config["lightning"]["trainer"]["accumulate_grad_batches"] = 2
    save(config, tmp_path / "phase_b.yaml")

    def run(steps: int, *overrides: str, resume: Path | None = None) -> Run:
        base = [] if resume else [tmp_path / "phase_b.yaml"]
        overrides = (f"lightning.trainer.max_steps={steps}", *overrides)
        return train(TrainOptions(base, overrides, tmp_path / "runs", gpus="0", resume=resume))

    return run


def checkpoint(run: Run) -> dict:
    return torch.load(run.last_checkpoint, weights_only=True)


def test_stopping_and_resuming_is_not_stopping(go):
    """3 steps, resume, 3 steps equal 6: both sides' weights, average, optimisers, schedules, counts, anchors."""
    run, half = go(6), go(3)
    whole, before = checkpoint(run), checkpoint(half)
    resumed = checkpoint(go(6, resume=half.path))
    for part in ("state_dict", "current_model_state"):
        assert whole[part].keys() == resumed[part].keys()
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), f"{part} {name}"
        assert {name.split(".")[0] for name in whole[part]} >= {"encoder", "decoder", "adversary", "anchor"}
    assert len(whole["optimizer_states"]) == len(resumed["optimizer_states"]) == 2
    for one, other in zip(whole["optimizer_states"], resumed["optimizer_states"], strict=True):
        assert one["state"].keys() == other["state"].keys()
        assert len(one["state"]) > 5
        for i, state in one["state"].items():
            for name, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][i][name])), f"{i} {name}"
        assert one["param_groups"] == other["param_groups"]
    for name in ("lr_schedulers", "images_seen", "iteration", "global_step"):
        assert whole[name] == resumed[name], name
    assert whole["global_step"] == 6
    assert whole["iteration"] == 7  # one batch, of two updates, warmed up
    state = whole["current_model_state"]
    assert int(state["adversary._extra_state"]) > int(before["current_model_state"]["adversary._extra_state"]) > 2
    assert moved(before["current_model_state"], state)
    assert state["adversary.lecam.real_anchors"].any()
    anchor = {name: tensor for name, tensor in state.items() if name.startswith("anchor.")}
    assert_same(anchor, {name: before["current_model_state"][name] for name in anchor})

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    train_names = {"adversarial", "discriminator", "lecam", "r1", "anchor"}
    health_names = {"logits_real", "logits_fake", "accuracy", "gradient_ratio"}
    names = {f"train/{name}" for name in train_names} | {f"health/{name}" for name in health_names}
    assert names <= set(events.Tags()["scalars"])
    assert {e.step for e in events.Scalars("train/loss")} == {1, 2, 3, 4, 5, 6}


def test_a_signal_stops_between_updates(image_folder):
    """In between, gradients would be lost, LeCam's anchors moved twice, and Lightning's count of batches no longer
    that of micro-batches: later validations would clear half an update's gradients."""
    model = build(against(), accumulate_grad_batches=3)

    def look(m: LiteAutoencoderKL) -> None:
        if m.global_step == 1 and m._micro_batch == 1:
            signal.raise_signal(signal.SIGTERM)

    fit(model, image_folder, 9, batch_size=2, callbacks=[Each(look), GracefulStop()])
    assert model.trainer.global_step in (1, 2)
    assert model._micro_batch == 0


def test_the_last_step_is_validated_after_a_warm_up(go):
    run = go(
        2, "model.params.adversary_config.params.start_step=0", "model.params.adversary_config.params.ramp_steps=0"
    )
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("val/psnr")][-1] == 2


def test_a_signal_in_the_warm_up_leaves_a_checkpoint(go, tmp_path, monkeypatch):
    step = LiteAutoencoderKL.training_step

    def interrupt(self, batch, batch_idx):
        if self._iteration == 1 and self.update_is_complete:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LiteAutoencoderKL, "training_step", interrupt)
    params = "model.params.adversary_config.params"
    with pytest.raises(KeyboardInterrupt):
        go(2, f"{params}.start_step=0", f"{params}.warmup_updates=20")
    (path,) = (tmp_path / "runs").iterdir()
    assert checkpoint(Run(path))["iteration"] >= 1


@pytest.mark.parametrize("start_step", [0, 3])
def test_the_discriminators_rate_follows_the_schedule_whenever_it_begins(image_folder, start_step):
    model = build(against(start_step=start_step, learning_rate_ratio=2.0), scheduler="cosine", learning_rate=1e-3)
    rates = []

    def look(m: LiteAutoencoderKL) -> None:
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in m.trainer.optimizers])

    fit(model, image_folder, 6, callbacks=[Each(look)])
    assert all(theirs == pytest.approx(2 * ours) for ours, theirs in rates[start_step + 1 :])
    assert rates[-1][0] < rates[0][0]
