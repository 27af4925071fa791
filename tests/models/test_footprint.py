"""What a training step needs: by hand, as autograd keeps it on the CPU, and what to do where it does not fit."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from olvae.config import ConfigError
from olvae.losses import perceptual
from olvae.models import footprint
from olvae.models.footprint import CHECKPOINTS, GIB, MARGIN, Footprint, Kept, Moment, advice, footprints, keep
from olvae.models.parts.part import Step
from olvae.modules.base import count_parameters
from tests.conftest import tiny_config
from tests.models.steps import against, build

OBJECTIVE = "olvae.losses.objective.Objective"


def test_by_hand():
    """A convolution keeps its input, SiLU its own; weights do not count, nor does a storage that is kept twice."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 1))
    kept = Kept(footprint._storages(network.parameters()))
    with kept.part("networks"):
        x = torch.randn(2, 3, 10, 12)
        out = network(x)
    with kept.part("losses"):
        loss = (out * out).mean()
    assert kept.bytes(kept.networks(False)) == 4 * 2 * 120 * (3 + 8 + 8)
    assert kept.bytes(kept.networks(False), kept.parts["losses"]) == 4 * 2 * 120 * (3 + 8 + 8 + 2)
    assert loss.requires_grad


def test_what_is_held_by_hand():
    """Weights, a gradient for each, two moments of Adam, an average."""
    model = build(against(), use_ema=True)
    autoencoder, discriminator = (count_parameters(m) for m in (model.autoencoder, model.adversary.discriminator))
    counters = sum(b.nbytes for b in model.adversary.discriminator.buffers())
    found = footprints(model, 16, "32")
    assert found["A", False].gradients == 4 * autoencoder
    assert found["A", False].held == 4 * autoencoder * (1 + 2 + 1)
    assert found["B", False].gradients == 4 * (autoencoder + discriminator)
    assert found["B", False].held == found["A", False].held + 4 * discriminator * 3 + counters
    frozen = build(freeze_encoder=True, lossconfig={"target": OBJECTIVE, "params": {"lpips_weight": 0, "kl_weight": 0}})
    assert footprints(frozen, 16, "32")["A", False].gradients == 4 * count_parameters(frozen.decoder)


