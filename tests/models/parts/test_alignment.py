"""The latent aligned with a vision encoder: what it computes, what it trains, and what of it is
kept.
"""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import from_uint8
from olvae.losses.terms import marginal_cosine_loss, marginal_distance_loss
from olvae.models.footprint import footprint, without_weights
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.alignment import Alignment
from olvae.models.updates.optimizers import mix_seeds
from tests.conftest import parts, tiny_config
from tests.models.parts.vision import node
from tests.models.steps import WITHOUT_KL, build, fit, metrics, moved, objective, snapshot, source


def aligned(
    vit: str, adversary: dict | None = None, alignment: dict | None = None, **model
) -> LiteAutoencoderKL:
    settings = {"initial_logvar": -4.0, "learning_rate": 1e-3}
    nodes = {"alignment": node(vit, **(alignment or {})), **model.pop("parts", {})}
    return build(adversary, parts=nodes, **{**settings, **model})


def alone(vit: str, latent_channels: int, **params) -> Alignment:
    """Attached to a model of which it sees no more than this."""
    alignment = Alignment("test_vit", vit, **params)
    alignment.attach(
        SimpleNamespace(
            autoencoder=SimpleNamespace(latent_channels=latent_channels), channels_last=False
        )
    )
    return alignment


def test_vision_encoder_is_no_part_of_the_model(vit):
    model = aligned(vit)
    assert [name for name in model.state_dict() if name.startswith("parts.")] == [
        "parts.alignment.projection.weight"
    ]
    assert not any(name.startswith("parts.") for name in model.autoencoder.state_dict())
    other = copy.deepcopy(model)
    assert other.parts["alignment"].features is model.parts["alignment"].features
    assert other.parts["alignment"].projection is not model.parts["alignment"].projection
    model.train()
    assert not any(part.training for part in model.parts["alignment"].features.network.modules())


# The loss


def test_alignment_terms_are_the_losses_of_projected_latents(vit):
    alignment = alone(vit, 5).double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    z = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    features = alignment.features(x, (4, 4))
    terms = alignment(x, z)
    projected = torch.einsum("dc,bchw->bdhw", alignment.projection.weight[:, :, 0, 0], z)
    torch.testing.assert_close(
        terms["align_cosine"], marginal_cosine_loss(projected, features, 0.5)
    )
    torch.testing.assert_close(terms["align_distance"], marginal_distance_loss(z, features, 0.25))
    alignment.project_distance = True
    published = alignment(x, z)["align_distance"]
    torch.testing.assert_close(published, marginal_distance_loss(projected, features, 0.25))
    assert not torch.isclose(published, terms["align_distance"])


def test_alignment_takes_the_decoded_sample_before_noise(vit, image_folder):
    """Before noise; a second sample would be another one."""
    settings = {"of": "sample", "adaptive_weight": False}
    noise = parts(latent_noise={"std": 5.0})
    for others in ({}, noise):
        model, decoded, aligned_with = aligned(vit, alignment=settings, parts=others), [], []
        model.decoder.register_forward_pre_hook(
            lambda _, inputs, kept=decoded: kept.append(inputs[0].detach())
        )
        model.parts["alignment"].register_forward_pre_hook(
            lambda _, inputs, kept=aligned_with: kept.append(inputs[1].detach())
        )
        fit(model, image_folder, 1)
        assert torch.equal(decoded[-1], aligned_with[-1]) == (not others)
    with pytest.raises(ConfigError, match=r"of: .*sample_posterior"):
        aligned(vit, alignment=settings, sample_posterior=False)


# Send-VAE's mapper

SEND = {
    "mapper": "vit",
    "noise": 1.0,
    "weight": 1.0,
    "adaptive_weight": False,
    "cosine_margin": 0.0,
    "distance_margin": None,
}


