"""An emulated Mac: tensors of the CPU that say they are on ``mps``, with its rules.

Numbers are real, so whole commands run. A tensor on the emulated device has the CPU's memory and
dispatch keys, and ``mps:0`` for its device. What torch refuses on a Mac is
refused here: a float64 tensor on the device, and operations on tensors of two devices.

What it can't show: operators that Metal lacks, its kernels' rounding and mistakes, speed, memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from lightning.fabric.accelerators.mps import MPSAccelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps", 0)
CPU = torch.device("cpu")
ATEN = torch.ops.aten

NO_FLOAT64 = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)

# Copies between devices, and operations that take a CPU's tensor beside the device's.
CROSSING = {ATEN._to_copy.default, ATEN.copy_.default, ATEN._foreach_copy_.default}

IGNORES_FOUND_INF = {ATEN._fused_adam_.default}
"""Before torch 2.14 the kernel of mps updates whatever these say."""


class MacTensor(Tensor):
    """A tensor on the emulated device."""

    @property
    def device(self) -> torch.device:
        return MPS

    is_cpu = property(lambda _: False)
    is_mps = property(lambda _: True)

    def __repr__(self, **_: Any) -> str:
        return f"MacTensor({on_cpu(self)!r})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the emulated Mac")


def destination(func: Any, args: Any, kwargs: Any) -> tuple[torch.device | None, dict[str, Any]]:
    """The device and the dtype that ``to`` or ``cpu`` asks for."""
    if func is Tensor.cpu:
        return CPU, {}
    device = kwargs.get("device")
    dtype = kwargs.get("dtype")
    for value in (*args[1:], kwargs.get("other")):
        if isinstance(value, Tensor):
            device = value.device
            dtype = value.dtype
        elif isinstance(value, str | torch.device):
            device = value
        elif isinstance(value, torch.dtype):
            dtype = value
    target = None if device is None else torch.device(device)
    return target, {} if dtype is None else {"dtype": dtype}


def on_cpu(x: Any) -> Any:
    """The same memory as a plain tensor."""
    if not isinstance(x, MacTensor):
        return x
    place = (x.untyped_storage(), x.storage_offset(), x.size(), x.stride())
    return torch.empty(0, dtype=x.dtype).set_(*place)


def on_mac(x: Any) -> Any:
    """The same memory as a tensor on the device."""
    if not isinstance(x, Tensor) or isinstance(x, MacTensor):
        return x
    if x.dtype in (torch.float64, torch.complex128):
        raise TypeError(NO_FLOAT64)
    return Tensor._make_subclass(MacTensor, x)


class Generator(torch.Generator):
    """A source of noise, of either device."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu")
        made.of_mac = torch.device(device).type == "mps"
        return made


class Moves(TorchFunctionMode):
    """What C++ would decide by its own device of a tensor, which is the CPU here."""

    leaving = False  # whether a tensor is being copied off the device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.cpu, Tensor.to):
            target, options = destination(func, args, kwargs)
            if target is not None and target.type in ("cpu", "mps"):
                x = args[0]
                dtype = options.get("dtype", x.dtype)
                copied = kwargs.get("copy", False) or (target.type, dtype) != (
                    x.device.type,
                    x.dtype,
                )
                if kwargs.get("memory_format") is not None:
                    options["memory_format"] = kwargs["memory_format"]
                self.leaving = copied and target == CPU
                try:
                    return ATEN._to_copy.default(x, device=target, **options) if copied else x
                finally:
                    self.leaving = False
        if func in (Tensor.tolist, Tensor.item, Tensor.__repr__):
            return func(on_cpu(args[0].detach()), *args[1:], **kwargs)
        device = kwargs.get("device")
        if func is Tensor.new_tensor and isinstance(args[0], MacTensor):
            func = torch.tensor
            kwargs.setdefault("dtype", args[0].dtype)
            device = MPS
            args = args[1:]
        if device is not None and torch.device(device).type == "mps":
            kwargs["device"] = MPS
            if func in (torch.tensor, torch.as_tensor):
                return func(*args, **{**kwargs, "device": CPU}).to(MPS)
        noise = kwargs.get("generator")
        on_device = any(isinstance(x, MacTensor) for x in args) or kwargs.get("device") == MPS
        if noise is not None and on_device != getattr(noise, "of_mac", False):
            raise RuntimeError(f"{func}: expected a generator of the tensor's device")
        if device is not None and torch.device(device).type == "cpu":
            # A new tensor beside one of the device.
            args = tree_map(lambda x: on_cpu(x.detach()) if isinstance(x, MacTensor) else x, args)
        return func(*args, **kwargs)


