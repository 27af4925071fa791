"""Numbers and names of the published modules, measured from them [M]; see parity.json."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent


def parity_case(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads((HERE / "parity.json").read_text())["cases"][name]
    return case


def published_names() -> dict[str, tuple[int, ...]]:
    """Parameter names of the published B model and their shapes."""
    lines = (HERE / "published_names.tsv").read_text().splitlines()
    pairs = (line.split("\t") for line in lines if not line.startswith("#"))
    return {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}


def fill(module: nn.Module) -> nn.Module:
    """Give every parameter the recipe's weights: a function of its place among the sorted names."""
    state = module.state_dict()
    for k, name in enumerate(sorted(state)):
        tensor = state[name]
        v = np.sin(0.7 * k + 0.37 * np.arange(tensor.numel()))
        if tensor.ndim >= 2:
            v = v / math.sqrt(tensor.numel() / tensor.shape[0])
        else:
            v = 0.1 * v if name.endswith("bias") else 1 + 0.1 * v
        state[name] = torch.from_numpy(v.reshape(tuple(tensor.shape))).float()
    module.load_state_dict(state)
    return module


def recipe_input(shape: list[int]) -> Tensor:
    return torch.from_numpy(0.9 * np.sin(0.01 * np.arange(math.prod(shape))).reshape(shape)).float()


def assert_parity(output: Tensor, expected: dict[str, Any]) -> None:
    """Shape, statistics and values, to 1e-4 of the largest value."""
    assert list(output.shape) == expected["shape"]
    flat = output.detach().flatten().double()
    tolerance = 1e-4 * expected["abs_max"]
    np.testing.assert_allclose(
        flat[expected["at"]].numpy(), expected["values"], rtol=0, atol=tolerance
    )
    assert abs(flat.mean().item() - expected["mean"]) < tolerance
    assert abs(flat.std(unbiased=False).item() - expected["std"]) < tolerance
    assert abs(flat.abs().max().item() - expected["abs_max"]) < tolerance
