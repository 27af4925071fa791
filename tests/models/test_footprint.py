"""Estimate of a step's memory: beside what autograd keeps of a real step,
and what to do where it does not fit.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from olvae.bench.cases import time_steps
from olvae.config import ConfigError
from olvae.data.places import load
from olvae.losses import perceptual
from olvae.models import footprint as estimates
from olvae.models.footprint import MARGIN, Footprint, advice, footprint, without_weights
from olvae.models.large.tiling import GIB, LiveBytes
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.parts.part import Step
from olvae.models.updates.muon import is_matrix
from olvae.modules.counting import count_parameters
from tests.conftest import tiny_config
from tests.models.steps import SHALLOW, WITHOUT_KL, against, build, build_shallow, kept, objective


def test_footprint_of_a_backward_pass_by_hand():
    """Of x (2, 3, 10, 12): what the network keeps, its output and loss,
    then the gradients that replace them.
    """
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 1)).to("meta")
    x = torch.randn(2, 3, 10, 12, device="meta")
    with LiveBytes() as live:
        loss = network(x).sum()
        forward = live.now
        loss.backward()
    pixels, weights = 4 * 2 * 120, 4 * count_parameters(network)
    # The output of the last layer is freed: its sum needs its shape alone.
    assert forward == pixels * (8 + 8) + 4
    assert live.peak >= pixels * (8 + 8 + 8)  # and the gradient of SiLU's output
    del loss
    assert live.now == weights


def really_kept(images: int) -> tuple[int, int]:
    """Bytes of the storages that autograd keeps of a real step's forward pass in float32,
    and its operations.
    """
    model = build_shallow()
    batch = torch.randint(0, 256, (images, 3, 16, 16), dtype=torch.uint8)

    def forward() -> torch.Tensor:
        step = Step(
            model.images({"image": batch}), None, None, warming_up=False, adversary_plays=False
        )
        model.forward_pass(step)
        return model.autoencoder_loss(step)

    with FlopCounterMode(display=False) as counter:
        held = kept(forward, model)
    return held, counter.get_total_flops()


@pytest.fixture(scope="module")
def model() -> LiteAutoencoderKL:
    """The model that is measured once."""
    return build_shallow()


@pytest.fixture(scope="module")
def plain(model) -> Footprint:
    return footprint(model, 16, "32")


def test_footprint_is_what_autograd_keeps_of_a_real_step(model, plain):
    """The model is left as it is."""
    before = dict(build_shallow().named_parameters())  # of the same seed
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters()
    )
    assert not model.encoder.checkpoint
    assert not any(module._forward_pre_hooks for module in model.modules())
    (more, flop), (few, _) = really_kept(12), really_kept(4)
    kept = (more - few) / 8
    assert kept < plain.per_image < 1.25 * kept  # by gradients of activations
    # The backward pass has twice those of the forward pass, but for the gradient of the image.
    assert 2.5 < plain.flop / (flop / 12) < 3


@pytest.mark.parametrize(
    ("settings", "adversary"),
    [
        ({}, None),
        ({"use_ema": True}, against()),
        ({"optimizer": "muon", "use_quant": True}, None),
        ({"freeze_encoder": True, "lossconfig": WITHOUT_KL, "use_ema": True}, None),
    ],
)
def test_what_lives_between_steps_by_hand(monkeypatch, settings, adversary):
    """Of a step that takes 1,000 bytes, and 300 more for each image, which has 70 operations."""
    asked = []

    def step_under(mode, model, size, images, precision, checkpoint):
        asked.append((size, images, precision, checkpoint))
        peak, operations = 1000 + 300 * images, 70 * images
        return SimpleNamespace(peak=peak, get_total_flops=lambda: operations)

    monkeypatch.setattr(estimates, "_step_under", step_under)
    model = build(adversary, **settings)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = [p for p in model.autoencoder.parameters() if p.requires_grad]
    theirs = [] if adversary is None else list(model.adversary.discriminator.parameters())
    held += 2 * 4 * sum(p.numel() for p in [*trained, *theirs])
    if model.use_ema:
        held += 4 * sum(p.numel() for p in trained)
    if model.optimizer == "muon":
        held -= 4 * sum(p.numel() for p in trained if is_matrix(p))
    assert footprint(model, (16, 24), "bf16", True) == (held + 1000, 300, 70)
    assert {(size, *rest) for size, _, *rest in asked} == {((16, 24), "bf16", True)}


def test_a_model_without_memory_computes_as_a_gpu_does():
    """GroupNorm in float32; a frozen half as in training, and checkpointing where it is asked."""
    model = build(freeze_encoder=True, lossconfig=WITHOUT_KL)
    with FakeTensorMode():
        fake, checkpointed = estimates.without_memory(model), estimates.without_memory(model, True)
        half = torch.zeros(1, dtype=torch.bfloat16)
        norms = 0
        for module in fake.modules():
            hooks = list(module._forward_pre_hooks.values())
            assert len(hooks) == isinstance(module, nn.GroupNorm)
            for hook in hooks:
                (given,) = hook(module, (half,))
                assert given.dtype == torch.float32
                norms += 1
    assert norms > 1
    assert (fake.encoder.training, fake.decoder.training) == (False, True)
    assert (fake.decoder.checkpoint, checkpointed.decoder.checkpoint) == (False, True)
    assert not model.decoder.checkpoint


@pytest.mark.slow
def test_footprint_of_other_settings():
    """With checkpointing, frozen, with one moment, and of both players."""
    model = build()
    plain, checkpointed = (footprint(model, 16, "32", checkpoint=on) for on in (None, True))
    assert not model.encoder.checkpoint
    assert 0.3 * plain.per_image < checkpointed.per_image < 0.7 * plain.per_image
    frozen = footprint(build(freeze_encoder=True, lossconfig=WITHOUT_KL), 16, "32")
    # Neither gradients nor moments.
    assert plain.fixed - frozen.fixed >= 2 * 4 * count_parameters(model.encoder)
    matrices = sum(p.numel() for p in model.autoencoder.parameters() if is_matrix(p))
    # One moment, not two.
    assert plain.fixed - footprint(build(optimizer="muon"), 16, "32").fixed == 4 * matrices > 0
    against_one = build(against(), use_ema=True)
    held = 4 * count_parameters(model.autoencoder) + 3 * 4 * count_parameters(
        against_one.adversary.discriminator
    )
    assert footprint(against_one, 16, "bf16").fixed - plain.fixed >= held


@pytest.mark.slow
def test_footprint_counts_checkpointing_in_diffusers_networks():
    sizes = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    halves = {"encoder": {"latent_dim": 8}, "decoder": {"z_channels": 4}}
    networks = {
        f"{half}_config": {
            "target": f"olvae.modules.sdvae.SD{half.title()}",
            "params": {**sizes, **params},
        }
        for half, params in halves.items()
    }
    plain, checkpointed = (
        footprint(build(**networks), 16, "32", checkpoint=on) for on in (None, True)
    )
    assert checkpointed.per_image < 0.7 * plain.per_image
    assert checkpointed.flop > 1.1 * plain.flop
    assert footprint(build(checkpoint=True, **networks), 16, "32") == checkpointed


def test_footprint_has_the_operations_of_a_real_step_of_both_players():
    """Through Lightning, with what autograd really computes."""
    with FlopCounterMode(display=False) as counter:
        time_steps(build_shallow(against()), 16, 4, 0, "cpu")
    assert footprint(build_shallow(against()), 16, "32").flop == pytest.approx(
        counter.get_total_flops() / 4, rel=0.01
    )


@pytest.mark.parametrize(
    ("params", "weights"),
    [
        # VGG16's convolutions; a weight for each channel of five layers
        ({"lpips_weight": 1}, 14_714_688 + 64 + 128 + 256 + 512 + 512),
        # VGG19's convolutions
        pytest.param(
            {"lpips_weight": 1, "perceptual": "esrgan"}, 20_024_384, marks=pytest.mark.slow
        ),
    ],
    ids=["lpips", "esrgan"],
)
def test_footprint_counts_perceptual_networks_without_their_files(
    monkeypatch, capsys, params, weights, plain
):
    steps = []
    monkeypatch.setattr(
        estimates, "Step", lambda *given, **named: steps.append(named) or Step(*given, **named)
    )
    monkeypatch.setattr(
        perceptual, "find_weights", lambda *args, **kwargs: pytest.fail("no file is needed")
    )
    model = without_weights(tiny_config(lossconfig=objective(**params), **SHALLOW)["model"])
    assert next(model.parameters()).device.type == "meta"
    found = footprint(model, 16, "32")
    assert capsys.readouterr().out == ""
    assert steps == [{"warming_up": True, "adversary_plays": True}] * 3
    assert 0.99 * 4 * weights < found.fixed - plain.fixed < 5 * weights
    assert found.per_image > plain.per_image + 4 * 2 * 64 * 16 * 16


def test_footprint_of_a_config_for_inference_is_refused():
    with pytest.raises(ConfigError, match="inference only"):
        without_weights(tiny_config(lossconfig={"target": "torch.nn.Identity"})["model"])
    with pytest.raises(ConfigError, match="Identity is not a kind of"):
        without_weights({"target": "torch.nn.Identity"})


@pytest.mark.slow
def test_footprint_of_the_published_recipe():
    """32 images of B5 at 256 pixels do not fit 40 GB; with checkpointing they do."""

    model = without_weights(load(["configs/imagenet/B5.yaml"])["model"])
    found = footprint(model, 256, "bf16")
    assert found.per_image / GIB == pytest.approx(1.33, rel=0.1)
    checkpointed = footprint(model, 256, "bf16", checkpoint=True)
    assert checkpointed.per_image / GIB == pytest.approx(0.558, rel=0.05)
    assert found.total(32) > 40e9 > MARGIN * checkpointed.total(32)


PLAIN, LESS = (Footprint(3 * GIB, image) for image in (GIB, GIB // 4))
CHECKPOINT, ACCUMULATE = "model.params.checkpoint=true", "lightning.trainer.accumulate_grad_batches"


def test_a_batch_that_fits_to_the_byte_fits(monkeypatch):
    """19 GiB are 16 images beside what lives between steps, 11 GiB are eight."""
    monkeypatch.setattr(estimates, "MARGIN", 1.0)
    assert advice(19 * GIB, 16, 1, PLAIN, PLAIN) is None
    assert "batch_size=8 " in advice(11 * GIB, 16, 1, PLAIN, PLAIN)


@pytest.mark.parametrize(
    ("free", "batch", "footprint", "said"),
    [
        (24, 16, PLAIN, None),
        (16, 16, PLAIN, f"batch_size=8 {ACCUMULATE}=4 or {CHECKPOINT}"),
        (9, 16, PLAIN, f"batch_size=4 {ACCUMULATE}=8 or {CHECKPOINT}"),
        (8, 32, PLAIN, f"or {CHECKPOINT} data.params.batch_size=8 {ACCUMULATE}=8"),
        (4, 4, PLAIN, f"{CHECKPOINT} data.params.batch_size=1 {ACCUMULATE}=8"),
        (4, 1, LESS, None),
        (3, 1, LESS, "smaller images"),
        (6, 16, LESS, f"batch_size=8 {ACCUMULATE}=4"),
    ],
)
def test_memory_advice_says_what_would_fit(free, batch, footprint, said):
    found = advice(free * GIB, batch, 2, footprint, LESS)
    assert (found is None) == (said is None)
    if said is not None:
        assert found.endswith(said) or said == "smaller images" in found
        assert f"{free:.1f} GiB are free" in found
        assert ("checkpoint" in found) == ("checkpoint" in said)
