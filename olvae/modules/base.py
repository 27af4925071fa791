"""Base classes of encoders and decoders, counts of parameters and operations, float32 under autocast."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from itertools import chain
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

HALVES = ("encoder", "decoder")  # of an autoencoder

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


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

    checkpoint: bool = (
        False  # keep each step's inputs alone, and compute it again in the backward pass
    )

    def step(self, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """``run(*inputs)``; dropout draws the same numbers when it is computed again."""
        again = self.checkpoint and self.training and torch.is_grad_enabled()
        out: Tensor = checkpoint(run, *inputs, use_reentrant=False) if again else run(*inputs)
        return out

    def checkpoint_steps(self, on: bool = True) -> None:
        """Turn :attr:`checkpoint` on or off, in the networks inside as well."""
        for network in self.modules():
            if isinstance(network, Steps):
                network.checkpoint = on


def copy_plain(value: Any) -> Any:
    """Copy lists and mappings, at any depth; modules and all else in them are shared."""
    if isinstance(value, list):
        return [copy_plain(inner) for inner in value]
    return (
        {key: copy_plain(inner) for key, inner in value.items()}
        if isinstance(value, dict)
        else value
    )


class _Network(Steps):
    node: dict[
        str, Any
    ]  # ``target`` and ``params`` that build this network again, for the config of a saved model

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        network = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        params = copy_plain(dict(list(bound.arguments.items())[1:]))  # without self
        network.__dict__["node"] = {
            "target": f"{cls.__module__}.{cls.__qualname__}",
            "params": params,
        }
        return network

    def __init__(self) -> None:
        super().__init__()
        self.linear: nn.Conv2d | None = None
        """A linear path beside the network, which :func:`olvae.models.linear_code.fit_linear_paths` fits."""

    def use_latents(self, mean: Tensor, std: Tensor) -> None:
        """Take the mean and the deviation of the latents per channel, (n_z) each, from a part that brings them."""

    def _set_linear_path(self, path: nn.Conv2d) -> None:
        """Add a path, beside a network that adds nothing to it at first: its last convolution becomes zero."""
        if (last := last_convolution(self)) is not None:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.linear = path


class Encoder(_Network):
    """Images (B, in_channels, H, W) to (B, latent_dim, H/downscale, W/downscale).

    ``image_size`` is the intended size in pixels, at which summaries count operations.
    """

    deterministic: bool = (
        False  # whether its latents have no distribution, and the log-variances no meaning
    )

    def __init__(self, latent_dim: int, in_channels: int, downscale: int, image_size: int) -> None:
        super().__init__()
        check_counts(1, latent_dim=latent_dim, in_channels=in_channels, downscale=downscale)
        if image_size % downscale:
            raise ValueError(f"image_size {image_size} is not a multiple of {downscale}")
        self.latent_dim, self.in_channels = latent_dim, in_channels
        self.downscale, self.image_size = downscale, image_size

    def add_linear_path(self) -> None:
        """Add a linear path from patches to the means.

        Patches are twice as wide as positions are apart: the fit uses their centres, and training learns to overlap
        them. For odd factors, and above 16, where covariances of larger patches would need gigabytes, they just touch.
        """
        f = self.downscale
        margin = f // 2 if f % 2 == 0 and f <= 16 else 0
        size, n = f + 2 * margin, self.latent_dim // 2
        self._set_linear_path(
            nn.Conv2d(self.in_channels, n, size, f, padding=margin, padding_mode="replicate")
        )

    def with_linear_path(self, moments: Tensor, x: Tensor) -> Tensor:
        """The network's moments, (B, latent_dim, H/f, W/f), plus the linear path from the images x in their means."""
        if self.linear is None:
            return moments
        mean = self.linear(x)  # (B, latent_dim / 2, H/f, W/f)
        return torch.cat((moments[:, : mean.shape[1]] + mean, moments[:, mean.shape[1] :]), dim=1)