def test_send_vae_loss_by_hand(vit):
    """Eq. 1 and 2: 1 - cos of the mapped z_t = a z + (1 - a) e, a uniform, and of the features."""
    alignment = alone(vit, 5, **SEND).double()
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
    z = 3 + 2 * torch.randn(3, 5, 4, 4, dtype=torch.float64)
    torch.manual_seed(7)
    terms = alignment(x, z)
    torch.manual_seed(7)
    share = torch.rand(3, 1, 1, 1).double()
    noise = torch.randn_like(z)
    mean = z.mean((0, 2, 3), keepdim=True)
    std = (z - mean).square().mean((0, 2, 3), keepdim=True).sqrt()
    mapped = alignment.projection((1 - share) * z + share * (mean + std * noise))
    features = alignment.features(x, (4, 4))
    dot = (mapped * features).sum(1)
    cosine = dot / mapped.norm(dim=1) / features.norm(dim=1)
    assert terms.keys() == {"align_cosine"}
    torch.testing.assert_close(terms["align_cosine"], (1 - cosine).mean())


def test_noise_while_aligning_is_in_no_other_term(vit):
    """Not in the distance, which compares the latent itself, nor in what is decoded."""
    noisy, clean = alone(vit, 5, noise=1.0), alone(vit, 5)
    x, z = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 5, 4, 4)
    noisy.projection.load_state_dict(clean.projection.state_dict())
    found, wanted = noisy(x, z), clean(x, z)
    assert found["align_distance"] == wanted["align_distance"]
    assert found["align_cosine"] != wanted["align_cosine"]


def test_send_vae_trains_encoder_and_mapper_and_nothing_else(vit, image_folder):
    model = aligned(vit, alignment=SEND).train()
    x = from_uint8(next(iter(source(image_folder).train_loader()))["image"])
    posterior = model.encode(x)
    step = SimpleNamespace(encoded=posterior, images=x)
    ((loss, weight),) = model.parts["alignment"].losses(model, step).values()
    (weight * loss).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("encoder.") for name in got)
    mapper = {name for name in got if name.startswith("parts.")}
    assert mapper == {
        f"parts.alignment.projection.{name}"
        for name, _ in model.parts["alignment"].projection.named_parameters()
    }
    assert not any(name.startswith("decoder.") for name in got)
    assert not any(p.requires_grad for p in model.parts["alignment"].features.network.parameters())

    before = snapshot(model)
    fit(model, image_folder, 2, precision="bf16-mixed")
    assert "parts.alignment.projection.block.attention.qkv.weight" in moved(before, snapshot(model))
    assert "align_distance" not in metrics(model)
    assert metrics(model)["train/align_cosine"] > 0


