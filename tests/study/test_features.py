import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from olvae.data.dataset import HELD_OUT, PHOTOGRAPHS
from olvae.modules.frozen import installed_lite0, lite0_network
from study.features import Lite0, frechet_lite0

GIANT_PANDA, ICE_BEAR, ESPRESSO = 388, 296, 967


def picture(file, size=224):
    (path,) = (path for path in (*PHOTOGRAPHS, *HELD_OUT) if path.name == file)
    with Image.open(path) as image:
        left, top = (image.width - min(image.size)) // 2, (image.height - min(image.size)) // 2
        square = image.crop((left, top, left + min(image.size), top + min(image.size)))
        return torch.from_numpy(
            np.array(square.resize((size, size), Image.Resampling.BICUBIC))
        ).movedim(-1, 0)


@pytest.fixture(scope="module")
def lite0():
    return Lite0()


@pytest.mark.parametrize(
    ("file", "label"),
    [("panda.jpg", GIANT_PANDA), ("polar-bear.jpg", ICE_BEAR), ("coffee.jpg", ESPRESSO)],
)
def test_lite0_knows_what_is_on_a_photograph(file, label):
    logits = lite0_network(installed_lite0())(picture(file)[None] / 127.5 - 1)
    assert logits.argmax() == label


def test_features_are_what_the_classifier_sees(lite0):
    x = picture("panda.jpg")[None]
    features = torch.from_numpy(lite0(x))
    assert features.shape == (1, 1280)
    network = lite0_network(installed_lite0())
    torch.testing.assert_close(
        network.classifier(features), network(x / 127.5 - 1), atol=1e-4, rtol=1e-4
    )


def test_features_do_not_depend_on_the_batches(lite0):
    images = torch.stack([picture(path.name, 64) for path in HELD_OUT[:4]])
    np.testing.assert_allclose(lite0.of(images.split(1)), lite0(images), atol=1e-5)


def test_frechet_lite0_is_scipys_distance_in_float64():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(80, 12)).astype(np.float32)
    b = (rng.normal(size=(90, 12)) @ rng.normal(size=(12, 12)) + 0.5).astype(np.float32)
    means = [x.mean(0, dtype=np.float64) for x in (a, b)]
    sigmas = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(
        sum(sigmas) - 2 * sqrtm(sigmas[0] @ sigmas[1]).real
    )
    assert frechet_lite0(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_lite0(a, b) == pytest.approx(frechet_lite0(b, a), rel=1e-9)


def test_frechet_lite0_needs_two_images(lite0):
    with pytest.raises(ValueError, match="2 images"):
        frechet_lite0(np.zeros((1, 4), np.float32), np.zeros((5, 4), np.float32))
