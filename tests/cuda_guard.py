"""A device guard for a fake CUDA."""

import ctypes
from pathlib import Path

import torch


def stand_in_for_cuda_guard() -> None:
    """On a build without CUDA, autograd asks for a device guard where a parameter is used:
    the CPU's does nothing.
    """
    if not torch.cuda._is_compiled():
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        registry = (ctypes.c_void_p * 2).in_dll(
            library, "_ZN3c104impl26device_guard_impl_registryE"
        )
        registry[1] = registry[1] or registry[0]