def by_hand(
    model: LiteAutoencoderKL, image_folder
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Of the first step: the other losses, the alignment, all terms,
    and the paper's adaptive factor.
    """
    x = from_uint8(next(iter(source(image_folder).train_loader()))["image"])
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    reconstruction, posterior = model(x, sample_posterior=True)
    total, terms = model.objective(x, reconstruction, posterior)
    terms |= model.parts["alignment"](x, posterior.mean)
    loss = terms["align_cosine"] + terms["align_distance"]
    pixels = sum(
        model.objective.weights[name] * terms[name] for name in ("rec", "wavelet", "gaussian")
    )
    weight = (
        model.quantizer.quant_conv if model.quantizer else model.encoder.aggregator.conv_out
    ).weight
    norms = [
        torch.autograd.grad(part, weight, retain_graph=True)[0].norm() for part in (pixels, loss)
    ]
    return total, loss, terms, norms[0] / norms[1]


@pytest.mark.parametrize(("adaptive", "use_quant"), [(True, False), (True, True), (False, False)])
def test_alignment_step_by_hand(vit, image_folder, adaptive, use_quant):
    settings = {"alignment": {"weight": 0.3, "adaptive_weight": adaptive}, "use_quant": use_quant}
    total, loss, terms, factor = by_hand(aligned(vit, **settings), image_folder)
    values = metrics(fit(aligned(vit, **settings), image_folder, 1))
    for name, term in terms.items():
        assert values[f"train/{name}"] == pytest.approx(term.item(), rel=1e-5), name
    assert values.get("health/alignment_weight") == (
        pytest.approx(factor.item(), rel=1e-4) if adaptive else None
    )
    weighted = 0.3 * (factor if adaptive else 1.0) * loss
    assert values["train/loss"] == pytest.approx((total + weighted).item(), rel=1e-5)


def test_alignment_factor_is_at_most_that_of_the_published_code(vit, image_folder, monkeypatch):
    """1e8 where image terms are sums; here they are means."""
    model = aligned(vit)
    monkeypatch.setattr(
        LiteAutoencoderKL, "ratio_of_gradients", lambda *_: torch.tensor(3e7, dtype=torch.float32)
    )
    fit(model, image_folder, 1)
    assert metrics(model)["health/alignment_weight"] == pytest.approx(1e8 / (3 * 16 * 16))


@pytest.mark.parametrize(
    "settings", [{"use_quant": True, "use_ema": True}, {"checkpoint": True}], ids=str
)
def test_alignment_projection_learns_and_the_encoder_does_not(vit, image_folder, settings):
    model = aligned(vit, parts=parts(equivariance={"probability": 1.0}), **settings)
    before = snapshot(model)
    fit(model, image_folder, 2, size=32, precision="bf16-mixed")
    assert metrics(model)["health/alignment_weight"] > 0
    assert "parts.alignment.projection.weight" in moved(before, snapshot(model))
    assert not any(p.requires_grad for p in model.parts["alignment"].features.network.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.slow
def test_alignment_memory_is_counted_without_its_file(vit):
    config = tiny_config(parts={"alignment": node("/nowhere.pt")})["model"]
    timm = pytest.importorskip("timm")
    found = footprint(without_weights(config), 16, "32")
    assert found.fixed > 4 * sum(p.numel() for p in timm.create_model("test_vit").parameters())


KL_ALONE = objective(rec_weight=0, wavelet_weight=0, gaussian_weight=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_encoder": True, "lossconfig": WITHOUT_KL}, "the latents can't change"),
        ({"parts": parts(anchor={})}, r"the latents can't change \(parts.anchor\)"),
        ({"lossconfig": KL_ALONE}, "adaptive_weight: no loss compares images"),
    ],
)
def test_alignment_refuses_settings_that_contradict_it(vit, settings, message):
    with pytest.raises(ConfigError, match=message):
        aligned(vit, **settings)


def test_alignment_refuses_images_of_other_channels(vit):
    grey = tiny_config(parts={"alignment": node(vit)})["model"]["params"]
    grey["encoder_config"]["params"]["in_channels"] = grey["decoder_config"]["params"][
        "out_channels"
    ] = 1
    with pytest.raises(ConfigError, match="3 channels, not 1"):
        LiteAutoencoderKL(**grey)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"of": "mode"}, ValueError, "of must be one of mean, sample, got 'mode'"),
        ({"weight": -1}, ValueError, "weight must not be negative, got -1"),
        ({"mapper": "mlp"}, ValueError, "mapper must be one of linear, vit, got 'mlp'"),
        ({"noise": 1.5}, ValueError, "noise is a share of the latent, at most 1, got 1.5"),
        (
            {"project_distance": True, "distance_margin": None},
            ValueError,
            "project_distance: there is no distance term",
        ),
        ({"encoder": "vit_giant_of_nowhere"}, ValueError, "timm has no model vit_giant_of_nowhere"),
        (
            {"weights": "/nowhere.pt"},
            FileNotFoundError,
            "nowhere.*params.weights of the alignment",
        ),
        ({"encoder": "test_vit3"}, ValueError, "these are not the weights of test_vit3"),
    ],
)
def test_alignment_refuses_wrong_parameters(vit, params, error, message):
    with pytest.raises(error, match=message) as caught:
        Alignment(**{"encoder": "test_vit", "weights": vit, **params})
    assert "\n" not in str(caught.value)


def test_mapper_refuses_features_that_are_no_heads():
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"64 .*test_vit3 has 96"),
    ):
        Alignment("test_vit3", mapper="vit")


def test_an_alignment_says_what_it_does(vit):
    assert alone(vit, 5).describe() == "test_vit, weight 0.1, adaptive"
    sends = alone(vit, 5, **SEND).describe()
    assert sends == "test_vit, weight 1, by a transformer, noise up to 1"


def test_the_projection_lies_in_memory_as_the_model(vit):
    for channels_last, strides in ((False, (5, 1, 1, 1)), (True, (5, 1, 5, 5))):
        alignment = Alignment("test_vit", vit)
        autoencoder = SimpleNamespace(latent_channels=5)
        alignment.attach(SimpleNamespace(autoencoder=autoencoder, channels_last=channels_last))
        assert alignment.projection.weight.stride() == strides


def test_alignment_without_timm_names_the_extra(monkeypatch, vit):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="install timm"):
        Alignment("test_vit", vit)