def really_kept(model, images: int, precision: str) -> dict[str, int]:
    """Bytes of the storages that autograd keeps of a real step, by the player whose backward pass needs them."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    batch = torch.randint(0, 256, (images, 3, 16, 16), dtype=torch.uint8)
    found = {}

    def collecting(name: str):
        seen = found.setdefault(name, {})

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = (storage.nbytes(), t)
            return t

        return saved_tensors_hooks(pack, lambda t: t)

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if precision == "bf16" else nullcontext():
        x = model.images({"image": batch})
        with collecting("autoencoder"):
            step = Step(x, None, None, warming_up=False, adversary_plays=True)
            model.forward_pass(step)
            reconstruction = step.reconstruction
            total = model.autoencoder_loss(step)
            if model.adversary is not None:
                total = total + model.adversary.generator_loss(reconstruction)
        if model.adversary is not None:
            with collecting("discriminator"):
                loss, _ = model.adversary.discriminator_loss(x, reconstruction)
            assert loss.requires_grad
    assert total.requires_grad
    return {name: sum(n for n, _ in seen.values()) for name, seen in found.items()}


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_equal_to_what_autograd_keeps(checkpoint, precision):
    model = build(against(), use_quant=True)
    kept = keep(model, 16, 3, precision, "cpu")
    networks, parts = kept.networks(checkpoint), kept.parts
    real = build(against(), use_quant=True, checkpoint=checkpoint)
    expected = really_kept(real, 3, precision)
    # In bfloat16 a CPU keeps the statistics of its norms in float32, shapes alone give them in bfloat16.
    rel = 0.01 if precision == "bf16" else 0
    found = kept.bytes(networks, parts["losses"], parts["adversarial"])
    assert found == pytest.approx(expected["autoencoder"], rel=rel, abs=4 * 8)  # the sum of the losses keeps scalars
    assert kept.bytes(parts["discriminator"]) == pytest.approx(expected["discriminator"], rel=rel)


def test_linear_in_the_images():
    model = build(against())
    found = footprints(model, 16, "32")
    kept = keep(model, 16, 5, "32", "cuda")
    for (phase, checkpoint), counted in found.items():
        assert [moment.kept(5) for moment in counted.moments] == kept.moments(phase, checkpoint)


def test_a_step_computed_again_counts_beside_what_is_kept():
    found = footprints(build(), 16, "32")
    assert found["A", True].per_image < min(found["A", half].per_image for half in ("encoder", "decoder"))
    assert max(found["A", half].per_image for half in ("encoder", "decoder")) < found["A", False].per_image
    kept = keep(build(), 16, 1, "32", "cuda")
    assert found["A", True].total(1) - 2 * found["A", True].gradients >= kept.bytes(kept.networks(True))


def test_on_a_gpu_groups_are_normalised_in_float32():
    on_gpu, on_cpu = (footprints(build(), 16, "bf16", device)["A", False].per_image for device in ("cuda", "cpu"))
    assert on_cpu < on_gpu < footprints(build(), 16, "32")["A", False].per_image


def test_the_model_is_left_as_it_is():
    model = build(against(), freeze_encoder=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    footprints(model, 16, "bf16")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any("step" in part.__dict__ for part in model.modules())
    assert not model.encoder.checkpoint


def test_lpips_is_counted_without_its_file(monkeypatch):
    monkeypatch.setattr(perceptual, "find_weights", lambda *args, **kwargs: pytest.fail("no file is needed"))
    node = tiny_config(lossconfig={"target": OBJECTIVE, "params": {}})["model"]
    model = footprint.without_weights(node)
    assert next(model.parameters()).device.type == "meta"
    vgg = 14_714_688 + 64 + 128 + 256 + 512 + 512  # convolutions of VGG16, and a weight for each channel of five layers
    shift_and_scale = 6
    found, without = (footprints(m, 32, "32")["A", False] for m in (model, build()))
    assert found.held - without.held == 4 * (vgg + shift_and_scale)
    assert found.per_image > without.per_image + 4 * 2 * 64 * 32 * 32


def test_esrgans_network_is_counted_without_its_file(monkeypatch):
    monkeypatch.setattr(perceptual, "find_weights", lambda *args, **kwargs: pytest.fail("no file is needed"))
    node = tiny_config(lossconfig={"target": OBJECTIVE, "params": {"perceptual": "esrgan"}})["model"]
    found, without = (footprints(m, 32, "bf16")["A", False] for m in (footprint.without_weights(node), build()))
    assert found.held - without.held == 4 * (20_024_384 + 6)  # convolutions of VGG19; shift and scale
    assert found.per_image > without.per_image + 4 * 2 * 64 * 32 * 32  # the first ones', in float32 under autocast too


def test_a_config_for_inference_says_so():
    with pytest.raises(ConfigError, match="for inference only"):
        footprint.without_weights(tiny_config(lossconfig={"target": "torch.nn.Identity"})["model"])


@pytest.mark.slow
def test_the_published_recipe():
    """32 images of B5 at 256 pixels do not fit 40 GB; with checkpointing they do."""
    from olvae import config as cfg

    model = footprint.without_weights(cfg.load(["configs/imagenet/B5.yaml"])["model"])
    found = footprints(model, 256, "bf16")
    assert found["B", False].per_image / GIB == pytest.approx(1.23, rel=0.1)
    assert found["B", False].total(32) > 40e9 > MARGIN * found["B", True].total(32)


PLAIN, LESS = (Footprint(2 * GIB, GIB, (Moment(0, image),)) for image in (GIB, GIB // 4))


@pytest.mark.parametrize(
    ("free", "batch", "footprint", "said"),
    [
        (24, 16, PLAIN, None),
        (16, 16, PLAIN, "batch_size=8 lightning.trainer.accumulate_grad_batches=4 or model.params.checkpoint=true"),
        (9, 16, PLAIN, "batch_size=4 lightning.trainer.accumulate_grad_batches=8 or model.params.checkpoint=true"),
        (8, 32, PLAIN, "batch_size=2 lightning.trainer.accumulate_grad_batches=32"),
        (
            4,
            4,
            PLAIN,
            "model.params.checkpoint=true data.params.batch_size=1 lightning.trainer.accumulate_grad_batches=8",
        ),
        (4, 1, LESS, None),
        (3, 1, LESS, "smaller images"),
        (6, 16, LESS, "batch_size=8 lightning.trainer.accumulate_grad_batches=4"),
    ],
)
def test_advice(free, batch, footprint, said):
    found = advice(free * GIB, batch, 2, footprint, LESS)
    assert (found is None) == (said is None)
    if said is not None:
        assert found.endswith(said) or said == "smaller images" in found
        assert f"{free:.1f} GiB are free" in found
        assert ("checkpoint" in found) == ("checkpoint" in said)


def test_at_least():
    assert Footprint(2, 5, (Moment(1, 3), Moment(4, 1))).least(1) == 2 + 5
    assert Footprint(2, 5, (Moment(1, 3), Moment(4, 1))).least(4) == 2 + 13
    assert Footprint(2, 5, (Moment(1, 3), Moment(4, 1))).total(1) == 2 + 5 + 5
