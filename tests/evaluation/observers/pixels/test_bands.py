import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import pywt
import torch

from olvae.evaluation.observers.pixels.bands import Bands
from olvae.evaluation.results import Row
from tests.evaluation.peers import seen


def pairs(n: int, height: int = 16, width: int = 24, channels: int = 3):
    x = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)
    y = (x.int() + torch.randint(-20, 21, x.shape)).clamp(0, 255).to(torch.uint8)
    return [f"{i}.png" for i in range(n)], x, y


def observed(keys, x, y, levels: int = 3, size: int = 4) -> Bands:
    observer = Bands(levels)
    for i in range(0, len(keys), size):
        observer.update(seen("a", keys[i : i + size], x[i : i + size], y[i : i + size]))
    return observer


def bands(keys, x, y, levels: int = 3, size: int = 4):
    return observed(keys, x, y, levels, size).result("a", 0)


def pywavelets(images: np.ndarray, levels: int) -> dict[str, float]:
    """Energy per band and image; vertical details are those along the width."""
    approximation, *details = pywt.wavedec2(
        images, "haar", mode="periodization", level=levels, axes=(-2, -1)
    )
    energy = {f"LL{levels}": approximation}
    for level, (horizontal, vertical, diagonal) in zip(range(levels, 0, -1), details, strict=True):
        energy |= {f"LH{level}": vertical, f"HL{level}": horizontal, f"HH{level}": diagonal}
    return {name: float(np.square(band).sum()) / len(images) for name, band in energy.items()}


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_band_energies_are_pywavelets(levels):
    keys, x, y = pairs(5)
    found = bands(keys, x, y, levels)
    signal, error = x.double().numpy(), y.double().numpy() - x.double().numpy()
    expected_error, expected_signal = pywavelets(error, levels), pywavelets(signal, levels)
    expected_out = pywavelets(y.double().numpy(), levels)
    assert list(found) == list(expected_error)
    assert sum(band["mse"] for band in found.values()) == pytest.approx(
        np.square(error).mean(), rel=1e-12
    )
    for name, values in found.items():
        assert values["mse"] == pytest.approx(expected_error[name] / x[0].numel(), rel=1e-10)
        assert values["share_of_signal"] == pytest.approx(
            expected_error[name] / expected_signal[name], rel=1e-10
        )
        assert values["signal"] == pytest.approx(expected_signal[name] / x[0].numel(), rel=1e-10)
        assert values["energy_ratio"] == pytest.approx(
            expected_out[name] / expected_signal[name], rel=1e-10
        )
    finest = [
        sum(of[f"{band}1"] for band in ("LH", "HL", "HH")) for of in (expected_out, expected_signal)
    ]
    assert Bands().columns(found) == {"fine detail": f"{100 * finest[0] / finest[1]:.0f} %"}


def test_soft_reconstructions_have_less_fine_detail():
    keys, x, _ = pairs(2)
    soft = x.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).round().to(torch.uint8)
    found = bands(keys, x, soft.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert Bands().columns(found) == {"fine detail": "0 %"}
    assert found["LL3"]["energy_ratio"] == pytest.approx(1.0, abs=0.01)
    # Of results that have no energies.
    assert Bands().columns({name: {"mse": 1.0} for name in found}) == {}
    some = {"LH1": {"signal": 1.0, "energy_ratio": 0.5}, "HL1": {"signal": 1.0}}
    assert Bands().columns(some) == {"fine detail": "25.0 %"}


def test_bars_are_scaled_to_a_trained_models_longest():
    def row(target: str, mse: float, share: float | None, baseline: bool = False) -> Row:
        bands = {name: {"mse": mse, "share_of_signal": share} for name in ("LL1", "HH1")}
        return Row(target, 1, {}, observed={"bands": bands}, baseline=baseline)

    def section(*rows: Row):
        results = SimpleNamespace(rows=rows)
        page = SimpleNamespace(results=results, render=lambda name, **context: context)
        return Bands().section(page)

    rows = (row("a", 2.0, None), row("b", 3.0, 0.5), row("untrained", 9.0, 9.0, baseline=True))
    found = section(*rows, Row("odd", 1, {}))
    assert found["rows"] == [*rows]
    assert found["names"] == ["LL1", "HH1"]
    assert found["longest"] == {"mse": 3.0, "share_of_signal": 0.5}
    assert section(rows[0])["longest"] == {"mse": 2.0, "share_of_signal": 0.0}
    assert section(rows[2])["longest"] == {"mse": 0.0, "share_of_signal": 0.0}
    assert section(Row("odd", 1, {})) is None


def test_vertical_stripes_are_detail_along_the_width():
    x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    y = x.clone()
    y[..., 1::2] = 10  # mean square 50: half of it the mean, half of it the stripes
    found = bands(["a"], x, y)
    assert {name: band["mse"] for name, band in found.items() if band["mse"]} == {
        "LL3": 25.0,
        "LH1": 25.0,
    }
    assert all(band["share_of_signal"] is None for band in found.values())  # black has no energy


def test_bands_do_not_depend_on_batches_order_and_processes():
    keys, x, y = pairs(7)
    whole = bands(keys, x, y, size=7)
    order = [3, 6, 0, 5, 1, 4, 2]
    assert bands([keys[i] for i in order], x[order], y[order], size=2) == whole
    first = observed(keys[:4], x[:4], y[:4])
    second = observed(keys[2:], x[2:], y[2:], size=1)  # two in both
    second.merge(pickle.loads(pickle.dumps(first.state())))
    assert second.result("a", 0) == whole


def test_bands_have_as_many_levels_as_the_size_allows():
    keys, x, y = pairs(3, height=12)  # twice even
    assert bands(keys, x, y) == bands(keys, x, y, levels=2)
    assert next(iter(bands(keys, x, y))) == "LL2"


def test_odd_sides_have_no_bands():
    keys, x, y = pairs(2)
    assert bands(keys, x[:, :, :15], y[:, :, :15]) is None


def test_further_draws_have_the_bands_of_the_first():
    keys, x, y = pairs(2)
    observer = observed(keys, x, y)
    observer.update(seen("a", keys, x, x, draw=1))
    assert observer.result("a", 1) == bands(keys, x, y)
