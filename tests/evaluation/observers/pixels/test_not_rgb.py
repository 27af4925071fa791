import numpy as np
import pytest
import torch
from PIL import Image

from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.evaluation.observers.observer import Observation
from olvae.evaluation.observers.pixels.not_rgb import RealValues, Transparency
from olvae.evaluation.results import Row

STATED = PixelRange.from_node({"pairs": [0, 10_000], "values": "log1p"})


def seen(x: np.ndarray, y: np.ndarray, keys: list[str], stated: PixelRange = STATED) -> Observation:
    levels = [stated.levels(torch.from_numpy(values).float()) for values in (x, y)]
    return Observation("vae", 0, keys, *levels, torch.zeros(1), {}, stated)


def test_spectral_angle_is_float64s_whatever_the_batches():
    x, y = (np.random.default_rng(seed).uniform(0, 9000, (3, 6, 5, 4)) for seed in (0, 1))
    x[0, :, 2, 3] = 0  # a pixel without a spectrum
    whole, parts = RealValues(), [RealValues(), RealValues()]
    whole.update(seen(x, y, ["a", "b", "c"]))
    parts[0].update(seen(x[:2], y[:2], ["a", "b"]))
    parts[1].update(seen(x[1:], y[1:], ["b", "c"]))
    parts[0].merge(parts[1].state())
    entry = whole.result("vae", 0)
    for name, value in parts[0].result("vae", 0).items():
        assert value == pytest.approx(entry[name])
    a, b = (np.moveaxis(values, 1, -1).reshape(-1, 6) for values in (x, y))
    good = a.any(1)
    cosine = (
        (a * b).sum(1)[good] / np.linalg.norm(a[good], axis=1) / np.linalg.norm(b[good], axis=1)
    )
    assert entry["spectral_angle"] == pytest.approx(np.degrees(np.arccos(cosine)).mean(), rel=1e-4)
    np.testing.assert_allclose(entry["rmse"], np.sqrt(np.square(x - y).mean((0, 2, 3))), rtol=1e-4)
    assert set(whole.columns(entry)) == {"RMSE", "MAE", "relative", "angle"}


def test_errors_in_real_values_by_hand():
    """Two channels of two pixels; one value is 0, for which nothing is relative."""
    stated = PixelRange.from_node([0, 100])
    x = np.array([[[[0.0, 50.0]], [[20.0, 10.0]]]])
    y = np.array([[[[4.0, 53.0]], [[20.0, 15.0]]]])
    observer = RealValues()
    observer.update(seen(x, y, ["a"], stated))
    observer.update(seen(x[..., :1], x[..., :1], ["b"], stated))
    entry = observer.result("vae", 0)
    assert entry == {
        # Of each image, then over images: 25 / 2 and 0.
        "rmse": pytest.approx([(12.5 / 2) ** 0.5, (12.5 / 2) ** 0.5], rel=1e-5),
        "mae": pytest.approx([3.5 / 2, 2.5 / 2], rel=1e-5),
        # 3 / 50, 0, 5 / 10, and of the other image 0.
        "relative": pytest.approx(0.56 / 4, rel=1e-5),
    }
    one = observer.of_images("vae", ["a", "unknown"])
    assert one == {"rmse": pytest.approx(12.5**0.5), "mae": pytest.approx(3.0, rel=1e-5)}
    both = observer.of_images("vae", ["a", "b"])
    assert both == {"rmse": pytest.approx(2.5), "mae": pytest.approx(1.5, rel=1e-5)}
    assert observer.of_images("vae", ["unknown"]) == observer.of_images("other", ["a"]) == {}
    assert observer.columns(entry) == {"RMSE": "2.50", "MAE": "1.50", "relative": "14.0 %"}
    uneven = {"rmse": [3.0, 4.0], "mae": [1.0, 2.0], "spectral_angle": 1.5}
    assert observer.columns(uneven) == {"RMSE": "3.54", "MAE": "1.50", "angle": "1.50°"}
    rows = [Row("a", 2, {}, observed={"real_values": uneven}), Row("b", 2, {})]
    rows.append(Row("grey", 2, {}, observed={"real_values": {"rmse": [3.0], "mae": [1.0]}}))
    assert list(observer.lines(rows)) == ["a: RMSE per channel 3.00, 4.00"]


