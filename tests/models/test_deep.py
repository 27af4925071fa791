"""The configs of f16 and f32, as they are and in small."""

from pathlib import Path

import pytest
import torch

from olvae.config import load
from olvae.models.footprint import without_weights
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import TINY_ENCODER
from tests.models.steps import fit, metrics

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent.parent.parent / "configs/deep").glob("*.yaml"))}


@pytest.mark.parametrize(("name", "factor"), [("f16c32", 16), ("f16c32_aligned", 16), ("f32c32", 32)])
def test_the_latent_is_what_the_name_says(name, factor):
    """Of the networks as configured; the factors of encoder and decoder agree, or it would not build."""
    if name.endswith("aligned"):
        pytest.importorskip("timm")
    model = without_weights(load([CONFIGS[name]])["model"])
    assert (model.autoencoder.downscale, model.autoencoder.latent_channels) == (factor, 32)
    assert ("alignment" in model.parts) == name.endswith("aligned")
    assert model.objective.weights["kl"] == 1e-6
    if "alignment" in model.parts:
        assert model.parts["alignment"].projection.weight.shape == (1024, 32, 1, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_small_one_trains_a_step(name, image_folder, request):
    params = load([CONFIGS[name]])["model"]["params"]
    params["encoder_config"]["params"] |= {**TINY_ENCODER, "image_size": 64}
    params["decoder_config"]["params"] |= {"channels": 8, "num_res_blocks": 0}
    params["lossconfig"]["params"]["lpips_weight"] = 0  # whose network is a download
    if "parts" in params:
        params["parts"]["alignment"]["params"] |= {"encoder": "test_vit", "weights": request.getfixturevalue("vit")}
    model = fit(LiteAutoencoderKL(**params), image_folder, 1, batch_size=2, size=64)
    factor = model.autoencoder.downscale
    assert model.encode(torch.zeros(1, 3, 64, 96)).mean.shape == (1, 32, 64 // factor, 96 // factor)
    assert ("train/align_cosine" in metrics(model)) == name.endswith("aligned")
