"""The spectrum's divergence against scipy's transform of all latents at once, and the study's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn

from olvae.evaluation.observers.spectrum import Spectrum
from study.predictors import spectrum_divergence
from tests.evaluation.peers import seen


def pictures(n: int, sides: tuple[int, int] = (32, 32)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, *sides), generator=generator, dtype=torch.uint8)


def entry(keys, x, z):
    observer = Spectrum()
    for part in (slice(0, 3), slice(3, None)):
        observer.update(seen("t", keys[part], x[part], latents=z[part]))
    return observer.result("t", 0)


def test_divergence_is_the_studys_of_all_images():
    x = pictures(20, (64, 40))
    z = 3.0 + 2.0 * torch.randn(20, 4, 8, 5)
    found = entry([f"{i:02d}" for i in range(20)], x, z)
    wanted = spectrum_divergence(z, F.avg_pool2d(x.double(), 8))
    assert found["divergence"] == pytest.approx(wanted, rel=1e-9)


def test_powers_are_scipys():
    z = torch.randn(5, 4, 4, 4) + 1.5
    found = entry("abcde", pictures(5), z)
    scaled = z.double().numpy()
    scaled = (scaled - scaled.mean()) / scaled.std(ddof=1)
    power = (dctn(scaled, axes=(2, 3), norm="ortho") ** 2).mean((0, 1))
    u, v = np.mgrid[:4, :4] / 4
    ring = (16 * np.hypot(u, v) / 2**0.5 + 1e-9).astype(int)
    for i, value in enumerate(found["latents"]):
        if (ring == i).any():
            assert value == pytest.approx(power[ring == i].mean(), rel=1e-9)
        else:
            assert value is None
            assert found["target"][i] is None


def test_neither_scale_nor_mean_of_latents_changes_their_spectrum():
    x = pictures(5)
    z = torch.randn(5, 4, 4, 4)
    plain = entry("abcde", x, z)
    for other in (1e-8 * z, 1e3 * z, z + 100.0):
        found = entry("abcde", x, other)
        assert found["divergence"] == pytest.approx(plain["divergence"], rel=1e-4)
        powers = [(a, b) for a, b in zip(found["latents"], plain["latents"], strict=True) if b]
        assert [a for a, _ in powers] == pytest.approx([b for _, b in powers], rel=1e-4)
    assert entry("abcde", x, z + 1e4) is not None


def test_latents_with_the_target_spectrum_have_no_divergence():
    """Images of power 1 / f^2 at each frequency, and latents of 1 / f."""
    generator = torch.Generator().manual_seed(1)
    observer = Spectrum()
    white = torch.randn(200, 3, 16, 16, generator=generator, dtype=torch.float64)
    from study.latent_maps import inverse_cosines, radial_bins

    middles = (radial_bins(16, 16).double() + 0.5) / 16
    images = inverse_cosines(white / middles)
    latents = inverse_cosines(white / middles.sqrt())
    keys = [f"{i:03d}" for i in range(200)]
    batch = seen("t", keys, images.float(), latents=latents.float())
    observer.update(batch)
    assert observer.result("t", 0)["divergence"] < 1e-4


def test_order_batches_and_processes_change_nothing():
    x = pictures(9)
    z = torch.randn(9, 4, 4, 4)
    keys = [f"{i}" for i in range(9)]
    whole = entry(keys, x, z)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    assert entry([keys[i] for i in order], x[order], z[order]) == whole

    one, other = Spectrum(), Spectrum()
    one.update(seen("t", keys[:5], x[:5], latents=z[:5]))
    other.update(seen("t", keys[4:], x[4:], latents=z[4:]))  # both have one image
    one.merge(other.state())
    assert one.result("t", 0) == whole


def test_images_of_several_sizes_are_pooled():
    observer = Spectrum()
    observer.update(seen("t", ["a"], pictures(1), latents=torch.randn(1, 4, 4, 4)))
    observer.update(seen("t", ["b"], pictures(1, (16, 40)), latents=torch.randn(1, 4, 2, 5)))
    assert observer.result("t", 0)["divergence"] > 0


def test_a_bin_may_have_a_single_coefficient():
    """Frequency 0 of one grey image, and of its latent."""
    observer = Spectrum()
    observer.update(seen("t", ["a"], pictures(1)[:, :1], latents=torch.randn(1, 1, 4, 4)))
    assert observer.result("t", 0)["latents"][0] == pytest.approx(0.0, abs=1e-12)


def test_constant_latents_have_no_entry_and_later_draws_are_left_out():
    observer = Spectrum()
    observer.update(seen("t", ["a", "b"], pictures(2), latents=torch.ones(2, 4, 4, 4)))
    assert observer.result("t", 0) is None
    observer.update(seen("zeros", ["a", "b"], pictures(2), latents=torch.zeros(2, 4, 4, 4)))
    assert observer.result("zeros", 0) is None
    observer.update(seen("u", ["a"], pictures(1), draw=1, latents=torch.randn(1, 4, 4, 4)))
    assert observer.result("u", 1) is None


def test_the_table_has_a_column_and_a_line():
    observer = Spectrum()
    assert observer.columns({"divergence": 0.04913}) == {"spectrum": "0.0491"}
    row = SimpleNamespace(observed={"spectrum": {"divergence": 0.1}})
    assert "spectrum matching" in "".join(observer.lines([row]))
    assert list(observer.lines([SimpleNamespace(observed={})])) == []
