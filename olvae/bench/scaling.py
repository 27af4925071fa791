"""How the time and memory of a network grow with pixels and batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olvae.bench.networks import DECODERS, ENCODERS, FACTOR, LATENT, forward_bytes
from olvae.bench.timing import clocked, measure
from olvae.figures import plot_panels
from olvae.models.large.tiling import default_memory, peak_bytes
from olvae.modules.base import Decoder
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder

__all__ = ["BATCHES", "NETWORKS", "SIZES", "bench_scaling", "plot_scaling"]

SIZES = {"cpu": [128, 256, 512, 1024], "cuda": [256, 512, 1024, 2048]}
BATCHES = {"cpu": [1, 4], "cuda": [1, 4, 16]}

NETWORKS: Mapping[str, Mapping[str, Callable[[], nn.Module]]] = {
    "cpu": {
        "encoder S": ENCODERS["S"],
        "decoder of 32 channels": partial(
            LiteVAE_Decoder,
            z_channels=LATENT,
            channels=32,
            channel_mult=(1, 1, 2, 2),
            num_res_blocks=0,
            output="wavelet",
        ),
    },
    "cuda": {"encoder B": ENCODERS["B"], "decoder": DECODERS["open_litevae"]},
}
"""By device; on a CPU small ones."""


def bench_scaling(
    sizes: Sequence[int], batches: Sequence[int], device: str, rounds: int, memory: int | None = None
) -> list[dict[str, Any]]:
    """Time forward passes of an encoder and a decoder at sizes and batches in turn; float32, without gradients.

    Sizes and batches whose pass is computed to take more memory than the limit are left out.

    Args:
        sizes: pixels along a side.
        rounds: of all, after one that warms up.
        memory: the limit in bytes; by default :func:`~olvae.models.large.tiling.default_memory`.

    Returns:
        For each network, size and batch_size: name, median_ms, spread_ms, ns_per_pixel, relative (to the network's
        smallest, in pixels of a batch), bytes_per_pixel and peak_memory_bytes, which is measured on a GPU and computed
        from shapes on the CPU.
    """
    kind = device.partition(":")[0]
    networks = {name: build().eval().to(device) for name, build in NETWORKS[kind].items()}
    limit = default_memory(torch.device(device)) if memory is None else memory
    inputs: dict[tuple[str, int, int], Tensor] = {}
    for name, network in networks.items():
        for size in sizes:
            for batch in batches:
                shape = _shape(network, size, batch)
                if peak_bytes(network, lambda module, x: module(x), shape) <= limit:
                    inputs[name, size, batch] = torch.randn(shape, device=device)
    with torch.inference_mode():
        work = {key: clocked(partial(networks[key[0]], x), device) for key, x in inputs.items()}
        times = measure(work, device, rounds)
    used = {key: forward_bytes(networks[key[0]], x) for key, x in inputs.items()}
    rows: list[dict[str, Any]] = []
    smallest: dict[str, float] = {}
    for key in sorted(inputs, key=lambda key: (list(networks).index(key[0]), key[1] ** 2 * key[2])):
        name, size, batch = key
        pixels = size**2 * batch
        each = times[key].median / pixels
        rows.append(
            {
                "name": name,
                "size": size,
                "batch_size": batch,
                "median_ms": 1e3 * times[key].median,
                "spread_ms": 1e3 * times[key].spread,
                "ns_per_pixel": 1e9 * each,
                "relative": each / smallest.setdefault(name, each),
                "bytes_per_pixel": used[key] / pixels,
                "peak_memory_bytes": used[key],
            }
        )
    return rows


def _shape(network: nn.Module, size: int, batch: int) -> tuple[int, int, int, int]:
    if isinstance(network, Decoder):
        return batch, LATENT, size // FACTOR, size // FACTOR
    return batch, 3, size, size


def plot_scaling(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the rows of :func:`bench_scaling`: time relative to the smallest, and memory, per pixel; a line a batch."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in sorted(rows, key=lambda row: int(row["size"])):
        for key, title in (("relative", "time per pixel, relative"), ("bytes_per_pixel", "bytes per pixel")):
            curves = panels.setdefault(f"{row['name']}: {title}", {})
            along, values = curves.setdefault(f"batch {row['batch_size']}", ([], []))
            along.append(row["size"])
            values.append(row[key])
    plot_panels(panels, path, "pixels along a side", from_zero=True)
