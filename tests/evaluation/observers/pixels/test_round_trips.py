"""Passes of an autoencoder whose errors are known: it darkens, and shrinks what is left."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from olvae.evaluation.cells import texts
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.observers.pixels.round_trips import PASSES, RoundTrips
from olvae.evaluation.results import Row
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Deterministic
from tests.conftest import tiny
from tests.evaluation.peers import seen

KEYS = ["a.png", "b.png"]


class Fades(Autoencoder):
    """Halves the distance from black, which is -1; its latents are the images."""

    in_channels, downscale, latent_channels = 3, 1, 3

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken
        self.decoded = 0

    def encode(self, x: Tensor) -> Deterministic:
        return Deterministic(x)

    def decode(self, z: Tensor) -> Tensor:
        self.decoded += 1
        return z * torch.nan if self.broken else (z + 1) / 2 - 1


def observed(model: Autoencoder, x: Tensor, y: Tensor, batches: list[slice]) -> RoundTrips:
    observer = RoundTrips()
    for part in batches:
        with observer.watch("a", 0, Subject(model), KEYS[part]):
            pass
        observer.update(seen("a", KEYS[part], x[part], y[part]))
    return observer


def test_passes_by_hand():
    """128 becomes 64, 32, and so on: a darker image by 64, 96, 124 and 127.9 levels."""
    x = torch.full((2, 3, 4, 4), 128, dtype=torch.uint8)
    x[:, :, ::2, ::2] = 96
    y = (x / 2).round().to(torch.uint8)
    model = Fades()
    found = observed(model, x, y, [slice(0, 2)]).result("a", 0)
    assert model.decoded == 9  # the first pass was the evaluation's
    assert list(found) == [str(done) for done in PASSES]
    level = x.double().numpy()
    for done in range(1, 11):
        level = np.round(level / 2)  # half to even, as torch's
        if done not in PASSES:
            continue
        entry, error = found[str(done)], level - x.numpy()
        assert entry["psnr"] == pytest.approx(10 * np.log10(255**2 / (error**2).mean()))
        assert entry["shift"] == pytest.approx([error.mean()] * 3)
        assert entry["contrast"] == pytest.approx(
            level[0, 0].std() / x[0, 0].double().numpy().std()
        )
        # The finest bands have all of the pattern but its mean: the square of the contrast.
        assert entry["fine_detail"] == pytest.approx(entry["contrast"] ** 2)
    json.dumps(found, allow_nan=False)
    assert found["10"]["fine_detail"] == 0.0


def test_passes_do_not_depend_on_batches_and_processes():
    model = tiny()
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        y = ((model(x / 127.5 - 1)[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    whole = observed(model, x, y, [slice(0, 2)])
    first = observed(model, x, y, [slice(0, 1)])
    first.merge(observed(model, x, y, [slice(1, 2)]).state())
    for done, entry in whole.result("a", 0).items():
        assert first.result("a", 0)[done]["psnr"] == pytest.approx(entry["psnr"], abs=0.01)


@pytest.mark.parametrize("height", [4, 5])
def test_exact_passes_have_no_psnr_and_a_flat_or_odd_image_no_detail(height):
    x = torch.full((2, 3, height, 4), 7, dtype=torch.uint8)
    observer = RoundTrips()
    with observer.watch("a", 0, Subject(Exact()), KEYS):
        observer.update(seen("a", KEYS, x, x))
    entry = observer.result("a", 0)["10"]
    assert (entry["psnr"], entry["fine_detail"]) == (None, None)
    assert observer.columns(observer.result("a", 0)) == {"10 passes": "-"}


def test_cells_of_passes_in_the_line_and_on_the_page():
    entry = {
        "1": {"psnr": 30.0, "fine_detail": 0.5, "shift_of_images": [3.0, 4.0]},
        "10": {"psnr": None, "fine_detail": None, "shift_of_images": [0.0, 1.0]},
    }
    rows = [Row("a", 2, {}, observed={"round_trips": entry}), Row("b", 2, {})]
    observer = RoundTrips()
    (line,) = observer.lines(rows)
    assert line == (
        "a: after 1, 10 passes PSNR 30.00 dB, -; fine detail 50.0 %, -; colour shift 3.54, 0.71"
    )
    tables = []

    def table(rows, label, caption):
        tables.append((rows, label))
        return "shown" if rows else ""

    cells = {"PSNR, 1": "30.00 dB", "fine detail, 1": "50.0 %", "colour shift, 1": "3.54"}
    cells |= {"PSNR, 10": "-", "fine detail, 10": "-", "colour shift, 10": "0.71"}
    page = SimpleNamespace(results=SimpleNamespace(rows=rows), table=table)
    assert observer.section(page) == "shown"
    assert tables == [(texts({"a": cells}), "passes")]
    page.results.rows = rows[1:]
    assert observer.section(page) is None


class Exact(Fades):
    def decode(self, z: Tensor) -> Tensor:
        return z


def test_baselines_are_left_out_and_broken_passes_say_so():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    observer = RoundTrips()
    with observer.watch("bicubic", 0, Subject(Fades(), baseline=True), KEYS):
        observer.update(seen("bicubic", KEYS, x, x))
    assert observer.result("bicubic", 0) is None
    with pytest.raises(ArithmeticError, match="leave `observe` round_trips out"):
        observed(Fades(broken=True), x, x, [slice(0, 2)])
