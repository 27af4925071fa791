"""Neighbours and interpolations of latents against scipy's distances and hand-written formulas."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import softmax

from olvae.evaluation.observers import interpolated
from olvae.evaluation.observers.interpolated import (
    Interpolated,
    drawn_neighbours,
    nearest_neighbours,
    normalise_channels,
    share_of_wrong,
    slerp_halfway,
)
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.results import Row
from olvae.modules.distributions import keyed_seed
from olvae.pretrained_networks import INCEPTION
from tests.evaluation.peers import seen


@pytest.mark.parametrize(("n", "block"), [(2, 1024), (50, 7), (50, 1024), (300, 128)])
def test_nearest_neighbours_are_scipys(n, block):
    """Far from zero and close together, as latents with a large mean are,
    where float32's squares lose digits.
    """
    z = 1e6 + torch.randn(n, 40) * torch.logspace(-2, 1, 40)
    nearest, distances = nearest_neighbours(z, block=block)
    direct = cdist(z.double().numpy(), z.double().numpy())
    np.fill_diagonal(direct, np.inf)
    assert nearest.tolist() == direct.argmin(1).tolist()
    assert distances.numpy() == pytest.approx(direct.min(1), rel=1e-12)


def test_share_of_wrong_neighbours_is_that_of_scipy(monkeypatch):
    """One candidate, on a sphere that is large for the distances,
    where float32's products can't tell.
    """
    monkeypatch.setattr(interpolated, "CANDIDATES", 1)
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
    z = torch.tensor([[1.0, 2.0], [9.0, 9.0], [1.0, 2.0]])
    assert share_of_wrong(z, distances, torch.arange(3)) == 0.0


@pytest.mark.parametrize(("n", "block"), [(5, 1024), (60, 17)])
def test_drawn_neighbours_are_of_the_ten_most_similar_by_chance(n, block):
    z = torch.randn(n, 12, generator=torch.Generator().manual_seed(1)) + 0.5
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drawn, distances, farthest = drawn_neighbours(z, uniform, block=block)
    rows = z.double().numpy()
    cosine = 1.0 - cdist(rows, rows, "cosine")
    np.fill_diagonal(cosine, -np.inf)
    amount = min(10, n - 1)
    for i in range(n):
        similar = np.argsort(-cosine[i])[:amount]
        chances = softmax(-((rows[i] - rows[similar]) ** 2).mean(1))
        expected = similar[np.searchsorted(chances.cumsum(), uniform[i].item())]
        assert drawn[i] == expected
        assert distances[i].item() == pytest.approx(np.linalg.norm(rows[i] - rows[expected]))
        assert farthest[i].item() == pytest.approx((2.0 - 2.0 * cosine[i, similar[-1]]) ** 0.5)
    assert len(set(drawn.tolist())) > 1
    # The chances add up to 1 but for rounding, so the largest number draws the least similar.
    last, *_ = drawn_neighbours(z, torch.ones(n, dtype=torch.float64), block=block)
    assert last.tolist() == np.argsort(-cosine, axis=1)[:, amount - 1].tolist()
    checked = torch.arange(n)
    assert share_of_wrong(z, farthest, checked, amount, directions=True) == 0.0
    assert share_of_wrong(z, 1.1 * farthest, checked, amount, directions=True) == 1.0


def test_slerp_halfway_is_the_textbook_formula():
    a, b = torch.randn(6, 4, 2, 2).double(), torch.randn(6, 4, 2, 2).double()
    middle = slerp_halfway(a, b)
    for x, y, found in zip(a, b, middle, strict=True):
        omega = torch.acos((x * y).sum() / (x.norm() * y.norm()))
        expected = (torch.sin(0.5 * omega) * x + torch.sin(0.5 * omega) * y) / torch.sin(omega)
        torch.testing.assert_close(found, expected)
    unit = torch.nn.functional.normalize(a.flatten(1)), torch.nn.functional.normalize(b.flatten(1))
    torch.testing.assert_close(slerp_halfway(*unit).norm(dim=1), torch.ones(6).double())
    torch.testing.assert_close(slerp_halfway(a, a), a)
    assert torch.equal(slerp_halfway(a, -a), torch.zeros_like(a))
    torch.testing.assert_close(slerp_halfway(a, -2.0 * a), -0.5 * a)


def test_channels_are_normalised_and_back():
    z = torch.randn(50, 3, 4, 4) * torch.tensor([0.1, 1.0, 9.0])[:, None, None] + 5.0
    before = z.clone()
    shift, scale = normalise_channels(z)
    flat = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(3))
    torch.testing.assert_close(z * scale + shift, before)


class Kept(Interpolated):
    """Its entry has the features that it compares: all pixels."""

    name = "kept"
    label = "Kept"

    def compare(self, images, pictures):
        return {"images": images.tolist(), "pictures": pictures.tolist()}


class Extractor:
    """All pixels of an image; counts the instances and the images."""

    made = 0
    images = 0

    def __init__(self, path: Path, device: object) -> None:
        assert (path, str(device)) == (Path("inception.pt"), "cpu")
        Extractor.made += 1

    def __call__(self, x: torch.Tensor) -> np.ndarray:
        Extractor.images += len(x)
        return x.flatten(1).numpy().astype(np.float64)


@pytest.fixture
def _pixels(monkeypatch):
    """Without Inception."""

    def find_weights(file: object, folder: object) -> Path:
        assert (file, folder) == (INCEPTION, None)
        return Path("inception.pt")

    def provenance(path: Path, file: object) -> dict[str, object]:
        return {"file": path.name, "published": file is INCEPTION}

    monkeypatch.setattr(interpolated, "find_weights", find_weights)
    monkeypatch.setattr(interpolated, "provenance", provenance)
    monkeypatch.setattr(interpolated, "Inception", Extractor)
    monkeypatch.setattr(Extractor, "made", 0)
    monkeypatch.setattr(Extractor, "images", 0)


# Its picture is the latent.
MODEL = SimpleNamespace(decode=lambda z: z)
KEYS = ["d", "a", "c", "b"]
X = torch.arange(4 * 3, dtype=torch.uint8).view(4, 3, 1, 1)
LATENTS = torch.tensor([[0.9, 0.9, 0.9], [-0.5, 0.0, 0.0], [0.8, 0.8, 0.8], [-0.5, 0.2, 0.0]])


def batch(target: str, places: list[int], latents: torch.Tensor = LATENTS):
    z = latents[places].view(-1, 3, 1, 1)
    return seen(target, [KEYS[i] for i in places], X[places], latents=z)


@pytest.mark.usefixtures("_pixels")
def test_pictures_are_between_nearest_neighbours_in_the_order_of_keys():
    observer = Kept(how="nearest")
    observer.derive({})
    for target in ("t", "u"):
        for places in ([0, 1, 2], [3]):
            observer.update(batch(target, places))
    assert (Extractor.made, Extractor.images) == (1, 4)
    observer.examine({"t": Subject(MODEL), "u": Subject(MODEL)}, 1, "cpu")
    assert (Extractor.made, Extractor.images) == (1, 4 + 2 * 4)
    found = observer.result("t", 0)
    assert found == observer.result("u", 0)
    assert observer.result("v", 0) is None
    assert found.pop("images") == X[[1, 3, 2, 0]].flatten(1).tolist()
    # a and b, c and d: (-.5, .1, 0) and (.85, .85, .85) as (x + 1) * 127.5, rounded.
    assert found.pop("pictures") == [[64, 140, 128]] * 2 + [[236, 236, 236]] * 2
    apart = [0.2, 0.2, 0.03**0.5, 0.03**0.5]
    pairs = cdist(LATENTS.numpy(), LATENTS.numpy())
    typical = (np.square(pairs).sum() / 12) ** 0.5
    assert found.pop("neighbours") == pytest.approx(np.mean(apart) / typical, rel=1e-5)
    weights = {"file": "inception.pt", "published": True}
    assert found == {"how": "nearest", "wrong": 0.0, "checked": 4, "weights": weights}


@pytest.mark.usefixtures("_pixels")
def test_pictures_of_normalised_latents_are_in_the_models_units():
    """The average of two latents is the same, whatever the units."""
    found = []
    for normalise in (False, True):
        observer = Kept(how="nearest", normalise=normalise)
        observer.derive({})
        observer.update(batch("t", [0, 1, 2, 3]))
        observer.examine({"t": Subject(MODEL)}, 1, "cpu")
        found.append(observer.result("t", 0)["pictures"])
    assert found[0] == found[1]


@pytest.mark.usefixtures("_pixels")
def test_pictures_that_are_not_finite_are_an_error_and_numbers_are_the_subclasss():
    observer = Kept(how="nearest")
    observer.derive({})
    observer.update(batch("t", [0, 1, 2, 3]))
    broken = SimpleNamespace(decode=lambda z: z * torch.nan)
    with pytest.raises(ArithmeticError, match=r"^kept: "):
        observer.examine({"t": Subject(broken)}, 1, "cpu")
    with pytest.raises(NotImplementedError):
        Interpolated().compare(np.zeros((2, 1)), np.zeros((2, 1)))


@pytest.mark.usefixtures("_pixels")
def test_a_process_that_has_only_merged_examines_as_well():
    """It has read no image, and a single one has no neighbour."""
    one, other = Kept(how="nearest"), Kept(how="nearest")
    for observer in (one, other):
        observer.derive({})
    one.update(batch("t", [0, 1, 2, 3]))
    other.merge(pickle.loads(pickle.dumps(one.state())))
    for observer in (one, other):
        observer.examine({"t": Subject(MODEL)}, 1, "cpu")
    assert other.result("t", 0) == one.result("t", 0)
    assert Extractor.made == 2
    single = Kept(how="nearest")
    single.derive({})
    single.update(batch("t", [0]))
    single.examine({"t": Subject(MODEL)}, 1, "cpu")
    assert single.result("t", 0) is None
    pair = Kept()
    pair.derive({})
    pair.update(batch("t", [0, 2]))
    pair.examine({"t": Subject(MODEL)}, 1, "cpu")
    assert pair.result("t", 0)["checked"] == 2


@pytest.mark.usefixtures("_pixels")
def test_equal_latents_are_no_distance_apart_and_some_of_many_are_checked(monkeypatch):
    checked = []

    def note(z, distances, places, amount, directions):
        checked.append((places.tolist(), amount, directions))
        return 0.0

    monkeypatch.setattr(interpolated, "CHECKED", 3)
    monkeypatch.setattr(interpolated, "share_of_wrong", note)
    observer = Kept()
    observer.derive({})
    observer.update(batch("t", [0, 1, 2, 3], torch.full((4, 3), 0.5)))
    observer.examine({"t": Subject(MODEL)}, 1, "cpu")
    found = observer.result("t", 0)
    assert (found["neighbours"], found["checked"], found["how"]) == (0.0, 3, "paper")
    assert found["pictures"] == [[191, 191, 191]] * 4
    assert checked == [([0, 1, 3], 3, True)]


@pytest.mark.usefixtures("_pixels")
def test_an_images_pixels_draw_its_number():
    """53 bits of a hash, as a fraction."""
    observer = Kept()
    observer.derive({})
    found = list(observer.measure(batch("t", [0, 1, 2, 3])))
    draws = [number for number, _ in found]
    expected = [keyed_seed(bytes(pixels)) % 2**53 / 2**53 for pixels in X.flatten(1).tolist()]
    assert draws == expected
    assert all(0.0 <= number < 1.0 for number in draws)
    assert len(set(draws)) == 4
    assert torch.equal(torch.stack([z for _, z in found]), LATENTS.view(4, 3, 1, 1))


def test_lines_of_neighbours_and_each_warning_once():
    usual = {"neighbours": 0.456, "wrong": 0.0123, "checked": 64}
    weights = {"file": "inception.pt", "published": False}
    entries = {
        "a": {**usual, "warning": "few", "weights": weights},
        "b": {**usual, "warning": None, "weights": weights},
        "c": {**usual, "warning": "few", "weights": {"file": "theirs.pt", "published": True}},
    }
    rows = [Row(name, 9, {}, observed={"kept": entry}) for name, entry in entries.items()]
    assert list(Kept().lines([*rows, Row("d", 9, {})])) == [
        "Kept: neighbours are at 0.46 (a), 0.46 (b), 0.46 (c) of the distance of any two latents",
        "Kept: of the neighbours, wrong by a direct search: "
        "1.2% of 64 (a), 1.2% of 64 (b), 1.2% of 64 (c)",
        "warning: Kept: few",
        "warning: Kept: it rests on a inception.pt that is not the published file",
    ]
    assert list(Kept().lines([Row("d", 9, {})])) == []


def test_an_unknown_choice_of_neighbours_is_refused():
    with pytest.raises(ValueError, match="how"):
        Kept(how="farthest")
