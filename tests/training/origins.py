"""Share configs and comparisons of checkpoints between the tests of training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olvae.runs import Run
from tests.conftest import parts, plain_networks, tiny_config
from tests.models.autoencoder_kl import tiny_kl
from tests.models.steps import WITHOUT_KL, against

NETWORKS = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "initial_logvar")


def without_networks(root: Path, **model: Any) -> dict[str, Any]:
    """A config that trains what ``--from`` finds, two steps without validation."""
    config = tiny_config(root, lossconfig=WITHOUT_KL, **model)
    params = config["model"]["params"]
    config["model"]["params"] = {key: value for key, value in params.items() if key not in NETWORKS}
    config["data"]["params"]["val_fraction"] = 0.4
    config["lightning"]["trainer"] |= {"max_steps": 2, "limit_val_batches": 0}
    return config


def phase_b(root: Path, make_config: Callable[..., dict[str, Any]] = tiny_config) -> dict[str, Any]:
    """A config of phase B with everything on that has a state."""
    r1_and_lecam = {"r1_weight": 1.0, "r1_every": 3, "lecam_weight": 0.1}
    times = {"start_step": 1, "ramp_steps": 3, "warmup_updates": 2, "updates_per_step": 2}
    adversary = against(weight=0.3, learning_rate_ratio=2.0, **r1_and_lecam, **times)
    model = {
        "use_ema": True,
        "ema_decay": 0.8,
        "scheduler": "cosine",
        "warmup_steps": 2,
        "decay_steps": 7,
    }
    model["parts"] = parts(anchor={"weight": 0.1}, equivariance={"probability": 0.3})
    config = make_config(root, adversary_config=adversary, **model)
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
    """A config of a student with a plain encoder, one step without validation."""
    config = tiny_config(root, lossconfig=WITHOUT_KL, initial_logvar=-4.0, **model)
    config["model"]["params"]["encoder_config"] = plain_networks()["encoder_config"]
    config["data"]["params"]["val_fraction"] = 0.4
    config["lightning"]["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    return config


def checkpoint(run: Run, file: str = "last.ckpt") -> dict:
    return torch.load(run.checkpoints / file, weights_only=True)


def same(one: Any, other: Any) -> bool:
    """Compare every tensor and number, bit for bit, however they are nested."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_checkpoint(one: Run, other: Run, file: str = "last.ckpt") -> None:
    a, b = checkpoint(one, file), checkpoint(other, file)
    averages = ("state_dict", "current_model_state")
    for part in (
        *averages,
        "optimizer_states",
        "lr_schedulers",
        "images_seen",
        "iteration",
        "global_step",
    ):
        assert same(a.get(part), b.get(part)), part


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert "\n" not in text.strip(), text
    return text


def small(images: Path, size: int) -> list[str]:
    """Overrides that train a recipe on a few small images, without LPIPS,
    whose network is a download."""
    data = {
        "root": str(images),
        "size": size,
        "batch_size": 2,
        "num_workers": 0,
        "val_fraction": 0.2,
    }
    overrides = [f"data.params.{key}={value}" for key, value in data.items()]
    return [
        *overrides,
        "lightning.trainer.max_steps=1",
        "model.params.lossconfig.params.lpips_weight=0",
    ]


def reduced_features(weights: str, root: Path | None = None, **model: Any) -> dict[str, Any]:
    """A config: a vision encoder reduced to 8 channels as FAE's, FAE's part and PAE's priors."""
    target = "olvae.models.parts.features"
    priors = {"encoder": "test_vit", "weights": weights}
    features = {
        "fae": {"target": f"{target}.feature_decoder.FeatureDecoder", "params": {"depth": 1}},
        "pae": {"target": f"{target}.prior_alignment.PriorAlignment", "params": priors},
    }
    config = tiny_config(root, lossconfig=WITHOUT_KL, parts=features, **model)
    params = config["model"]["params"]
    kept = {key: value for key, value in params.items() if key not in NETWORKS}
    kept["freeze_encoder"] = False
    kept["decoder_config"] = {"params": {"width": 32, "depth": 1, "heads": 1}}
    config["model"] |= {"params": kept, "from": f"timm:test_vit={weights}::8"}
    config["data"]["params"]["size"] = 32
    return config
