"""Call autoencoders of diffusers with images; those of video see one frame."""

from typing import Any

from torch import Tensor, nn


def has_frames(model: nn.Module) -> tuple[bool, ...]:
    """Whether a model may take a time axis: both answers, the likely one first.

    A 3D convolution takes an image of one channel without a time axis as well, and makes nonsense of it.
    """
    return (True, False) if any(isinstance(module, nn.Conv3d) for module in model.modules()) else (False, True)


def encode_image(model: Any, x: Tensor, frames: bool) -> tuple[Tensor, bool]:
    """Encode (B, C, H, W), as one frame if the model has ``frames``; whether the latent has a distribution, too.

    Returns moments (B, 2 n_z, h, w): means, then log-variances; or a latent (B, n_z, h, w) without a distribution.
    ValueError if there is more than one frame of them.
    """
    output = model.encode(x[:, :, None] if frames else x)
    if "latent_dist" in output:
        latent = output.latent_dist  # Cosmos' has no variance
        return _without_time(latent.parameters, frames), hasattr(latent, "logvar")
    return _without_time(output["latents"] if "latents" in output else output["latent"], frames), False


def decode_image(model: Any, z: Tensor, frames: bool) -> Tensor:
    """Decode (B, n_z, h, w) to (B, C, f h, f w); ValueError if there is more than one frame of them."""
    output = model.decode(z[:, :, None] if frames else z)
    return _without_time(getattr(output, "sample", output), frames)


def _without_time(x: Tensor, frames: bool) -> Tensor:
    if not frames:
        return x
    if x.ndim != 5 or x.shape[2] != 1:
        raise ValueError(f"of one frame it makes {tuple(x.shape)}")
    return x[:, :, 0]
