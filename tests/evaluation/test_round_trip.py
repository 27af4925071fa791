from types import SimpleNamespace

import numpy as np
import pytest
import torch

from olvae.config import ConfigError, save
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.evaluation.round_trip import RoundTrip, open_images_for
from olvae.modules.counting import count_macs
from olvae.modules.distributions import keyed_generator
from tests.conftest import tiny, tiny_config

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
    noise = [torch.randn(4, 4, 4, generator=keyed_generator(f"0 {key}")) for key in KEYS]
    sample = model.decode(posterior.mean + posterior.std * torch.stack(noise))
    sample = sample.clamp(-1, 1).add(1).mul(127.5)
    assert (y - sample).abs().max() < 0.51  # rounded, and of other batches


def test_costs_of_a_decoder_at_2x_are_of_smaller_images_to_encode():
    decoder = tiny_config()["model"]["params"]["decoder_config"]
    decoder["params"]["enlarge"] = 2
    model = tiny(decoder_config=decoder)
    cost = RoundTrip(model).cost([32, 64])
    assert cost.encode_macs == count_macs(model.encoder, 1, 3, 16, 32)
    assert cost.decode_macs == count_macs(model.decoder, 1, 4, 2, 4)


def taker(values: PixelRange = EIGHT_BITS, channels: int = 3, f: int = 8) -> SimpleNamespace:
    """What an autoencoder says of the images that it takes."""
    return SimpleNamespace(pixel_range=values, in_channels=channels, upscale=f)


def test_images_are_opened_for_all_models_with_the_range_that_one_states(image_folder, tmp_path):
    models = {"a": taker(), "b": taker(f=4)}
    found = open_images_for(models, {}, str(image_folder), [16, 24])
    assert (found.channels, found.size, found.val_images) == (3, (16, 24), 12)
    assert found.pixel_range == EIGHT_BITS
    stated = PixelRange.from_node([0, 4095])
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full((20, 20, 3), number, np.uint16))
    found = open_images_for(
        {"a": taker(), "b": taker(stated), "c": taker(stated)}, {}, f"{tmp_path}/*.npy", 8
    )
    assert (found.pixel_range.low, found.pixel_range.high) == ((0.0,), (4095.0,))


WIDE = PixelRange.from_node([0, 4095])


@pytest.mark.parametrize(
    ("models", "size", "message"),
    [
        (
            {"a": taker(WIDE), "b": taker(PixelRange.from_node([0, 9]))},
            16,
            "0 to 4095, linear and of 0 to 9, linear",
        ),
        ({"a": taker(), "b": taker(channels=1)}, 16, r"1 \(b\) and 3 \(a\) channels"),
        ({"a": taker(f=4), "b": taker()}, 20, "b: .* 8x8 pixels, and 20 .* `size` to 16$"),
        ({"a": taker()}, [16, 28], "a: .*16x28 .* `size` to 16x24$"),
        ({"a": taker(channels=1)}, None, "the images have 3 channels, and a takes 1"),
        ({"a": taker(WIDE)}, None, "`data`: .* 0 to 100, linear, the targets take 0 to 4095"),
    ],
)
def test_images_that_not_all_models_take_are_refused(models, size, message, image_folder, tmp_path):
    data = str(image_folder)
    if size is None:
        params = {"root": data, "size": 16, "batch_size": 1, "channels": 3}
        if "4095" in message:
            params["range"] = [0, 100]
        target = "olvae.data.picture_folder.FolderSource"
        save({"data": {"target": target, "params": params}}, tmp_path / "data.yaml")
        data = str(tmp_path / "data.yaml")
    with pytest.raises(ConfigError, match=message):
        open_images_for(models, {}, data, size)


@pytest.mark.parametrize(
    ("times", "peaks", "speeds", "batch", "peak"),
    [
        ([], [], (None, None), 0, None),
        ([(4, 2.0, 1.0)], [70], (2.0, 4.0), 4, 70),
        ([(4, 9.0, 9.0), (4, 1.0, 2.0), (2, 1.0, 1.0)], [90, 80, 60], (3.0, 2.0), 4, 80),
    ],
)
def test_round_trip_cost_leaves_out_the_first_batch_unless_it_is_the_only_one(
    model, times, peaks, speeds, batch, peak
):
    reconstruct = RoundTrip(model)
    reconstruct._times = times
    reconstruct._peaks = peaks
    cost = reconstruct.cost([16, 24])
    assert (cost.encode_images_per_s, cost.decode_images_per_s) == speeds
    assert (cost.batch_size, cost.peak_memory_bytes) == (batch, peak)
    assert cost.encode_macs == count_macs(model.encoder, 1, 3, 16, 24)
    assert cost.decode_macs == count_macs(model.decoder, 1, 4, 2, 3)


def test_round_trip_cost_of_a_network_that_can_not_be_counted(model, monkeypatch, caplog):
    def fail(z):
        raise RuntimeError("needs values\nof a kind")

    monkeypatch.setattr(model, "decode", fail)
    cost = RoundTrip(model).cost(16)
    assert cost.encode_macs == count_macs(model.encoder, 1, 3, 16, 16)
    assert cost.decode_macs is None
    (line,) = caplog.messages
    assert line.endswith("multiplications of `decode` not counted: needs values")


def test_the_first_image_without_a_finite_reconstruction_is_named(images, model, monkeypatch):
    decode = model.decode

    def broken(z):
        y = decode(z)
        y[2, 0, 5, 5] = torch.inf
        y[4] = torch.nan
        return y

    monkeypatch.setattr(model, "decode", broken)
    with pytest.raises(ArithmeticError, match="of image2 is not finite"):
        RoundTrip(model)(KEYS, images)


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
