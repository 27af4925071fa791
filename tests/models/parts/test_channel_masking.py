"""ChannelMasking: the first channels kept, their PSNR, and that they learn to suffice."""

from types import SimpleNamespace

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import to_uint8
from olvae.models.parts.channel_masking import ChannelMasking
from olvae.models.parts.part import Step
from tests.conftest import parts
from tests.models.steps import against, build, fit, metrics, source

WIDTHS = {"widths": [4, 1, 2]}


def test_channel_masking_keeps_the_first_channels_and_zeroes_the_others():
    """Each width equally often, for each sample its own; no gradient for what is zero."""
    z = torch.randn(3000, 4, 3, 3, requires_grad=True)
    step = Step(torch.zeros(1), None, None, warming_up=False, adversary_plays=False)
    step.latent = z
    ChannelMasking(**WIDTHS).on_latent(None, step)
    kept = (step.latent != 0).flatten(2).all(2)  # (B, n_z)
    counts = {width: int((kept.sum(1) == width).sum()) for width in (1, 2, 3, 4)}
    assert counts.pop(3) == 0
    assert all(abs(count - 1000) < 4 * 26 for count in counts.values())  # binomial
    assert torch.equal(kept, kept.sum(1, keepdim=True) > torch.arange(4))
    assert torch.equal(step.latent[kept], z[kept])
    assert (step.latent[~kept] == 0).all()
    (gradient,) = torch.autograd.grad(step.latent.sum(), z)
    assert torch.equal(gradient[:, :, 0, 0], kept.float())


@pytest.mark.parametrize("at_once", [2, 3])
def test_several_widths_at_once_have_always_the_largest(at_once):
    z = torch.randn(1000, 4, 2, 2)
    x = torch.randn(1000, 3, 2, 2)
    step = Step(x, None, None, warming_up=False, adversary_plays=False)
    step.latent, step.target = z, x
    ChannelMasking(widths=[4, 1, 2], at_once=at_once).on_latent(None, step)
    kept = (step.latent != 0).flatten(2).all(2).sum(1).view(at_once, 1000)
    assert (kept[0] == 4).all()
    assert torch.equal(step.latent[:1000], z)
    for number in range(1, at_once):
        counts = {width: int((kept[number] == width).sum()) for width in (1, 2)}
        assert abs(counts[1] - 500) < 64  # four deviations
        assert sum(counts.values()) == 1000
    if at_once == 3:
        assert torch.equal(kept.sort(0).values.T, torch.tensor([1, 2, 4]).expand(1000, 3))
    assert torch.equal(step.target, torch.cat([x] * at_once))
    assert step.images is x


def test_a_step_of_two_widths_is_the_mean_over_them(image_folder):
    """With two widths both are decoded for each image."""
    both = {"widths": [1, 4], "at_once": 2}
    model = build(parts=parts(channel_masking=both), sample_posterior=False)
    x = model.images(next(iter(source(image_folder).train_loader())))
    posterior = model.encode(x)
    z = posterior.mean
    narrow = torch.cat((z[:, :1], torch.zeros_like(z[:, 1:])), dim=1)
    totals, kl = [], 0.0
    for latent in (z, narrow):
        _, terms = model.objective(x, model.decode(latent), posterior)
        kl = model.loss_weights["kl"] * terms.pop("kl").item()
        totals.append(model.objective.weighted(terms, *terms).item())
    values = metrics(fit(model, image_folder, 1))
    assert values["train/loss"] == pytest.approx(sum(totals) / 2 + kl, rel=1e-5)


def test_several_widths_at_once_play_against_a_discriminator(image_folder):
    masking = {"widths": [1, 2, 4], "at_once": 2}
    model = build(against(), parts=parts(channel_masking=masking))
    seen = []
    model.adversary.discriminator.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    values = metrics(fit(model, image_folder, 1))
    assert "train/discriminator" in values
    assert set(seen) <= {8, 16}  # twice the batch, alone or reals beside fakes


def test_channel_masking_validates_the_psnr_of_each_width(image_folder):
    model = build(parts=parts(channel_masking=WIDTHS))
    x = model.images(next(iter(source(image_folder).train_loader())))
    with torch.no_grad():
        found = model.parts["channel_masking"].validate(model, x, None)
        z = model.encode(x).mean
        for width in (1, 2, 4):
            masked = torch.cat((z[:, :width], torch.zeros_like(z[:, width:])), dim=1)
            decoded = to_uint8(model.decode(masked))
            pairs = zip(to_uint8(x).numpy(), decoded.numpy(), strict=True)
            by_hand = sum(peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs) / len(x)
            assert float(found[f"psnr_{width}"]) == pytest.approx(by_hand, rel=1e-5)


