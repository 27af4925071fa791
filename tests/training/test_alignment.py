"""A run whose latent is aligned with a vision encoder: resumed, exported, and trained on from its weights."""

import torch

from olvae.config import save
from olvae.models.autoencoder import LiteVAE
from olvae.training import run as training
from olvae.training.run import TrainOptions, train
from tests.conftest import tiny_config
from tests.models.parts.vision import node
from tests.training.origins import assert_same_checkpoint, checkpoint

PROJECTION = "parts.alignment.projection.weight"


def test_resumed_bit_for_bit_and_exported_without(vit, image_folder, tmp_path, monkeypatch, quick_training):
    monkeypatch.delenv(training.RUN_ENV, raising=False)
    base = tmp_path / "tiny.yaml"
    save(tiny_config(image_folder, use_ema=True, parts={"alignment": node(vit)}), base)

    def go(steps: int, logdir: str, **options):
        settings = {"base": [base], "logdir": tmp_path / logdir, "gpus": "0", **options}
        return train(TrainOptions(overrides=[f"lightning.trainer.max_steps={steps}"], **settings))

    whole, half = go(6, "whole"), go(3, "half")
    assert not torch.equal(checkpoint(whole)["state_dict"][PROJECTION], checkpoint(half)["state_dict"][PROJECTION])
    resumed = go(6, "half", base=[], resume=half.path)
    assert_same_checkpoint(whole, resumed)
    states = checkpoint(whole)["optimizer_states"][0]["state"]
    assert any(state["exp_avg"].shape == (64, 4, 1, 1) for state in states.values())
    assert PROJECTION not in checkpoint(whole)["current_model_state"]  # it is not averaged
    assert not any("alignment" in name for name in LiteVAE.from_pretrained(whole.path).state_dict())
    plain = tmp_path / "plain.yaml"
    save(tiny_config(image_folder), plain)
    go(1, "onwards", base=[plain], actual_resume=whole.path)
