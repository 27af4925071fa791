"""CutMix of images and reconstructions, for discriminators with a logit per pixel.

Schönfeld et al. 2020.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from olvae.losses.gan_losses import check_logits, find_loss
from olvae.modules.mixed_precision import upcast


def cutmix(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of one image into the other, sample by sample.

    Yun et al. 2019, Schönfeld et al. 2020. The rectangle's share of the area is uniform in (0, 1),
    up to whole pixels; it has the image's aspect ratio and a random place. A fair coin decides
    whether it holds the real or the fake image, so that a pixel's place does not predict its label
    [D]. Returns the mixed images (B, C, H, W), and a mask (B, 1, H, W): 1 for real pixels, else 0.
    """
    if real.shape != fake.shape or real.ndim != 4:
        raise ValueError(
            "cutmix takes two (B, C, H, W) of one shape, "
            f"got {tuple(real.shape)}, {tuple(fake.shape)}"
        )
    b, _, h, w = real.shape
    area, top, left, coin = torch.rand(4, b, 1, device=real.device)  # each (B, 1)
    rows = _inside(h, area.sqrt(), top)  # (B, H)
    columns = _inside(w, area.sqrt(), left)  # (B, W)
    inside = rows[:, :, None] & columns[:, None, :]  # (B, H, W)
    mask = (inside ^ (coin < 0.5)[..., None]).unsqueeze(1)  # (B, 1, H, W)
    return torch.where(mask, real, fake), mask.to(real.dtype)


def _inside(size: int, share: Tensor, place: Tensor) -> Tensor:
    """Return (B, size), true on a random interval of round(share * size) pixels.

    ``share`` and ``place`` are (B, 1) in [0, 1).
    """
    length = (share * size).round()
    start = (place * (size - length + 1)).floor()
    pixel = torch.arange(size, device=share.device)
    return (pixel >= start) & (pixel < start + length)


def cutmix_consistency(
    mixed_logits: Tensor, real_logits: Tensor, fake_logits: Tensor, mask: Tensor
) -> Tensor:
    """E (D(mix(x, y)) - mix(D(x), D(y)))^2 over all pixels, in float32; all (B, 1, H, W)."""
    target = torch.where(mask > 0.5, upcast(real_logits), upcast(fake_logits))
    return (upcast(mixed_logits) - target).square().mean()


def cutmix_loss(name: str, mixed_logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The discriminator's loss on mixed images (Schönfeld et al. 2020), a scalar in float32.

    The logits are of pixels, (B, 1, H, W), like the mask, then of whole images, any number of
    tensors (B, ...). A pixel's logit has its pixel's label; an image's logit has the label "fake",
    unless the mix has no fake pixel [D]: a rectangle may fill the image. The mean is over each
    tensor. The means are summed over the list, as in the published code, where the consistency term
    beside them has weight 1.
    """
    loss = find_loss(name)
    # A discriminator returns the pixels' logits first.
    pixels, *images = check_logits(mixed_logits)
    real = mask > 0.5
    terms = [torch.where(real, loss.real(pixels), loss.fake(pixels))]
    for t in images:
        # (B, 1, ...), with as many axes as the logits.
        wholly_real = real.flatten(1).all(dim=1).view(-1, *(1,) * (t.ndim - 1))
        terms.append(torch.where(wholly_real, loss.real(t), loss.fake(t)))
    return torch.stack([t.mean() for t in terms]).sum()