class Decoder(_Network):
    """Latents (B, z_channels, h, w) to images (B, out_channels, upscale h, upscale w)."""

    def __init__(self, z_channels: int, out_channels: int, upscale: int) -> None:
        super().__init__()
        check_counts(1, z_channels=z_channels, out_channels=out_channels, upscale=upscale)
        self.z_channels, self.out_channels, self.upscale = z_channels, out_channels, upscale

    @property
    def widths(self) -> list[int]:
        """Channels of each level, for diffusers, whose pipelines count them to know the factor."""
        params = self.node["params"]
        multiples = params.get("channel_mult") or [1] * self.upscale.bit_length()
        return [params.get("channels", 1) * multiple for multiple in multiples]

    def add_linear_path(self) -> None:
        """Add a linear path from 3x3 latent positions to patches."""
        values = self.out_channels * self.upscale**2
        self._set_linear_path(
            nn.Conv2d(self.z_channels, values, 3, padding=1, padding_mode="replicate")
        )

    def linear_path(self, z: Tensor) -> Tensor:
        """The linear path's image: (B, z_channels, h, w) -> (B, out_channels, upscale h, upscale w)."""
        assert self.linear is not None
        return F.pixel_shuffle(self.linear(z), self.upscale)

    def stages(self) -> list[Stage] | None:
        """List the steps of the network, to compute it in tiles; None if one depends on the whole image."""
        return None

    def paths(self) -> list[list[Stage]] | None:
        """Chains of steps from the latent, whose images ``forward`` adds up; None if a step needs the whole image."""
        if (network := self.stages()) is None:
            return None
        return (
            [network]
            if self.linear is None
            else [network, [Stage(self.linear_path, 1, self.upscale)]]
        )


def last_convolution(network: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    """The last convolution: a network's ``output_layer``, or by the order of definition.

    That of a linear path only where there is nothing else.
    """
    named: nn.Conv2d | nn.Conv3d | None = getattr(network, "output_layer", None)
    if named is not None:
        return named
    path = getattr(network, "linear", None)
    found = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m is not path]
    return found[-1] if found else path


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast; otherwise it is torch's, bit for bit."""

    def forward(self, x: Tensor) -> Tensor:
        if not autocast_enabled(x):
            return super().forward(x)
        with no_autocast(x):
            return super().forward(upcast(x))


def keep_in_float32(conv: nn.Module) -> None:
    """Make a plain Conv2d a :class:`Float32Conv2d`, in place."""
    if type(conv) is nn.Conv2d:
        conv.__class__ = Float32Conv2d


def check_counts(least: int, **counts: int | Sequence[int]) -> None:
    """Check numbers of channels, blocks or multiples, one or several each; ValueError if one is below ``least``."""
    for name, value in counts.items():
        given = [value] if isinstance(value, int) else list(value)
        if not given or min(given) < least:
            raise ValueError(
                f"{name} must be at least {least}, got {value if isinstance(value, int) else given}"
            )


def check_not_negative(**numbers: float) -> None:
    """Raise ValueError for a number below 0, or nan."""
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")


def check_betas(betas: Sequence[float]) -> tuple[float, float]:
    """The betas of Adam or Muon; ValueError unless they are two numbers from 0 to below 1."""
    if len(betas) != 2 or not 0 <= min(betas) <= max(betas) < 1:
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {list(betas)}")
    return betas[0], betas[1]


def check_choice(choices: Iterable[str], **settings: str) -> None:
    """Raise ValueError for a setting that is none of its choices."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer; the CPU for one without any."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first parameter; float32 for one without any."""
    first = next(module.parameters(), None)
    return torch.float32 if first is None else first.dtype


