"""Equivariance: latent and image scaled and rotated alike."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from olvae.config import ConfigError
from olvae.losses.terms import kl_loss
from olvae.models.parts import equivariance
from olvae.models.parts.equivariance import Equivariance, sizes_of, transform_alike
from olvae.models.parts.part import Step
from tests.conftest import parts
from tests.models.steps import (
    PATCHGAN,
    UNETGAN,
    against,
    assert_same,
    build,
    fit,
    metrics,
    moved,
    snapshot,
    source,
)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def by_pil(t: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bilinear filter, which is antialiased, plane by plane in float32."""
    planes = [
        np.asarray(
            Image.fromarray(plane.numpy()).resize((width, height), Image.Resampling.BILINEAR)
        )
        for plane in t.flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).unflatten(0, t.shape[:2])


def test_equivariance_scales_as_pillow_does_and_turns_latent_and_image_alike():
    z, x = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 32, 32)
    seen = set()
    for seed in range(80):
        z_out, x_out = transform_alike(z, x, generator(seed), antialias=True)
        h, w = z_out.shape[-2:]
        assert x_out.shape == (2, 1, 4 * h, 4 * w)
        z_small, x_small = by_pil(z, h, w), by_pil(x, 4 * h, 4 * w)
        turns = [k for k in range(4) if torch.allclose(z_out, z_small.rot90(k, (2, 3)), atol=1e-5)]
        assert len(turns) == 1
        torch.testing.assert_close(x_out, x_small.rot90(turns[0], (2, 3)), atol=1e-5, rtol=0)
        seen.add((h / 8, turns[0]))
    assert seen == {(size / 8, turn) for size in range(2, 8) for turn in (1, 2, 3)}


def test_equivariance_published_scales_without_antialiasing():
    """8/32 to 31/32; half the size is then the mean of each 2x2 block,
    a quarter that of its middle.
    """
    assert [n / 32 for n in sizes_of(32)] == [n / 32 for n in range(8, 32)]
    z = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    seen = set()
    for seed in range(40):
        outs, plain = transform_alike(z, x, generator(seed)), [z, x]
        n = outs[0].shape[-1]
        seen.add(n)
        if n == 3:
            continue
        for out, t in zip(outs, plain, strict=True):
            # (1, C, n k, s, n k, s).
            blocks = t.unflatten(3, (-1, 4 // n)).unflatten(2, (-1, 4 // n))
            middle = slice(0, 2) if n == 2 else slice(1, 3)
            means = blocks[:, :, :, middle, :, middle].mean((3, 5)).float()
            assert any(torch.allclose(out, means.rot90(k, (2, 3)), atol=1e-6) for k in (1, 2, 3))
    assert seen == {1, 2, 3}


@pytest.mark.parametrize(
    ("side", "sizes"),
    [((1, 1), {1}), ((3, 3), {1, 2}), ((6, 6), {2, 3, 4, 5}), ((5, 3), {3, 5}), ((4, 2), {1, 2})],
)
def test_equivariance_scales_to_whole_latent_positions(side, sizes):
    """In float32 from any precision; the global generator is left alone."""
    z, x = torch.randn(1, 2, *side).bfloat16(), torch.randn(1, 3, 8 * side[0], 8 * side[1])
    seen, before = set(), torch.get_rng_state()
    for seed in range(40):
        z_out, x_out = transform_alike(z, x, generator(seed))
        assert x_out.shape[-2:] == tuple(8 * s for s in z_out.shape[-2:])
        assert z_out.dtype == (torch.bfloat16 if z_out.numel() == z.numel() else torch.float32)
        seen.add(z_out.shape[-1])
    assert seen == sizes
    assert torch.equal(torch.get_rng_state(), before)


def test_equivariance_gradients_reach_the_latent_only():
    """Bilinear weights sum to 1: a sum over a share of the pixels has gradients that sum to that
    share.
    """
    for seed in range(20):
        z = torch.randn(1, 2, 8, 8, requires_grad=True)
        z_out, x_out = transform_alike(z, torch.randn(1, 3, 64, 64), generator(seed))
        assert not x_out.requires_grad
        (gradient,) = torch.autograd.grad(z_out.sum(), z)
        assert gradient.sum().item() == pytest.approx(z_out.numel(), rel=1e-5)


def test_an_equivariance_step_may_pause_the_adversary(image_folder):
    model = build(
        against(weight=0.5), parts=parts(equivariance={"probability": 1.0, "adversary": False})
    )
    start, start_d = snapshot(model.autoencoder), snapshot(model.adversary)
    sizes = []
    model.decoder.register_forward_hook(
        lambda _, inputs, y: sizes.append((inputs[0].shape[-1], y.shape[-1]))
    )
    fit(model, image_folder, 8, batch_size=1, size=32)
    assert model.trainer.global_step == 8
    assert model.adversary.updates == 0
    assert_same(snapshot(model.adversary), start_d)
    assert len(moved(start, snapshot(model.autoencoder))) > 0.9 * len(start)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not [name for name in metrics(model) if "health" in name or "adversarial" in name]
    assert len(sizes) == 8
    assert set(sizes) == {(size, 8 * size) for size in (1, 2, 3)}


def test_adversary_plays_on_equivariance_steps_too(image_folder):
    """On the transformed images, as published."""
    model, seen = build(against(weight=0.5), parts=parts(equivariance={"probability": 1.0})), []
    model.adversary.discriminator.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[-1])
    )
    fit(model, image_folder, 4, batch_size=1, size=32)
    assert model.adversary.updates == 4
    assert set(seen) <= {8, 16, 24}
    assert len(set(seen)) > 1


