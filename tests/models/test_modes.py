"""Other ways to train: a frozen encoder, an anchored one, equivariance, noise on the latent, bounded activations."""

import copy

import pytest
import torch

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.losses.terms import kl_loss
from olvae.models import liteautoencoder
from olvae.modules.distributions import DiagonalGaussian
from tests.models.steps import Each, against, assert_same, build, fit, metrics, moved, snapshot, source

WITHOUT_KL = {"target": "olvae.losses.objective.Objective", "params": {"lpips_weight": 0, "kl_weight": 0}}
WITH_KL = {"target": "olvae.losses.objective.Objective", "params": {"lpips_weight": 0}}


@pytest.mark.parametrize("adversary", [None, against(weight=0.5)], ids=["a", "b"])
def test_a_frozen_encoder(image_folder, updates, adversary):
    model = build(adversary, use_quant=True, freeze_encoder=True, use_ema=True, ema_decay=0.5, lossconfig=WITHOUT_KL)
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


FIXED = {
    "embed_dim": 12,
    "encoder_config": {
        "target": "olvae.modules.litevae.encoder_model.WaveletEncoder",
        "params": {"image_size": 16},
    },
    "decoder_config": {
        "target": "olvae.modules.litevae.decoder_model.LiteVAE_Decoder",
        "params": {"channels": 8, "z_channels": 12, "channel_mult": [1, 1, 1, 1], "num_res_blocks": 0},
    },
    "lossconfig": WITHOUT_KL,
}
"""Model arguments: an encoder without parameters."""


def test_a_fixed_encoder(image_folder, tmp_path):
    model = build(freeze_encoder=True, use_ema=True, **FIXED)
    start = snapshot(model)
    fit(model, image_folder, 2)
    assert len(moved(start, snapshot(model))) > 0.9 * len(start)
    vae, x = model.autoencoder.eval(), torch.rand(1, 3, 16, 16)
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(LiteVAE.from_pretrained(tmp_path)(x)[0], vae(x)[0])


def test_a_fixed_encoder_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"freeze_encoder: WaveletEncoder has nothing to train: set it to true"):
        build(**FIXED)
    with pytest.raises(ConfigError, match=r"initial_logvar: WaveletEncoder learns no log-variances: leave it out"):
        build(freeze_encoder=True, initial_logvar=-4.0, **FIXED)
    narrow = {**FIXED["encoder_config"], "params": {"image_size": 16, "latent_dim": 12}}
    mixed = build(use_quant=True, **{**FIXED, "encoder_config": narrow, "lossconfig": WITH_KL})
    assert {name for name, _ in mixed.named_parameters() if not name.startswith(("decoder.", "quantizer."))} == set()


def test_a_frozen_encoder_trains_the_decoder_as_the_whole_does(image_folder, updates):
    """The gradients of the decoder are those of full training; there are no others."""
    frozen, whole = build(freeze_encoder=True, lossconfig=WITHOUT_KL), build()
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
    free, held = (fit(build(anchor_weight=w, learning_rate=1e-3), image_folder, 24) for w in (1e-6, 1e2))
    distances = [(m.encode(x).mean - old).square().mean().item() for m in (free, held)]
    assert distances[1] < distances[0]  # by how much is a matter of rounding


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
        state = generator.bit_generator.state
        calls.append((model.global_step, state))
        return transform(z, x, generator)

    monkeypatch.setattr(liteautoencoder, "transform_alike", record)
    fit(model, image_folder, 30, batch_size=1)
    share = len(calls) / 2 / 30
    assert 0.1 < share < 0.9  # 0.5, and four standard deviations of 0.09
    assert model.adversary.updates == 30 - len(calls) // 2
    for (step, state), (again, other) in zip(calls[::2], calls[1::2], strict=True):
        assert step == again
        assert state == other


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
        model.seed = seed  # another transformation
        x = model.images(next(iter(source(image_folder, size=32).train_loader())))
        assert kl_loss(model.encode(x), x).item() == pytest.approx(expected, rel=1e-5)
        fit(model, image_folder, 1, size=32)
        kls.append(metrics(model)["train/kl"])
    assert kls == pytest.approx([expected] * 6, rel=1e-5)


