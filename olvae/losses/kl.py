"""KL divergence of the posterior, in the units of the latent-diffusion code."""

from torch import Tensor

from olvae.modules.distributions import DiagonalGaussian

__all__ = ["kl_loss"]


def kl_loss(posterior: DiagonalGaussian, x: Tensor) -> Tensor:
    """Mean over the batch of KL(posterior || N(0, I)) in nats, per value of the image.

    The sum over a sample's latent is divided by the number C H W of values of its image [D], as every other
    term is a mean per value; so a weight means what it means in the latent-diffusion code, where both are sums.
    """
    return posterior.kl().mean() / x[0].numel()
