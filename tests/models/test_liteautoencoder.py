"""A training step's helpers, and the step of phase A."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from olvae.config import ConfigError, instantiate, load
from olvae.models.liteautoencoder import grad_scaler, gradient_ratio, last_convolution, lr_factor, mix_seeds
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.sdvae import SDDecoder
from tests.models.steps import build, fit, norm, source

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").rglob("*.yaml"))

# Seeds and rates


def test_seeds_differ_with_every_number_and_with_their_order():
    grid = [(seed, step, micro, rank) for seed in (0, 1, 7) for step in range(9) for micro in (0, 1) for rank in (0, 1)]
    assert len({mix_seeds(*numbers) for numbers in grid}) == len(grid)
    assert mix_seeds(1, 2) != mix_seeds(2, 1)


def test_seeds_differ_from_those_with_zeros_after_them():
    """So that what an update shares does not follow its first micro-batch's noise."""
    assert mix_seeds(0, 5) != mix_seeds(0, 5, 0, 0)


def test_seeds_are_what_torch_takes_and_the_same_again():
    for step in range(100):
        seed = mix_seeds(3, step)
        assert 0 <= seed < 2**63
        assert seed == mix_seeds(3, step)
        torch.manual_seed(seed)


def test_warm_up_then_constant():
    assert [lr_factor(s, "constant", 4, 100, 0.0) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]


