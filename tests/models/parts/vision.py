"""A small vision encoder, with random weights in a file, and the node of an alignment with it."""

import pytest
import torch

__all__ = ["node", "vit"]


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> str:
    """Random weights of a ViT of 0.3 M parameters with patches of 16 pixels;
    skips where timm is not installed.
    """
    timm = pytest.importorskip("timm")
    path = tmp_path_factory.mktemp("timm") / "vit.pt"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return str(path)


def node(weights: str, **params) -> dict:
    """An alignment."""
    arguments = {"encoder": "test_vit", "weights": weights, **params}
    return {"target": "olvae.models.parts.alignment.Alignment", "params": arguments}
