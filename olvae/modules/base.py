"""Base classes of encoder and decoder, and how networks are counted."""

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Decoder", "Encoder", "Stage", "count_macs", "count_parameters"]


class Stage(NamedTuple):
    """A step of a decoder that sees only a neighbourhood: to compute a window of its output, widen the window by
    ``reach`` positions on every side, then shrink it by ``scale``; that is the window of its input."""

    run: Callable[[Tensor], Tensor]
    reach: int
    scale: int = 1


class _Half(nn.Module):
    node: dict[str, Any]
    """The ``target`` and ``params`` that build it again, defaults included: what a saved model's config has."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        half = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        params = dict(list(bound.arguments.items())[1:])  # without self
        half.__dict__["node"] = {"target": f"{cls.__module__}.{cls.__qualname__}", "params": params}
        return half


class Encoder(_Half):
    """Images (B, in_channels, H, W) to (B, latent_dim, H/downscale, W/downscale)."""

    in_channels: int
    latent_dim: int
    downscale: int
    image_size: int
    """The size in pixels at which the model is meant to be used: what summaries count operations at."""


class Decoder(_Half):
    """Latents (B, z_channels, h, w) to images (B, out_channels, upscale h, upscale w)."""

    z_channels: int
    out_channels: int
    upscale: int

    def stages(self) -> list[Stage] | None:
        """The steps of ``forward``, which tiles are cut between; None, if any step sees the whole image."""
        return None


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *shape: int) -> int:
    """Multiply-accumulates of one forward pass of an input of this shape: half of torch's FLOPs.

    Counted on the meta device, so that no memory is needed; matrix products and convolutions only.
    """
    module = copy.deepcopy(module).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops()) // 2
