"""Base classes of encoders and decoders; setting checks, operation counts, mixed precision."""

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


class Stage(NamedTuple):
    """A step of a decoder with a finite receptive field.

    A window of the output depends on this window of the input: widen the output's window by
    ``reach`` positions on every side, then divide it by ``scale``.
    """

    run: Callable[[Tensor], Tensor]
    reach: int
    scale: int = 1


class Steps(nn.Module):
    """A network whose forward pass hands its steps to :meth:`step`."""

    # Whether to keep only each step's inputs, and compute the step again in the backward pass.
    checkpoint: bool = False

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
    """Copy lists and dicts at any depth; share modules and everything else in them."""
    if isinstance(value, list):
        return [copy_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {key: copy_plain(inner) for key, inner in value.items()}
    return value


class _Network(Steps):
    """One half of an autoencoder: records its arguments, and may have a linear path."""

    # ``target`` and ``params`` that build this network again, for the config of a saved model.
    node: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        network = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        _self, *arguments = bound.arguments.items()
        network.node = {
            "target": f"{cls.__module__}.{cls.__qualname__}",
            "params": copy_plain(dict(arguments)),
        }
        return network

    def __init__(self) -> None:
        super().__init__()
        # A linear path beside the network: see :func:`olvae.models.linear_code.fit_linear_paths`.
        self.linear: nn.Conv2d | None = None

    def use_latents(self, mean: Tensor, std: Tensor) -> None:
        """Take the latents' mean and deviation per channel, (n_z) each, from a part with them."""

    def _set_linear_path(self, path: nn.Conv2d) -> None:
        """Add the path, and zero the network's last convolution: at first the path is alone."""
        last = last_convolution(self)
        if last is not None:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.linear = path


class Encoder(_Network):
    """Images (B, in_channels, H, W) to (B, latent_dim, H/downscale, W/downscale).

    ``image_size`` is the intended size in pixels, at which summaries count operations.
    """

    # Whether the latents have no distribution, so that the log-variances mean nothing.
    deterministic: bool = False

    def __init__(self, latent_dim: int, in_channels: int, downscale: int, image_size: int) -> None:
        super().__init__()
        check_counts(1, latent_dim=latent_dim, in_channels=in_channels, downscale=downscale)
        if image_size % downscale:
            raise ValueError(f"image_size {image_size} is not a multiple of {downscale}")
        self.latent_dim = latent_dim
        self.in_channels = in_channels
        self.downscale = downscale
        self.image_size = image_size

    def add_linear_path(self) -> None:
        """Add a linear path from patches to the means.

        Patches are twice as wide as their distance: the fit uses their centres, and training learns
        to overlap them. Where the factor is odd, or above 16 (the covariances of larger patches
        would need gigabytes), patches just touch.
        """
        f = self.downscale
        margin = f // 2 if f % 2 == 0 and f <= 16 else 0
        size = f + 2 * margin
        means = self.latent_dim // 2
        self._set_linear_path(
            nn.Conv2d(self.in_channels, means, size, f, padding=margin, padding_mode="replicate")
        )

    def with_linear_path(self, moments: Tensor, x: Tensor) -> Tensor:
        """Add the linear path from the images x to the means in moments (B, latent_dim, h, w)."""
        if self.linear is None:
            return moments
        mean = self.linear(x)  # (B, latent_dim / 2, H/f, W/f)
        n_z = mean.shape[1]
        return torch.cat((moments[:, :n_z] + mean, moments[:, n_z:]), dim=1)


class Decoder(_Network):
    """Latents (B, z_channels, h, w) to images (B, out_channels, upscale h, upscale w)."""

    def __init__(self, z_channels: int, out_channels: int, upscale: int) -> None:
        super().__init__()
        check_counts(1, z_channels=z_channels, out_channels=out_channels, upscale=upscale)
        self.z_channels = z_channels
        self.out_channels = out_channels
        self.upscale = upscale

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
        """Compute the linear path's image (B, out_channels, upscale h, upscale w) from a latent."""
        assert self.linear is not None
        return F.pixel_shuffle(self.linear(z), self.upscale)

    def stages(self) -> list[Stage] | None:
        """List the network's steps, to run it in tiles; None if one depends on the whole image."""
        return None

    def paths(self) -> list[list[Stage]] | None:
        """List the chains of steps that start at the latent; ``forward`` adds up their images.

        None if a step needs the whole image.
        """
        network = self.stages()
        if network is None:
            return None
        if self.linear is None:
            return [network]
        return [network, [Stage(self.linear_path, 1, self.upscale)]]


def last_convolution(network: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    """Find the last convolution: the network's ``output_layer``, or the last one defined.

    The linear path counts only where there is no other.
    """
    named: nn.Conv2d | nn.Conv3d | None = getattr(network, "output_layer", None)
    if named is not None:
        return named
    path = getattr(network, "linear", None)
    found = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m is not path]
    return found[-1] if found else path


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if it has none."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first parameter; float32 if it has none."""
    first = next(module.parameters(), None)
    return torch.float32 if first is None else first.dtype


def mean_over_processes(x: Tensor) -> Tensor:
    """Average a tensor over all processes; gradients of any order flow; no barrier, no wait.

    In a single process return ``x`` itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    total: Tensor = all_reduce(x)
    return total / dist.get_world_size()


# Checks of settings: each raises ValueError with the setting's name.


def check_counts(least: int, **counts: int | Sequence[int]) -> None:
    """Check numbers of channels, blocks or multiples, one or several each: ``least`` or more."""
    for name, value in counts.items():
        several = [value] if isinstance(value, int) else list(value)
        if not several or min(several) < least:
            got = value if isinstance(value, int) else several
            raise ValueError(f"{name} must be at least {least}, got {got}")


def check_not_negative(**numbers: float) -> None:
    """Raise ValueError for a number below 0, or nan."""
    for name, number in numbers.items():
        # Not ``number < 0``, which is False for nan.
        if not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")


def check_betas(betas: Sequence[float]) -> tuple[float, float]:
    """Check the betas of Adam or Muon: two numbers from 0 to below 1."""
    if len(betas) != 2 or not 0 <= min(betas) <= max(betas) < 1:
        raise ValueError(f"betas must be two numbers from 0 to below 1, got {list(betas)}")
    return betas[0], betas[1]


def check_choice(choices: Iterable[str], **settings: str) -> None:
    """Raise ValueError for a setting that is not among the choices."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


# Counting: parameters, multiply-accumulates, outputs of modules.


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class ShapesOnly(TorchFunctionMode):
    """Skip normalisations, SiLU and power iterations when counting operations.

    They are slow on the meta device.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.mv:
            # A column of the matrix has the product's shape.
            return args[0][:, 0]
        if func in _SAME_SHAPE:
            return args[0]
        return func(*args, **(kwargs or {}))


_SAME_SHAPE = frozenset((F.normalize, F.group_norm, torch.group_norm, F.silu))


def count_macs(module: nn.Module, *shape: int, method: str = "__call__") -> int:
    """Count the multiply-accumulates of a module's method on an input of this shape.

    In matrix products and convolutions: half of torch's FLOPs, on the meta device, without memory.
    """
    tensors = (*module.parameters(), *module.buffers())
    if any(not tensor.is_meta for tensor in tensors):
        module = copy.deepcopy(module).to("meta")
    with torch.no_grad(), ShapesOnly(), FlopCounterMode(display=False) as counter:
        getattr(module, method)(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops()) // 2


@contextmanager
def watch_outputs(
    modules: Mapping[str, nn.Module], record: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``record(name, output)`` for each output of these modules that is a tensor."""

    # torch's signature of a hook, after the name.
    def hook(name: str, module: nn.Module, given: Any, output: Any) -> None:  # noqa: ARG001
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


# Mixed precision: what computes in float32 under autocast.


def autocast_enabled(x: Tensor) -> bool:
    """Return whether autocast is on for the device of ``x`` (devices such as meta have none)."""
    kind = x.device.type
    return bool(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off for the device of ``x``."""
    if autocast_enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@contextmanager
def full_float32(x: Tensor) -> Iterator[None]:
    """Turn off autocast and cuDNN's TF32 convolutions, for numbers that others compare with."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with no_autocast(x):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


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


# Mixed precision: many weights cast in one launch.
#
# Autocast casts each float32 weight to half precision in a kernel launch of its own, and its
# gradient back in another: hundreds of launches in a step, for which a GPU waits. Below, one
# ``torch._foreach_copy_`` casts a whole group of weights, in two ways:
#
# - Eager networks (``casts_together``) cast a group when its first layer is called. For the time of
#   the pass each layer's ``forward`` is replaced by one that takes the group's copies.
# - Compiled networks (``compile_in_place``) cast all weights before the graph runs. For the time of
#   the call the copies take the parameters' places, so the graph gets half precision.
#
# Both give the values and gradients that autocast gives.
#
# A layer may compute its weight from its parameters, as SMC and SpectralConv2d do. Its class then
# has ``derive(layers)``, which returns weight and bias of each of these layers, and
# ``_conv_forward(x, weight, bias)``, which convolves with given ones, as nn.Conv2d has.

Operands = tuple[Tensor, Tensor | None]  # weight and bias of a convolution

# Bytes of weights that are cast in one launch: as many as DDP sends in one message.
GROUP_BYTES = 25 * 2**20

Inputs = ParamSpec("Inputs")
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
        torch._foreach_copy_(copies, list(tensors))
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
        convolved: Tensor = layer._conv_forward(x, weight, bias)
        return convolved


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
        elif {"weight", "bias"} <= child._parameters.keys():
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
    forward: Callable[Concatenate[Any, Inputs], Output],
) -> Callable[Concatenate[Any, Inputs], Output]:
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
    def run(network: Any, /, *args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
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
    # torch keeps what it runs in place of ``forward`` in this attribute, and so do we below.
    network.compile()
    compiled: Callable[..., Any] = network._compiled_call_impl  # type: ignore[assignment]

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
                parameter = module._parameters.get(name)
                if parameter is not None and parameter.dtype == torch.float32:
                    slots.append((module._parameters, name))

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

    network._compiled_call_impl = run
