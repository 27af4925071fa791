"""Small models whose decoder generates, shared by the tests of its losses."""

from typing import Any

from torch import nn

from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import tiny_config
from tests.models.steps import build

CLASSES = {
    "flow": "flow_matching.FlowMatching",
    "distillation": "distillation.Distillation",
}


def nodes(**params: dict[str, Any]) -> dict[str, Any]:
    """Nodes of the parts of olvae/models/parts/flow/ with these arguments."""
    return {
        name: {"target": f"olvae.models.parts.flow.{CLASSES[name]}", "params": arguments}
        for name, arguments in params.items()
    }


def one_step_config(**params: Any) -> dict[str, Any]:
    """The node of a small one-step decoder with a linear path."""
    plain = tiny_config()["model"]["params"]["decoder_config"]["params"]
    target = "olvae.modules.litevae.one_step.OneStepDecoder"
    return {"target": target, "params": {**plain, "linear": True, **params}}


def generates(parts: dict[str, Any] | None = None, **model: Any) -> LiteAutoencoderKL:
    """The model of `tiny_config` with a decoder that generates."""
    given = nodes(flow={}) if parts is None else parts
    return build(parts=given, **{"decoder_config": one_step_config(), **model})


def vary(model: LiteAutoencoderKL, std: float = 0.1) -> LiteAutoencoderKL:
    """Give its decoder random weights, so that the noise matters."""
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=std)
    return model
