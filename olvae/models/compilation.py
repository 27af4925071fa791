"""torch.compile for networks that are trained or encode."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from olvae.devices import this_process

__all__ = ["compile_networks"]

log = logging.getLogger("olvae")


def compile_networks(networks: Sequence[nn.Module], device: torch.device) -> bool:
    """Compile the networks in place, at their first use; names in their state dicts and copies of them stay plain.

    Inductor writes C++ for a CPU and Triton for a GPU, both of which need a compiler on the machine. Without one the
    networks stay as they are, and one line says so.

    Returns:
        Whether they are compiled.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds: InductorError, InvalidCxxCompiler, CalledProcessError, ...
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if this_process()[0] == 0:
            log.warning("compile: the networks run uncompiled, because no compiler works here (%s)", reason[0])
        return False
    # A ratio of gradients goes through a graph before its backward pass, which must not reuse the graph's memory.
    torch._functorch.config.donated_buffer = False
    for network in networks:
        network.compile()
    return True
