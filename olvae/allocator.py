"""Host memory that stays with the process, so that the same pages serve tensor after tensor."""

import ctypes
import platform

__all__ = ["keep_freed_memory"]

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of mallopt(3), from malloc.h."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; returns whether the C library can be told.

    glibc gives blocks of over 32 MB back to the system at once, and gets fresh pages for the next tensor, which the
    system clears first. On a CPU that takes up to half of the time of a network on large images. From then on a process
    holds its peak, and may hold half as much again in gaps: not for commands that promise a limit on memory. Other C
    libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(MMAP_MAX, 0)) and bool(set_option(TRIM_THRESHOLD, -1))
