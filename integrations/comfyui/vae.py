"""A LiteVAE with the interface of ComfyUI's VAE objects, which its VAE nodes call.

Pixels are (B, H, W, C) in [0, 1] there, latents (B, n_z, h, w) and the autoencoder's own: ComfyUI
scales them in the diffusion model's latent format, never in the VAE.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from comfy import model_management
from torch import Tensor

from olvae import LiteVAE, config_inside


class VAE:
    """A LiteVAE for ComfyUI's nodes, on its device while it works,
    and on its offload device in between.

    Args:
        model: in evaluation mode.
        memory: bytes that encoding and decoding may take beside images and weights. What does not
            fit is computed in parts that know their surroundings: equal to rounding, without seams.
    """

    latent_dim = 2

    def __init__(self, model: LiteVAE, memory: int) -> None:
        self.device: torch.device = model_management.vae_device()
        self.offload_device: torch.device = model_management.vae_offload_device()
        self.output_device: torch.device = model_management.intermediate_device()
        self.vae_dtype = torch.float32
        self.first_stage_model = model.to(self.offload_device)
        self.memory = memory
        self.downscale_ratio = model.downscale
        self.upscale_ratio = model.upscale  # twice as much for a decoder at 2x
        self.latent_channels = model.latent_channels
        self.output_channels = model.decoder.out_channels

    @classmethod
    def from_file(cls, path: str | Path, memory: int) -> "VAE":
        """Load a file of ``olvae export --format comfyui``.

        Raises:
            ValueError: it is another file, or broken.
        """
        if config_inside(Path(path)) is None:
            raise ValueError(
                f"{path}: not a LiteVAE for ComfyUI: olvae export TARGET --format comfyui writes "
                "one; other VAEs are for the node Load VAE"
            )
        return cls(LiteVAE.from_pretrained(path), memory)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, H, W, C) in [0, 1] -> the posterior's means, (B, n_z, H/f, W/f).

        Sides are cropped to multiples of f around the middle, as ComfyUI does.

        Raises:
            ValueError: the image is smaller than f, or the memory is too small.
        """
        x = self.vae_encode_crop_pixels(pixels).movedim(-1, 1)  # (B, C, H, W)
        if 0 in x.shape:
            raise ValueError(
                f"an image of {pixels.shape[2]}x{pixels.shape[1]} pixels: at least "
                f"{self.downscale_ratio}"
            )
        with self._at_work() as model:
            x = x.to(self.device, self.vae_dtype) * 2 - 1
            return model.encode_within(x, self.memory).mode().to(self.output_device)

    def decode(self, samples: Tensor, vae_options: Any = None) -> Tensor:  # noqa: ARG002  (ComfyUI's signature)
        """Latents (B, n_z, h, w) -> pixels (B, f h, f w, C) in [0, 1], f = upscale_ratio.

        Raises:
            ValueError: the latents have other channels, or the memory is too small.
        """
        return self._decode(samples, None)

    def decode_tiled(
        self, samples: Tensor, tile_x: int = 64, tile_y: int = 64, *_: Any, **__: Any
    ) -> Tensor:
        """As :meth:`decode`, in tiles of the smaller of these sides, in latent positions.

        An overlap need not be given: tiles know their surroundings.
        """
        return self._decode(samples, min(tile_x, tile_y))

    def encode_tiled(self, pixels: Tensor, *_: Any, **__: Any) -> Tensor:
        """As :meth:`encode`, which is computed in parts already where the memory needs it."""
        return self.encode(pixels)

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) to sides that are multiples of f, around the middle,
        and without further channels."""
        for axis in (1, 2):
            size, extra = pixels.shape[axis], pixels.shape[axis] % self.downscale_ratio
            pixels = pixels.narrow(axis, extra // 2, size - extra)
        return pixels[..., : self.first_stage_model.in_channels]

    def spacial_compression_encode(self) -> int:
        return self.downscale_ratio

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio

    def temporal_compression_decode(self) -> None:
        """An image VAE has none."""

    def get_sd(self) -> NoReturn:
        """What VAESave writes; it would lose the config, without which the weights can't be loaded.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Save VAE can't write a LiteVAE, whose file has its config in it: copy the file in "
            "models/vae, or write another with olvae export --format comfyui"
        )

    def throw_exception_if_invalid(self) -> None:
        """Nothing to check: :meth:`from_file` has."""

    def _decode(self, samples: Tensor, tile: int | None) -> Tensor:
        z = samples[:, :, 0] if samples.ndim == 5 else samples  # a video latent of one frame
        if z.shape[1] != self.latent_channels:
            raise ValueError(
                f"a latent of {z.shape[1]} channels, but this VAE's have {self.latent_channels}: "
                "it is for another diffusion model"
            )
        with self._at_work() as model:
            z = z.to(self.device, self.vae_dtype)
            # (B, C, f h, f w)
            x = model.decode_tiled(z, tile, self.memory if tile is None else None)
            return ((x + 1) / 2).clamp(0, 1).movedim(1, -1).to(self.output_device)

    @contextmanager
    def _at_work(self) -> Iterator[LiteVAE]:
        """The model on its device, in inference mode; back on the offload device afterwards."""
        model = self.first_stage_model
        if self.device.type != "cpu":
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            model_management.free_memory(weights + self.memory, self.device)
        try:
            model.to(self.device)
            with torch.inference_mode():
                yield model
        finally:
            model.to(self.offload_device)
