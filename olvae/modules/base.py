"""Base classes of encoders and decoders, counts of parameters and operations."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


class Stage(NamedTuple):
    """A step of a decoder with a finite receptive field.

    The input that a window of the output depends on: the window, ``reach`` positions wider on every side, then divided
    by ``scale``.
    """

    run: Callable[[Tensor], Tensor]
    reach: int
    scale: int = 1


class Steps(nn.Module):
    """A network whose forward pass hands its steps to :meth:`step`."""

    checkpoint: bool = False  # keep each step's inputs alone, and compute it again in the backward pass

    def step(self, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """``run(*inputs)``; dropout draws the same numbers when it is computed again."""
        again = self.checkpoint and self.training and torch.is_grad_enabled()
        out: Tensor = checkpoint(run, *inputs, use_reentrant=False) if again else run(*inputs)
        return out

    def checkpoint_steps(self) -> None:
        """Turn :attr:`checkpoint` on, in the networks inside as well."""
        for network in self.modules():
            if isinstance(network, Steps):
                network.checkpoint = True


class _Network(Steps):
    node: dict[str, Any]  # ``target`` and ``params`` that build this network again, for the config of a saved model

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        network = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        params = dict(list(bound.arguments.items())[1:])  # without self
        network.__dict__["node"] = {"target": f"{cls.__module__}.{cls.__qualname__}", "params": params}
        return network


class Encoder(_Network):
    """Images (B, in_channels, H, W) to (B, latent_dim, H/downscale, W/downscale)."""

    in_channels: int
    latent_dim: int
    downscale: int
    image_size: int  # the intended size in pixels, at which summaries count operations


class Decoder(_Network):
    """Latents (B, z_channels, h, w) to images (B, out_channels, upscale h, upscale w)."""

    z_channels: int
    out_channels: int
    upscale: int

    def stages(self) -> list[Stage] | None:
        """List the steps of ``forward``, to compute it in tiles; None if a step depends on the whole image."""
        return None


def check_counts(least: int, **counts: int | Sequence[int]) -> None:
    """Check numbers of channels, blocks or multiples, one or several each; ValueError if one is below ``least``."""
    for name, value in counts.items():
        given = [value] if isinstance(value, int) else list(value)
        if not given or min(given) < least:
            raise ValueError(f"{name} must be at least {least}, got {value if isinstance(value, int) else given}")


def check_size(image_size: int, downscale: int) -> None:
    if image_size % downscale:
        raise ValueError(f"image_size {image_size} is not a multiple of {downscale}")


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class ShapesOnly(TorchFunctionMode):
    """Skip normalisations, SiLU and power iterations, which are slow on the meta device, when counting operations."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.mv:
            return args[0][:, 0]
        return args[0] if func in _SAME_SHAPE else func(*args, **(kwargs or {}))


_SAME_SHAPE = frozenset((F.normalize, F.group_norm, torch.group_norm, F.silu))


def count_macs(module: nn.Module, *shape: int) -> int:
    """Multiply-accumulates of a forward pass on an input of this shape, in matrix products and convolutions.

    Half of torch's FLOPs, counted on the meta device, without memory.
    """
    if any(not tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module = copy.deepcopy(module).to("meta")
    with torch.no_grad(), ShapesOnly(), FlopCounterMode(display=False) as counter:
        module(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops()) // 2


@contextmanager
def watch_outputs(modules: Mapping[str, nn.Module], record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``record`` in this context with the name and the output of each module whose output is a tensor."""

    def hook(name: str, module: nn.Module, given: Any, output: Any) -> None:  # noqa: ARG001  (torch's signature)
        if isinstance(output, Tensor):
            record(name, output)

    handles = [module.register_forward_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
