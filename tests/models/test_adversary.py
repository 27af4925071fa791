import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import Sides
from olvae.losses import gan_losses as losses
from olvae.losses.cutmix import cutmix, cutmix_consistency, cutmix_loss
from olvae.losses.gan_losses import ADVERSARIAL_LOSSES
from olvae.models.adversary import Adversary
from olvae.modules.unetgan import UNetGAN

DISCRIMINATORS = {  # each in small, and an image size for it
    "patchgan": ("olvae.modules.patchgan.PatchGAN", {"base_channels": 4, "n_layers": 1}, 16),
    "unetgan": ("olvae.modules.unetgan.UNetGAN", {"base_channels": 2, "image_size": 128}, 64),
    "gigagan": (
        "olvae.modules.gigagan.GigaGAN",
        {
            "image_size": 64,
            "base": 128,
            "max_channels": 8,
            "blocks": 1,
            "attention": [8],
            "heads": 2,
        },
        64,
    ),
}
every = pytest.mark.parametrize("kind", ["patchgan", "unetgan", "gigagan"])


def build(kind: str = "unetgan", **params) -> Adversary:
    torch.manual_seed(0)
    target, settings, _ = DISCRIMINATORS[kind]
    return Adversary({"target": target, "params": settings}, **params)


def images(kind: str = "unetgan", batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = DISCRIMINATORS[kind][2]
    real, fake = torch.rand(2, batch, 3, size, size, generator=generator) * 2 - 1
    return real, 0.5 * fake + 0.2


@torch.no_grad()
def logits(adversary: Adversary, x: Tensor) -> list[Tensor]:
    return adversary.discriminator(x)


def mean(tensors: list[Tensor]) -> float:
    return sum(t.mean().item() for t in tensors) / len(tensors)


def test_adversarial_weight_from_the_start_step_on():
    adversary = build("patchgan", weight=0.3, start_step=10)
    assert [adversary.weight_at(step) for step in (0, 9, 10, 11, 1000)] == [0.0, 0.0, 0.3, 0.3, 0.3]
    assert [adversary.plays(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    ramp = build("patchgan", weight=0.4, start_step=10, ramp_steps=4)
    weights = [ramp.weight_at(step) for step in range(8, 16)]
    assert weights == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


@pytest.mark.parametrize("reports", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_adaptive_weight_is_the_ratio_of_gradients_below_its_ceiling(adaptive, reports):
    """The ceiling of 48 is a fourth of a value in 3x8x8 images."""
    adversary = build("patchgan", weight=0.4, adaptive_weight=adaptive, adaptive_max=48.0)
    for ratio, factor in ((-0.5, 0.0), (0.0, 0.0), (0.125, 0.125), (0.25, 0.25), (5.0, 0.25)):
        found: dict = {}
        asked: list = []
        model = SimpleNamespace(
            global_step=0,
            reports=reports,
            report=found.update,
            ratio_of_gradients=lambda *given, r=ratio, asked=asked: (
                asked.append(given) or torch.tensor(r)
            ),
        )
        step = SimpleNamespace(target=torch.zeros(1, 3, 8, 8), losses={"adversarial": "its loss"})
        expected = 0.4 * (factor if adaptive else 1.0)
        assert float(adversary.weight_in(model, step)) == pytest.approx(expected)
        assert asked == ([(step, "its loss")] if adaptive or reports else [])
        values = {name.removeprefix("health/"): float(value) for name, value in found.items()}
        of_weight = {"adaptive_weight": pytest.approx(factor)} if adaptive else {}
        of_gradients = expected / max(ratio, 1e-12)
        reported = {**of_weight, "gradient_ratio": pytest.approx(of_gradients)}
        assert values == (reported if adaptive or reports else {})


@every
def test_the_generators_loss_reaches_the_image_and_no_parameter(kind):
    adversary, (_, fake) = build(kind), images(kind)
    fake.requires_grad_()
    before = copy.deepcopy(adversary.state_dict())
    loss = adversary.generator_loss(fake)
    assert all(p.requires_grad for p in adversary.parameters())  # again, before the backward pass
    loss.backward()
    assert all(p.grad is None for p in adversary.parameters())
    assert fake.grad.abs().max() > 0
    assert fake.grad.isfinite().all()
    for name, tensor in adversary.state_dict().items():  # nor does it move what spectral norm keeps
        assert "_extra_state" in name or "norm" in name or torch.equal(tensor, before[name]), name


def test_generator_loss_keeps_frozen_parameters_frozen_after_a_failure_too():
    adversary, (_, fake) = build(), images()
    frozen = next(adversary.parameters()).requires_grad_(False)
    adversary.generator_loss(fake)
    with pytest.raises(ValueError, match="multiples of 64"):
        adversary.generator_loss(fake[..., :60])
    assert [p for p in adversary.parameters() if not p.requires_grad] == [frozen]
    assert all(m.training for m in adversary.modules())


@every
def test_the_discriminators_loss_reaches_every_parameter_and_no_image(kind):
    settings = {
        "r1_weight": 1.0,
        "lecam_weight": 1.0,
        "cutmix_probability": 1.0 if kind == "unetgan" else 0.0,
    }
    adversary, (real, fake) = build(kind, **settings), images(kind)
    buffers = {name: t.clone() for name, t in adversary.discriminator.named_buffers()}
    real.requires_grad_()
    bottleneck = torch.ones((), requires_grad=True)
    reconstruction = (fake * bottleneck).tanh()
    loss, logs = adversary.discriminator_loss(real, reconstruction)
    loss.backward()
    assert bottleneck.grad is None
    assert real.grad is None
    for name, p in adversary.named_parameters():
        # the gradient of the bias of the last layer of hinge is a difference, and may be 0
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert sum(float(p.grad.norm()) for p in adversary.parameters()) > 1e-3
    adversary.generator_loss(reconstruction).backward()  # the reconstruction's graph is whole
    assert bottleneck.grad.abs() > 0
    assert not any(value.requires_grad for value in logs.values())
    if kind != "patchgan":  # which has BatchNorm; no loss runs a power iteration
        assert all(
            torch.equal(t, buffers[name]) for name, t in adversary.discriminator.named_buffers()
        )


@pytest.mark.parametrize("loss", ADVERSARIAL_LOSSES)
def test_adversary_losses_are_the_gan_losses_of_the_logits(loss):
    adversary, (real, fake) = build(loss=loss), images()
    r, f = logits(adversary, real), logits(adversary, fake)
    assert [t.shape for t in r] == [(2, 1, 64, 64), (2, 1)]
    total, logs = adversary.discriminator_loss(real, fake)
    assert total.item() == pytest.approx(losses.discriminator_loss(loss, r, f).item(), rel=1e-5)
    assert adversary.generator_loss(fake).item() == pytest.approx(
        losses.generator_loss(loss, f).item(), rel=1e-5
    )
    assert logs.keys() == {"discriminator", "logits_real", "logits_fake", "accuracy"}
    assert logs["discriminator"].item() == total.item()
    assert logs["accuracy"].item() == pytest.approx(
        losses.discriminator_accuracy(r, f, loss).item()
    )
    assert logs["logits_real"].item() == pytest.approx(mean(r), rel=1e-4)
    assert logs["logits_fake"].item() == pytest.approx(mean(f), rel=1e-4)


def test_r1_is_lazy_and_multiplied_by_how_lazy():
    adversary, plain = build(r1_weight=7e-3, r1_every=3), build()
    real, fake = images()
    base, _ = plain.discriminator_loss(real, fake)
    image = real.clone().requires_grad_()
    pixels, whole = plain.discriminator(image)
    (gradient,) = torch.autograd.grad(pixels.sum() + whole.sum(), image)
    by_hand = 0.5 * gradient.square().sum().item() / 2
    assert by_hand > 1
    for update in range(7):
        for _ in range(2):  # every micro-batch of the update
            total, logs = adversary.discriminator_loss(real, fake)
            assert ("r1" in logs) == (update in (0, 3, 6))
            if update == 0:  # before a power iteration has changed the weights
                assert logs["r1"].item() == pytest.approx(by_hand, rel=1e-4)
                assert total.item() == pytest.approx(base.item() + 7e-3 * 3 * by_hand, rel=1e-4)
            elif "r1" not in logs:
                assert total.item() == logs["discriminator"].item()
        adversary.updated()


@every
def test_r1_under_bf16_is_that_of_float32(kind):
    adversary, (real, fake) = build(kind, r1_weight=1.0), images(kind)
    _, exact = adversary.discriminator_loss(real, fake)
    with torch.autocast("cpu", torch.bfloat16):
        total, logs = adversary.discriminator_loss(real, fake)
    total.backward()
    assert logs["r1"].dtype == torch.float32
    assert logs["r1"] > 0
    assert logs["r1"].item() == pytest.approx(exact["r1"].item(), rel=1e-5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in adversary.parameters())


def test_lecam_is_logged_and_weighted_when_it_is_on():
    adversary, (real, fake) = build(lecam_weight=0.3), images()
    base, without = build().discriminator_loss(real, fake)
    total, logs = adversary.discriminator_loss(real, fake)
    assert logs.keys() - without.keys() == {"lecam"}
    r, f = logits(adversary, real), logits(adversary, fake)
    # The anchors start at the means.
    by_hand = mean([(a - b.mean()) ** 2 for a, b in zip(r, f, strict=True)])
    by_hand += mean([(b - a.mean()) ** 2 for a, b in zip(r, f, strict=True)])
    assert by_hand > 1e-3
    assert logs["lecam"].item() == pytest.approx(by_hand, rel=1e-4)
    assert total.item() == pytest.approx(base.item() + 0.3 * by_hand, rel=1e-5)
    # The code's ReLU tells real from fake: where real logits are larger it leaves nothing.
    adversary = build(lecam_weight=0.3, lecam_variant="code")
    adversary.discriminator.forward = lambda x: [x.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))]
    high, low = torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4)
    for real, fake, expected in ((high, low, 2 * 2.0**2), (low, high, 0.0)):
        adversary.lecam.started.fill_(False)
        _, logs = adversary.discriminator_loss(real, fake)
        assert logs["lecam"].item() == pytest.approx(expected)


def test_cutmix_takes_the_place_of_the_normal_loss():
    """Consistency, and half as much for either kind of logits;
    the normal loss is logged, without a gradient.
    """
    adversary, (real, fake) = build(cutmix_probability=1.0), images()
    base, without = build().discriminator_loss(real, fake)
    torch.manual_seed(3)
    total, logs = adversary.discriminator_loss(real, fake)
    assert logs.keys() - without.keys() == {"cutmix"}
    torch.manual_seed(3)
    mixed, mask = cutmix(real, fake)
    of_mixed = logits(adversary, mixed)
    expected = cutmix_loss("hinge", of_mixed, mask) + cutmix_consistency(
        of_mixed[0], logits(adversary, real)[0], logits(adversary, fake)[0], mask
    )
    assert logs["cutmix"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert logs["discriminator"].item() == base.item()


def test_cutmix_in_its_share_of_the_updates_after_a_ramp():
    """None at first; in all ranks and micro-batches alike, whatever their noise."""
    adversary, mixed = build("patchgan", cutmix_probability=0.5, ramp_steps=200), []
    for update in range(600):
        mixed.append("CutMix" in adversary.rare_terms(update))
    assert adversary.rare_terms(599) == ["CutMix"][: mixed[-1]]
    assert sum(mixed[:20]) <= 4  # half of one is expected
    assert abs(sum(mixed[:200]) - 50) < 3 * 6  # binomial, of 1/4 on average
    assert abs(sum(mixed[200:]) - 200) < 3 * 10
    assert build().rare_terms(0) == []


def test_adversary_update_is_counted_and_runs_one_power_iteration():
    adversary = build()
    with torch.no_grad():
        # Away from the orthogonal start, where every vector is as good.
        for p in adversary.parameters():
            p.add_(0.5 * torch.randn_like(p))
    other = UNetGAN(base_channels=2, image_size=128)
    other.load_state_dict(adversary.discriminator.state_dict())
    adversary.updated()
    assert adversary.updates == 1
    other(images()[0])
    for (name, mine), theirs in zip(
        adversary.discriminator.named_buffers(), other.buffers(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_shared_spectral_weights_are_those_of_now(monkeypatch):
    """On a GPU: outside of a training step, after an update, after an error, in a copy."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    adversary, (real, fake) = build(), images()
    for change in (1.5, -1.0):
        adversary.generator_loss(fake)
        with torch.no_grad():
            for p in adversary.parameters():
                p.add_(change * torch.randn_like(p))
        adversary.updated()
        adversary.discriminator_loss(real, fake)[0].backward()
        with pytest.raises(ValueError, match="multiples of 64"):
            adversary.discriminator_loss(real[..., :60], fake)
        other = copy.deepcopy(adversary)
        fresh = build()
        fresh.load_state_dict(adversary.state_dict())
        losses = [each.generator_loss(fake).item() for each in (adversary, other, fresh)]
        assert losses == [losses[0]] * 3


def test_adversary_state_survives_a_file(tmp_path):
    adversary, (real, fake) = build(lecam_weight=1.0, warmup_updates=4), images()
    for _ in range(3):
        adversary.discriminator_loss(real, fake)
        adversary.updated()
    torch.save(adversary.state_dict(), tmp_path / "state.pt")
    other = build(lecam_weight=1.0, warmup_updates=4)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.updates == 3
    assert other.warms_up(0)
    for each in (adversary, other):
        each.updated()
    assert not other.warms_up(0)
    (one, logs), (two, theirs) = (a.discriminator_loss(real, fake) for a in (adversary, other))
    assert torch.equal(one, two)
    assert torch.equal(logs["lecam"], theirs["lecam"])  # the anchors came along


@pytest.mark.parametrize(
    ("kind", "channels", "size", "message"),
    [
        (
            "unetgan",
            3,
            60,
            "images of 3x60x60: UNetGAN .* multiples of 64",
        ),
        (
            "unetgan",
            1,
            64,
            r"discriminator_config\.params: .* 1x64x64: .*channels",
        ),
    ],
)
def test_adversary_refuses_images_that_do_not_fit_the_discriminator(kind, channels, size, message):
    adversary = build(kind)
    before = copy.deepcopy(adversary.state_dict())
    with pytest.raises(ConfigError, match=message) as error:
        adversary.check_image(channels, size)
    assert "\n" not in str(error.value)
    adversary.check_image(3, DISCRIMINATORS[kind][2])
    assert all(m.training for m in adversary.modules())
    assert all(torch.equal(t, before[name]) for name, t in adversary.state_dict().items())


def test_adaptive_max_may_be_infinite():
    """As docs/train.md sets it for the weights of taming-transformers."""
    assert build("patchgan", adaptive_max=math.inf).adaptive_max == math.inf


@pytest.mark.parametrize("kind", ["patchgan", "gigagan"])
def test_cutmix_needs_a_logit_per_pixel(kind):
    size = DISCRIMINATORS[kind][2]
    with pytest.raises(ConfigError, match=r"cutmix_probability .*pixel"):
        build(kind, cutmix_probability=1.0).check_image(3, size)
    build("unetgan", cutmix_probability=1.0).check_image(3, 128)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"weight": -0.1}, "weight must not be negative, got -0.1"),
        ({"start_step": -1}, "start_step must not be negative, got -1"),
        ({"updates_per_step": 0}, "updates_per_step must be at least 1, got 0"),
        ({"lecam_weight": -1.0}, "lecam_weight must not be negative"),
        ({"lecam_weight": math.nan}, "lecam_weight must not be negative, got nan"),
        ({"learning_rate_ratio": 0.0}, "learning_rate_ratio must be above 0, got 0.0"),
        (
            {"lecam_variant": "published"},
            "lecam_variant must be one of paper, code, got 'published'",
        ),
        ({"cutmix_probability": 1.5}, "cutmix_probability must be between 0 and 1, got 1.5"),
    ],
)
def test_adversary_refuses_settings_that_make_no_sense(params, message):
    with pytest.raises(ValueError, match=message):
        build("patchgan", **params)


def test_adversary_names_the_nearest_discriminator():
    with pytest.raises(ConfigError, match=r"PatchGan.* PatchGAN"):
        Adversary({"target": "olvae.modules.patchgan.PatchGan"})
    with pytest.raises(ConfigError, match=r"torch\.nn\.Identity .*num_outputs"):
        Adversary({"target": "torch.nn.Identity"})


@pytest.mark.parametrize(
    ("variant", "decay", "relu"), [("paper", 0.99, False), ("code", 0.999, True)]
)
def test_lecams_variants(variant, decay, relu):
    lecam = build("patchgan", lecam_weight=1.0, lecam_variant=variant).lecam
    assert (lecam.decay, lecam.relu) == (decay, relu)


def test_an_adversary_is_checked_against_steps_losses_and_images():
    """It plays from the last step on at the latest, on images that its discriminator takes."""
    adversary = build("unetgan", start_step=9)
    model = SimpleNamespace(loss_weights={"rec": 1.0}, encoder=SimpleNamespace(in_channels=3))
    source = SimpleNamespace(size=64)
    seen: list[tuple[int, ...]] = []
    adversary.discriminator.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    adversary.check(model, source, 10)
    adversary.check(model, SimpleNamespace(size=Sides(64, 128)), 10)
    assert seen == [(1, 3, 64, 64), (1, 3, 64, 128)]
    for steps in (8, 9):
        with pytest.raises(ConfigError, match=rf"start_step: 9 .*max_steps, {steps}"):
            adversary.check(model, source, steps)
    with pytest.raises(ConfigError, match="images of 3x60x60"):
        adversary.check(model, SimpleNamespace(size=60), 10)
    model.encoder.in_channels = 1
    with pytest.raises(ConfigError, match="images of 1x64x64"):
        adversary.check(model, source, 10)
    model.loss_weights = {"kl": 1.0}
    with pytest.raises(ConfigError, match="compare images"):
        adversary.check(model, source, 10)


def test_a_discriminator_warms_up_while_it_plays_until_its_updates_are_done():
    adversary = build("patchgan", start_step=5, warmup_updates=2)
    assert [adversary.warms_up(step) for step in (4, 5)] == [False, True]
    adversary.updates = 1
    assert adversary.warms_up(5)
    adversary.updates = 2
    assert not adversary.warms_up(5)


def test_cutmixs_share_grows_with_the_updates(monkeypatch):
    """From 0 to the probability; a draw is below it."""
    adversary = build("patchgan", cutmix_probability=0.5, ramp_steps=4)
    draws = SimpleNamespace(random=lambda: 0.25)
    monkeypatch.setattr("numpy.random.default_rng", lambda seed: draws)
    mixed = [bool(adversary.rare_terms(updates)) for updates in range(7)]
    assert mixed == [False, False, False, True, True, True, True]
    adversary.ramp_steps = 0
    assert adversary.rare_terms(0) == ["CutMix"]
    draws.random = lambda: 0.5
    assert adversary.rare_terms(9) == []
