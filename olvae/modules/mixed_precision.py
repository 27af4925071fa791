"""Compute in mixed precision: islands in float32, and weights cast together, eagerly or compiled.

Autocast casts each float32 weight to half precision in a kernel launch of its own, and its gradient
back in another: hundreds of launches in a step, for which a GPU waits. Here one launch casts a
whole group of weights, in two ways:

- Eager networks (:func:`casts_together`) cast a group when its first layer is called. For the time
  of the pass each layer's ``forward`` is replaced by one that takes the group's copies.
- Compiled networks (:func:`compile_in_place`) cast all weights before the graph runs. For the time
  of the call the copies take the parameters' places, so the graph gets half precision.

Both give the values and gradients that autocast gives.

A layer may compute its weight from its parameters, as SMC and SpectralConv2d do. Its class then has
``derive(layers)``, which returns weight and bias of each of these layers, and
``_conv_forward(x, weight, bias)``, which convolves with given ones, as nn.Conv2d has.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.files import first_line
from olvae.library_internals import (
    compiled_call,
    convolve,
    copy_each,
    keep_graphs_memory,
    own_parameters,
    set_compiled_call,
)
from olvae.modules.base import last_convolution


def autocast_enabled(x: Tensor) -> bool:
    """Return whether autocast is on for the device of ``x``; never for meta, which lacks it."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off for the device of ``x``."""
    if autocast_enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def in_float64(x: Tensor) -> Tensor:
    """``x`` in float64, on its device, or for mps, which has no float64, on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def without_tf32(x: Tensor) -> Tensor:
    """``x`` for a convolution that must not be TF32's: in float64 on CUDA, else as it is.

    TF32 is a setting of the moment, and a backward pass or a compiled graph runs at another.
    """
    return x.double() if x.is_cuda else x


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast; without autocast it is torch's."""

    def forward(self, x: Tensor) -> Tensor:
        if not autocast_enabled(x):
            return super().forward(x)
        with no_autocast(x):
            return super().forward(upcast(x))


def keep_in_float32(conv: nn.Module) -> None:
    """Make a plain Conv2d a :class:`Float32Conv2d`, in place."""
    if type(conv) is nn.Conv2d:
        conv.__class__ = Float32Conv2d


Operands = tuple[Tensor, Tensor | None]  # weight and bias of a convolution

# Bytes of weights that are cast in one launch: as many as DDP sends in one message.
GROUP_BYTES = 25 * 2**20

LayerInputs = ParamSpec("LayerInputs")

Output = TypeVar("Output")


class _Cast(torch.autograd.Function):
    """Cast tensors to another dtype, and their gradients back to float32, one launch each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        # A copy without a gradient gives None in backward, not a tensor of zeros.
        ctx.set_materialize_grads(False)
        copies = _in_dtype(tensors, dtype)
        # One function has made all copies, so all would require gradients, also of frozen weights:
        # their layers would then compute weight gradients for nothing.
        trained = ctx.needs_input_grad[1:]
        frozen = [copy for copy, needed in zip(copies, trained, strict=True) if not needed]
        ctx.mark_non_differentiable(*frozen)
        return tuple(copies)

    @staticmethod
    def backward(_: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [gradient for gradient in gradients if gradient is not None]
        cast = iter(_in_dtype(present, torch.float32))
        # The first None is for the dtype.
        return None, *(None if gradient is None else next(cast) for gradient in gradients)


def _in_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        copy_each(copies, tensors)
    return copies


def _cast_operands(layers: Sequence[Any], dtype: torch.dtype) -> dict[Any, Operands]:
    """Return weight and bias of each layer: float32 ones cast to dtype, others as they are.

    Autocast keeps float64 as it is, too.
    """
    # Weight and bias of each layer; a class with ``derive`` computes them for all its layers.
    by_derive: dict[Any, list[Any]] = {}
    for layer in layers:
        by_derive.setdefault(getattr(type(layer), "derive", None), []).append(layer)
    operands: dict[Any, Operands] = {}
    for derive, alike in by_derive.items():
        pairs = derive(alike) if derive else [(layer.weight, layer.bias) for layer in alike]
        operands.update(zip(alike, pairs, strict=True))

    # Cast those in float32, all in one launch.
    given: list[Tensor] = []
    for pair in operands.values():
        given += [t for t in pair if t is not None and t.dtype == torch.float32]
    if not given:
        return operands
    copies = _Cast.apply(dtype, *given)

    # By id, because ``==`` compares tensors element by element. Two layers may share a tensor.
    cast = {id(tensor): copy for tensor, copy in zip(given, copies, strict=True)}
    return {
        layer: (cast.get(id(weight), weight), cast.get(id(bias), bias))
        for layer, (weight, bias) in operands.items()
    }


class _Group:
    """Layers with weights that are cast together, when the first of them is called in a pass.

    Not earlier: autograd runs backward in the reverse order of the forward pass. If all weights
    were cast before the first layer, no gradient would be complete before the last moment, and DDP
    could send none of them while others are computed.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self._cast: dict[Any, Operands] = {}  # of this pass; empty before its first layer

    def run(self, layer: Any, x: Tensor) -> Tensor:
        """Run a layer's forward pass with its weights from the group."""
        # The network may have turned autocast off for this layer.
        if not autocast_enabled(x):
            out: Tensor = type(layer).forward(layer, x)
            return out
        if not self._cast:
            dtype = torch.get_autocast_dtype(x.device.type)
            with no_autocast(x):
                self._cast = _cast_operands(self.layers, dtype)
        weight, bias = self._cast[layer]
        if type(layer) is nn.Linear:
            return F.linear(x, weight, bias)
        return convolve(layer, x, weight, bias)


