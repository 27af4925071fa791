"""Configs and weights as files, for tests that save and load autoencoders."""

import torch

from olvae import LiteVAE

PER_CHANNEL = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 0.25, 3.0, 8.0]}


def training_config(model: LiteVAE) -> dict:
    """As the published YAML has it."""
    node = {"target": "olvae.models.liteautoencoder.LiteAutoencoderKL"}
    params = {**model.config, "lossconfig": {"target": "torch.nn.Identity"}, "use_ema": False}
    return {"model": {"base_learning_rate": 1e-4, **node, "params": params}}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(t, theirs[name]) for name, t in ours.items()
    )
