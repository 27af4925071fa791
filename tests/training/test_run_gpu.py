"""What only a CUDA device can show: `make test-gpu`."""

import pytest
import torch

from olvae.config import save
from olvae.training import run as training
from olvae.training.run import TrainOptions, train
from tests.conftest import tiny_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_both_players_train_in_every_precision(tmp_path, image_folder, monkeypatch, precision):
    monkeypatch.delenv(training.RUN_ENV, raising=False)
    discriminator = {"target": "olvae.modules.patchgan.PatchGAN", "params": {"n_layers": 1}}
    adversary = {
        "target": "olvae.models.adversary.Adversary",
        "params": {
            "discriminator_config": discriminator,
            "adaptive_weight": True,
            "updates_per_step": 2,
        },
    }
    config = tiny_config(image_folder, adversary_config=adversary)
    config["lightning"]["trainer"]["gradient_clip_val"] = 1.0
    save(config, tmp_path / "gpu.yaml")
    run = train(
        TrainOptions(
            [tmp_path / "gpu.yaml"], logdir=tmp_path / "runs", gpus="1", precision=precision
        )
    )
    state = torch.load(run.last_checkpoint, weights_only=True)
    assert state["global_step"] == 4
    assert all(torch.isfinite(t).all() for t in state["state_dict"].values())
