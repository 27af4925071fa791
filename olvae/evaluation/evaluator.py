"""One pass over the test images: reconstruct, compare, keep what the report needs."""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from olvae.data.pixels import Bands, from_uint8, image_to_tensor, tensor_to_picture, to_uint8
from olvae.data.source import Batch
from olvae.metrics.psnr import psnr
from olvae.metrics.ssim import ssim
from olvae.models.autoencoder import Autoencoder

__all__ = ["METRICS", "Result", "autoencoder_reconstruction", "bicubic_reconstruction", "evaluate"]

METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
"""Names to functions of two batches of uint8 images that give one value per image."""

Reconstruct = Callable[[Tensor], Tensor]
"""uint8 (B, 3, H, W) to uint8 of the same shape."""


@dataclass(frozen=True)
class Result:
    """The metrics of one target, and its reconstructions of the images that the figure shows."""

    target: str
    n: int
    metrics: dict[str, float]
    skipped: dict[str, str]
    examples: Tensor

    def as_dict(self) -> dict[str, object]:
        return {"target": self.target, "n": self.n, "metrics": self.metrics, "skipped": self.skipped}


@torch.inference_mode()
def evaluate(
    contenders: Mapping[str, Reconstruct], batches: Iterable[Batch], metrics: Sequence[str], examples: Container[int]
) -> tuple[Tensor, list[Result]]:
    """Means over images of every metric, for several targets in one pass, accumulated in float64.

    Args:
        contenders: names to functions that reconstruct.
        batches: of the test images.
        metrics: names of :data:`METRICS`.
        examples: the places of images to keep.

    Returns:
        The images at those places, uint8 (N, C, H, W), and the results in the order of the contenders.

    Raises:
        ValueError: there are no images.
    """
    values: dict[str, dict[str, list[Tensor]]] = {name: {metric: [] for metric in metrics} for name in contenders}
    kept: dict[str, list[Tensor]] = {name: [] for name in contenders}
    inputs: list[Tensor] = []
    n = 0
    for batch in batches:
        x = batch["image"]
        chosen = [i for i in range(x.shape[0]) if n + i in examples]
        inputs += [x[i] for i in chosen]
        for name, reconstruct in contenders.items():
            y = reconstruct(x)
            kept[name] += [y[i] for i in chosen]
            for metric in metrics:
                values[name][metric].append(METRICS[metric](x, y))
        n += x.shape[0]
    if not n:
        raise ValueError("the test set has no images")
    return torch.stack(inputs), [_result(name, n, values[name], kept[name]) for name in contenders]


def _result(target: str, n: int, values: Mapping[str, list[Tensor]], kept: list[Tensor]) -> Result:
    means = {name: float(torch.cat(parts).double().mean()) for name, parts in values.items()}
    return Result(
        target,
        n,
        {name: value for name, value in means.items() if math.isfinite(value)},
        {name: f"{value}: some images are equal to the pixel" for name, value in means.items() if math.isinf(value)},
        torch.stack(kept),
    )


def autoencoder_reconstruction(model: Autoencoder, device: str = "cpu") -> Reconstruct:
    """From the posterior's mode, clamped and rounded; computed on a device, given back on the CPU."""
    model = model.to(device)

    def reconstruct(x: Tensor) -> Tensor:
        y, _ = model(from_uint8(x.to(device)))
        return to_uint8(y).cpu()

    return reconstruct


def bicubic_reconstruction(factor: int) -> Reconstruct:
    """A round trip through an image that is ``factor`` times smaller, both ways by Pillow's antialiased bicubic."""

    def reconstruct(x: Tensor) -> Tensor:
        return torch.stack([image_to_tensor(round_trip(tensor_to_picture(image))) for image in x])

    def round_trip(image: Bands) -> Bands:
        small = image.resize((image.width // factor, image.height // factor), Image.Resampling.BICUBIC)
        return small.resize(image.size, Image.Resampling.BICUBIC)

    return reconstruct
