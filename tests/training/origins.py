"""Share configs and comparisons of checkpoints between the tests of training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olvae.runs import Run
from tests.conftest import parts, tiny_config
from tests.models.autoencoder_kl import tiny_kl
from tests.models.steps import against

OBJECTIVE = {"target": "olvae.losses.objective.Objective", "params": {"lpips_weight": 0, "kl_weight": 0}}

NETWORKS = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "initial_logvar")


def without_networks(root: Path, **model: Any) -> dict[str, Any]:
    """A config that trains what ``--from`` finds."""
    config = tiny_config(root, lossconfig=OBJECTIVE, **model)
    params = config["model"]["params"]
    config["model"]["params"] = {key: value for key, value in params.items() if key not in NETWORKS}
    config["data"]["params"]["val_fraction"] = 0.4
    return config


def phase_b(root: Path) -> dict[str, Any]:
    """A config of phase B with everything on that has a state."""
    adversary = against(
        weight=0.3,
        start_step=1,
        ramp_steps=3,
        warmup_updates=2,
        updates_per_step=2,
        r1_weight=1.0,
        r1_every=3,
        lecam_weight=0.1,
        lecam_decay=0.5,
        learning_rate_ratio=2.0,
    )
    model = {"use_ema": True, "ema_decay": 0.8, "scheduler": "cosine", "warmup_steps": 2, "decay_steps": 7}
    model["parts"] = parts(anchor={"weight": 0.1}, equivariance={"probability": 0.3})
    config = tiny_config(root, adversary_config=adversary, **model)
    config["lightning"]["trainer"]["accumulate_grad_batches"] = 2
    return config


FACTORS: dict[str, Any] = {
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
    "latents_mean": [0.0, 1.0, 2.0, 3.0],
    "latents_std": [1.0, 2.0, 3.0, 4.0],
    "force_upcast": False,
}

EIGHT = {
    "block_out_channels": (8, 8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""AutoencoderKL with the student's factor."""


def save_teacher(folder: Path) -> str:
    """Save a teacher for :func:`student`; returns the TARGET."""
    tiny_kl(**EIGHT, **FACTORS).save_pretrained(folder)
    return f"diffusers:{folder}"


def student(root: Path, **model: Any) -> dict[str, Any]:
    config = tiny_config(root, lossconfig=OBJECTIVE, initial_logvar=-4.0, **model)
    config["data"]["params"]["val_fraction"] = 0.4
    return config


def checkpoint(run: Run, file: str = "last.ckpt") -> dict:
    return torch.load(run.checkpoints / file, weights_only=True)


def assert_same_checkpoint(one: Run, other: Run, file: str = "last.ckpt") -> None:
    """Every tensor and number, bit for bit, whatever part it is in."""

    def compare(a: Any, b: Any, where: str) -> None:
        assert type(a) is type(b), where
        if isinstance(a, Tensor):
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{where}.{i}")
        else:
            assert a == b, where

    a, b = checkpoint(one, file), checkpoint(other, file)
    for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        compare(a.get(part), b.get(part), part)
    for part in ("images_seen", "iteration", "global_step"):
        assert a[part] == b[part], part


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert "\n" not in text.strip(), text
    return text