def test_channel_masking_orders_channels_by_importance():
    """A linear autoencoder of four numbers finds their principal components in order,
    which it does not without.
    """
    masking, scale = ChannelMasking([1, 2, 3, 4]), torch.tensor([3.0, 2.0, 1.5, 1.0])
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    x = torch.randn(256, 4) * scale @ turn
    variances = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)
    kept = {}
    for masks in (False, True):
        torch.manual_seed(1)
        encoder, decoder = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.03)
        step = Step(torch.zeros(1), None, None, warming_up=False, adversary_plays=False)
        for _ in range(300):
            step.latent = encoder(x)[:, :, None, None]
            if masks:
                masking.on_latent(None, step)
            loss = (decoder(step.latent[:, :, 0, 0]) - x).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z = (encoder(x) * torch.tensor([1.0, 0, 0, 0])).detach()
        kept[masks] = float(variances.sum() - (decoder(z).detach() - x).square().sum(1).mean())
    assert kept[True] == pytest.approx(variances[0].item(), rel=0.02)
    assert kept[False] < 0.8 * kept[True]


def test_channel_masking_says_its_widths():
    assert ChannelMasking(**WIDTHS).describe() == "1, 2, 4 channels"
    assert ChannelMasking(**WIDTHS, at_once=2).describe() == "1, 2, 4 channels, 2 at once"


@pytest.mark.parametrize("widths", [[], [0, 4], [2, 2]])
def test_channel_masking_refuses_widths_that_make_no_sense(widths):
    with pytest.raises(ValueError, match="widths must"):
        ChannelMasking(widths)


@pytest.mark.parametrize(
    ("at_once", "message"), [(0, "at_once must be at least 1"), (4, "at most the 3 widths, got 4")]
)
def test_channel_masking_refuses_a_number_of_widths_that_it_lacks(at_once, message):
    with pytest.raises(ValueError, match=message):
        ChannelMasking([1, 2, 4], at_once=at_once)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"parts": parts(channel_masking={"widths": [2, 8]})},
            "widths: the latent has 4 channels, not 8",
        ),
        ({"freeze_decoder": True}, "the decoder is frozen"),
        (
            {"parts": parts(channel_masking=WIDTHS, latent_noise={"std": 0.1})},
            "put it after parts.latent_noise",
        ),
        (
            {"parts": parts(channel_masking=WIDTHS, random_noise={})},
            "put it after parts.random_noise",
        ),
        (
            {"parts": parts(channel_masking=WIDTHS, anchor={})},
            "the latents can't change",
        ),
    ],
)
def test_channel_masking_refuses_settings_that_contradict_it(settings, message):
    with pytest.raises(ConfigError, match=rf"parts.channel_masking.*{message}"):
        build(**{"parts": parts(channel_masking=WIDTHS), **settings})


def test_channel_masking_counts_an_image_without_error_as_100_db():
    model = build(parts=parts(channel_masking={"widths": [4]}))
    model.encoder.forward = lambda x: torch.zeros(len(x), 8, 2, 2)
    model.decoder.forward = lambda z: torch.zeros(len(z), 3, 16, 16)
    found = model.parts["channel_masking"].validate(model, torch.zeros(2, 3, 16, 16), None)
    assert float(found["psnr_4"]) == 100.0


def test_channel_masking_comes_after_parts_that_add_noise():
    """Named is the first that follows; those before, and others, may be anywhere."""
    masking = ChannelMasking(**WIDTHS)
    masking.name = "masking"

    def noisy(name: str, adds_noise: bool) -> SimpleNamespace:
        return SimpleNamespace(name=name, adds_noise=adds_noise, latents="free")

    model = SimpleNamespace(
        autoencoder=SimpleNamespace(latent_channels=4), freeze_decoder=False, freeze_encoder=False
    )
    before, after, other = noisy("before", True), noisy("after", True), noisy("other", False)
    for parts_of, named in (
        ([masking], None),
        ([before, masking, other], None),
        ([before, masking, other, after], "after"),
        ([masking, after, before], "after"),
    ):
        model.each_part = [*parts_of]
        lines = list(masking.conflicts(model))
        assert len(lines) == (named is not None)
        for line in lines:
            assert line.startswith("parts.masking: ")
            assert line.endswith(f"after parts.{named}")
