"""The configs of f16 and f32, as they are and in small."""

from pathlib import Path

import pytest

from olvae.data.places import load
from olvae.models.footprint import without_weights

CONFIGS = {
    path.stem: path
    for path in sorted((Path(__file__).parent.parent.parent / "configs/deep").glob("*.yaml"))
}


ALIGNED = ("f16c32_aligned", "f16c32_send")
WITH_TIMM = (*ALIGNED, "f16c32_dino")


@pytest.mark.parametrize(
    ("name", "factor"),
    [("f16c32", 16), *((name, 16) for name in WITH_TIMM), ("f32c32", 32)],
)
def test_deep_recipes_have_the_latent_that_their_name_says(name, factor):
    """Of the networks as configured; the factors of encoder and decoder agree,
    or it would not build.
    """
    if name in WITH_TIMM:
        pytest.importorskip("timm")
    model = without_weights(load([CONFIGS[name]])["model"])
    assert (model.autoencoder.downscale, model.autoencoder.latent_channels) == (factor, 32)
    assert ("alignment" in model.parts) == (name in ALIGNED)
    assert model.objective.weights["kl"] == 1e-6
    if name in ALIGNED:
        projection = model.parts["alignment"].projection
        assert getattr(projection, "embed", projection).weight.shape == (1024, 32, 1, 1)
