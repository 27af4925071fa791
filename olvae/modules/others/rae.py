"""diffusers' AutoencoderRAE as our encoder and decoder, under its own names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from olvae.modules.base import Decoder, Encoder
from olvae.modules.distributions import deterministic_moments
from olvae.modules.others.wrapped import decode_image, encode_image


def _half(config: Mapping[str, Any], other: str) -> Any:
    """Build the autoencoder without its ``other`` half.

    ValueError if transformers, whose network the encoder is, is not installed.
    """
    # Takes seconds, so it is imported for this network only.
    from diffusers import AutoencoderRAE

    try:
        model = AutoencoderRAE.from_config(dict(config))
    except NameError as error:
        raise ValueError("AutoencoderRAE needs transformers: pip install transformers") from error
    setattr(model, other, nn.Identity())
    return model


class RAEEncoder(Encoder):
    """The frozen vision encoder of an AutoencoderRAE, with its normalisation of latents.

    It takes images of one size, ``side``. Its latents have no distribution, and no noise: for that
    is the part :class:`~olvae.models.parts.random_noise.RandomNoise`.

    Args:
        config: the content of its config.json.
        latent_dim, in_channels, image_size: as LiteVAE_Encoder's.
        downscale: pixels per latent position.

    Shapes: (B, in_channels, side, side) -> (B, latent_dim, side/f, side/f).
    """

    deterministic = True

    def __init__(
        self,
        config: Mapping[str, Any],
        latent_dim: int,
        in_channels: int = 3,
        image_size: int = 256,
        downscale: int = 16,
    ) -> None:
        super().__init__(latent_dim, in_channels, downscale, image_size)
        self.model = _half(config, "decoder").requires_grad_(False).eval()
        self.side = int(self.model.decoder_image_size)

    def train(self, mode: bool = True) -> "RAEEncoder":
        """Stay in evaluation mode: else diffusers' encoder would add noise."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.side, self.side):
            raise ValueError(
                f"AutoencoderRAE takes images of {self.side}x{self.side} only, not "
                f"{x.shape[-2]}x{x.shape[-1]}"
            )
        latent, _ = encode_image(self.model, (x + 1) / 2, frames=False)
        return deterministic_moments(latent)


class RAEDecoder(Decoder):
    """The transformer that decodes in an AutoencoderRAE.

    Args:
        z_channels, out_channels: channels of the latent and of the image.
        upscale: pixels per latent position.
        config: as :class:`RAEEncoder`'s.

    Shapes: (B, z_channels, h, w) -> (B, out_channels, f h, f w), with h and w of one size.
    """

    def __init__(
        self, config: Mapping[str, Any], z_channels: int, out_channels: int = 3, upscale: int = 16
    ) -> None:
        super().__init__(z_channels, out_channels, upscale)
        self.model = _half(config, "encoder")

    @property
    def output_layer(self) -> nn.Linear:
        """The last layer, to patches, for :func:`~olvae.modules.base.last_convolution`."""
        layer: nn.Linear = self.model.decoder.decoder_pred
        return layer

    def forward(self, z: Tensor) -> Tensor:
        return 2 * decode_image(self.model, z, frames=False) - 1
