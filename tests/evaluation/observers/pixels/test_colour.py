import pickle

import numpy as np
import pytest
import torch
from skimage.color import rgb2hsv, rgb2ycbcr

from olvae.evaluation.cells import MINUS
from olvae.evaluation.observers.pixels.colour import Colour
from tests.evaluation.peers import seen

KEYS = [f"{i}.png" for i in range(6)]


@pytest.fixture
def pair():
    x = torch.randint(0, 256, (6, 3, 8, 12), dtype=torch.uint8)
    grey = x.float().mean(1, keepdim=True)
    y = (grey + 0.8 * (x - grey)) * torch.linspace(0.7, 1.2, 6)[:, None, None, None]
    return x, y.round().clamp(0, 255).to(torch.uint8)


def observed(keys, x, y) -> Colour:
    observer = Colour()
    for key, a, b in zip(keys, x, y, strict=True):
        observer.update(seen("a", [key], a[None], b[None]))
    return observer


def test_colour_shift_chroma_and_contrast_are_scikit_images(pair):
    found = observed(KEYS, *pair).result("a", 0)
    x, y = (images.permute(0, 2, 3, 1).numpy() for images in pair)
    difference = y.astype(float) - x
    assert found["shift"] == pytest.approx(difference.mean((0, 1, 2)).tolist())
    assert found["shift_of_images"] == pytest.approx(
        np.sqrt((difference.mean((1, 2)) ** 2).mean(0)).tolist()
    )
    hsv = (rgb2hsv(x), rgb2hsv(y))
    luma = [rgb2ycbcr(images)[..., 0].std((1, 2)).mean() for images in (x, y)]
    # Saturation times value: largest - smallest.
    chroma = [(images[..., 1] * images[..., 2]).mean() for images in hsv]
    assert found["saturation"] == pytest.approx(chroma[1] / chroma[0])
    # Its weights are rounded otherwise.
    assert found["contrast"] == pytest.approx(luma[1] / luma[0], rel=1e-5)
    assert found["saturation"] < 0.9


def test_colour_shift_by_hand_and_in_the_table():
    x = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    x[:, 0, 0] = 100
    y = x.clone()
    y[:, 0, 0] = 50
    y[0] += 10
    y[1, 1:] += 20
    found = observed(KEYS[:2], x, y).result("a", 0)
    assert found["shift"] == [-20.0, 15.0, 15.0]  # red is -15 and -25, the others 10 and 20
    assert found["shift_of_images"] == pytest.approx([425**0.5, 250**0.5, 250**0.5])
    assert found["saturation"] == pytest.approx(0.5)
    assert found["contrast"] == pytest.approx(0.5)
    assert Colour().columns(found) == {
        "shift": f"{MINUS}20.00 +15.00 +15.00",
        "saturation": "50.0 %",
        "contrast": "50.0 %",
    }


def test_a_grey_image_has_no_saturation_and_a_flat_one_no_contrast():
    flat = torch.full((1, 2, 4, 4), 7, dtype=torch.uint8)
    found = observed(KEYS[:1], flat, flat + 1).result("a", 0)
    assert (found["shift"], found["saturation"], found["contrast"]) == ([1.0, 1.0], None, None)
    assert Colour().columns(found) == {"shift": "+1.00 +1.00"}


def test_the_luma_of_other_channels_is_their_mean():
    x = torch.randint(0, 256, (2, 2, 4, 6), dtype=torch.uint8)
    rows = Colour().measure(seen("a", KEYS[:2], x, x))
    luma = x.double().numpy().mean(1)
    assert [row[-2:] for row in rows] == [pytest.approx([one.std()] * 2) for one in luma]


def test_colour_does_not_depend_on_order_processes_and_further_draws(pair):
    x, y = pair
    whole = observed(KEYS, x, y)
    first = observed(KEYS[:4], x[:4], y[:4])
    second = observed(KEYS[:1:-1], x[2:].flip(0), y[2:].flip(0))
    second.merge(pickle.loads(pickle.dumps(first.state())))  # two in both
    second.update(seen("a", KEYS, x, x, draw=1))
    assert second.result("a", 0) == whole.result("a", 0)
