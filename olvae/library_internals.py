"""Private names of torch, Lightning and diffusers that this package uses, each under a public one.

A release of these libraries may change any of them without notice. No other file uses one, and
tests/test_library_internals.py looks for each in the installed versions: a new release that lacks
one fails there, by name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor as FakeTensor
from torch._subclasses import FakeTensorMode as FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

BatchNormBase = _NormBase

# A spectral norm's left and right singular vector, the names of its buffers.
SPECTRAL_VECTORS = ("_u", "_v")

# What accelerate and diffusers set in a module whose ``forward`` they replace.
HOOKED = ("_hf_hook", "_old_forward", "_diffusers_hook", "forward")

HAS_FOREACH = "torch.nn.utils.clip_grad._has_foreach_support"  # to patch where a CPU plays a GPU


# Many tensors in one launch, as torch's optimizers work: these have no public names.


def copy_each(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes, in one launch on a GPU."""
    torch._foreach_copy_(list(destinations), list(sources))


def add_each(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Add to tensors, in place."""
    torch._foreach_add_(list(tensors), list(others))


def subtract_each(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Sequence[Tensor]:
    """The differences of tensors."""
    return torch._foreach_sub(list(tensors), list(others))


def scale_each(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply tensors by one number, in place."""
    torch._foreach_mul_(list(tensors), factor)


def norms_of_each(tensors: Sequence[Tensor], least: float) -> Sequence[Tensor]:
    """The norms of tensors, at least ``least``."""
    return torch._foreach_clamp_min(torch._foreach_norm(list(tensors)), least)


# Modules


def convolve(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution as the layer computes it (padding mode, stride, groups), with other weights."""
    y: Tensor = layer._conv_forward(x, weight, bias)
    return y


def compiled_call(network: nn.Module) -> Callable[..., Any] | None:
    """What ``network(...)`` calls once ``network.compile()`` has run; None before."""
    return network._compiled_call_impl


def set_compiled_call(network: nn.Module, call: Callable[..., Any]) -> None:
    """Replace what a compiled network calls."""
    network._compiled_call_impl = call


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | Tensor | None]:
    """A module's own parameters by name: the dictionary itself, so entries can be exchanged."""
    return module._parameters  # type: ignore[return-value]


def move_tensors(network: nn.Module, function: Callable[..., Any], recurse: bool) -> None:
    """Do to a module outside of the tree what ``to``, ``half`` and ``cuda`` do to one in it."""
    network._apply(function, recurse)


def hooks_around(module: nn.Module) -> list[Any]:
    """What accelerate and diffusers have put around a module's ``forward``."""
    return [vars(module)[name] for name in HOOKED if name in vars(module)]


def forget_hooks(module: nn.Module) -> None:
    """Remove the forward hooks of a copied module: nobody has their handles."""
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    for name in HOOKED:
        vars(module).pop(name, None)


def is_hooked_by_diffusers(module: nn.Module) -> bool:
    """Whether ``forward`` has a hook of diffusers, such as group offloading's."""
    return hasattr(module, "_diffusers_hook")


# Compilation and tracing


def is_traced() -> bool:
    """Whether torch.jit or torch.func traces operations; neither takes a custom backward pass."""
    return torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def assume_constant(function: Any) -> None:
    """As torch.compiler.assume_constant_result does, without its two seconds of imports."""
    function._dynamo_marked_constant = True


def keep_graphs_memory() -> None:
    """Compile so that a graph can be walked twice: a backward pass must not reuse its memory."""
    torch._functorch.config.donated_buffer = False


# fp16's loss scale


def found_inf_of(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The flags, one a device, that make a scaler skip an optimizer's next step."""
    return list(scaler._found_inf_per_device(optimizer).values())


def loss_scale_of(scaler: torch.amp.GradScaler) -> Tensor | None:
    """The scale on its device; the public ``get_scale`` waits for the device."""
    return scaler._get_scale_async()


# Processes


def default_store() -> Any:
    """The key-value store of the process group, through which CPUs can talk while GPUs work."""
    return dist.distributed_c10d._get_default_store()


def stop_workers(batches: Any) -> None:
    """End the worker processes of a data loader's iterator, as Lightning does."""
    batches._shutdown_workers()


# A GPU's memory


def record_memory_history(entries: int) -> None:
    """Begin to record allocations, without stacks: these would slow the traced steps."""
    torch.cuda.memory._record_memory_history(context=None, max_entries=entries)


def dump_memory_history(path: str) -> None:
    """Write what was recorded, for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(path)


# Lightning


def count_batches(trainer: Any, batches: int) -> None:
    """Set the count by which Lightning decides at which batches it logs."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = batches


def forget_logged(trainer: Any) -> None:
    """Drop the values of earlier steps, which Lightning would log again as this one's."""
    results = trainer.fit_loop.epoch_loop._results
    earlier = [
        name for name in results if name.startswith(("training_step.", "on_train_batch_end."))
    ]
    for name in earlier:
        del results[name]


def leave_signals_alone(trainer: Any) -> None:
    """Turn off the exchange of SIGTERM before each batch, which waits for every device."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def reducer_of(strategy: Any, module: nn.Module) -> DistributedDataParallel:
    """Wrap a module in DDP with a Lightning strategy's settings, and its hook on gradients."""
    reducer: DistributedDataParallel = strategy._setup_model(module)
    if strategy._ddp_comm_hook is not None:
        reducer.register_comm_hook(strategy._ddp_comm_state, strategy._ddp_comm_hook)
    return reducer


def observe_processes(subprocess_script: Any, watch: Callable[..., None]) -> None:
    """Let ``watch`` observe the processes that Lightning starts; its own kills in silence."""
    subprocess_script._launch_process_observer = watch


# diffusers


def can_checkpoint(model: Any) -> bool:
    """Whether a class of diffusers can keep fewer activations."""
    return bool(model._supports_gradient_checkpointing)


def set_checkpointing(module: Any, function: Callable[..., Any]) -> None:
    """Let a module of diffusers call its blocks through ``function``."""
    module.gradient_checkpointing = True
    module._gradient_checkpointing_func = function


def causal_padding(conv: Any) -> Sequence[int] | None:
    """A convolution's (left, right, top, bottom, before, after), if it is causal in time."""
    return getattr(conv, "_padding", None)


# The dry run, which alone imports these: training does not depend on them


def fake_store() -> Any:
    """A store for the process group "fake", whose collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def finished_work(tensors: list[Tensor]) -> Any:
    """A collective that is done, with this result."""
    from torch._C._distributed_c10d import (  # type: ignore[attr-defined]
        _create_work_from_future,
    )

    future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    future.set_result(tensors)
    return _create_work_from_future(future).boxed()


def real_tensors() -> Any:
    """A context within a FakeTensorMode in which tensors are real."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def value_needed_error() -> type[Exception]:
    """Raised where a fake tensor is asked for its value."""
    from torch._subclasses.fake_tensor import DataDependentOutputException

    return DataDependentOutputException
