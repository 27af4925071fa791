"""A LiteVAE of a few thousand parameters, for tests."""

import torch

from olvae import LiteVAE
from tests.conftest import tiny_config


def tiny_litevae() -> LiteVAE:
    """Fresh weights, but for the self-modulation, so that folding is not the identity."""
    params = tiny_config()["model"]["params"]
    model = LiteVAE.from_config(**{key: value for key, value in params.items() if key != "lossconfig"}).eval()
    for name, p in model.named_parameters():
        if name.endswith(("scales", "gain")):
            torch.nn.init.uniform_(p, 0.5, 2.0)
    return model
