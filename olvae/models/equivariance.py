"""An auxiliary regulariser in the manner of EQ-VAE (Kouzelis et al. 2025): scaled and rotated latents should decode
to scaled and rotated images."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SCALES", "transform_alike"]

SCALES = (0.25, 0.5, 0.75, 1.0)


def transform_alike(z: Tensor, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scale and rotate a latent, and the image that it should decode to, in the same way.

    The scale is one of :data:`SCALES` that leaves whole latent positions; the rotation a multiple of 90 degrees.
    Both are the same for the batch. Scaling is bilinear and antialiased, in float32.

    Args:
        z: (B, n_z, h, w).
        x: (B, C, f h, f w).
        generator: on the CPU.

    Returns:
        z and x at (s h, s w) and (s f h, s f w), turned; x has no gradient.
    """
    h, w = z.shape[-2:]
    scales = [s for s in SCALES if (s * h).is_integer() and (s * w).is_integer()]
    scale = scales[int(torch.randint(len(scales), (), generator=generator))]
    turns = int(torch.randint(4, (), generator=generator))

    def transform(t: Tensor) -> Tensor:
        if scale != 1.0:
            size = [round(scale * side) for side in t.shape[-2:]]
            t = F.interpolate(t.float(), size=size, mode="bilinear", antialias=True)
        return t.rot90(turns, dims=(-2, -1))

    return transform(z), transform(x)
