"""Stable Diffusion's autoencoder, the baseline [P App. F]: encoder and decoder from diffusers.

Together, with ``use_quant: true`` and the encoder's ``latent_dim`` at 2 n_z, they are the SD-VAE.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from olvae.library_internals import set_checkpointing
from olvae.modules.base import Decoder, Encoder, Enlarge, Steps, check_choice, check_counts
from olvae.modules.mixed_precision import casts_together

Padding = Literal["zeros", "reflect"]


class _Half(Steps):
    """Wrap diffusers' network, built from a width, its multiples and blocks per level."""

    model: nn.Module

    def _build(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        norm_groups: int,
        attention: bool,
        attention_levels: Sequence[int],
        padding: Padding,
    ) -> None:
        # Takes seconds, so it is imported for this network only.
        from diffusers.models.autoencoders import vae

        check_counts(0, num_res_blocks=num_res_blocks)
        levels = len(channel_mult)
        for level in attention_levels:
            if level not in range(levels):
                raise ValueError(f"attention_levels: {level}: there are levels 0 to {levels - 1}")
        shared: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "block_out_channels": tuple(channels * m for m in channel_mult),
            "layers_per_block": num_res_blocks,
            "norm_num_groups": norm_groups,
            "mid_block_add_attention": attention,
        }
        blocks = block_types(levels, attention_levels, attention_levels)
        if isinstance(self, Encoder):
            down = tuple(blocks["down_block_types"])
            self.model = vae.Encoder(down_block_types=down, double_z=False, **shared)
        else:
            up = tuple(blocks["up_block_types"])
            self.model = vae.Decoder(up_block_types=up, **shared)
        set_padding(self.model, padding)

    def checkpoint_steps(self, on: bool = True) -> None:
        super().checkpoint_steps(on)
        # diffusers then calls this function for each level and the middle; `step` decides.
        set_checkpointing(self.model, self.step)


class SDEncoder(_Half, Encoder):
    """Stable Diffusion's convolutional encoder with attention in the middle.

    Args:
        latent_dim, in_channels, image_size: as LiteVAE_Encoder's.
        channels, channel_mult, num_res_blocks: base width, its multiples, blocks per level.
        norm_groups: groups of every GroupNorm; divides every width.
        attention: self-attention in the middle.
        attention_levels: levels with self-attention after each block: 0 is the image's, the last
            one the latent's. CompVis's kl-f16 has it at the last, kl-f32 at the last two.
        padding: at the borders of every convolution: ``zeros``, as published, or ``reflect``, as in
            some copies that were fine-tuned with EQ-VAE. Strided convolutions keep their zeros, at
            the bottom and the right.
        linear: add a linear path beside the network, as LiteVAE's.

    Shapes: (B, in_channels, H, W) -> (B, latent_dim, H/f, W/f), f = 2^(len(channel_mult) - 1).
    """

    def __init__(
        self,
        latent_dim: int = 24,
        in_channels: int = 3,
        image_size: int = 256,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        norm_groups: int = 32,
        attention: bool = True,
        attention_levels: Sequence[int] = (),
        padding: Padding = "zeros",
        linear: bool = False,
    ) -> None:
        check_counts(1, channels=channels, channel_mult=channel_mult)
        super().__init__(latent_dim, in_channels, 2 ** (len(channel_mult) - 1), image_size)
        self._build(
            in_channels,
            latent_dim,
            channels,
            channel_mult,
            num_res_blocks,
            norm_groups,
            attention,
            attention_levels,
            padding,
        )
        if linear:
            self.add_linear_path()

    @casts_together
    def forward(self, x: Tensor) -> Tensor:
        return self.with_linear_path(self.model(x), x)


class SDDecoder(_Half, Decoder):
    """Stable Diffusion's convolutional decoder with attention in the middle.

    The first five arguments are LiteVAE_Decoder's, so that a config can exchange the two; the
    others are :class:`SDEncoder`'s.

    Args:
        channels, channel_mult, num_res_blocks: see :class:`SDEncoder`.
        z_channels, out_channels: of the latent and of the image.
        norm_groups, attention, attention_levels, padding, linear: see :class:`SDEncoder`.
        enlarge: as LiteVAE_Decoder's.

    Shapes: (B, z_channels, h, w) -> (B, out_channels, f h, f w),
    f = enlarge 2^(len(channel_mult) - 1).
    """

    def __init__(
        self,
        channels: int = 128,
        z_channels: int = 12,
        out_channels: int = 3,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        norm_groups: int = 32,
        attention: bool = True,
        attention_levels: Sequence[int] = (),
        padding: Padding = "zeros",
        linear: bool = False,
        enlarge: Enlarge = 1,
    ) -> None:
        check_counts(1, channels=channels, channel_mult=channel_mult)
        super().__init__(z_channels, out_channels, 2 ** (len(channel_mult) - 1), enlarge)
        self._build(
            z_channels,
            out_channels,
            channels,
            channel_mult,
            num_res_blocks,
            norm_groups,
            attention,
            attention_levels,
            padding,
        )
        self.widen_output()
        if linear:
            self.add_linear_path()

    @casts_together
    def forward(self, z: Tensor) -> Tensor:
        image = self.shuffle(self.model(z))
        return image if self.linear is None else image + self.linear_path(z)


def block_types(
    levels: int, encoder: Collection[int], decoder: Collection[int]
) -> dict[str, list[str]]:
    """Name diffusers' blocks of an AutoencoderKL, with attention at these levels of each half.

    The decoder's begin at the latent.
    """
    down: list[str] = []
    up: list[str] = []
    for level in range(levels):
        down.append("AttnDownEncoderBlock2D" if level in encoder else "DownEncoderBlock2D")
        up.insert(0, "AttnUpDecoderBlock2D" if level in decoder else "UpDecoderBlock2D")
    return {"down_block_types": down, "up_block_types": up}


def set_padding(network: nn.Module, padding: Padding) -> None:
    """Set what a network's convolutions see beyond the borders; see :class:`SDEncoder`."""
    check_choice(("zeros", "reflect"), padding=padding)
    # Convolutions without padding are 1x1, or strided: diffusers pads those outside of them.
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d) and conv.padding != (0, 0):
            conv.padding_mode = padding