def test_an_image_of_zeros_has_no_relative_error_and_negative_ranges_have_none():
    observer = RealValues()
    zeros, ones = np.zeros((1, 1, 2, 2)), np.ones((1, 1, 2, 2))
    observer.update(seen(zeros, ones, ["a"], PixelRange.from_node([0, 9])))
    assert set(observer.result("vae", 0)) == {"rmse", "mae"}
    small = RealValues()
    small.update(seen(0.5 * ones, ones, ["a"], PixelRange.from_node([0, 9])))
    assert small.result("vae", 0)["relative"] == pytest.approx(1.0, rel=1e-5)
    signed = RealValues()
    signed.update(seen(ones, zeros, ["a"], PixelRange.from_node([-1, 9])))
    assert set(signed.result("vae", 0)) == {"rmse", "mae"}


@pytest.mark.parametrize(("channels", "has_angle"), [(3, False), (4, True)])
def test_four_channels_are_a_spectrum(channels, has_angle):
    """From the first axis to the second are 90 degrees; where both have no values, none."""
    x, y = np.zeros((2, 1, channels, 1, 3))
    x[0, 0, 0, :2] = 0.5
    y[0, 1, 0, 0] = 0.3
    y[0, 0, 0, 1:] = 0.7
    observer = RealValues()
    observer.update(seen(x, y, ["a"], PixelRange.from_node([0, 9])))
    angle = observer.result("vae", 0).get("spectral_angle")
    assert angle == (pytest.approx(45.0, abs=1e-3) if has_angle else None)


def test_equal_and_opposite_spectra_have_no_angle_and_180_degrees():
    """Also where rounding makes their cosine larger than 1."""
    # Numbers that a round trip through levels leaves as they are.
    x = np.random.default_rng(0).integers(-2048, 2049, (1, 5, 16, 16)) / 4096
    for y, angle in ((x, 0.0), (-x, 180.0)):
        observer = RealValues()
        observer.update(seen(x, y, ["a"], PixelRange.from_node([-1, 1])))
        assert observer.result("vae", 0)["spectral_angle"] == pytest.approx(angle, abs=1e-3)


def test_not_rgb_has_nothing_for_eight_bits_and_no_angle_without_a_spectrum():
    observer = RealValues()
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    observer.update(Observation("vae", 0, ["a"], images, images, torch.zeros(1), {}, EIGHT_BITS))
    assert observer.result("vae", 0) is None
    signed = PixelRange.from_node([-5, 5])
    observer.update(seen(np.zeros((1, 3, 4, 4)), np.ones((1, 3, 4, 4)), ["a"], signed))
    assert observer.result("vae", 0) == {
        "rmse": pytest.approx([1] * 3, rel=1e-5),
        "mae": pytest.approx([1] * 3, rel=1e-5),
    }


def test_psnr_over_three_backgrounds_as_pillow_lays_them():
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 256, (2, 32, 32, 4), dtype=np.uint8) for _ in range(2))
    y[1, ..., 3] = x[1, ..., 3]
    observer = Transparency()
    tensors = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (x, y)]
    observer.update(Observation("vae", 0, ["a", "b"], *tensors, torch.zeros(1), {}))
    entry = observer.result("vae", 0)

    def psnr(a: np.ndarray, b: np.ndarray) -> float:
        return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 255**2 * 1e-10))

    def flat(image: np.ndarray, grey: str) -> np.ndarray:
        whole = Image.fromarray(image)
        return np.asarray(
            Image.alpha_composite(Image.new("RGBA", whole.size, grey), whole).convert("RGB")
        )

    for name, grey in (("black", "black"), ("grey", "#808080"), ("white", "white")):
        expected = np.mean([psnr(flat(a, grey), flat(b, grey)) for a, b in zip(x, y, strict=True)])
        assert entry[name] == pytest.approx(expected, abs=0.03)  # Pillow rounds
    assert entry["alpha"] == pytest.approx(
        np.mean([psnr(x[0, ..., 3], y[0, ..., 3]), 100.0]), abs=1e-3
    )
    assert list(observer.columns(entry)) == ["over black", "over grey", "over white", "alpha"]
    opaque = Transparency()
    opaque.update(
        Observation("vae", 0, ["a"], tensors[0][:1, :3], tensors[1][:1, :3], torch.zeros(1), {})
    )
    assert opaque.result("vae", 0) is None
