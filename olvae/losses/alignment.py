"""VA-VAE's alignment of a latent with a vision encoder's features (Yao et al. 2025), two terms; in float32."""

import torch.nn.functional as F
from torch import Tensor

from olvae.modules.precision import island, no_autocast

__all__ = ["marginal_cosine_loss", "marginal_distance_loss"]


def marginal_cosine_loss(projected: Tensor, features: Tensor, margin: float = 0.5) -> Tensor:
    """Mean over positions of relu(1 - margin - cos(projected, features)): position by position.

    Args:
        projected: the latent, by a linear projection, (B, d, h, w).
        features: (B, d, h, w).
        margin: a cosine above 1 - margin costs nothing.

    Returns:
        A scalar; gradients flow to both.
    """
    cosine = F.cosine_similarity(island(projected), island(features), dim=1)  # (B, h, w)
    return F.relu(1.0 - margin - cosine).mean()


def marginal_distance_loss(z: Tensor, features: Tensor, margin: float = 0.25) -> Tensor:
    """Mean over pairs of positions i, j of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin): how positions relate.

    Args:
        z: the latent, (B, n_z, h, w).
        features: (B, d, h, w).
        margin: a difference of cosines below it costs nothing.

    Returns:
        A scalar; gradients flow to both. Memory grows with (h w)^2.
    """
    return F.relu((_cosines(z) - _cosines(features)).abs() - margin).mean()


def _cosines(x: Tensor) -> Tensor:
    """Of all pairs of positions of each sample: (B, C, h, w) -> (B, h w, h w)."""
    unit = F.normalize(island(x).flatten(2), dim=1)  # (B, C, h w)
    with no_autocast(unit):
        return unit.transpose(1, 2) @ unit
