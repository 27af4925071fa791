"""Autoencoders of diffusers as our encoders and decoders; video ones see an image as one frame."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from olvae.library_internals import can_checkpoint, causal_padding, set_checkpointing
from olvae.modules.base import HALVES, Decoder, Encoder, Enlarge, Steps
from olvae.modules.distributions import deterministic_moments
from olvae.modules.mixed_precision import autocast_enabled, no_autocast, upcast

TRAINABLE = (
    "AutoencoderDC",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLKVAE",
    "AutoencoderKLQwenImage",
    "AutoencoderKLQwenImage21",
    "AutoencoderKLWan",
)
"""Classes with halves that can be trained on images; other video classes use whole 3D kernels."""

MODULES = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
"""The modules that belong to one half; others, such as FLUX.2's batch norm, are kept with both."""


def has_frames(model: nn.Module) -> tuple[bool, ...]:
    """Guess whether a model takes a time axis: both answers, the likelier one first.

    A 3D convolution takes an image of one channel without a time axis as well, and makes nonsense
    of it.
    """
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        return True, False
    return False, True


def encode_image(model: Any, x: Tensor, frames: bool) -> tuple[Tensor, bool]:
    """Encode (B, C, H, W), as one frame if the model has ``frames``.

    Returns moments (B, 2 n_z, h, w), means then log-variances, and True; or a latent (B, n_z, h, w)
    without a distribution, and False. ValueError if that has more than one frame.
    """
    output = model.encode(x[:, :, None] if frames else x)
    if "latent_dist" in output:
        # Cosmos' has no variance.
        latent = output.latent_dist
        return _without_time(latent.parameters, frames), hasattr(latent, "logvar")
    # Some classes call it ``latent``, others, such as TAESD's, ``latents``.
    name = "latents" if "latents" in output else "latent"
    return _without_time(output[name], frames), False


def decode_image(model: Any, z: Tensor, frames: bool) -> Tensor:
    """Decode (B, n_z, h, w) to (B, C, f h, f w); ValueError if that has more than one frame."""
    output = model.decode(z[:, :, None] if frames else z)
    return _without_time(getattr(output, "sample", output), frames)


def _without_time(x: Tensor, frames: bool) -> Tensor:
    if not frames:
        return x
    if x.ndim != 5 or x.shape[2] != 1:
        raise ValueError(f"of one frame it makes {tuple(x.shape)}")
    return x[:, :, 0]


class _Wrapped(Steps):
    """One half of an autoencoder of diffusers, under its own names."""

    model: Any

    def _build(self, kind: str, config: Mapping[str, Any], half: str) -> None:
        # Takes seconds, so it is imported for this network only.
        import diffusers

        if kind not in TRAINABLE:
            raise ValueError(f"{kind}: only {', '.join(TRAINABLE)} can be trained here")
        self.kind = kind
        self.model = getattr(diffusers, kind).from_config(dict(config))

        # Take out the other half.
        for names in MODULES.values():
            for name in names:
                if name not in MODULES[half] and getattr(self.model, name, None) is not None:
                    setattr(self.model, name, nn.Identity())

        for name, module in self.model.named_modules():
            # One frame never gets there, and DDP would wait for its gradient.
            if name.endswith("time_conv"):
                module.requires_grad_(False)
            if not isinstance(module, nn.Conv3d):
                continue
            # Where a convolution pads in time only before the input, as Wan's do, the last slice of
            # its kernel meets the first frame.
            padding = causal_padding(module)
            if padding is not None and tuple(padding[4:]) == (module.kernel_size[0] - 1, 0):
                exact = half == "encoder" and module is self.output_layer
                forward = partial(_on_one_frame, module, exact=exact)
                module.forward = forward  # type: ignore[method-assign]

    @property
    def output_layer(self) -> nn.Conv2d | nn.Conv3d:
        """The last layer, for :func:`~olvae.modules.base.last_convolution`.

        The order of definition does not show it.
        """
        convolutions = [getattr(self.model, "quant_conv", None)]
        for half in HALVES:
            # The half that was taken out has none. Of DC without blocks at the image's size it is
            # an upsampling block, with a convolution before its pixel shuffle.
            end = getattr(getattr(self.model, half), "conv_out", None)
            convolutions.append(getattr(end, "conv", end))
        found: nn.Conv2d | nn.Conv3d = next(
            c for c in convolutions if isinstance(c, nn.Conv2d | nn.Conv3d)
        )
        return found

    def checkpoint_steps(self, on: bool = True) -> None:
        if on and not can_checkpoint(self.model):
            raise ValueError(f"checkpoint: diffusers' {self.kind} can't: leave it out")
        super().checkpoint_steps(on)
        for module in self.model.modules():
            # Always on: `step` decides.
            if hasattr(module, "gradient_checkpointing"):
                set_checkpointing(module, self.step)


