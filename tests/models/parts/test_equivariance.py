"""Equivariance: latent and image scaled and rotated alike."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from olvae.losses.terms import kl_loss
from olvae.models.parts import equivariance
from olvae.models.parts.equivariance import SCALES, transform_alike
from tests.conftest import parts
from tests.models.steps import against, assert_same, build, fit, metrics, moved, snapshot, source


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def by_pil(t: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bilinear filter, which is antialiased, plane by plane in float32."""
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((width, height), Image.Resampling.BILINEAR))
        for plane in t.flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).unflatten(0, t.shape[:2])


def test_latent_and_image_are_scaled_as_pillow_does_and_turned_alike():
    z, x = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 32, 32)
    seen = set()
    for seed in range(80):
        z_out, x_out = transform_alike(z, x, generator(seed))
        h, w = z_out.shape[-2:]
        assert x_out.shape == (2, 1, 4 * h, 4 * w)
        z_small, x_small = by_pil(z, h, w), by_pil(x, 4 * h, 4 * w)
        turns = [k for k in range(4) if torch.allclose(z_out, z_small.rot90(k, (2, 3)), atol=1e-5)]
        assert len(turns) == 1
        torch.testing.assert_close(x_out, x_small.rot90(turns[0], (2, 3)), atol=1e-5, rtol=0)
        seen.add((h / 8, turns[0]))
    assert seen == {(scale, turn) for scale in SCALES for turn in range(4)}


def test_scales_and_turns_are_uniform():
    z = torch.randn(1, 1, 8, 8)
    sizes = [transform_alike(z, z, generator(seed))[0].shape[-1] for seed in range(1000)]
    for size in (2, 4, 6, 8):
        assert 200 < sizes.count(size) < 300  # 250, and four standard deviations of 14


@pytest.mark.parametrize(
    ("side", "sizes"), [(1, {1}), (2, {1, 2}), (3, {3}), (4, {1, 2, 3, 4}), (6, {3, 6}), (12, {3, 6, 9, 12})]
)
def test_only_whole_latent_positions(side, sizes):
    z, x = torch.randn(1, 2, side, side), torch.randn(1, 3, 8 * side, 8 * side)
    seen = set()
    for seed in range(40):
        z_out, x_out = transform_alike(z, x, generator(seed))
        assert x_out.shape[-2:] == tuple(8 * s for s in z_out.shape[-2:])
        seen.add(z_out.shape[-1])
    assert seen == sizes


def test_oblong_images_turn_too():
    z, x = torch.randn(1, 1, 4, 2), torch.randn(1, 1, 16, 8)
    shapes = set()
    for seed in range(40):
        z_out, x_out = transform_alike(z, x, generator(seed))
        assert x_out.shape[-2:] == (4 * z_out.shape[-2], 4 * z_out.shape[-1])
        shapes.add(tuple(z_out.shape[-2:]))
    assert shapes == {(4, 2), (2, 4), (2, 1), (1, 2)}


def test_the_generator_decides_and_the_global_one_is_left_alone():
    z, x = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 64, 64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = transform_alike(z, x, generator(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = transform_alike(z, x, generator(5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_reach_the_latent_only():
    """Bilinear weights sum to 1: a sum over a quarter of the pixels has gradients that sum to a quarter."""
    for seed in range(20):
        z = torch.randn(1, 2, 8, 8, requires_grad=True)
        z_out, x_out = transform_alike(z, torch.randn(1, 3, 64, 64), generator(seed))
        assert not x_out.requires_grad
        (gradient,) = torch.autograd.grad(z_out.sum(), z)
        assert gradient.sum().item() == pytest.approx(z_out.numel(), rel=1e-5)


def test_half_precision_is_scaled_in_float32():
    z = torch.randn(1, 2, 8, 8).bfloat16()
    seed = next(s for s in range(99) if transform_alike(z, z, generator(s))[0].shape[-1] == 4)
    z_out, _ = transform_alike(z, z, generator(seed))
    assert z_out.dtype == torch.float32
    expected = F.interpolate(z.double(), size=(4, 4), mode="bilinear", antialias=True)
    turned = [expected.rot90(k, (2, 3)).float() for k in range(4)]
    assert any(torch.allclose(z_out, t, atol=1e-6) for t in turned)


def test_an_equivariance_step_pauses_the_adversary(image_folder):
    model = build(against(weight=0.5), parts=parts(equivariance={"probability": 1.0}))
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
    transform, model, calls = (
        equivariance.transform_alike,
        build(against(), parts=parts(equivariance={"probability": 0.5})),
        [],
    )
    model.accumulate_grad_batches = 2

    def record(z, x, generator):
        state = generator.bit_generator.state
        calls.append((model.global_step, state))
        return transform(z, x, generator)

    monkeypatch.setattr(equivariance, "transform_alike", record)
    fit(model, image_folder, 30, batch_size=1)
    share = len(calls) / 2 / 30
    assert 0.1 < share < 0.9  # 0.5, and four standard deviations of 0.09
    assert model.adversary.updates == 30 - len(calls) // 2
    for (step, state), (again, other) in zip(calls[::2], calls[1::2], strict=True):
        assert step == again
        assert state == other


def test_equivariance_compares_with_the_transformed_image(image_folder, monkeypatch):
    """A decoder that knows the transformed image by heart has no pixel loss."""
    seen = {}

    def transform(z, x, generator):
        seen["x"] = x.rot90(1, (2, 3))[..., :8, :8]
        return z.rot90(1, (2, 3))[..., :1, :1], seen["x"]

    monkeypatch.setattr(equivariance, "transform_alike", transform)
    model = build(parts=parts(equivariance={"probability": 1.0}))
    model.decoder.register_forward_hook(lambda _, z, y: 0 * y + seen["x"])
    fit(model, image_folder, 1)
    assert metrics(model)["train/rec"] == 0.0
    assert metrics(model)["train/gaussian"] == 0.0


def test_equivariance_leaves_the_kl_term_alone(image_folder):
    """It is per value of the image that was encoded."""
    plain = fit(build(), image_folder, 1, size=32)
    expected = metrics(plain)["train/kl"]
    kls = []
    for seed in range(3):
        model = build(parts=parts(equivariance={"probability": 1.0}))
        model.seed = seed  # another transformation
        x = model.images(next(iter(source(image_folder, size=32).train_loader())))
        assert kl_loss(model.encode(x), x).item() == pytest.approx(expected, rel=1e-5)
        fit(model, image_folder, 1, size=32)
        kls.append(metrics(model)["train/kl"])
    assert kls == pytest.approx([expected] * 3, rel=1e-5)
