"""A small diffusion transformer on latents: for the diffusion prior and the examples."""

from typing import Any, cast

import torch
from torch import Tensor, nn

# Channels of an attention head.
HEAD = 32


class DiT(nn.Module):
    """diffusers' diffusion transformer without classes.

    It gives the velocity on the straight line from a latent to noise. Each block begins as the
    identity (adaLN-Zero), and the velocity as 0. It works on square latents of any side that the
    patch divides.

    Args:
        shape: of a latent, (n_z, h, w), to which the embedding of positions is scaled.
        width: of a token, a multiple of 32.
        depth: number of blocks.
        patch: positions of the latent, along each side, that make a token.

    Raises ValueError: latents of this shape are not divided into patches, or not square; the width
    is not divided into heads.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, depth: int, patch: int) -> None:
        super().__init__()
        channels, height, side = shape
        if height != side or side % patch:
            raise ValueError(
                f"latents of {height}x{side}: a diffusion transformer needs square ones, whose "
                f"side a `patch` of {patch} divides"
            )
        if width % HEAD:
            raise ValueError(
                f"`width` {width}: give a multiple of {HEAD}, the width of an attention head"
            )
        # Takes seconds, so it is imported for this network only.
        from diffusers import DiTTransformer2DModel

        network = DiTTransformer2DModel(
            num_attention_heads=width // HEAD,
            attention_head_dim=HEAD,
            in_channels=channels,
            num_layers=depth,
            sample_size=side,
            patch_size=patch,
            num_embeds_ada_norm=1,
        )
        self.network = cast("Any", network)
        self.eval()
        for layer in (
            *(block.norm1.linear for block in self.network.transformer_blocks),
            self.network.proj_out_1,
            self.network.proj_out_2,
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def train(self, mode: bool = True) -> "DiT":  # noqa: ARG002
        """Stay in evaluation mode: else it would drop the one class there is at random."""
        return super().train(False)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """(B, n_z, h, w) and times (B,) in [0, 1], where 1 is noise -> velocity (B, n_z, h, w)."""
        label = torch.zeros(len(z), dtype=torch.long, device=z.device)
        velocity: Tensor = self.network(z, 1000 * t, class_labels=label).sample
        return velocity