def test_cosine():
    values = [lr_factor(s, "cosine", 10, 110, 0.1) for s in (10, 60, 110, 500)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_no_warm_up():
    assert lr_factor(0, "cosine", 0, 10, 0.0) == 1.0
    assert lr_factor(0, "constant", 0, 10, 0.0) == 1.0


# The decoder's last layer, and gradients there


@pytest.mark.parametrize("output", ["image", "wavelet"])
@pytest.mark.parametrize("variant", ["open_litevae", "paper_smc"])
def test_the_last_convolution_of_litevae(variant, output):
    decoder = LiteVAE_Decoder(8, 4, channel_mult=(1, 2), num_res_blocks=0, variant=variant, output=output)
    assert last_convolution(decoder) is decoder.conv_out


def test_the_last_convolution_of_the_sd_decoder():
    decoder = SDDecoder(8, 4, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    assert last_convolution(decoder) is decoder.model.conv_out


@pytest.mark.parametrize(
    "decoder",
    [
        LiteVAE_Decoder(8, 4, channel_mult=(1, 2), num_res_blocks=0),
        SDDecoder(8, 4, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4),
    ],
    ids=["litevae", "sd"],
)
def test_the_last_convolution_makes_the_image(decoder):
    """Its output is the decoder's."""
    outputs: list[Tensor] = []
    last_convolution(decoder).register_forward_hook(lambda _, __, y: outputs.append(y))
    image = decoder(torch.randn(1, 4, 4, 4))
    assert len(outputs) == 1
    assert torch.equal(outputs[0], image)


def module(decoder: nn.Module, scaler=None, world_size: int = 1, reduce=None) -> SimpleNamespace:
    """What gradient_ratio asks of a LightningModule in training."""
    plugin = SimpleNamespace(scaler=scaler)
    strategy = SimpleNamespace(reduce=reduce)
    trainer = SimpleNamespace(world_size=world_size, precision_plugin=plugin, strategy=strategy)
    return SimpleNamespace(decoder=decoder, trainer=trainer)


def two_losses(decoder: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Two losses of one image, and by hand the ratio of their gradients at the only convolution, a 1x1 one.

    The image is w_oc z_c at every pixel: d(sum of a * image)/dw_oc = a * sum of z_c.
    """
    z = torch.randn(2, 3, 4, 4)
    image = decoder(z)
    (conv,) = decoder
    sums = z.sum(dim=(0, 2, 3))  # (3,)
    one, other = (2.0 * image).sum(), (0.5 * image[:, :1]).sum()
    assert conv.weight.shape[:2] == (2, 3)
    by_hand = (2.0 * 2**0.5 * sums.norm()) / (0.5 * sums.norm())  # two output channels, and one
    return one, other, by_hand.item()


@pytest.fixture
def decoder() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 2, kernel_size=1))


def test_gradient_ratio_by_hand(decoder):
    one, other, by_hand = two_losses(decoder)
    ratio = gradient_ratio(module(decoder), one, other)
    assert ratio.item() == pytest.approx(by_hand, rel=1e-5)
    assert ratio.item() == pytest.approx(4 * 2**0.5, rel=1e-5)
    assert ratio.dtype == torch.float32
    assert gradient_ratio(module(decoder), other, one).item() == pytest.approx(1 / by_hand, rel=1e-5)


def test_gradient_ratio_leaves_the_graph_and_no_gradient(decoder):
    one, other, _ = two_losses(decoder)
    ratio = gradient_ratio(module(decoder), one, other)
    assert not ratio.requires_grad
    assert decoder[0].weight.grad is None
    (one + other).backward()  # what follows in a step
    assert decoder[0].weight.grad.abs().max() > 0


def test_no_adversarial_gradient_is_a_large_number_and_not_infinite(decoder):
    one, other, _ = two_losses(decoder)
    assert 1e9 < gradient_ratio(module(decoder), one, 0.0 * other).item() < float("inf")


def test_the_loss_scale_does_not_show(decoder):
    one, other, by_hand = two_losses(decoder)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert grad_scaler(module(decoder, scaler)) is scaler
    assert gradient_ratio(module(decoder, scaler), one, 0.0 * other).item() == pytest.approx(
        gradient_ratio(module(decoder), one, 0.0 * other).item(), rel=1e-5
    )
    assert gradient_ratio(module(decoder, scaler), one, other).item() == pytest.approx(by_hand, rel=1e-5)


def test_the_loss_scale_saves_gradients_that_half_precision_would_lose(decoder):
    """1e-9 is under float16's smallest number, 6e-8; times 2^16 it is not."""
    weight = decoder[0].weight
    one, other = (1e-9 * factor * weight.half().float().sum() for factor in (3.0, 1.0))
    assert gradient_ratio(module(decoder), one, other).item() == 0.0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert gradient_ratio(module(decoder, scaler), one, other).item() == pytest.approx(3.0, rel=1e-2)


def test_without_a_scaler():
    assert grad_scaler(module(nn.Identity())) is None
    plain = SimpleNamespace(trainer=SimpleNamespace(precision_plugin=SimpleNamespace()))
    assert grad_scaler(plain) is None


def test_over_ranks_the_gradients_are_averaged_before_their_norm(decoder):
    """Two ranks with opposite gradients of the second loss but for a tenth: its norm is that of the mean."""
    weight = decoder[0].weight
    one, other = weight.sum(), weight[0].sum()
    calls = []

    def reduce(gradient, reduce_op):
        assert reduce_op == "mean"
        calls.append(gradient.clone())
        theirs = gradient if len(calls) == 1 else -0.8 * gradient
        return (gradient + theirs) / 2

    ratio = gradient_ratio(module(decoder, world_size=2, reduce=reduce), one, other)
    assert len(calls) == 2
    assert ratio.item() == pytest.approx(2**0.5 / 0.1, rel=1e-5)


# Phase A


def test_a_step_is_the_objective_and_adam_by_hand(image_folder):
    """The first update, repeated without Lightning: same noise, same loss, same weights."""
    model = fit(build(), image_folder, 1)
    other = build()
    optimizer = torch.optim.Adam(other.autoencoder_parameters(), lr=1e-4, betas=(0.5, 0.9), fused=True)
    batch = next(iter(source(image_folder).train_loader()))
    x = other.images(batch)
    torch.manual_seed(mix_seeds(0, 0, 0, 0))
    reconstruction, posterior = other(x, sample_posterior=True)
    total, _ = other.objective(x, reconstruction, posterior)
    total.backward()
    optimizer.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_autoencoder_runs_forward_once_a_step(image_folder):
    model = build()
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    model.decoder.register_forward_hook(lambda *_: calls.append("decoder"))
    fit(model, image_folder, 3)
    assert calls == ["encoder", "decoder"] * 3


def test_accumulation_counts_updates_and_equals_a_larger_batch(image_folder, monkeypatch, updates):
    """Without the posterior's noise, 2 x 4 images give the gradient of 8."""
    monkeypatch.setattr("olvae.modules.distributions.DiagonalGaussian.sample", lambda self, *_: self.mode())
    small = fit(build(accumulate_grad_batches=2), image_folder, 3)
    large = fit(build(), image_folder, 3, batch_size=8)
    assert small.trainer.global_step == large.trainer.global_step == 3
    assert small.images_seen == large.images_seen == 24
    accumulated, whole = updates[0].gradients, updates[3].gradients
    for a, b in zip(accumulated, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_clipping(image_folder, updates):
    """Norm 1e-3, where it would be more, as the optimizer sees it."""
    fit(build(), image_folder, 1)
    fit(build(gradient_clip_val=1e-3), image_folder, 1)
    free, clipped = (norm(update.gradients) for update in updates)
    assert free > 0.01
    assert clipped == pytest.approx(1e-3, rel=1e-2)


def test_the_schedule_reaches_the_optimizer(image_folder, updates):
    fit(build(scheduler="cosine", warmup_steps=2, min_lr_factor=0.5, learning_rate=1e-2), image_folder, 4)
    assert [update.lr for update in updates] == pytest.approx([0.5e-2, 1e-2, 1e-2, 0.75e-2])


def test_ema_is_lightnings_callback_over_the_weights(image_folder):
    model = build(use_ema=True, ema_decay=0.5)
    (callback,) = model.configure_callbacks()
    assert isinstance(callback, pl.callbacks.EMAWeightAveraging)
    history = []
    model.on_train_batch_start = lambda *_: history.append(model.encoder.aggregator.conv_out.weight.detach().clone())
    fit(model, image_folder, 3)
    raw = [*history[1:]]  # after steps 1 and 2; the average starts as the first of them
    final = fit(build(), image_folder, 3).encoder.aggregator.conv_out.weight.detach()
    expected = raw[0] * 0.25 + raw[1] * 0.25 + final * 0.5
    torch.testing.assert_close(model.encoder.aggregator.conv_out.weight.detach(), expected)
    assert build().configure_callbacks() == []


@pytest.mark.parametrize("path", [p for p in CONFIGS if "from" not in load([p])["model"]], ids=lambda p: p.name)
def test_every_parameter_of_every_config_learns(path):
    """One step's gradient is finite and not zero everywhere, for every parameter; LPIPS and teachers are left out
    (downloads), nothing is frozen, and a config for inference gets the default objective."""
    node = load([path])["model"]
    for key in ("teacher_config", "freeze_encoder", "freeze_decoder"):
        node["params"].pop(key, None)
    node["params"]["lossconfig"] = {"target": "olvae.losses.objective.Objective", "params": {"lpips_weight": 0}}
    model = instantiate(node)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    total, _ = model.objective(x, *model(x, sample_posterior=True))
    total.backward()
    if model.adversary is not None:
        # At the size that it is made for. Squares, because hinge's slopes for real and fake cancel in the biases.
        size = node["params"]["adversary_config"]["params"]["discriminator_config"].get("params", {}).get("image_size")
        logits = model.adversary.discriminator(torch.rand(2, 3, size or 64, size or 64) * 2 - 1)
        torch.stack([(t + 0.1).square().mean() for t in logits]).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


def test_bf16(image_folder):
    model = fit(build(), image_folder, 3, precision="bf16-mixed")
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in model.parameters())
    assert float(model.trainer.callback_metrics["train/loss"]) < 2


def test_a_config_for_inference_says_so():
    model = build(lossconfig={"target": "torch.nn.Identity"})
    with pytest.raises(ConfigError, match=r"torch\.nn\.modules\.linear\.Identity, which is for inference only"):
        _ = model.objective


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="constant or cosine"):
        build(scheduler="linear")
