"""Other ways to train: a frozen encoder, an anchored one, equivariance."""

import pytest
import torch

from olvae.losses.terms import kl_loss
from olvae.models import liteautoencoder
from tests.models.steps import Each, against, assert_same, build, fit, metrics, moved, snapshot, source

WITHOUT_KL = {"target": "olvae.losses.objective.Objective", "params": {"lpips_weight": 0, "kl_weight": 0}}


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
        state = generator.get_state().clone()
        calls.append((model.global_step, state))
        return transform(z, x, generator)

    monkeypatch.setattr(liteautoencoder, "transform_alike", record)
    fit(model, image_folder, 30, batch_size=1)
    share = len(calls) / 2 / 30
    assert 0.1 < share < 0.9  # 0.5, and four standard deviations of 0.09
    assert model.adversary.updates == 30 - len(calls) // 2
    for (step, state), (again, other) in zip(calls[::2], calls[1::2], strict=True):
        assert step == again
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
        model.seed = seed  # another transformation
        x = model.images(next(iter(source(image_folder, size=32).train_loader())))
        assert kl_loss(model.encode(x), x).item() == pytest.approx(expected, rel=1e-5)
        fit(model, image_folder, 1, size=32)
        kls.append(metrics(model)["train/kl"])
    assert kls == pytest.approx([expected] * 6, rel=1e-5)