@pytest.mark.parametrize(
    ("discriminator", "size", "fits"), [(PATCHGAN, 64, True), (UNETGAN, 64, False)]
)
def test_equivariance_refuses_a_discriminator_of_fixed_sizes(
    image_folder, discriminator, size, fits
):
    model = build(against(discriminator), parts=parts(equivariance={}))
    if fits:
        model.check(source(image_folder, size=size))
        return
    with pytest.raises(
        ConfigError,
        match=r"equivariance\.params\.adversary: ",
    ) as error:
        model.check(source(image_folder, size=size))
    assert "\n" not in str(error.value)
    build(against(discriminator), parts=parts(equivariance={"adversary": False})).check(
        source(image_folder, size=size)
    )


def test_the_smallest_and_the_largest_size_are_tried_and_both_turned(image_folder, monkeypatch):
    """Of 64x32 pixels, 8x4 positions: a quarter, and three quarters of the sides."""
    model, seen = build(against(), parts=parts(equivariance={})), []
    monkeypatch.setattr(model.adversary, "check_image", lambda *given: seen.append(given))
    model.check(source(image_folder, size=[64, 32]))
    sizes = {(16, 8), (48, 24), (8, 16), (24, 48)}
    assert sorted(seen) == sorted((3, size) for size in sizes)


@pytest.mark.parametrize("params", [{"probability": 1.5}, {"shrunk": -0.1}, {"shrunk": 1.01}])
def test_shares_of_the_steps_are_shares(params):
    ((name, value),) = params.items()
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1, got {value}"):
        Equivariance(**params)
    assert Equivariance(probability=1.0, shrunk=0.0).shrunk == 0.0
    described = Equivariance(probability=0.25, shrunk=0.2).describe()
    assert described == "on 25% of the steps, shrunk images on 15%"


def test_images_that_equivariance_would_shrink_below_lpips_size_are_refused(image_folder):
    """Below 64 pixels, of the shorter side."""
    equivariant = build(parts=parts(equivariance={}))
    equivariant.check(source(image_folder, size=32))
    equivariant.loss.perceptual = torch.nn.Identity()
    for size, named in ((56, "56"), ([56, 64], "56x64"), ([64, 56], "64x56")):
        with pytest.raises(ConfigError, match=rf"size: {named}: .*16"):
            equivariant.check(source(image_folder, size=size))
    equivariant.check(source(image_folder, size=64))


