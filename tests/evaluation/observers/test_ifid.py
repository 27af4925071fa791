"""iFID against a direct computation in float64: all distances by scipy, the square root by
scipy.
"""

import pickle

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from olvae.evaluation.observers import ifid
from olvae.evaluation.observers.ifid import InterpolatedFID, nearest_neighbours, share_of_wrong
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.results import Row
from olvae.metrics.features import Inception
from olvae.pretrained_networks import INCEPTION, MissingWeights
from tests.conftest import tiny
from tests.evaluation.peers import seen
from tests.metrics.conftest import pairs
from tests.metrics.test_features import extract


@pytest.mark.parametrize(("n", "block"), [(2, 1024), (50, 7), (50, 1024), (300, 128)])
def test_nearest_neighbours_are_scipys(n, block):
    """Far from zero and close together, as latents with a large mean are,
    where float32's squares lose digits.
    """
    z = 300.0 + torch.randn(n, 40) * torch.logspace(-2, 1, 40)
    nearest, distances = nearest_neighbours(z, block=block)
    direct = cdist(z.double().numpy(), z.double().numpy())
    np.fill_diagonal(direct, np.inf)
    assert nearest.tolist() == direct.argmin(1).tolist()
    assert distances.numpy() == pytest.approx(direct.min(1), rel=1e-12)


def test_share_of_wrong_neighbours_is_that_of_scipy(monkeypatch):
    """One candidate, on a sphere that is large for the distances,
    where float32's products can't tell.
    """
    monkeypatch.setattr(ifid, "CANDIDATES", 1)
    z = 1e4 * torch.nn.functional.normalize(torch.randn(2, 40)).repeat_interleave(
        50, 0
    ) + torch.randn(100, 40)
    nearest, distances = nearest_neighbours(z, block=30)
    direct = cdist(z.double().numpy(), z.double().numpy()) + np.diag(np.full(100, np.inf))
    wrong = (direct.argmin(1) != nearest.numpy())[::3].mean()
    assert share_of_wrong(z, distances, torch.arange(0, 100, 3)) == pytest.approx(wrong)
    assert wrong > 0.1


def test_equal_latents_are_each_others_nearest_neighbours():
    nearest, distances = nearest_neighbours(torch.tensor([[1.0, 2.0], [9.0, 9.0], [1.0, 2.0]]))
    assert (nearest[[0, 2]].tolist(), distances[[0, 2]].tolist()) == ([2, 0], [0.0, 0.0])


@pytest.fixture
def setting(weights_dir, monkeypatch):
    monkeypatch.setattr(
        ifid, "provenance", lambda path, file: {"file": path.name, "published": False}
    )
    model, (keys, x, _) = tiny(), pairs(30, 16)
    with torch.no_grad():
        latents = model.encode(x.float() / 127.5 - 1.0).mean
    return model, keys, x, latents


def observed(weights_dir, model, keys, x, latents, size=7) -> InterpolatedFID:
    observer = InterpolatedFID(weights_dir)
    observer.derive({"a": Subject(model)})
    for i in range(0, len(keys), size):
        part = slice(i, i + size)
        observer.update(seen("a", keys[part], x[part], x[part], latents=latents[part]))
    return observer


def directly(model, x, latents, features) -> float:
    z = latents.flatten(1).double().numpy()
    distances = cdist(z, z) + np.diag(np.full(len(z), np.inf))
    with torch.no_grad():
        y = model.decode((latents + latents[distances.argmin(1)]) / 2.0)
    y = ((y.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    a, b = (features(images).astype(np.float64) for images in (x, y))
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.trace(sqrtm(s1 @ s2).real) if a.shape[1] < 100 else 0.0
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2.0 * root, distances.min(
        1
    ).mean()


def test_ifid_is_the_formula_in_float64(setting, weights_dir, monkeypatch):
    monkeypatch.setattr(ifid, "Inception", lambda path, device: extract)
    model, keys, x, latents = setting
    expected, distance = directly(model, x, latents, extract)
    observer = observed(weights_dir, model, keys, x, latents)
    observer.update(seen("a", keys, x, x, latents=latents + 1.0, draw=1))  # of another draw
    observer.examine({"a": Subject(model)}, 16, "cpu")
    found = observer.result("a", 0)
    assert found["value"] == pytest.approx(expected, rel=1e-4)
    assert found["value"] > 0.1
    pairwise = cdist(*[latents.flatten(1).double().numpy()] * 2)
    typical = np.sqrt((pairwise**2).sum() / (30 * 29))
    assert found["neighbours"] == pytest.approx(distance / typical)
    assert found["warning"] is None  # 30 images for 12 features
    lines = list(observer.lines([Row(name, 30, {}, observed={"ifid": found}) for name in "ab"]))
    assert lines[0].startswith(f"iFID: nearest neighbours are at {found['neighbours']:.2f} (a), ")
    assert len(lines) == 3
    assert lines[1].endswith("0.0% of 30 (a), 0.0% of 30 (b)")
    assert lines[2].endswith("is not the published file")
    assert observer.columns(found) == {"iFID": f"{found['value']:.3f}"}

    first, second = (
        observed(weights_dir, model, keys[part], x[part], latents[part])
        for part in (slice(20), slice(15, 30))
    )
    second.merge(pickle.loads(pickle.dumps(first.state())))  # five in both
    second.examine({"a": Subject(model)}, 16, "cpu")
    assert second.result("a", 0) == found


def test_ifid_with_inception_is_the_direct_computation(setting, weights_dir, monkeypatch):
    """Its random weights are in the published file's format;
    the root of its covariances takes seconds, see rFID's.
    """
    monkeypatch.setattr(
        "torch_fidelity.metric_fid.fid_statistics_to_metric",
        lambda a, b, verbose: {
            "frechet_inception_distance": ((a["mu"] - b["mu"]) ** 2).sum()
            + np.trace(a["sigma"] + b["sigma"])
        },
    )
    inception = Inception(weights_dir / INCEPTION.name)
    monkeypatch.setattr(ifid, "Inception", lambda path, device: inception)
    model, keys, x, latents = (part if i == 0 else part[:3] for i, part in enumerate(setting))
    observer = observed(weights_dir, model, keys, x, latents)
    observer.examine({"a": Subject(model)}, 16, "cpu")
    expected, _ = directly(model, x, latents, inception)
    assert observer.result("a", 0)["value"] == pytest.approx(expected, rel=1e-4)
    assert "3 images for 2048 features" in observer.result("a", 0)["warning"]


def test_ifid_refuses_missing_weights_one_image_and_non_finite_latents(
    setting, weights_dir, monkeypatch, nowhere
):
    monkeypatch.setattr(ifid, "Inception", lambda path, device: extract)
    model, keys, x, latents = setting
    with pytest.raises(MissingWeights, match="`weights_dir`"):
        InterpolatedFID().derive({"a": Subject(model)})
    one = observed(weights_dir, model, keys[:1], x[:1], latents[:1])
    one.examine({"a": Subject(model)}, 16, "cpu")
    assert one.result("a", 0) is None
    broken = observed(weights_dir, model, keys, x, latents * torch.inf)
    with pytest.raises(ArithmeticError, match="not finite"):
        broken.examine({"a": Subject(model)}, 16, "cpu")