def latents(model, root, steps=1, **settings) -> list[torch.Tensor]:
    """What the decoder gets in training."""
    seen = []
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    fit(model, root, steps, **settings)
    hook.remove()
    return seen


def test_noise_on_the_latent_in_units_of_the_posteriors_deviation(image_folder):
    """Statistics over a grid of latents whose means and deviations are known, against numbers."""
    n = 100
    mean = torch.linspace(-3, 3, 4).view(1, 4, 1, 1).expand(8, 4, n, n)
    std = torch.tensor([0.1, 0.5, 1.0, 2.0]).view(1, 4, 1, 1).expand(8, 4, n, n)
    posterior = DiagonalGaussian(torch.cat([mean, 2 * std.log()], 1))
    for unit, expected in (
        ("posterior", [0.03, 0.15, 0.3, 0.6]),
        ("data", [0.0] * 4),  # the means of a channel are all the same
    ):
        z = build(latent_noise=0.3, latent_noise_of=unit, sample_posterior=False)._latent(posterior)
        noise = (z - mean).double()
        assert noise.std((0, 2, 3)).tolist() == pytest.approx(expected, rel=0.02)  # 1 / sqrt(2 * 80000) is 0.0025
        assert noise.mean((0, 2, 3)).abs().max() < 0.01


def test_noise_on_the_latent_in_units_of_the_datas_deviation():
    """Per channel, over batch and positions; not the posterior's."""
    torch.manual_seed(3)
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1)
    mean = scale * torch.randn(8, 4, 100, 100) + 5
    posterior = DiagonalGaussian(torch.cat([mean, torch.full_like(mean, -20.0)], 1))
    z = build(latent_noise=0.5, latent_noise_of="data", sample_posterior=False)._latent(posterior)
    noise = (z - mean).double()
    assert noise.std((0, 2, 3)).tolist() == pytest.approx([0.25, 0.5, 1.0, 2.0], rel=0.02)
    correlation = torch.corrcoef(torch.stack([noise.flatten(), (mean - 5).flatten().double()]))[0, 1]
    assert abs(correlation) < 0.02


def test_noise_is_added_to_a_sample_too():
    """Their variances add up."""
    moments = torch.cat([torch.zeros(8, 4, 100, 100), torch.full((8, 4, 100, 100), 2 * 0.5 * 1.0)], 1)
    std = torch.tensor(0.5).exp().item()
    z = build(latent_noise=2.0)._latent(DiagonalGaussian(moments))
    assert z.std().item() == pytest.approx(std * 5**0.5, rel=0.02)


def test_noise_does_not_teach_the_encoder_to_hide_from_it():
    """Its size is a constant: the gradient of a latent is that of its mean."""
    moments = torch.randn(2, 8, 3, 3, requires_grad=True)
    for unit in ("posterior", "data"):
        model = build(latent_noise=0.7, latent_noise_of=unit, sample_posterior=False)
        (gradient,) = torch.autograd.grad(model._latent(DiagonalGaussian(moments)).sum(), moments)
        assert torch.equal(gradient[:, :4], torch.ones(2, 4, 3, 3))
        assert gradient[:, 4:].abs().max() == 0


