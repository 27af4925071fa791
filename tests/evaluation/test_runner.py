import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from olvae.data.pixels.size_and_range import PixelRange, Sides
from olvae.evaluation.baselines import Bicubic
from olvae.evaluation.observers.observer import Observer
from olvae.evaluation.protocol import PROTOCOLS, Protocol
from olvae.evaluation.round_trip import Reconstructed, RoundTrip
from olvae.evaluation.runner import fingerprint, found_by, is_examined, measure, observe, rows_under
from olvae.metrics import build_metrics
from olvae.models.autoencoder import Autoencoder
from olvae.modules.counting import count_macs
from olvae.modules.distributions import Posterior
from tests.conftest import tiny

KEYS = [f"image{i}" for i in range(7)]
USUAL = Protocol()


@pytest.fixture
def images():
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def model():
    return tiny()


def darker(keys, x):
    return (x.int() * 3 // 4).to(torch.uint8)


def run(targets, images, size=3, names=("psnr", "ssim"), order=None, protocol=USUAL):
    """Which images were seen, and the rows of stand-ins that are functions of keys and images."""
    order = order or list(range(len(images)))
    batches = [
        {"image": images[order[i : i + size]], "key": [KEYS[j] for j in order[i : i + size]]}
        for i in range(0, len(order), size)
    ]
    make = build_metrics([protocol.columns.get(name, name) for name in names])
    trips = {
        (name, 0): lambda keys, x, target=target: Reconstructed(
            torch.zeros(len(x), 4, 4, 4), target(keys, x)
        )
        for name, target in targets.items()
    }
    metrics = {key: make() for key in trips}
    seen = observe(batches, {}, trips, metrics)
    measured = [measure(name, found, len(seen)) for (name, _), found in metrics.items()]
    return seen, rows_under(protocol, measured, names)


def test_the_mean_over_images_whatever_the_batches_and_their_order(images):
    expected = np.mean(
        [peak_signal_noise_ratio(x.numpy(), darker([], x).numpy(), data_range=255) for x in images]
    )
    seen, (first,) = run({"darker": darker}, images)
    assert first.metrics["psnr"] == pytest.approx(expected, rel=1e-9)
    assert first.n == 7
    assert list(first.per_image["psnr"]) == KEYS
    for size, order in ((1, None), (7, None), (2, [6, 5, 4, 3, 2, 1, 0])):
        other, (again,) = run({"darker": darker}, images, size, order=order)
        assert again.metrics == pytest.approx(first.metrics, rel=1e-6)
        assert fingerprint(other) == fingerprint(seen)
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    assert fingerprint(run({"darker": darker}, changed)[0]) != fingerprint(seen)


def test_a_protocols_variants_stand_under_the_metrics_names(images):
    _, (gaussian,) = run({"darker": darker}, images, names=("psnr", "ssim", "ssim_uniform"))
    _, (uniform,) = run({"darker": darker}, images, protocol=Protocol(ssim="uniform"))
    assert list(uniform.metrics) == ["psnr", "ssim"]
    assert uniform.metrics["ssim"] == gaussian.metrics["ssim_uniform"] != gaussian.metrics["ssim"]


def test_differences_from_the_first_row_are_paired(images):
    def darkest(keys, x):
        return darker(keys, darker(keys, x))

    _, (first, second, same) = run(
        {"darker": darker, "darkest": darkest, "same": lambda keys, x: x}, images
    )
    assert first.differences == {}
    found = second.differences["psnr"]
    assert found.value == pytest.approx(second.metrics["psnr"] - first.metrics["psnr"])
    assert found.low < found.value < found.high < 0
    assert same.metrics == {"psnr": math.inf, "ssim": pytest.approx(1.0)}
    assert same.skipped == {}
    assert same.differences.keys() == same.intervals.keys() == {"ssim"}  # an infinite PSNR has none


def test_bicubic_is_pillows(images):
    reconstruction = RoundTrip(Bicubic(8))(KEYS, images).images
    for x, y in zip(images, reconstruction, strict=True):
        picture = Image.fromarray(x.permute(1, 2, 0).numpy())
        small = picture.resize((4, 4), Image.Resampling.BICUBIC)
        back = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(back, y.permute(1, 2, 0).numpy())


def test_samples_depend_on_seed_and_key_alone(images, model):
    def trip(seed):
        return lambda keys, x: RoundTrip(model, seed=seed)(keys, x).images

    mode, zero, again, one = map(trip, (None, 0, 0, 1))
    y = zero(KEYS, images)
    assert torch.equal(y[2:5], again(KEYS[2:5], images[2:5]))
    assert torch.equal(y.flip(0), again(KEYS[::-1], images.flip(0)))
    assert not torch.equal(y, one(KEYS, images))
    assert not torch.equal(y, mode(KEYS, images))
    assert not torch.equal(y[:1], again(["other"], images[:1]))
    posterior = model.encode(images.float() / 127.5 - 1.0)
    expected = model.decode(posterior.mode()).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    assert torch.equal(mode(KEYS, images), expected)


def test_what_it_costs(images, model):
    reconstruct = RoundTrip(model)
    for _ in range(3):
        reconstruct(KEYS, images)
    cost = reconstruct.cost(32)
    assert cost.batch_size == len(KEYS)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.encode_macs == count_macs(model.encoder, 1, 3, 32, 32)
    assert cost.decode_macs == count_macs(model.decoder, 1, 4, 4, 4)
    assert cost.encode_images_per_s > 0
    assert cost.decode_images_per_s > 0
    assert cost.peak_memory_bytes is None  # nothing measures it on the CPU


def test_what_can_not_be_counted_or_examined_loses_no_metric(images, model, caplog):
    """Networks of the user's own may be more than torch, and observers may fail."""
    count = RoundTrip(NumPyAutoencoder(model)).cost(32)
    assert (count.encode_macs, count.decode_macs) == (None, None)
    assert "multiplications of `encode` not counted: " in caplog.text
    source = SimpleNamespace(size=Sides.of(32))
    assert is_examined(Observer(), {}, source, "cpu")
    broken = Observer()
    broken.name = "mine"
    broken.examine = lambda *_: [][0]
    assert not is_examined(broken, {}, source, "cpu")
    assert "mine: left out: list index out of range" in caplog.text
    broken.result = lambda *_: {"value": math.nan}
    assert found_by(broken, "a", 0) is None
    assert "mine: left out: Out of range float values are not JSON compliant" in caplog.text


class NumPyAutoencoder(Autoencoder):
    """Computes elsewhere, on values."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.in_channels = 3
        self.latent_channels = 4
        self.downscale = 8
        self.inner = [model]

    def encode(self, x: torch.Tensor) -> Posterior:
        return self.inner[0].encode(torch.from_numpy(x.numpy()))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.inner[0].decode(torch.from_numpy(z.numpy()))


@pytest.mark.gpu
def test_a_gpu_measures_the_memory_of_a_batch(images, model):
    reconstruct = RoundTrip(model, "cuda")
    reconstruct(KEYS, images)
    assert reconstruct.cost(32).peak_memory_bytes >= 4 * images.numel()  # the output in float32


def test_a_reconstruction_that_is_not_finite_gives_no_number(images, model):
    """As uint8 it would be a black picture, and a PSNR."""
    with torch.no_grad():
        next(p for name, p in model.decoder.named_parameters() if name.endswith("bias")).fill_(
            float("nan")
        )
    with pytest.raises(ArithmeticError, match="mine: its reconstruction of image0 is not finite"):
        RoundTrip(model, name="mine")(KEYS, images)


CHOICES = {
    "range": "0 to 65535, linear",
    "version": 3,
    "size": 64,
    "resize": "adm",
    "resample": "bilinear",
    "posterior": "sample",
    "ssim": "uniform",
    "lpips": "alex",
    "crops": "tiles",
    "n": 5,
}


def test_the_hash_is_of_every_choice_and_of_nothing_else():
    changed = [Protocol(**{name: value}) for name, value in CHOICES.items()]
    changed += [Protocol(posterior="sample", seed=1)]
    assert len({protocol.hash() for protocol in [Protocol(), *changed]}) == len(changed) + 1
    assert CHOICES.keys() | {"name", "seed"} == {
        field.name for field in dataclasses.fields(Protocol)
    }
    assert Protocol(seed=1).hash() == Protocol().hash()  # the mode draws nothing
    assert Protocol("mine").hash() == Protocol().hash()
    assert Protocol(posterior="sample").hash() == PROTOCOLS["latent-diffusion"].hash()


def test_presets_differ_in_what_they_say():
    assert len({protocol.hash() for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    assert PROTOCOLS["open-litevae"] == Protocol()
    assert "halved by averaging" in PROTOCOLS["dc-ae"].as_dict()["images"]


def test_speeds_are_of_each_half_without_the_first_batch(monkeypatch):
    # A batch warms up; then 2 s to encode, 1 s to decode.
    clock = iter([0, 100, 100, 200, 300, 302, 302, 303.0])
    monkeypatch.setattr("olvae.evaluation.round_trip.now", lambda _: next(clock))
    reconstruct = RoundTrip(tiny())
    for _ in range(2):
        reconstruct(list("abcd"), torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    cost = reconstruct.cost(16)
    assert (cost.encode_images_per_s, cost.decode_images_per_s) == (2.0, 4.0)


def test_bicubic_keeps_the_sides_of_oblongs_and_rounds_eight_bits_alone():
    x = torch.randint(0, 256, (3, 16, 32), dtype=torch.uint8)
    picture = Image.fromarray(x.permute(1, 2, 0).numpy())
    back = picture.resize((4, 2), Image.Resampling.BICUBIC).resize(
        (32, 16), Image.Resampling.BICUBIC
    )
    y = ((Bicubic(8)(x[None] / 127.5 - 1)[0][0] + 1) * 127.5).round()
    assert np.array_equal(np.asarray(back), y.permute(1, 2, 0).numpy())
    deep = torch.rand(1, 2, 16, 16) * 2 - 1
    torch.testing.assert_close(Bicubic(1, 2, PixelRange.from_node([0, 65535]))(deep)[0], deep)
