"""What an autoencoder asks of its two halves; derive from these to bring your own."""

from torch import nn

__all__ = ["Decoder", "Encoder"]


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) to (B, latent_dim, H/downscale, W/downscale)."""

    in_channels: int
    latent_dim: int
    downscale: int
    image_size: int
    """The size in pixels at which the model is meant to be used: what summaries count operations at."""


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) to images (B, out_channels, upscale h, upscale w)."""

    z_channels: int
    out_channels: int
    upscale: int
