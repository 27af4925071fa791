"""From images to their reconstructions: by an autoencoder, under a protocol's choices, or by a baseline."""

import hashlib
from collections.abc import Sequence
from typing import Protocol as Interface

import torch
from PIL import Image
from torch import Tensor

from olvae.data.pixels import Bands, from_uint8, image_to_tensor, tensor_to_picture, to_uint8
from olvae.evaluation.cost import Meter, peak_memory
from olvae.models.autoencoder import Autoencoder
from olvae.modules.precision import full_float32

__all__ = ["AutoencoderReconstruction", "Reconstruct", "bicubic_reconstruction"]


class Reconstruct(Interface):
    """Keys and images, uint8 (B, C, H, W) on the CPU, to reconstructions of the same kind."""

    def __call__(self, keys: Sequence[str], x: Tensor, /) -> Tensor: ...


class AutoencoderReconstruction:
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
        draws = []
        for key in keys:
            digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            draws.append(torch.randn(z.shape[1:], generator=generator))
        return torch.stack(draws).to(z)

    def _keep_peak(self, peak: int) -> None:
        self.meter.peak = peak


def bicubic_reconstruction(factor: int) -> Reconstruct:
    """A round trip through an image that is ``factor`` times smaller, both ways by Pillow's antialiased bicubic."""

    def reconstruct(keys: Sequence[str], x: Tensor, /) -> Tensor:  # noqa: ARG001  (the same for every key)
        return torch.stack([image_to_tensor(round_trip(tensor_to_picture(image))) for image in x])

    def round_trip(image: Bands) -> Bands:
        small = image.resize((image.width // factor, image.height // factor), Image.Resampling.BICUBIC)
        return small.resize(image.size, Image.Resampling.BICUBIC)

    return reconstruct
