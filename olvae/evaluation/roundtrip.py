"""From images to their reconstructions: by an autoencoder, under a protocol's choices, or by a baseline."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from typing import Protocol as Interface

import torch
from PIL import Image
from torch import Tensor, nn

from olvae.data.image import Bands, from_uint8, image_to_tensor, tensor_to_picture, to_uint8
from olvae.models.autoencoder import Autoencoder
from olvae.modules.base import count_macs, count_parameters
from olvae.modules.distributions import keyed_generator
from olvae.modules.precision import full_float32

__all__ = ["AutoencoderRoundTrip", "Cost", "Meter", "RoundTrip", "bicubic_round_trip", "peak_memory"]


class RoundTrip(Interface):
    """Keys and images, uint8 (B, C, H, W) on the CPU, to reconstructions of the same kind."""

    def __call__(self, keys: Sequence[str], x: Tensor, /) -> Tensor: ...


class AutoencoderRoundTrip:
    """Encodes and decodes in float32; clamps and rounds.

    Args:
        model: in evaluation mode.
        device: where it runs; the images come and go on the CPU.
        seed: None for the posterior's mode; else one sample, whose noise depends on the seed and the image's key.
        name: of the model, for messages.
    """

    def __init__(
        self, model: Autoencoder, device: str = "cpu", seed: int | None = None, name: str = "the autoencoder"
    ) -> None:
        self.model = model.to(device)
        self.device = device
        self.seed = seed
        self.name = name
        self.meter = Meter(device)

    @torch.inference_mode()
    def __call__(self, keys: Sequence[str], x: Tensor) -> Tensor:
        """uint8 to uint8.

        Raises:
            ArithmeticError: a reconstruction is not finite, which no picture could show.
        """
        images = from_uint8(x.to(self.device))
        with full_float32(images):
            if self.meter.batches != 1:
                return self._pass(keys, images)
            with peak_memory(torch.device(self.device), self._keep_peak):
                return self._pass(keys, images)

    def _pass(self, keys: Sequence[str], images: Tensor) -> Tensor:
        posterior = self.meter.run("encode", len(images), lambda: self.model.encode(images))
        z = posterior.mode()  # (B, n_z, H/f, W/f)
        if self.seed is not None and not posterior.deterministic:
            z = z + posterior.std * self._noise(keys, z)
        y = self.meter.run("decode", len(images), lambda: self.model.decode(z))
        finite = y.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise ArithmeticError(f"{self.name}: its reconstruction of {keys[finite.index(False)]} is not finite")
        return to_uint8(y).cpu()

    def _noise(self, keys: Sequence[str], z: Tensor) -> Tensor:
        generators = [keyed_generator(f"{self.seed} {key}") for key in keys]
        return torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in generators]).to(z)

    def _keep_peak(self, peak: int) -> None:
        self.meter.peak = peak


def bicubic_round_trip(factor: int) -> RoundTrip:
    """A round trip through an image that is ``factor`` times smaller, both ways by Pillow's antialiased bicubic."""

    def reconstruct(keys: Sequence[str], x: Tensor, /) -> Tensor:  # noqa: ARG001  (the same for every key)
        return torch.stack([image_to_tensor(round_trip(tensor_to_picture(image))) for image in x])

    def round_trip(image: Bands) -> Bands:
        small = image.resize((image.width // factor, image.height // factor), Image.Resampling.BICUBIC)
        return small.resize(image.size, Image.Resampling.BICUBIC)

    return reconstruct


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
