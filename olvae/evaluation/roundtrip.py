"""Reconstruct images with an autoencoder under a protocol's choices, and measure what that costs."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from olvae.data.image import from_uint8, to_uint8
from olvae.models.autoencoder import Autoencoder
from olvae.modules.base import count_macs, count_parameters
from olvae.modules.distributions import keyed_generator
from olvae.modules.precision import full_float32


class Reconstructed(NamedTuple):
    """The posterior's means, (B, n_z, H/f, W/f) on the device, and images, uint8 (B, C, H, W) on the CPU."""

    latents: Tensor
    images: Tensor


class RoundTrip:
    """Encode and decode in float32; clamp and round to uint8.

    Args:
        model: in evaluation mode.
        device: where it runs; images come and go on the CPU.
        seed: None takes the posterior's mode; a number one sample, whose noise depends on it and on the image's key.
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
    def __call__(self, keys: Sequence[str], x: Tensor) -> Reconstructed:
        """Reconstruct images, uint8 (B, C, H, W).

        Raises:
            ArithmeticError: a reconstruction is not finite, which uint8 would hide.
        """
        images = from_uint8(x.to(self.device))
        with full_float32(images), self.meter.batch():
            posterior = self.meter.run("encode", len(images), lambda: self.model.encode(images))
            z = posterior.mode()  # (B, n_z, H/f, W/f)
            if self.seed is not None and not posterior.deterministic:
                generators = [keyed_generator(f"{self.seed} {key}") for key in keys]
                noise = [torch.randn(z.shape[1:], generator=generator) for generator in generators]
                z = z + posterior.std * torch.stack(noise).to(z)
            y = self.meter.run("decode", len(images), lambda: self.model.decode(z))
        finite = y.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise ArithmeticError(f"{self.name}: its reconstruction of {keys[finite.index(False)]} is not finite")
        return Reconstructed(posterior.mean, to_uint8(y).cpu())

    def cost(self, size: int) -> "Cost":
        """What images of ``size`` pixels cost, as counted and as measured so far."""
        return self.meter.cost(self.model, size)


@dataclass(frozen=True)
class Cost:
    """What one image of the evaluated size costs. Speed and memory are those of this run's batches and device.

    Args:
        parameters: of the whole model.
        encode_macs, decode_macs: multiply-accumulates per image.
        encode_images_per_s, decode_images_per_s: None if nothing was measured.
        peak_memory_bytes: what encoding and decoding one batch takes beyond weights and images, measured by the
            allocator of a GPU; None on the CPU, where nothing measures it.
        batch_size: of the largest batch; it is smaller than requested if there are few images.
        device: the GPU's name, or the CPU with its threads.
    """

    parameters: int
    encode_macs: int
    decode_macs: int
    encode_images_per_s: float | None
    decode_images_per_s: float | None
    peak_memory_bytes: int | None
    batch_size: int
    device: str

    def unmeasured(self) -> "Cost":
        """Without speed and memory."""
        return replace(self, encode_images_per_s=None, decode_images_per_s=None, peak_memory_bytes=None)


T = TypeVar("T")
Direction = Literal["encode", "decode"]


class Meter:
    """Measures the time of encoding and decoding, and on a GPU the memory.

    The first batch warms up and is not counted, unless it is the only one.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._gpu = self.device.type == "cuda"
        self._seconds: dict[Direction, list[tuple[int, float]]] = {"encode": [], "decode": []}
        self._peaks: list[int] = []

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Measure the memory that the work in this context takes."""
        if not self._gpu:
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        self._peaks.append(torch.cuda.max_memory_allocated(self.device) - before)

    def run(self, direction: Direction, images: int, work: Callable[[], T]) -> T:
        """Encode or decode a number of images, and measure the time."""
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        self._seconds[direction].append((images, time.perf_counter() - start))
        return result

    def _rate(self, direction: Direction) -> float | None:
        """Images per second."""
        counted = _warm(self._seconds[direction])
        seconds = sum(s for _, s in counted)
        return sum(n for n, _ in counted) / seconds if seconds else None

    def cost(self, model: Autoencoder, size: int) -> Cost:
        """The cost of images of ``size`` pixels: counted from the model, and as measured here."""
        latent = size // model.downscale
        threads = torch.get_num_threads()
        cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        return Cost(
            parameters=count_parameters(model),
            encode_macs=count_macs(OneWay(model, "encode"), 1, model.in_channels, size, size),
            decode_macs=count_macs(OneWay(model, "decode"), 1, model.latent_channels, latent, latent),
            encode_images_per_s=self._rate("encode"),
            decode_images_per_s=self._rate("decode"),
            peak_memory_bytes=max(_warm(self._peaks), default=None),
            batch_size=max((images for images, _ in self._seconds["decode"]), default=0),
            device=torch.cuda.get_device_name(self.device) if self._gpu else cpu,
        )

    def _wait(self) -> None:
        if self._gpu:
            torch.cuda.synchronize(self.device)


def _warm(measured: list[T]) -> list[T]:
    """All but the first batch, if there are others."""
    return measured[1:] or measured


class OneWay(nn.Module):
    """One direction of an autoencoder as a module's forward pass."""

    def __init__(self, model: Autoencoder, direction: Direction) -> None:
        super().__init__()
        self.model = model
        self._encodes = direction == "encode"

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode(x).mean if self._encodes else self.model.decode(x)
