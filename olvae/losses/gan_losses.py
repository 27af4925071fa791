"""Adversarial losses of both sides, the discriminator's accuracy and its penalties.

With r the logits of real images, f the logits of reconstructions, softplus(t) = log(1 + e^t):

| name     | discriminator                     | generator       |                            |
|----------|-----------------------------------|-----------------|----------------------------|
| hinge    | E max(0, 1 - r) + E max(0, 1 + f) | -E f            | Lim & Ye 2017 [1]          |
| logistic | E softplus(-r) + E softplus(f)    | E softplus(-f)  | Goodfellow et al. 2014 [2] |
| lsgan    | E (r - 1)^2 / 2 + E f^2 / 2       | E (f - 1)^2 / 2 | Mao et al. 2017 [3]        |
| wgan     | E f - E r                         | -E f            | Arjovsky et al. 2017       |
| bce      | E H(1, r) + E H(0, f)             | E H(1, f)       | [4]                        |

[1] and Miyato et al. 2018. [2] non-saturating. [3] with targets 1 and 0. [4] H(y, t): cross-entropy
of sigmoid(t) with y. H(1, t) = softplus(-t) and H(0, t) = softplus(t), so bce is logistic by the
name that some configs use.

wgan needs a Lipschitz discriminator (spectral norm, or a gradient penalty).

latent-diffusion, taming-transformers and VA-VAE take half of hinge's discriminator loss,
(real + fake) / 2. Adam divides a gradient by its size, so half a loss alone trains the same. Beside
another term, or a bound, it does not: an R1 weight of w on top is 2 w here, and clipping of the
gradient to a norm of c is 2 c here.

Discriminators return a list of logit tensors; a loss is the mean over each tensor, then over the
list, in float32 under autocast too (float64 for float64).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.modules.base import check_choice, mean_over_processes
from olvae.modules.mixed_precision import upcast


@dataclass(frozen=True)
class _Loss:
    """Per logit: the discriminator's loss on a real and on a fake image, and the generator's."""

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    threshold: float | None  # the undecided logit; None if only differences of logits mean anything


_LOGISTIC = _Loss(lambda r: F.softplus(-r), F.softplus, lambda f: F.softplus(-f), threshold=0.0)
ADVERSARIAL_LOSSES = {
    "hinge": _Loss(lambda r: F.relu(1 - r), lambda f: F.relu(1 + f), lambda f: -f, threshold=0.0),
    "logistic": _LOGISTIC,
    "lsgan": _Loss(
        lambda r: (r - 1).square() / 2,
        lambda f: f.square() / 2,
        lambda f: (f - 1).square() / 2,
        0.5,
    ),
    "wgan": _Loss(lambda r: -r, lambda f: f, lambda f: -f, threshold=None),
    "bce": _LOGISTIC,
}


def generator_loss(name: str, fake_logits: Sequence[Tensor]) -> Tensor:
    """The autoencoder's loss on the logits of reconstructions, a scalar in float32."""
    loss = find_loss(name)
    return mean_of_outputs([loss.generator(f) for f in check_logits(fake_logits)])


def discriminator_loss(
    name: str, real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]
) -> Tensor:
    """The discriminator's loss on its logits of images and of detached reconstructions.

    A scalar in float32.
    """
    loss = find_loss(name)
    real, fake = _pair(real_logits, fake_logits)
    on_real = mean_of_outputs([loss.real(r) for r in real])
    on_fake = mean_of_outputs([loss.fake(f) for f in fake])
    return on_real + on_fake


@torch.no_grad()
def discriminator_accuracy(
    real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor], name: str
) -> Tensor:
    """The share of logits on the right side of a threshold.

    1 for a perfect discriminator, 0.5 for a blind one. The threshold is the loss's undecided logit:
    0 for hinge, logistic and bce, 0.5 for lsgan. wgan's logits are defined up to a constant: there
    it is the midpoint between the means of real and fake logits, per tensor. A logit on the
    threshold counts half. Real and fake weigh the same; mean over each tensor, then over the list;
    no gradient.
    """
    threshold = find_loss(name).threshold
    shares: list[Tensor] = []
    for r, f in zip(*_pair(real_logits, fake_logits), strict=True):
        middle = 0.5 * (r.mean() + f.mean()) if threshold is None else threshold
        shares.append(0.5 * (_share_above(r - middle) + _share_above(middle - f)))
    return torch.stack(shares).mean()


def _share_above(x: Tensor) -> Tensor:
    return 0.5 * (1 + x.sign()).mean()


def mean_of_outputs(per_logit: Sequence[Tensor]) -> Tensor:
    """The mean over each tensor, then over the list, in float32."""
    return torch.stack([upcast(values).mean() for values in per_logit]).mean()


