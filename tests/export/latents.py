"""A tiny autoencoder whose latents are worth something, and folders of its latents."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olvae import LiteVAE
from olvae.data.image import EvalTransform, image_to_tensor, read_picture
from olvae.data.picture_folder import find_images
from olvae.data.pixels.size_and_range import from_uint8
from olvae.export.encode_inputs import EncodeOptions, find_inputs
from olvae.export.encoding import EncodeJob
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Deterministic, DiagonalGaussian
from tests.conftest import one_width, tiny


def tiny_vae(seed: int = 0) -> LiteVAE:
    torch.manual_seed(seed)
    return tiny(encoder_config=one_width(), initial_logvar=-3.0)


class Shrunk(Autoencoder):
    """A deterministic autoencoder: its latent is the image, shrunk twice."""

    in_channels, downscale, latent_channels = 3, 2, 3

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def encode(self, x: Tensor) -> Deterministic:
        return Deterministic(torch.nn.functional.avg_pool2d(x, 2) * self.gain)

    def decode(self, z: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(z / self.gain, scale_factor=2)


class Blocks(Autoencoder):
    """A distribution whose element at a position is a function of the 4x4 pixels there,
    and of no others.
    """

    in_channels, downscale, latent_channels = 3, 4, 48

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def encode(self, x: Tensor) -> DiagonalGaussian:
        mean = torch.nn.functional.pixel_unshuffle(x, 4) * self.gain
        return DiagonalGaussian(torch.cat([mean, 2.0 * mean - 3.0], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(z / self.gain, 4)


def encode(
    source: Path | str,
    folder: Path,
    model: Autoencoder | None = None,
    shard_size: int = 5,
    **options: Any,
):
    """What the command does, in this process, which also reads the images; stats.json's content."""
    model = tiny_vae() if model is None else model
    batches = {"batch_size": options.pop("batch_size", 3), "workers": options.pop("workers", 0)}
    inputs = find_inputs(str(source), 3, shard_size, options.pop("classes", False))
    encoder = EncodeJob(
        model, inputs, EncodeOptions(**{"size": 16, **options}), folder, {"target": "tiny"}
    )
    encoder.run(**batches)
    return encoder.finish()


def pictures(folder: Path, size: int = 16) -> Tensor:
    """All images of a folder as a model takes them, in the order of their paths."""
    images = [
        image_to_tensor(EvalTransform(size)(read_picture(path))) for path in find_images(folder)
    ]
    return from_uint8(torch.stack(images))


def everything(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, not those of the folders in it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
