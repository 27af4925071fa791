"""What a compiled training would launch on an H100, counted on a machine without one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from torch._dynamo.device_interface import CpuInterface
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.ir import MultiOutput
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def on_an_h100(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are fused as for Triton on a GPU of so many processors."""
    h100 = SimpleNamespace(multi_processor_count=132)
    patch.setattr(CpuInterface, "get_device_properties", lambda _: h100)
    patch.setattr(CpuInterface.Worker, "get_device_properties", lambda _: h100)
    DeviceProperties.create.cache_clear()
    settings = {"cpu_backend": "triton", "layout_optimization": False, "fx_graph_cache": False}
    with inductor.patch(settings):
        yield
    DeviceProperties.create.cache_clear()


class Launches(TorchDispatchMode):
    """Counts what is launched: kernels of graphs, as inductor fuses them for Triton,
    and operations beside them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.in_graph = 0, False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        nothing = func.is_view or func.namespace in ("prim", "profiler") or "empty" in str(func)
        self.count += not (self.in_graph or nothing)
        return func(*args, **(kwargs or {}))

    def compile(self, graph, inputs):
        return compile_fx(graph, inputs, inner_compile=self.schedule)

    def schedule(self, graph, inputs, **options):
        """Stop where kernels are fused, before their code is written;
        the graph then runs as it is.
        """
        kernels = []

        def stop(nodes):
            kernels.extend(n for n in nodes if not isinstance(n, NopKernelSchedulerNode))
            raise RuntimeError("all kernels are known")

        with inductor.patch(_post_fusion_custom_pass=stop), suppress(Exception):
            compile_fx_inner(copy.deepcopy(graph), inputs, **options)
        launched = sum(not isinstance(kernel.node, MultiOutput) for kernel in kernels)
        assert launched > 0

        def run(values):
            self.in_graph = True
            try:
                return graph(*values)
            finally:
                self.in_graph = False
                self.count += launched
                values.clear()

        run._boxed_call = True
        return run
