"""A diffusion prior: a small denoiser learns the latents, and its weighted error is their rate."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.files import counted
from olvae.losses.terms import logvar_loss
from olvae.models.parts.part import Loss, Model, Part, Step, fixed_latents
from olvae.modules.base import check_counts
from olvae.modules.distributions import draws_by_image
from olvae.modules.mixed_precision import upcast
from olvae.modules.others.denoiser import HEAD, DiT

# Positions along a token grid's side, to which the embedding of positions is scaled.
GRID = 16

# Weight of the loss that teaches the encoder's log-variances the noise's.
LOGVAR_WEIGHT = 0.1

# Noise levels of each image in validation, spread evenly.
NOISE_LEVELS = 8


class Prior(Part):
    """Limit the latent's information by a diffusion model trained beside it, in place of KL.

    As in Unified Latents (Heek et al. 2026, arXiv 2602.17270): the latent z that is decoded has a
    fixed noise, z + exp(-log_snr / 2) noise. A denoiser learns the straight line from z to noise,
    x_t = (1 - t) z + t noise, from t_0, where x_t has that log-SNR, to 1, where nothing of z is
    left. The rate, in nats for each image, is the integral over the line's log-SNR of the
    unweighted variational bound:

        integral from t_0 to 1 of (1 - t) / t E ||(noise - z) - velocity(x_t, t)||^2 dt

    It is an upper bound of the information that the decoder gets. At the line's end nothing is
    left, so the bound's prior term is 0. The loss ``rate`` is its mean per value of the image, as
    KL's. The encoder gets its gradient times ``weight``, the denoiser its gradient unweighted. The
    loss ``logvar`` teaches the encoder the noise's log-variance, so that exports draw the latents
    that the decoder has learned. Validation logs ``val/bits_per_image``.

    Args:
        weight: weight of the rate in the encoder's loss, above 0.
        log_snr: of the latent that is decoded, for a latent whose square is 1 on average; 5 is the
            paper's.
        width: of the denoiser's tokens, a multiple of 32.
        depth: number of the denoiser's blocks.
        patch: latent positions along a token's side.
    """

    adds_noise = True

    def __init__(
        self,
        weight: float = 0.01,
        log_snr: float = 5.0,
        width: int = 128,
        depth: int = 4,
        patch: int = 2,
    ) -> None:
        super().__init__()
        if not weight > 0:
            raise ValueError(f"weight must be above 0, got {weight}")
        check_counts(1, width=width, depth=depth, patch=patch)
        if width % HEAD:
            raise ValueError(f"width must be a multiple of {HEAD}, got {width}")
        self.weight = weight
        self.log_snr = log_snr
        self.width = width
        self.depth = depth
        self.patch = patch
        self.first_t = 1 / (1 + math.exp(log_snr / 2))

    def attach(self, model: Model) -> None:
        side = GRID * self.patch
        shape = (model.autoencoder.latent_channels, side, side)
        self.denoiser = DiT(shape, self.width, self.depth, self.patch)

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"
        if "kl" in model.loss_weights:
            yield f"lossconfig.params.kl_weight: {here} is in place of KL: set it to 0"
        if model.sample_posterior:
            yield (
                f"sample_posterior: the latent's noise is fixed, and {here} adds it: "
                "set it to false"
            )
        yield from fixed_latents(self, model)
        moving = [part.name for part in model.each_part if part.moves_latents]
        if moving and self.patch > 1:
            yield (
                f"{here}.params.patch: parts.{moving[0]} makes latents of other sides, which "
                f"{self.patch} may not divide: set it to 1"
            )

    def check(self, model: Model, source: Source) -> None:
        """Raise ConfigError unless latents are square, and divided into tokens."""
        positions = source.size // model.autoencoder.upscale
        if positions.height != positions.width or not positions.fits(self.patch):
            raise ConfigError(
                f"model.params.parts.{self.name}.params.patch: latents of {positions} are not "
                f"squares of {self.patch}x{self.patch} tokens: change it, or data.params.size"
            )

    def on_latent(self, model: Model, step: Step) -> None:
        noise = torch.randn_like(step.latent)
        step.latent = step.latent + math.exp(-self.log_snr / 2) * noise

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        assert step.encoded is not None
        z = upcast(step.encoded.mean)

        # The trainer multiplies a loss by its weight, which is meant for the encoder alone: z gets
        # it here, so that both gradients can be divided by it. The values stay what they are.
        weighted = z.detach() + self.weight * (z - z.detach())
        where = torch.rand(len(z), device=z.device)
        nats = self(weighted, where, torch.randn_like(z))
        rate = nats.mean() / step.images[0].numel()
        rate = rate.detach() + (rate - rate.detach()) / self.weight
        losses: dict[str, Loss] = {"rate": (rate, self.weight)}

        # The fixed noise, as the encoder's distribution.
        if not step.encoded.deterministic:
            fixed = torch.full_like(step.encoded.logvar, -self.log_snr)
            losses["logvar"] = (logvar_loss(step.encoded.logvar, fixed), LOGVAR_WEIGHT)
        return losses

    def forward(self, z: Tensor, where: Tensor, noise: Tensor) -> Tensor:
        """Estimate the rate of latents (B, n_z, h, w) in nats, (B,), each at one noise level.

        ``where``, (B,), from 0 (noise alone) to 1 (log_snr), is uniform: the level t is then
        spread evenly in its logarithm, so that the bound's factor 1 / t becomes a constant.
        """
        t = self.first_t**where
        at = t[:, None, None, None]
        velocity = upcast(self.denoiser((1 - at) * z + at * noise, t))
        error = (noise - z - velocity).square().flatten(1).sum(1)
        return -math.log(self.first_t) * (1 - t) * error

    def validate(self, model: Model, x: Tensor, moments: Tensor | None) -> Mapping[str, Tensor]:
        z = upcast(model.encode(x).mean)

        # Each image's noise is its own, the same in any batch and process.
        start, noise = draws_by_image(x, z.shape[1:])

        nats = torch.zeros_like(start)
        for level in range(NOISE_LEVELS):
            nats = nats + self(z, (start + level / NOISE_LEVELS) % 1, noise) / NOISE_LEVELS
        return {"bits_per_image": nats.mean() / math.log(2)}

    def describe(self) -> str:
        return f"weight {self.weight:g}, log-SNR {self.log_snr:g}, {counted(self.depth, 'block')}"