def _groups(layers: Sequence[nn.Module]) -> list[_Group]:
    """Divide layers, in their order, into groups of up to :data:`GROUP_BYTES`."""
    groups = [_Group()]
    size = 0
    for layer in layers:
        nbytes = sum(parameter.nbytes for parameter in layer.parameters())
        if size and size + nbytes > GROUP_BYTES:
            groups.append(_Group())
            size = 0
        groups[-1].layers.append(layer)
        size += nbytes
    return groups


def _layers(network: nn.Module) -> Iterator[Any]:
    """Find a network's layers with weights that autocast would cast, in the order of definition.

    Layers whose ``weight`` or ``bias`` is no parameter (pruning computes it in a hook before each
    pass) are left to autocast.
    """
    for child in network.children():
        if hasattr(child, "derive"):
            yield child
        elif type(child) not in (nn.Conv2d, nn.Linear):
            yield from _layers(child)
        elif {"weight", "bias"} <= own_parameters(child).keys():
            yield child


def _half_precision_input(
    network: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Return a pass's first tensor if the network trains under autocast; else None."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value if network.training and autocast_enabled(value) else None
    return None


def casts_together(
    forward: Callable[Concatenate[Any, LayerInputs], Output],
) -> Callable[Concatenate[Any, LayerInputs], Output]:
    """Decorate a network's ``forward``: in training under autocast, cast its weights in groups.

    Groups have up to 25 MB, so that DDP can send the gradients of one while the next are computed.
    Left to autocast are:

    - the last convolution: adaptive weights take gradients at it alone, which would otherwise go
      through the cast of its whole group;
    - weights that are no float32 parameters (pruned ones, float64);
    - networks with :attr:`Steps.checkpoint`, which run layers again after the pass, in backward;
    - compiled networks: see :func:`compile_in_place`.
    """

    @wraps(forward)
    def run(network: Any, /, *args: LayerInputs.args, **kwargs: LayerInputs.kwargs) -> Output:
        alone = torch.compiler.is_compiling() or getattr(network, "checkpoint", False)
        if alone or _half_precision_input(network, args, kwargs) is None:
            return forward(network, *args, **kwargs)

        # A layer that has its own ``forward`` already is in an outer network's group, or was
        # changed by somebody else.
        last = last_convolution(network)
        layers = [
            layer
            for layer in _layers(network)
            if layer is not last and "forward" not in layer.__dict__
        ]

        # An attribute of the instance hides the method of its class: nn.Module's ``__call__`` looks
        # up ``self.forward``. Removing the attribute brings the method back.
        try:
            for group in _groups(layers):
                for layer in group.layers:
                    layer.__dict__["forward"] = partial(group.run, layer)
            return forward(network, *args, **kwargs)
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    # torch.compile limits how many graphs one code object may have, and all decorated functions
    # share the code of ``run``. A copy gives each network class a limit of its own.
    run.__code__ = run.__code__.replace()  # type: ignore[attr-defined]
    run.casts_together = True  # type: ignore[attr-defined]
    return run


def compile_in_place(network: nn.Module) -> None:
    """Compile a network at its first use; cast the weights of decorated parts before each pass.

    Otherwise the graph would cast each weight, and each gradient, in a launch of its own. What
    :func:`casts_together` leaves to autocast is left here, too. Layers with ``derive`` compute
    their weight in the graph, where it becomes one kernel. Parts without the decorator are left as
    they are: they may use weights in float32, without autocast.
    """
    network.compile()
    compiled = compiled_call(network)
    assert compiled is not None

    # The layers of decorated parts: each once, in order, though a part may be inside another.
    layers: dict[Any, None] = {}
    for part in network.modules():
        if hasattr(type(part).forward, "casts_together"):
            layers.update(dict.fromkeys(_layers(part)))

    # Where their float32 parameters are: a module's own table of parameters, and the name in it.
    last = last_convolution(network)
    slots: list[tuple[dict[str, Any], str]] = []
    for layer in layers:
        if layer is last:
            continue
        names = ("bias",) if hasattr(layer, "derive") else ("weight", "bias")
        for module in layer.modules():
            for name in names:
                table = own_parameters(module)
                parameter = table.get(name)
                if parameter is not None and parameter.dtype == torch.float32:
                    slots.append((table, name))

    @wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        x = _half_precision_input(network, args, kwargs)
        if not slots or x is None:
            return compiled(*args, **kwargs)
        parameters = [table[name] for table, name in slots]
        with no_autocast(x):
            copies = _Cast.apply(torch.get_autocast_dtype(x.device.type), *parameters)

        # Not by setattr, which takes only an nn.Parameter for these names; tables take any tensor.
        try:
            for (table, name), copy in zip(slots, copies, strict=True):
                table[name] = copy
            return compiled(*args, **kwargs)
        finally:
            for (table, name), parameter in zip(slots, parameters, strict=True):
                table[name] = parameter

    set_compiled_call(network, run)


log = logging.getLogger("olvae")


def compile_networks(networks: Sequence[nn.Module], device: torch.device) -> bool:
    """Compile networks in place, at their first use; state dicts and copies stay uncompiled.

    Without a working C++ compiler, leave them as they are, log one line, and return False.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:
        # Of many kinds: InductorError, InvalidCxxCompiler, CalledProcessError, ...
        if not dist.is_initialized() or dist.get_rank() == 0:
            message = "compile: the networks run uncompiled, because no compiler works here (%s)"
            log.warning(message, first_line(error))
        return False
    # A ratio of gradients runs through a graph before its backward pass does.
    keep_graphs_memory()
    for network in networks:
        compile_in_place(network)
    return True
