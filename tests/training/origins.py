"""Share configs and comparisons of checkpoints between the tests of training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olvae.runs import Run
from tests.conftest import tiny_config

OBJECTIVE = {"target": "olvae.losses.objective.Objective", "params": {"lpips_weight": 0, "kl_weight": 0}}

NETWORKS = ("encoder_config", "decoder_config", "embed_dim", "use_quant", "initial_logvar")


def without_networks(root: Path, **model: Any) -> dict[str, Any]:
    """A config that trains what ``--from`` finds."""
    config = tiny_config(root, lossconfig=OBJECTIVE, **model)
    params = config["model"]["params"]
    config["model"]["params"] = {key: value for key, value in params.items() if key not in NETWORKS}
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