def _on_one_frame(
    conv: Any, x: Tensor, cache_x: Tensor | None = None, exact: bool = False
) -> Tensor:
    """Convolve one frame with the last slice of a causal kernel, as the others meet zeros.

    A third of the work. ``exact`` computes in float32 under autocast.
    """
    # Several frames, or one after frames that a cache holds: the whole kernel.
    if x.shape[2] != 1 or cache_x is not None:
        y: Tensor = type(conv).forward(conv, x, cache_x)
        return y
    padding = causal_padding(conv)
    assert padding is not None
    left, _, top, *_ = padding
    exact = exact and autocast_enabled(x)
    with no_autocast(x) if exact else nullcontext():
        frame = (upcast(x) if exact else x)[:, :, 0]
        kernel = conv.weight[:, :, -1]
        y = F.conv2d(frame, kernel, conv.bias, conv.stride[1:], (top, left))
        return y[:, :, None]


class DiffusersEncoder(_Wrapped, Encoder):
    """The encoder of a diffusers autoencoder, under its own names; see :data:`TRAINABLE`.

    Args:
        kind, config: diffusers' class, and the content of its config.json.
        latent_dim, in_channels, image_size: as LiteVAE_Encoder's.
        downscale: pixels per latent position.
        frames: the network has a time axis, on which an image is one frame.
        deterministic: its latents have no distribution; the log-variances are the smallest there
            are.

    Shapes: (B, in_channels, H, W) -> (B, latent_dim, H/f, W/f).
    """

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        latent_dim: int,
        in_channels: int = 3,
        image_size: int = 256,
        downscale: int = 8,
        frames: bool = False,
        deterministic: bool = False,
    ) -> None:
        super().__init__(latent_dim, in_channels, downscale, image_size)
        self.frames = frames
        self.deterministic = deterministic
        self._build(kind, config, "encoder")

    def forward(self, x: Tensor) -> Tensor:
        latent, distributed = encode_image(self.model, x, self.frames)
        return latent if distributed else deterministic_moments(latent)


class DiffusersDecoder(_Wrapped, Decoder):
    """The decoder of a diffusers autoencoder, under its own names.

    Args:
        z_channels, out_channels: channels of the latent and of the image.
        upscale: pixels per latent position, of an image that is not enlarged.
        kind, config, frames: as :class:`DiffusersEncoder`'s.
        enlarge: as LiteVAE_Decoder's.

    Shapes: (B, z_channels, h, w) -> (B, out_channels, f h, f w), f = enlarge upscale.
    """

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        z_channels: int,
        out_channels: int = 3,
        upscale: int = 8,
        frames: bool = False,
        enlarge: Enlarge = 1,
    ) -> None:
        super().__init__(z_channels, out_channels, upscale, enlarge)
        self.frames = frames
        self._build(kind, config, "decoder")
        if enlarge > 1 and not isinstance(self.model.decoder.conv_out, nn.Conv2d | nn.Conv3d):
            raise ValueError(f"enlarge: this {kind} ends with no convolution: leave it out")
        # Wan 2.2's output is patches of pixels; FLUX.2's setting, a list, is about its latents.
        patch = config.get("patch_size")
        self.widen_output(patch if isinstance(patch, int) else 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.shuffle(decode_image(self.model, z, self.frames))
