"""What keeps a discriminator healthy: R1, LeCam, CutMix and its consistency term."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olvae.modules.precision import island

__all__ = ["LeCam", "cutmix", "cutmix_consistency", "r1_penalty"]


def r1_penalty(logits: Sequence[Tensor], real_images: Tensor) -> Tensor:
    """Half the squared length of the discriminator's gradient at real images (Mescheder et al. 2018, R1).

    1/2 E |grad_x D(x)|^2, with D(x) a sample's score: the mean of its logits in each tensor, then over the list,
    as the losses take it. The gradient of a sample is summed over its values; the mean is over the batch. The
    result can be differentiated again. Compute the logits without autocast: the gradient is as exact as they are.
    For the lazy form, call it every k-th step and multiply by k.

    Args:
        logits: the discriminator's on ``real_images``; each (B, ...), from samples that do not see each other
            (with BatchNorm in training mode they do, and the penalty is on the batch as one).
        real_images: (B, C, H, W), with ``requires_grad`` set before the discriminator saw it.

    Returns:
        A scalar in float32, not negative, not multiplied by the usual gamma.

    Raises:
        ValueError: real_images does not require a gradient, or a tensor of logits is not a batch of their length.
    """
    if not real_images.requires_grad:
        raise ValueError("R1 needs the gradient at real_images: call .requires_grad_() before the discriminator")
    if len(logits) == 0 or any(t.shape[:1] != real_images.shape[:1] for t in logits):
        raise ValueError("R1 takes the list of logit tensors (B, ...) that the discriminator returned for real_images")
    score = torch.stack([island(t).reshape(len(t), -1).mean(dim=1) for t in logits]).mean(dim=0)  # (B,)
    (gradient,) = torch.autograd.grad(score.sum(), real_images, create_graph=True)
    return 0.5 * island(gradient).flatten(1).square().sum(dim=1).mean()


class LeCam(nn.Module):
    """Keeps the logits of real images near those of fake ones, and the reverse (Tseng et al. 2021).

    E (r - a_f)^2 + E (f - a_r)^2, with a_r and a_f moving averages of the mean logits of real and fake images.
    Each logit tensor of the discriminator has anchors of its own; the mean is over each tensor, then over the list.

    In training mode a call first moves the anchors, a <- decay a + (1 - decay) E, which start from the first
    batch's means; in evaluation mode they stand still. Under torch.distributed the means are over all processes.

    Args:
        num_outputs: how many tensors the discriminator returns: its ``num_outputs``.
        decay: of the moving averages, in [0, 1).
    """

    real_anchors: Tensor  # (num_outputs,)
    fake_anchors: Tensor  # (num_outputs,)
    started: Tensor

    def __init__(self, num_outputs: int = 1, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"LeCam's decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("real_anchors", torch.zeros(num_outputs))
        self.register_buffer("fake_anchors", torch.zeros(num_outputs))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
        """The penalty, a scalar in float32; gradients flow to the logits and not to the anchors.

        Raises:
            ValueError: the lists have not ``num_outputs`` tensors.
        """
        outputs = self.real_anchors.numel()
        if len(real_logits) != outputs or len(fake_logits) != outputs:
            raise ValueError(
                f"LeCam was built for {outputs} logit tensors, got {len(real_logits)} real and {len(fake_logits)} "
                "fake ones: set num_outputs to the discriminator's"
            )
        real, fake = [island(t) for t in real_logits], [island(t) for t in fake_logits]
        if self.training:
            self._move(real, fake)
        terms = [
            (r - a_f).square().mean() + (f - a_r).square().mean()
            for r, f, a_r, a_f in zip(real, fake, self.real_anchors, self.fake_anchors, strict=True)
        ]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def _move(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> None:
        means = torch.stack([t.mean() for t in (*real, *fake)]).to(self.real_anchors.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means = means / dist.get_world_size()
        decay = torch.where(self.started, self.decay, 0.0)  # no synchronisation with the device
        new_real, new_fake = means.chunk(2)
        self.real_anchors.copy_(torch.lerp(new_real, self.real_anchors, decay))
        self.fake_anchors.copy_(torch.lerp(new_fake, self.fake_anchors, decay))
        self.started.fill_(True)


def cutmix(real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of one image into the other, sample by sample (Yun et al. 2019, Schönfeld et al. 2020).

    The rectangle's share of the area is uniform in (0, 1), up to whole pixels; it has the image's proportions
    and any place within it. Whether it holds the real or the fake image is a fair coin's choice, so that a
    pixel's place says nothing about its label [D].

    Args:
        real, fake: (B, C, H, W).
        generator: where the random numbers come from; on any device.

    Returns:
        The mixed images (B, C, H, W), and the mask (B, 1, H, W) in their dtype: 1 where they are real, 0 where
        fake.

    Raises:
        ValueError: the shapes differ.
    """
    if real.shape != fake.shape or real.ndim != 4:
        raise ValueError(f"cutmix takes two (B, C, H, W) of one shape, got {tuple(real.shape)}, {tuple(fake.shape)}")
    b, _, h, w = real.shape
    source = real.device if generator is None else generator.device
    area, top, left, coin = torch.rand(4, b, 1, generator=generator, device=source).to(real.device)  # each (B, 1)
    rows = _inside(h, area.sqrt(), top)  # (B, H)
    columns = _inside(w, area.sqrt(), left)  # (B, W)
    inside = rows[:, :, None] & columns[:, None, :]  # (B, H, W)
    mask = (inside ^ (coin < 0.5)[..., None]).unsqueeze(1)  # (B, 1, H, W)
    return torch.where(mask, real, fake), mask.to(real.dtype)


def _inside(size: int, share: Tensor, place: Tensor) -> Tensor:
    """(B, size), true on a random interval of round(share * size) pixels; share and place (B, 1) in [0, 1)."""
    length = (share * size).round()
    start = (place * (size - length + 1)).floor()
    pixel = torch.arange(size, device=share.device)
    return (pixel >= start) & (pixel < start + length)


def cutmix_consistency(mixed_logits: Tensor, real_logits: Tensor, fake_logits: Tensor, mask: Tensor) -> Tensor:
    """The logits of a mixed image should be the mix of the logits (Schönfeld et al. 2020).

    E (D(mix(x, y)) - mix(D(x), D(y)))^2, over all pixels.

    Args:
        mixed_logits, real_logits, fake_logits: the discriminator's per pixel, (B, 1, H, W), on the mixed, the
            real and the fake images.
        mask: cutmix's, (B, 1, H, W).

    Returns:
        A scalar in float32; gradients flow to all three.
    """
    target = torch.where(mask > 0.5, island(real_logits), island(fake_logits))
    return (island(mixed_logits) - target).square().mean()