def test_without_noise_a_step_is_what_it_was(image_folder):
    """Bit for bit; and with noise the decoder gets other latents, in training alone."""
    plain, zero, noisy = (build(**settings) for settings in ({}, {"latent_noise": 0.0}, {"latent_noise": 0.5}))
    (first,), (second,), (third,) = (latents(model, image_folder) for model in (plain, zero, noisy))
    assert torch.equal(first, second)
    assert_same(snapshot(plain), snapshot(zero))
    assert not torch.equal(first, third)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(noisy(x)[0], noisy.decode(noisy.encode(x).mean))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_noise": -0.1}, "latent_noise must not be negative, got -0.1"),
        ({"latent_noise_of": "batch"}, "latent_noise_of must be posterior or data"),
        ({"freeze_encoder": True}, "kl_weight: the encoder is frozen"),
        (
            {"freeze_encoder": True, "lossconfig": WITHOUT_KL, "anchor_weight": 1.0},
            "anchor_weight: the encoder is frozen",
        ),
        ({"freeze_encoder": True, "freeze_decoder": True}, "nothing is left to train"),
        ({"freeze_decoder": True, "latent_noise": 0.1}, "the decoder is frozen"),
        ({"freeze_decoder": True, "adversary_config": against()}, "an adversary has nothing to train"),
        ({"checkpoint": "all"}, "checkpoint must be true, false, encoder or decoder, got 'all'"),
        ({"checkpoint": True, "activation_bound": 1.0}, "checkpoint, activation_bound: a bound needs"),
        (
            {"checkpoint": "encoder", "freeze_encoder": True, "lossconfig": WITHOUT_KL},
            "checkpoint: the encoder is frozen",
        ),
    ],
)
def test_choices_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(settings.pop("adversary_config", None), **settings)


def test_a_bound_lowers_the_activations_of_a_decoder_scaled_by_hand(image_folder):
    """Its first convolution gives 30 times what it gave."""

    @torch.no_grad()
    def largest(model) -> float:
        seen = []
        decoder = copy.deepcopy(model.decoder)
        for module in decoder.modules():
            module.register_forward_hook(lambda _, __, out: seen.append(out.abs().max().item()))
        decoder(torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0)))
        return max(seen)

    model = build(activation_bound=3.0, learning_rate=3e-2, freeze_encoder=True, lossconfig=WITHOUT_KL)
    with torch.no_grad():
        model.decoder.conv_in.weight.mul_(30)
        model.decoder.conv_in.bias.mul_(30)
    before, penalties = largest(model), []
    fit(model, image_folder, 60, callbacks=[Each(lambda m: penalties.append(metrics(m)["train/activation"]))])
    assert before > 30
    assert penalties[-1] < 0.5 * penalties[0]
    assert largest(model) < 0.8 * before


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
def test_the_bound_is_on_what_is_trained(image_folder, frozen):
    model = build(**{f"freeze_{frozen}": True}, activation_bound=1e-3, lossconfig=WITHOUT_KL)
    watched, watch = [], model.bound.watch
    model.bound.watch = lambda *networks: watched.append(networks) or watch(*networks)
    fit(model, image_folder, 1)
    assert watched == [(model.decoder if frozen == "encoder" else model.encoder,)]
    values = metrics(model)
    terms = sum(weight * values[f"train/{name}"] for name, weight in model.objective.weights.items())
    assert values["train/loss"] == pytest.approx(terms + values["train/activation"], rel=1e-5)


def test_a_bounded_model_can_be_trained_again(image_folder):
    model = build(activation_bound=0.5, use_ema=True)
    for _ in range(2):
        fit(model, image_folder, 1)
    assert metrics(model)["train/activation"] > 0


@pytest.mark.parametrize("checkpoint", [True, "encoder", "decoder"])
def test_computing_steps_again_changes_nothing_else(image_folder, checkpoint):
    """Weights after three steps with an adversary and averages, bit for bit; the average keeps its names."""
    settings = {"use_ema": True, "sample_posterior": True}
    plain, again = (
        fit(build(against(weight=0.5, adaptive_weight=True), checkpoint=value, **settings), image_folder, 3)
        for value in (False, checkpoint)
    )
    assert_same(snapshot(plain), snapshot(again))
    assert metrics(plain) == metrics(again)
    assert [again.encoder.checkpoint, again.decoder.checkpoint] == [
        checkpoint in (True, h) for h in ("encoder", "decoder")
    ]
    assert list(again.state_dict()) == list(plain.state_dict())
