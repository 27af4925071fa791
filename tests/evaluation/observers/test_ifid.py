"""iFID and its precision against direct computations in float64: distances and the square root
by scipy.
"""

import pickle

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.special import softmax

from olvae.evaluation.observers import interpolated
from olvae.evaluation.observers.ifid import InterpolatedFID, InterpolatedPrecision, NearestFID
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.results import Row
from olvae.metrics.features import Inception
from olvae.modules.distributions import keyed_seed
from olvae.pretrained_networks import INCEPTION, MissingWeights
from tests.conftest import tiny
from tests.evaluation.peers import seen
from tests.metrics.conftest import pairs
from tests.metrics.test_features import extract


@pytest.fixture
def setting(weights_dir, monkeypatch):
    monkeypatch.setattr(
        interpolated, "provenance", lambda path, file: {"file": path.name, "published": False}
    )
    model, (keys, x, _) = tiny(), pairs(30, 16)
    with torch.no_grad():
        latents = model.encode(x.float() / 127.5 - 1.0).mean
    return model, keys, x, latents


def observed(weights_dir, model, keys, x, latents, size=7, kind=InterpolatedFID) -> InterpolatedFID:
    observer = kind(weights_dir)
    observer.derive({"a": Subject(model)})
    for i in range(0, len(keys), size):
        part = slice(i, i + size)
        observer.update(seen("a", keys[part], x[part], x[part], latents=latents[part]))
    return observer


def between(x, latents, kind) -> tuple[torch.Tensor, np.ndarray]:
    """The latents between neighbours, and the neighbours' distances."""
    z = latents.flatten(1).double().numpy()
    distances = cdist(z, z)
    if kind is NearestFID:
        apart = distances + np.diag(np.full(len(z), np.inf))
        return (latents + latents[apart.argmin(1)]) / 2.0, apart.min(1)
    cosine = 1.0 - cdist(z, z, "cosine")
    np.fill_diagonal(cosine, -np.inf)
    middle, chosen = [], []
    for i in range(len(z)):
        similar = np.argsort(-cosine[i])[: min(10, len(z) - 1)]
        chances = softmax(-(distances[i, similar] ** 2) / z.shape[1])
        draw = keyed_seed(x[i].numpy().tobytes()) % 2**53 / 2**53
        j = similar[np.searchsorted(chances.cumsum(), draw)]
        omega = np.arccos(cosine[i, j])
        middle.append((z[i] + z[j]) * np.sin(omega / 2) / np.sin(omega))
        chosen.append(distances[i, j])
    return torch.from_numpy(np.array(middle)).float().view_as(latents), np.array(chosen)