class Mac(TorchDispatchMode):
    """Within it the device exists; ``made`` counts the operations on it."""

    def __init__(self, moves: Moves) -> None:
        super().__init__()
        self.moves = moves
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = kwargs.get("device")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in inputs if isinstance(x, MacTensor)]
        if given is not None and given.type == "meta":
            return func(*tree_map(on_cpu, args), **kwargs)
        wanted = bool(ours)
        if given is not None:
            # A gradient goes "back to the CPU", where C++ believes its tensor to be.
            leaving = func is ATEN._to_copy.default and self.moves.leaving
            wanted = given.type == "mps" or (bool(ours) and not leaving)
            kwargs["device"] = CPU

        # Tensors of both devices, but for numbers in tensors. In backward passes C++ fills missing
        # gradients with zeros, on what it takes for their device.
        backward = torch._C._current_autograd_node() is not None
        if ours and func not in CROSSING and not backward:
            others = [
                x for x in inputs if not isinstance(x, MacTensor) and x.ndim and not x.is_meta
            ]
            index = func.overloadpacket in (ATEN.index, ATEN.index_put, ATEN.index_put_)
            if others and not index:
                raise RuntimeError(
                    f"{func}: expected all tensors to be on the same device, but found at least "
                    "two devices, mps:0 and cpu!"
                )
        if func in IGNORES_FOUND_INF:
            kwargs |= {"found_inf": None, "grad_scale": None}
        plain = tree_map(on_cpu, (args, kwargs))
        out = func(*plain[0], **plain[1])
        if not wanted:
            return out
        self.made += 1

        # An operation in place returns its argument.
        if ours and func is not ATEN._to_copy.default and returns_argument(func):
            return args[0]
        return tree_map(on_mac, out)


def returns_argument(func: Any) -> bool:
    """Whether an operation works in place, and returns what it changed."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and returns[0].alias_info.is_write


@contextmanager
def emulated_mac(patch: pytest.MonkeyPatch) -> Iterator[Mac]:
    """A Mac for torch and Lightning; ``made`` of the result counts operations on its device."""
    patch.setattr(torch.backends.mps, "is_available", lambda: True)
    patch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    patch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    for name in ("synchronize", "manual_seed", "empty_cache"):
        patch.setattr(torch.mps, name, lambda *_: None)
    patch.setattr(torch.mps, "current_allocated_memory", lambda: 0)
    patch.setattr(torch.mps, "driver_allocated_memory", lambda: 2**20)
    patch.setattr(torch.mps, "recommended_max_memory", lambda: 2**33)
    patch.setattr(torch, "Generator", Generator)

    # Autocast on the device is the CPU's here.
    for name in ("set_autocast_enabled", "set_autocast_dtype"):
        setter = getattr(torch, name)

        def both(kind: Any, value: Any, setter: Any = setter) -> None:
            setter(kind, value)
            if kind == "mps":
                setter("cpu", value)

        patch.setattr(torch, name, both)

    # A subclass can't be made in inference mode: gradients are off, and nothing else.
    def enter(mode: torch.inference_mode) -> None:
        mode.instead = torch.no_grad() if mode.mode else nullcontext()
        mode.instead.__enter__()

    patch.setattr(torch.inference_mode, "__enter__", enter)
    patch.setattr(torch.inference_mode, "__exit__", lambda mode, *_: mode.instead.__exit__(*_))

    # A module's parameters are exchanged, because ``.data`` of one can't become a subclass.
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        moves = Moves()
        with moves, Mac(moves) as mac:
            yield mac
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
