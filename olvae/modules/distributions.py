"""The posterior of the latent, and reproducible noise for samples of it."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from olvae.modules.mixed_precision import upcast

LOGVAR_RANGE = (-30.0, 20.0)  # keeps exp() finite in float32 and bf16


def deterministic_moments(mean: Tensor) -> Tensor:
    """Append the smallest log-variances to means: (B, n_z, h, w) -> (B, 2 n_z, h, w)."""
    return torch.cat((mean, torch.full_like(mean, LOGVAR_RANGE[0])), dim=1)


class DiagonalGaussian:
    """A Gaussian per latent element, from the encoder's moments.

    Args:
        moments: (B, 2 n_z, h, w): the means, then the log-variances, which are clamped to
            [-30, 20].
    """

    deterministic = False

    def __init__(self, moments: Tensor) -> None:
        if moments.shape[1] % 2:
            raise ValueError(f"moments need an even number of channels, got {tuple(moments.shape)}")
        self.mean, logvar = moments.chunk(2, dim=1)  # each (B, n_z, h, w)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    @property
    def var(self) -> Tensor:
        return self.logvar.exp()

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, the noise drawn from ``generator`` or from torch's global one."""
        noise = torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(self || N(0, I)) of each sample in nats, summed over its latent: (B,).

        In float32 or better.
        """
        mean = upcast(self.mean)
        logvar = upcast(self.logvar)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


class Deterministic:
    """The latent (B, n_z, h, w) of an autoencoder without a distribution: a point mass.

    Its variance is 0; ``logvar`` and ``kl``, which are infinite, raise ValueError.
    """

    deterministic = True

    def __init__(self, latent: Tensor) -> None:
        self.mean = latent

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean)

    var = std

    @property
    def logvar(self) -> Tensor:
        raise ValueError("a deterministic latent has no log-variance")

    def mode(self) -> Tensor:
        return self.mean

    # ``generator`` is for the same signature as DiagonalGaussian's; there is no noise.
    def sample(self, generator: torch.Generator | None = None) -> Tensor:  # noqa: ARG002
        """The latent itself."""
        return self.mean

    def kl(self) -> Tensor:
        raise ValueError("a deterministic latent has no finite KL")


Posterior = DiagonalGaussian | Deterministic


def in_float32(posterior: Posterior) -> Posterior:
    """Convert a posterior that was computed in half precision, so that what follows is float32."""
    if isinstance(posterior, Deterministic):
        return Deterministic(posterior.mean.float())
    return DiagonalGaussian(torch.cat((posterior.mean, posterior.logvar), dim=1).float())


def keyed_seed(content: bytes) -> int:
    """Return a seed in [0, 2^63) that depends on the content alone: 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def keyed_generator(content: str) -> torch.Generator:
    """Return a CPU generator seeded by :func:`keyed_seed`.

    So an image's noise is the same in any batch, order and process.
    """
    return torch.Generator().manual_seed(keyed_seed(content.encode()))


def draws_by_image(images: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw a uniform number (B,) and normal noise (B, *shape) for each image, by its pixels.

    So they are the same in any batch, order and process. Both are on the images' device.
    """
    uniform = []
    normal = []
    for image in images:
        seed = keyed_seed(image.cpu().contiguous().numpy().tobytes())
        generator = torch.Generator().manual_seed(seed)
        uniform.append(torch.rand((), generator=generator))
        normal.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(uniform).to(images.device), torch.stack(normal).to(images.device)