def decoded(model, middle) -> torch.Tensor:
    with torch.no_grad():
        y = model.decode(middle)
    return ((y.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def directly(model, x, latents, features, kind=InterpolatedFID) -> float:
    middle, distances = between(x, latents, kind)
    y = decoded(model, middle)
    a, b = (features(images).astype(np.float64) for images in (x, y))
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.trace(sqrtm(s1 @ s2).real) if a.shape[1] < 100 else 0.0
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2.0 * root, distances.mean()


@pytest.mark.parametrize("kind", [InterpolatedFID, NearestFID])
def test_ifid_is_the_formula_in_float64(setting, weights_dir, monkeypatch, kind):
    monkeypatch.setattr(interpolated, "Inception", lambda path, device: extract)
    model, keys, x, latents = setting
    expected, distance = directly(model, x, latents, extract, kind)
    observer = observed(weights_dir, model, keys, x, latents, kind=kind)
    observer.update(seen("a", keys, x, x, latents=latents + 1.0, draw=1))  # of another draw
    observer.examine({"a": Subject(model)}, 16, "cpu")
    found = observer.result("a", 0)
    assert found["value"] == pytest.approx(expected, rel=1e-4)
    assert found["value"] > 0.1
    pairwise = cdist(*[latents.flatten(1).double().numpy()] * 2)
    typical = np.sqrt((pairwise**2).sum() / (30 * 29))
    assert found["neighbours"] == pytest.approx(distance / typical)
    assert found["warning"] is None  # 30 images for 12 features
    lines = list(
        observer.lines([Row(name, 30, {}, observed={observer.name: found}) for name in "ab"])
    )
    assert lines[0].startswith(f"iFID: neighbours are at {found['neighbours']:.2f} (a), ")
    assert len(lines) == 3
    assert lines[1].endswith("0.0% of 30 (a), 0.0% of 30 (b)")
    assert lines[2].endswith("is not the published file")
    assert list(observer.columns(found).values()) == [f"{found['value']:.3f}"]

    first, second = (
        observed(weights_dir, model, keys[part], x[part], latents[part], kind=kind)
        for part in (slice(20), slice(15, 30))
    )
    second.merge(pickle.loads(pickle.dumps(first.state())))  # five in both
    second.examine({"a": Subject(model)}, 16, "cpu")
    assert second.result("a", 0) == found


def test_normalised_channels_choose_neighbours_and_are_undone_before_decoding(
    setting, weights_dir, monkeypatch
):
    monkeypatch.setattr(interpolated, "Inception", lambda path, device: extract)
    model, keys, x, latents = setting
    channels = torch.linspace(0.2, 5.0, latents.shape[1])[:, None, None]
    latents = latents * channels + channels  # as in no trained autoencoder
    observer = InterpolatedFID(weights_dir, normalise=True)
    observer.derive({"a": Subject(model)})
    observer.update(seen("a", keys, x, x, latents=latents))
    observer.examine({"a": Subject(model)}, 16, "cpu")

    # By hand, in float64: shift and scale, choose, go halfway, undo.
    z = latents.double()
    mean = z.mean((0, 2, 3), keepdim=True)
    deviation = z.std((0, 2, 3), keepdim=True)
    middle, _ = between(x, (z - mean) / deviation, InterpolatedFID)
    y = decoded(model, (middle.double() * deviation + mean).float())
    a, b = (extract(images).astype(np.float64) for images in (x, y))
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = apart + np.trace(s1 + s2) - 2.0 * np.trace(sqrtm(s1 @ s2).real)
    assert observer.result("a", 0)["value"] == pytest.approx(expected, rel=1e-4)
    assert directly(model, x, latents, extract)[0] != pytest.approx(expected, rel=1e-3)


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
    monkeypatch.setattr(interpolated, "Inception", lambda path, device: inception)
    model, keys, x, latents = (part if i == 0 else part[:3] for i, part in enumerate(setting))
    observer = observed(weights_dir, model, keys, x, latents)
    observer.examine({"a": Subject(model)}, 16, "cpu")
    expected, _ = directly(model, x, latents, inception)
    assert observer.result("a", 0)["value"] == pytest.approx(expected, rel=1e-4)
    assert "3 images for 2048" in observer.result("a", 0)["warning"]


def test_ifid_refuses_missing_weights_one_image_and_non_finite_latents(
    setting, weights_dir, monkeypatch, nowhere
):
    monkeypatch.setattr(interpolated, "Inception", lambda path, device: extract)
    model, keys, x, latents = setting
    with pytest.raises(MissingWeights, match="`weights_dir`"):
        InterpolatedFID().derive({"a": Subject(model)})
    one = observed(weights_dir, model, keys[:1], x[:1], latents[:1])
    one.examine({"a": Subject(model)}, 16, "cpu")
    assert one.result("a", 0) is None
    broken = observed(weights_dir, model, keys, x, latents * torch.inf)
    with pytest.raises(ArithmeticError, match="not finite"):
        broken.examine({"a": Subject(model)}, 16, "cpu")


def test_precision_is_the_share_of_pictures_near_an_image(
    setting, weights_dir, monkeypatch, capsys
):
    monkeypatch.setattr(interpolated, "Inception", lambda path, device: extract)
    model, keys, x, latents = setting
    # Far from each other, so that some pictures between them are near no image.
    latents = 4.0 * latents
    observer = observed(weights_dir, model, keys, x, latents, kind=InterpolatedPrecision)
    observer.examine({"a": Subject(model)}, 16, "cpu")
    found = observer.result("a", 0)
    images = extract(x).astype(np.float64)
    pictures = extract(decoded(model, between(x, latents, InterpolatedFID)[0])).astype(np.float64)
    radius = np.sort(cdist(images, images), axis=1)[:, 3]
    expected = (cdist(pictures, images) <= radius).any(1).mean()
    assert found["value"] == pytest.approx(expected)
    assert 0.0 < expected < 1.0
    assert observer.columns(found) == {"precision": f"{expected:.3f}"}
    assert capsys.readouterr() == ("", "")
    few = observed(weights_dir, model, keys[:3], x[:3], latents[:3], kind=InterpolatedPrecision)
    few.examine({"a": Subject(model)}, 16, "cpu")
    assert observer.columns(few.result("a", 0)) == {"precision": "skipped"}
    assert "more than 3" in few.result("a", 0)["warning"]
