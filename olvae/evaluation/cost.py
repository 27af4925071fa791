"""What an autoencoder costs: parameters, operations, time, memory."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from olvae.models.autoencoder import Autoencoder
from olvae.modules.counting import count_macs, count_parameters

__all__ = ["Cost", "Meter", "peak_memory"]

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Of one image of the size that was evaluated; speeds and memory of the batches and the device that were used.

    ``batch_size`` is that of the largest batch there was: fewer images than were asked for may be all there are.

    ``peak_memory_bytes`` is what encoding and decoding one batch takes beyond weights and images; None where the
    system does not tell.
    """

    parameters: int
    encode_macs: int
    decode_macs: int
    encode_images_per_s: float | None
    decode_images_per_s: float | None
    peak_memory_bytes: int | None
    batch_size: int
    device: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Meter:
    """Takes the time of encoding and decoding, and the memory of one batch.

    The first batch warms up: its time does not count, unless it is the only one. The second one's memory is taken,
    so that its time does not count either, unless there is no third.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.peak: int | None = None
        self._seconds: dict[str, list[tuple[int, float]]] = {"encode": [], "decode": []}

    def run(self, part: str, images: int, work: Callable[[], T]) -> T:
        """Do the work, ``encode`` or ``decode`` of so many images, and take its time."""
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        self._seconds[part].append((images, time.perf_counter() - start))
        return result

    @property
    def batches(self) -> int:
        return len(self._seconds["decode"])

    def rate(self, part: str) -> float | None:
        """Images per second."""
        taken = self._seconds[part]
        counted = taken[2:] or taken[1:] or taken
        seconds = sum(s for _, s in counted)
        return sum(n for n, _ in counted) / seconds if seconds else None

    def cost(self, model: Autoencoder, size: int) -> Cost:
        """Everything together."""
        gpu = self.device.type == "cuda"
        latent = size // model.downscale
        return Cost(
            parameters=count_parameters(model),
            encode_macs=count_macs(_Part(model, "encode"), 1, model.in_channels, size, size),
            decode_macs=count_macs(_Part(model, "decode"), 1, model.latent_channels, latent, latent),
            encode_images_per_s=self.rate("encode"),
            decode_images_per_s=self.rate("decode"),
            peak_memory_bytes=self.peak,
            batch_size=max((images for images, _ in self._seconds["decode"]), default=0),
            device=torch.cuda.get_device_name(self.device) if gpu else _cpu(),
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


class _Part(nn.Module):
    """One direction of an autoencoder as a module's forward pass."""

    def __init__(self, model: Autoencoder, part: str) -> None:
        super().__init__()
        self.model = model
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode(x).mean if self.part == "encode" else self.model.decode(x)


@contextmanager
def peak_memory(device: torch.device, report: Callable[[int], None]) -> Iterator[None]:
    """Report how many bytes more than before were in use at once: on a GPU by its allocator, on Linux's CPUs by the
    resident set, which the system keeps to a few per cent; elsewhere nothing is reported.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        report(torch.cuda.max_memory_allocated(device) - before)
        return
    reset = Path("/proc/self/clear_refs")
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not pass for free of charge
        reset.write_text("5")  # the peak becomes what is resident now
    except (OSError, AttributeError):
        yield
        return
    before = _resident("VmRSS")
    yield
    report(max(0, _resident("VmHWM") - before))


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
