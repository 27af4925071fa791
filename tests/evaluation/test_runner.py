import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from olvae.data.pixels.size_and_range import PixelRange, Sides
from olvae.evaluation import runner
from olvae.evaluation.observers.observer import Observer
from olvae.evaluation.protocol import Protocol
from olvae.evaluation.round_trip import Reconstructed, RoundTrip
from olvae.evaluation.runner import (
    Request,
    evaluate,
    fingerprint,
    found_by,
    is_examined,
    measure,
    observe,
    rows_under,
)
from olvae.metrics import build_metrics
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.loader import Target
from olvae.modules.distributions import Posterior
from tests.conftest import tiny

KEYS = [f"image{i}" for i in range(7)]


USUAL = Protocol()


@pytest.fixture
def images():
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def model():
    return tiny()


def darker(keys, x):
    return (x.int() * 3 // 4).to(torch.uint8)


def run(targets, images, size=3, names=("psnr", "ssim"), order=None, protocol=USUAL):
    """Which images were seen, and the rows of stand-ins that are functions of keys and images."""
    order = order or list(range(len(images)))
    batches = [
        {"image": images[order[i : i + size]], "key": [KEYS[j] for j in order[i : i + size]]}
        for i in range(0, len(order), size)
    ]
    make = build_metrics([protocol.columns.get(name, name) for name in names])
    trips = {
        (name, 0): lambda keys, x, target=target: Reconstructed(
            torch.zeros(len(x), 4, 4, 4), target(keys, x)
        )
        for name, target in targets.items()
    }
    metrics = {key: make() for key in trips}
    seen = observe(batches, {}, trips, metrics)
    measured = [measure(name, found, len(seen)) for (name, _), found in metrics.items()]
    return seen, rows_under(protocol, measured, names)


def test_metrics_are_means_over_images_whatever_the_batches_and_their_order(images):
    expected = np.mean(
        [peak_signal_noise_ratio(x.numpy(), darker([], x).numpy(), data_range=255) for x in images]
    )
    seen, (first,) = run({"darker": darker}, images)
    assert first.metrics["psnr"] == pytest.approx(expected, rel=1e-9)
    assert first.n == 7
    assert list(first.per_image["psnr"]) == KEYS
    for size, order in ((1, None), (7, None), (2, [6, 5, 4, 3, 2, 1, 0])):
        other, (again,) = run({"darker": darker}, images, size, order=order)
        assert again.metrics == pytest.approx(first.metrics, rel=1e-6)
        assert fingerprint(other) == fingerprint(seen)
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    assert fingerprint(run({"darker": darker}, changed)[0]) != fingerprint(seen)


def test_protocol_variants_stand_under_the_metrics_names(images):
    _, (gaussian,) = run({"darker": darker}, images, names=("psnr", "ssim", "ssim_uniform"))
    _, (uniform,) = run({"darker": darker}, images, protocol=Protocol(ssim="uniform"))
    assert list(uniform.metrics) == ["psnr", "ssim"]
    assert uniform.metrics["ssim"] == gaussian.metrics["ssim_uniform"] != gaussian.metrics["ssim"]


def test_differences_from_the_first_row_are_paired(images):
    def darkest(keys, x):
        return darker(keys, darker(keys, x))

    _, (first, second, same) = run(
        {"darker": darker, "darkest": darkest, "same": lambda keys, x: x}, images
    )
    assert first.differences == {}
    found = second.differences["psnr"]
    assert found.value == pytest.approx(second.metrics["psnr"] - first.metrics["psnr"])
    assert found.low < found.value < found.high < 0
    assert same.metrics == {"psnr": math.inf, "ssim": pytest.approx(1.0)}
    assert same.skipped == {}
    assert same.differences.keys() == same.intervals.keys() == {"ssim"}  # an infinite PSNR has none


def test_failing_observers_and_uncounted_macs_lose_no_metric(images, model, caplog):
    """Networks of the user's own may be more than torch, and observers may fail."""
    count = RoundTrip(NumPyAutoencoder(model)).cost(32)
    assert (count.encode_macs, count.decode_macs) == (None, None)
    assert "`encode` not counted: " in caplog.text
    source = SimpleNamespace(size=Sides.of(32))
    assert is_examined(Observer(), {}, source, "cpu")
    broken = Observer()
    broken.name = "mine"
    broken.examine = lambda *_: [][0]
    assert not is_examined(broken, {}, source, "cpu")
    assert "mine: left out: list" in caplog.text
    broken.result = lambda *_: {"value": math.nan}
    assert found_by(broken, "a", 0) is None
    assert "mine: left out: Out of range" in caplog.text


class NumPyAutoencoder(Autoencoder):
    """Computes elsewhere, on values."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.in_channels = 3
        self.latent_channels = 4
        self.downscale = 8
        self.inner = [model]

    def encode(self, x: torch.Tensor) -> Posterior:
        return self.inner[0].encode(torch.from_numpy(x.numpy()))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.inner[0].decode(torch.from_numpy(z.numpy()))


def test_the_first_process_has_the_images_groups_and_entries_of_all(images, monkeypatch):
    """The other one has read an image that this one has, too."""
    merged = []
    observer = Observer()
    observer.merge = merged.append
    observer.state = lambda: "own"
    batch = {"image": images[:2], "key": KEYS[:2], "group": ["a", "b"]}

    def gather(own):
        digests, states, read, groups = own
        assert (list(digests), states, read) == (KEYS[:2], ["own"], 2)
        assert groups == {"image0": "a", "image1": "b"}
        theirs = ({"image1": b"1", "image2": b"2"}, ["theirs"], 2, {"image2": "b"})
        return [own, theirs]

    monkeypatch.setattr(runner, "gather", gather)
    lines = []
    monkeypatch.setattr(runner, "warn_once", lines.append)
    groups: dict[str, str] = {}
    digests = observe([batch], {}, {}, {}, [observer], groups=groups)
    assert list(digests) == KEYS[:3]
    assert digests["image2"] == b"2"
    assert groups == {"image0": "a", "image1": "b", "image2": "b"}
    assert merged == ["own", "theirs"]
    assert [line[:44] for line in lines] == ["4 images were read, 3 are measured: the othe"]
    monkeypatch.setattr(runner, "gather", lambda own: None)
    assert observe([batch], {}, {}, {}) is None
    monkeypatch.setattr(runner, "gather", lambda own: [own])
    with pytest.raises(ValueError, match="no images"):
        observe([], {}, {}, {})


def test_observers_watch_the_reconstruction_before_they_see_it(images):
    """With the batch so far: its own values of metrics among them."""
    events = []

    class Watching(Observer):
        @contextmanager
        def watch(self, target, draw, subject, keys):
            events.append(("watch", target, draw, subject, list(keys)))
            yield
            events.append("watched")

        def update(self, batch):
            events.append(("update", batch.target, batch.draw, batch.shards))
            assert torch.equal(batch.x, images[:2])
            assert torch.equal(batch.y, darker([], images[:2]))
            assert list(batch.values["psnr"]) == KEYS[:2]

    def trip(keys, x):
        events.append("trip")
        return Reconstructed(torch.zeros(len(x), 4, 4, 4), darker(keys, x))

    batch = {"image": images[:2], "key": KEYS[:2]}
    metrics = {("a", 1): build_metrics(["psnr"])()}
    observe([batch], {"a": "it"}, {("a", 1): trip}, metrics, [Watching()], shards=True)
    watch = ("watch", "a", 1, "it", KEYS[:2])
    assert events == [watch, "trip", "watched", ("update", "a", 1, True)]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        observe([{**batch, "key": KEYS[:3]}], {}, {}, {})


@pytest.mark.parametrize(
    ("asked", "in_config", "largest"), [(5, 3, 5), (None, 3, 3), (None, None, 8)]
)
def test_batches_are_as_large_as_asked_or_as_in_the_config(
    model, image_folder, asked, in_config, largest
):
    params = {} if in_config is None else {"batch_size": in_config}
    target = Target(lambda: model, config={"data": {"params": params}}, name="a", given="a")
    sizes = []

    def progress(what, batches, images):
        assert (what, images) == ("evaluating", 12)
        for batch in batches:
            sizes.append(len(batch["key"]))
            yield batch

    request = Request([target], metrics=["psnr"], data=str(image_folder), size=16, batch_size=asked)
    (found,) = evaluate(request, progress)
    assert (max(sizes), sum(sizes)) == (largest, 12)
    protocol = found.results.protocol
    assert (protocol["n"], protocol["size"]) == (12, 16)
    assert protocol["pixels"] == "clamped to [-1, 1], rounded to uint8"
    (row,) = found.results.rows
    assert (row.target, row.n, row.cost.batch_size) == ("a", 12, largest)


def test_a_range_of_values_is_in_the_protocol(model, tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full((16, 16, 3), 100 * number, np.uint16))
    model.pixel_range = PixelRange.from_node([0, 4095])
    target = Target(lambda: model, config={}, name="a", given="a")
    request = Request([target], metrics=["psnr"], data=f"{tmp_path}/*.npy", size=16)
    (found,) = evaluate(request)
    assert found.results.protocol["pixels"].startswith("clamped to 0 to 4095, linear;")
