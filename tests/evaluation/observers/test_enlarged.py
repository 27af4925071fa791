"""Rows beside a decoder at 2x: its images shrunk, and others' enlarged."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import to_uint8
from olvae.evaluation.baselines import Bicubic
from olvae.evaluation.observers.cross import Cross
from olvae.evaluation.observers.enlarged import Bicubically, Enlarged
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.observers.pixels.flat_colours import FlatColours
from olvae.evaluation.observers.pixels.round_trips import RoundTrips
from olvae.evaluation.results import Row
from olvae.evaluation.round_trip import RoundTrip
from olvae.evaluation.runner import Request, evaluate
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.loader import Target
from olvae.modules.distributions import Deterministic
from tests.export.latents import Shrunk, pictures

TWICE, ONCE = "two", "one"


class Larger(Shrunk):
    """Its decoder makes images twice as large: the latent is four times smaller than those."""

    enlarge = 2

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return super().decode(super().decode(z) * self.gain) * 0.9


def measured(images: torch.Tensor, model: Autoencoder, by: int) -> list[float]:
    """PSNR by hand, of an autoencoder that gets the images ``by`` times smaller."""
    found = []
    for image in images:
        x = image[None]
        smaller = x.unfold(2, by, by).unfold(3, by, by).mean((-2, -1))
        y = model.decode(model.encode(smaller).mode())
        if y.shape != x.shape:
            y = y.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
        a, b = (to_uint8(one)[0].numpy() for one in (x, y))
        found.append(peak_signal_noise_ratio(a, b, data_range=255))
    return found


@torch.no_grad()
def test_a_decoder_at_2x_is_compared_at_both_sizes(image_folder):
    targets = [
        Target(lambda m=model: m, name=name)
        for name, model in ((TWICE, Larger()), (ONCE, Shrunk()))
    ]
    request = Request(
        targets,
        metrics=("psnr",),
        data=str(image_folder),
        size=16,
        observers=[Enlarged(), FlatColours(), RoundTrips()],
    )
    (done,) = evaluate(request)
    rows = {row.target: row for row in done.results.rows}
    assert list(rows) == [TWICE, ONCE, f"{TWICE}, at 1x", f"{ONCE}, bicubic to 2x"]

    # By hand, on the same images.
    images = pictures(image_folder)
    expected = {
        TWICE: measured(images, Larger(), 2),
        f"{TWICE}, at 1x": measured(images, Larger(), 1),
        ONCE: measured(images, Shrunk(), 1),
        f"{ONCE}, bicubic to 2x": measured(images, Bicubically(Shrunk(), 2), 2),
    }
    for name, values in expected.items():
        assert rows[name].metrics["psnr"] == pytest.approx(np.mean(values), abs=0.01), name

    # Costs are of the targets alone, differences of rows that encode images of one size.
    assert rows[TWICE].cost is not None
    assert rows[f"{TWICE}, at 1x"].cost is None
    compared = [name for name, row in rows.items() if row.differences]
    assert compared == [f"{ONCE}, bicubic to 2x"]
    (line,) = Enlarged.lines(done.observers[0], done.results.rows)
    assert line.startswith("two: encodes the images 2 times smaller")


@torch.no_grad()
def test_bicubic_enlargement_is_pillows():
    class Same(Shrunk):
        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z

    z = torch.rand(1, 3, 7, 9) * 2 - 1
    found = Bicubically(Same(), 2).decode(z)
    for channel, image in zip(found[0], z[0], strict=True):
        theirs = Image.fromarray(image.numpy()).resize((18, 14), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(channel.numpy(), np.asarray(theirs), atol=1e-5)


def test_without_a_decoder_at_2x_there_are_no_rows():
    subjects = {"one": Subject(Shrunk()), "bicubic": Subject(Bicubic(8), baseline=True)}
    observer = Enlarged()
    assert observer.derive(subjects) == subjects
    assert not list(observer.lines([]))
    large = {"two": Subject(Larger(), baseline=True)}
    assert observer.derive(large) == large


def test_a_baseline_keeps_its_differences_beside_a_decoder_at_2x():
    observer = Enlarged()
    subjects = {"two": Subject(Larger()), "one": Subject(Shrunk())}
    observer.derive({**subjects, "bicubic": Subject(Bicubic(8), baseline=True)})
    rows = {name: Row(name, 1, {}, differences={"psnr": None}) for name in (*subjects, "bicubic")}
    kept = [name for name, row in rows.items() if observer.complete(row, rows).differences]
    assert kept == ["two", "bicubic"]


def test_crossed_evaluation_refuses_unlike_sizes():
    subjects = {"a": Subject(Shrunk()), "b": Subject(Larger())}
    with pytest.raises(ConfigError, match=r"a .*1x, b .*2x"):
        Cross().derive(subjects)


def test_images_have_to_fit_the_larger_factor(image_folder):
    target = Target(lambda: Larger(), name="two")
    with pytest.raises(ConfigError, match=r"two: .*4x4 .*18 .*4"):
        evaluate(Request([target], metrics=("psnr",), data=str(image_folder), size=18))


def test_a_round_trip_at_2x_shrinks_before_it_encodes():
    seen = []

    class Watched(Larger):
        def encode(self, x: torch.Tensor) -> Deterministic:
            seen.append(tuple(x.shape))
            return super().encode(x)

    trip = RoundTrip(Watched())
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    found = trip(["a", "b"], images)
    assert seen == [(2, 3, 8, 12)]
    assert found.images.shape == images.shape
    assert found.latents.shape == (2, 3, 4, 6)