def test_equivariance_is_decided_once_an_update_for_its_share_of_them(image_folder, monkeypatch):
    transform, calls = equivariance.transform_alike, []
    settings = {"probability": 0.5, "adversary": False, "shrunk": 0.5}
    model = build(against(), parts=parts(equivariance=settings), accumulate_grad_batches=2)
    sides = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))

    def record(z, x, generator, antialias):
        calls.append((model.global_step, generator.bit_generator.state))
        return transform(z, x, generator, antialias)

    monkeypatch.setattr(equivariance, "transform_alike", record)
    fit(model, image_folder, 16, batch_size=1)
    assert 2 * 2 <= len(calls) <= 2 * 14  # 8, and three standard deviations of 2
    assert calls[::2] == calls[1::2]
    sides = sides[-32:]  # without those of a check before the first step
    assert sides[::2] == sides[1::2]
    # 4, and three standard deviations of 2.
    assert 1 <= (shrunk := sum(side < 16 for side in sides[::2])) <= 10
    assert model.adversary.updates == 16 - len(calls) // 2 - shrunk


def test_equivariance_encodes_shrunk_images_in_a_quarter_of_the_other_steps():
    """As published; at half the size, without antialiasing, a pixel is the mean of four."""
    model, x = SimpleNamespace(autoencoder=SimpleNamespace(upscale=8)), torch.randn(1, 3, 32, 32)

    def images(seed: int, part: Equivariance, moments=None, warming_up=False) -> Tensor:
        step = Step(x, moments, generator(seed), warming_up, adversary_plays=True)
        part.on_images(model, step)
        assert step.adversary_plays == (part.adversary or step.images is x)
        return step.images

    shrunk = [
        t
        for seed in range(800)
        if (t := images(seed, Equivariance(adversary=seed % 2 == 0))) is not x
    ]
    assert len(shrunk) == pytest.approx(100, abs=30)  # an eighth, and three standard deviations
    assert {t.shape[-1] for t in shrunk} == {8, 16, 24}
    half = next(t for t in shrunk if t.shape[-1] == 16)
    torch.testing.assert_close(half, torch.nn.functional.avg_pool2d(x, 2), atol=1e-6, rtol=0)
    always = Equivariance(probability=0.0, shrunk=1.0)
    assert images(0, always) is not x
    assert images(0, always, moments=torch.zeros(1)) is x  # they are of the whole image
    assert images(0, always, warming_up=True) is x


def test_equivariance_compares_with_the_shrunk_image(image_folder):
    model, seen = build(parts=parts(equivariance={"probability": 0.0, "shrunk": 1.0})), []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.decoder.register_forward_hook(lambda _, z, y: seen.append(y.detach()))
    values = metrics(fit(model, image_folder, 1, size=32))
    assert values["train/rec"] == pytest.approx((seen[-2] - seen[-1]).abs().mean().item(), rel=1e-5)


def test_equivariance_compares_with_the_transformed_image(image_folder, monkeypatch):
    """A decoder that knows the transformed image by heart has no pixel loss."""
    seen = {}

    def transform(z, x, generator, antialias):
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
    model = build(parts=parts(equivariance={"probability": 1.0}))
    x = model.images(next(iter(source(image_folder, size=32).train_loader())))
    expected = kl_loss(model.encode(x), x).item()
    assert metrics(fit(model, image_folder, 1, size=32))["train/kl"] == pytest.approx(
        expected, rel=1e-5
    )
    assert metrics(fit(build(), image_folder, 1, size=32))["train/kl"] == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_equivariance_needs_a_decoder_of_its_own(frozen):
    model = SimpleNamespace(freeze_decoder=frozen, stand_in=object())
    assert len(list(Equivariance().conflicts(model))) == frozen
