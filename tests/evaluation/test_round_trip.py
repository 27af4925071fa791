import pytest
import torch

from olvae.evaluation.round_trip import RoundTrip
from olvae.modules.counting import count_macs
from tests.conftest import tiny

KEYS = [f"image{i}" for i in range(7)]


@pytest.fixture
def images():
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def model():
    return tiny()


def test_posterior_samples_depend_on_seed_and_key_alone(images, model):
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


def test_round_trip_cost_counts_parameters_macs_and_speed(images, model):
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


@pytest.mark.gpu
def test_round_trip_cost_on_a_gpu_has_peak_memory(images, model):
    reconstruct = RoundTrip(model, "cuda")
    reconstruct(KEYS, images)
    assert reconstruct.cost(32).peak_memory_bytes >= 4 * images.numel()  # the output in float32


def test_non_finite_reconstruction_is_an_error(images, model):
    """As uint8 it would be a black picture, and a PSNR."""
    with torch.no_grad():
        next(p for name, p in model.decoder.named_parameters() if name.endswith("bias")).fill_(
            float("nan")
        )
    with pytest.raises(ArithmeticError, match=r"mine: .*image0"):
        RoundTrip(model, name="mine")(KEYS, images)


def test_round_trip_speeds_are_of_each_half_without_the_first_batch(monkeypatch):
    # A batch warms up; then 2 s to encode, 1 s to decode.
    clock = iter([0, 100, 100, 200, 300, 302, 302, 303.0])
    monkeypatch.setattr("olvae.evaluation.round_trip.now", lambda _: next(clock))
    reconstruct = RoundTrip(tiny())
    for _ in range(2):
        reconstruct(list("abcd"), torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    cost = reconstruct.cost(16)
    assert (cost.encode_images_per_s, cost.decode_images_per_s) == (2.0, 4.0)