def find_loss(name: str) -> _Loss:
    """Find an adversarial loss by name; ValueError if there is none."""
    check_choice(ADVERSARIAL_LOSSES, **{"adversarial loss": name})
    return ADVERSARIAL_LOSSES[name]


def check_logits(logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """Check that logits are the list that a discriminator returns; return them in float32."""
    if isinstance(logits, Tensor):
        raise TypeError(
            "logits come as the list that a discriminator returns, got a single tensor: "
            "wrap it in [ ]"
        )
    if not logits:
        raise ValueError("the list of logits is empty: a discriminator returns at least one tensor")
    return [upcast(t) for t in logits]


def _pair(
    real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    real = check_logits(real_logits)
    fake = check_logits(fake_logits)
    if len(real) != len(fake):
        raise ValueError(
            f"{len(real)} real and {len(fake)} fake logit tensors: they come from one discriminator"
        )
    return real, fake


def r1_penalty(logits: Sequence[Tensor], real_images: Tensor) -> Tensor:
    """R1: half the squared length of the discriminator's gradient at real images.

    1/2 E |grad_x D(x)|^2 (Mescheder et al. 2018), with D(x) the sum of all of a sample's logits, as
    usual: of its pixels or patches, of every tensor. So it grows with their number. The square is
    summed over a sample's values, the mean is over the batch. The result, a scalar in float32, can
    be differentiated again. Compute the logits without autocast. For the lazy form, call it every
    k-th step and multiply by k. With BatchNorm in training mode the penalty is on the whole batch.

    The logits, each (B, ...), are of these images (B, C, H, W), with ``requires_grad`` set before
    the discriminator was called.
    """
    if len(logits) == 0 or any(t.shape[:1] != real_images.shape[:1] for t in logits):
        raise ValueError(
            "R1 takes the list of logit tensors (B, ...) that the discriminator returned "
            "for real_images"
        )
    # A sample's gradient comes from its own logits alone, so one sum serves the whole batch.
    total = torch.stack([upcast(t).sum() for t in logits]).sum()
    (gradient,) = torch.autograd.grad(total, real_images, create_graph=True)
    return 0.5 * upcast(gradient).flatten(1).square().sum(dim=1).mean()


class LeCam(nn.Module):
    """Penalise the distance of real logits from an average of fake ones, and the reverse.

    E (r - a_f)^2 + E (f - a_r)^2 (Tseng et al. 2021), with the anchors a_r and a_f: moving averages
    of the mean logits of real and fake images, for each logit tensor. The mean is over each tensor,
    then over the list. The published code has E max(0, r - a_f)^2 + E max(0, a_r - f)^2, which lets
    logits on the wrong side go, and a decay of 0.999.

    In training mode a call first moves the anchors, a <- decay a + (1 - decay) E, starting from the
    first batch's means; in evaluation mode they are fixed. Under torch.distributed the means are
    over all processes.

    Args:
        num_outputs: how many tensors the discriminator returns: its ``num_outputs``.
        decay: of the moving averages, in [0, 1).
        relu: take the published code's form.
    """

    real_anchors: Tensor  # (num_outputs,)
    fake_anchors: Tensor  # (num_outputs,)
    started: Tensor  # a bool: whether the anchors have seen a batch

    def __init__(self, num_outputs: int = 1, decay: float = 0.99, relu: bool = False) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"LeCam's decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.relu = relu
        self.register_buffer("real_anchors", torch.zeros(num_outputs))
        self.register_buffer("fake_anchors", torch.zeros(num_outputs))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
        """The penalty, a scalar in float32; gradients flow to the logits and not to the anchors."""
        real, fake = _pair(real_logits, fake_logits)
        outputs = self.real_anchors.numel()
        if len(real) != outputs:
            raise ValueError(
                f"LeCam was built for {outputs} logit tensors, got {len(real)}: "
                "set num_outputs to fit"
            )
        if self.training:
            self._move(real, fake)
        terms: list[Tensor] = []
        for r, f, a_r, a_f in zip(real, fake, self.real_anchors, self.fake_anchors, strict=True):
            for gap in (r - a_f, a_r - f):
                kept = F.relu(gap) if self.relu else gap
                terms.append(kept.square().mean())
        # Two terms per tensor: twice their mean is the mean over tensors of their sum.
        return 2 * torch.stack(terms).mean()

    @torch.no_grad()
    def _move(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> None:
        """Move the anchors towards the batch's means; set them at the first batch."""
        means = torch.stack([t.mean() for t in (*real, *fake)]).to(self.real_anchors.dtype)
        new_real, new_fake = mean_over_processes(means).chunk(2)
        # 0 at the first batch; a tensor, as an `if` would wait for the device.
        decay = self.started * self.decay
        self.real_anchors.copy_(torch.lerp(new_real, self.real_anchors, decay))
        self.fake_anchors.copy_(torch.lerp(new_fake, self.fake_anchors, decay))
        self.started.fill_(True)
