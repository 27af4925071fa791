"""Passes of an autoencoder whose errors are known: it darkens, and shrinks what is left."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.observers.pixels.round_trips import PASSES, RoundTrips
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

    def encode(self, x: Tensor) -> Deterministic:
        return Deterministic(x)

    def decode(self, z: Tensor) -> Tensor:
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
    found = observed(Fades(), x, y, [slice(0, 2)]).result("a", 0)
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


def test_exact_passes_have_no_psnr_and_a_flat_image_no_detail():
    x = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    observer = RoundTrips()
    with observer.watch("a", 0, Subject(Exact()), KEYS):
        observer.update(seen("a", KEYS, x, x))
    entry = observer.result("a", 0)["10"]
    assert (entry["psnr"], entry["fine_detail"]) == (None, None)
    assert observer.columns(observer.result("a", 0)) == {"10 passes": "-"}


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