class ShapesOnly(TorchFunctionMode):
    """Skip normalisations, SiLU and power iterations, which are slow on the meta device, when counting operations."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.mv:
            return args[0][:, 0]
        return args[0] if func in _SAME_SHAPE else func(*args, **(kwargs or {}))


_SAME_SHAPE = frozenset((F.normalize, F.group_norm, torch.group_norm, F.silu))


def count_macs(module: nn.Module, *shape: int, method: str = "__call__") -> int:
    """Multiply-accumulates of a module's method on an input of this shape, in matrix products and convolutions.

    Half of torch's FLOPs, counted on the meta device, without memory.
    """
    if any(not tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module = copy.deepcopy(module).to("meta")
    with torch.no_grad(), ShapesOnly(), FlopCounterMode(display=False) as counter:
        getattr(module, method)(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops()) // 2


@contextmanager
def watch_outputs(
    modules: Mapping[str, nn.Module], record: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``record`` in this context with the name and the output of each module whose output is a tensor."""

    def hook(name: str, module: nn.Module, given: Any, output: Any) -> None:  # noqa: ARG001  (torch's signature)
        if isinstance(output, Tensor):
            record(name, output)

    handles = [
        module.register_forward_hook(partial(hook, name)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x`` (devices such as meta have none)."""
    kind = x.device.type
    return bool(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off for the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, to be differentiated as often as needed; no barrier, no wait.

    ``x`` itself in a single process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    total: Tensor = all_reduce(x)
    return total / dist.get_world_size()


class _Cast(torch.autograd.Function):
    """Tensors in another dtype, and their gradients back in float32: dozens of casts in one launch."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = _in_dtype(tensors, dtype)
        trained = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(
            *(copy for copy, needed in zip(copies, trained, strict=True) if not needed)
        )
        return tuple(copies)

    @staticmethod
    def backward(_: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_in_dtype([g for g in gradients if g is not None], torch.float32))
        return None, *(None if g is None else next(cast) for g in gradients)


def _in_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


Operands = tuple[Tensor, Tensor | None]  # weight and bias of a convolution

GROUP_BYTES = (
    25 * 2**20
)  # of weights that are cast in one launch: as many as DDP sends in one message


class _Group:
    """Layers in whose passes weights are cast together, when the first of them is called.

    Not before: a backward pass begins with what was computed last, so gradients of weights that were cast ahead of all
    layers would have to wait for all layers.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self._cast: dict[Any, Operands] = {}

    def run(self, layer: Any, x: Tensor) -> Tensor:
        """A layer's forward pass."""
        if not autocast_enabled(x):
            out: Tensor = type(layer).forward(layer, x)
            return out
        if not self._cast:
            with no_autocast(x):
                self._cast = _cast_operands(
                    _operands(self.layers), torch.get_autocast_dtype(x.device.type)
                )
        weight, bias = self._cast[layer]
        return (
            F.linear(x, weight, bias)
            if type(layer) is nn.Linear
            else layer._conv_forward(x, weight, bias)
        )


def _operands(layers: Sequence[Any]) -> dict[Any, Operands]:
    """Weight and bias of each layer; those of a class with ``derive`` are computed by it, for all of its layers."""
    found: dict[Any, Operands] = {}
    for derive in dict.fromkeys(getattr(type(layer), "derive", None) for layer in layers):
        alike = [layer for layer in layers if getattr(type(layer), "derive", None) is derive]
        found |= zip(
            alike,
            derive(alike) if derive else [(layer.weight, layer.bias) for layer in alike],
            strict=True,
        )
    return found


def _cast_operands(operands: Mapping[Any, Operands], dtype: torch.dtype) -> dict[Any, Operands]:
    """Cast tensors in float32; the others are left to autocast, which keeps float64."""
    given = [
        t for pair in operands.values() for t in pair if t is not None and t.dtype == torch.float32
    ]
    copies = dict(zip(map(id, given), _Cast.apply(dtype, *given) if given else (), strict=True))
    return {
        layer: (
            copies.get(id(weight), weight),
            bias if bias is None else copies.get(id(bias), bias),
        )
        for layer, (weight, bias) in operands.items()
    }


def _cast_for(network: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a pass gets, if weights are cast together for it: in training, under autocast."""
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return x if x is not None and network.training and autocast_enabled(x) else None


def casts_together(
    forward: Callable[Concatenate[Any, Inputs], Output],
) -> Callable[Concatenate[Any, Inputs], Output]:
    """Let a network's forward pass in training cast its layers' weights together, where autocast casts each.

    Values and gradients are the same, in fewer launches: one for each 25 MB, so that DDP can send the gradients of
    some layers while it computes those of others. The last convolution is left to autocast, or a gradient at it alone
    would take more of the backward pass; so are weights that are not parameters in float32 (pruned ones, float64),
    and networks with :attr:`Steps.checkpoint`, which compute their casts again. :func:`compile_in_place` sees it.
    """

    @wraps(forward)
    def run(network: Any, /, *args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
        alone = torch.compiler.is_compiling() or getattr(network, "checkpoint", False)
        if alone or _cast_for(network, args, kwargs) is None:
            return forward(network, *args, **kwargs)
        last = last_convolution(network)
        layers = [
            layer
            for layer in _layers(network)
            if layer is not last and "forward" not in layer.__dict__
        ]
        try:
            for group in _groups(layers):
                for layer in group.layers:  # an attribute hides the method
                    layer.__dict__["forward"] = partial(group.run, layer)
            return forward(network, *args, **kwargs)
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    # A copy: torch.compile limits how many graphs one piece of code has.
    run.__code__ = run.__code__.replace()  # type: ignore[attr-defined]
    run.casts_together = True  # type: ignore[attr-defined]
    return run


def compile_in_place(network: nn.Module) -> None:
    """Compile a network at its first use; weights of its parts with :func:`casts_together` are cast before each pass.

    A graph would cast each of them in a launch of its own, and each gradient. What is left to autocast is the same;
    layers that derive their weights do that in the graph, where it becomes one kernel. Other parts may use weights in
    float32, without autocast, and are left as they are.
    """
    network.compile()
    parts = [
        module for module in network.modules() if hasattr(type(module).forward, "casts_together")
    ]
    layers = dict.fromkeys(
        layer for part in parts for layer in _layers(part)
    )  # each once, in order
    compiled: Callable[..., Any] = network._compiled_call_impl  # type: ignore[assignment]
    last = last_convolution(network)
    slots = [
        (child._parameters, name)
        for layer in layers
        for child in layer.modules()
        for name in (("bias",) if hasattr(layer, "derive") else ("weight", "bias"))
        if layer is not last
        and getattr(child._parameters.get(name), "dtype", None) == torch.float32
    ]

    @wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        x = _cast_for(network, args, kwargs)
        if not slots or x is None:
            return compiled(*args, **kwargs)
        given = [parameters[name] for parameters, name in slots]
        with no_autocast(x):
            cast = _Cast.apply(torch.get_autocast_dtype(x.device.type), *given)
        try:
            for (parameters, name), copy in zip(slots, cast, strict=True):
                parameters[name] = copy
            return compiled(*args, **kwargs)
        finally:
            for (parameters, name), parameter in zip(slots, given, strict=True):
                parameters[name] = parameter

    network._compiled_call_impl = run


def _layers(network: nn.Module) -> Iterator[Any]:
    """The layers of a network whose weights autocast casts; those that a hook computes before each pass are left."""
    for child in network.children():
        if hasattr(child, "derive"):
            yield child
        elif type(child) not in (nn.Conv2d, nn.Linear):
            yield from _layers(child)
        elif {"weight", "bias"} <= child._parameters.keys():
            yield child


def _groups(layers: Sequence[nn.Module]) -> list[_Group]:
    """Layers in their order, in groups of up to :data:`GROUP_BYTES`."""
    groups, size = [_Group()], 0
    for layer in layers:
        nbytes = sum(parameter.nbytes for parameter in layer.parameters())
        if size and size + nbytes > GROUP_BYTES:
            groups.append(_Group())
            size = 0
        groups[-1].layers.append(layer)
        size += nbytes
    return groups


@contextmanager
def full_float32(x: Tensor) -> Iterator[None]:
    """Turn off autocast, and TF32 in convolutions, cuDNN's default: for numbers that are compared with others'."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with no_autocast(x):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
