"""The teacher of a distillation: an autoencoder that exists, frozen, whose latent space the student learns."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from olvae.config import ConfigError
from olvae.losses.terms import latent_loss, logvar_loss
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.targets import find_target
from olvae.modules.base import weights_checksum
from olvae.modules.distributions import Deterministic, DiagonalGaussian, Posterior
from olvae.modules.precision import DTYPES, no_autocast

__all__ = ["NO_FACTORS", "Teacher"]

NO_FACTORS = (
    "its file holds no factors for a diffusion model: set model.params.scaling_factor (Stable Diffusion 1 has 0.18215, "
    "SDXL 0.13025, SD3 1.5305 with shift_factor 0.0609, FLUX.1 0.3611 with 0.1159)"
)


class Teacher:
    """A frozen autoencoder in evaluation mode, and how much its latents count.

    A plain object rather than a module: its tensors are in no state dict, optimizer, average or checkpoint, and copies
    of the student share it.

    Args:
        autoencoder: a TARGET: ``diffusers:ID_OR_FOLDER``, a file, a run, ...
        dtype: of its weights and of what it computes; bfloat16 halves its memory and time on a GPU.
        latent_weight: of the squared distance of the means, in units of the teacher's standard deviation per channel.
        logvar_weight: of the KL divergence between teacher's and student's Gaussians of equal means, which teaches the
            log-variances. 0 for a teacher without a distribution.
        decoder_weight: of the objective's image terms between the image and what the teacher's decoder makes of the
            student's latents: its gradient goes through that decoder, in bfloat16 or float32. 0 saves the time.

    Raises:
        ConfigError, FileNotFoundError, ValueError: the autoencoder was not found or can't be loaded.
    """

    def __init__(
        self,
        autoencoder: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        latent_weight: float = 1.0,
        logvar_weight: float = 0.1,
        decoder_weight: float = 0.0,
    ) -> None:
        for name, weight in (
            ("latent_weight", latent_weight),
            ("logvar_weight", logvar_weight),
            ("decoder_weight", decoder_weight),
        ):
            if weight < 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if dtype == "float16" and decoder_weight:
            raise ValueError("decoder_weight: the gradients of a mean over pixels are 0 in float16: use bfloat16")
        self.name = autoencoder
        self.dtype = DTYPES[dtype]
        self.weights = {"latent": latent_weight, "logvar": logvar_weight, "teacher_decoder": decoder_weight}
        model = find_target(autoencoder).load().requires_grad_(False)
        self.checksum = weights_checksum(model)
        self.model: Autoencoder = model.to(self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    def to(self, device: torch.device) -> "Teacher":
        self.model.to(device)
        return self

    def check_student(self, student: Autoencoder) -> None:
        """Raise ConfigError unless the student's latents can be the teacher's."""
        for what, ours, theirs in (
            ("the latent", _latent(student), _latent(self.model)),
            ("images", f"{student.in_channels} channels", f"{self.model.in_channels} channels"),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"teacher_config: {self.name}: {what}: {theirs}, but the student's: {ours}: set the student's "
                    "networks and embed_dim to the teacher's factor and channels"
                )

    @torch.no_grad()
    def posterior(self, x: Tensor, moments: Tensor | None = None) -> Posterior:
        """The teacher's posterior in float32, without gradients.

        Args:
            x: images (B, C, H, W) in [-1, 1].
            moments: the posterior's moments, (B, 2 n_z, H/f, W/f), if they are known; then nothing is computed.
        """
        if moments is not None:
            return DiagonalGaussian(moments.float())
        with no_autocast(x):
            found = self.model.encode(x.to(self.dtype))
        if isinstance(found, Deterministic):
            return Deterministic(found.mean.float())
        return DiagonalGaussian(torch.cat([found.mean.float(), found.logvar.float()], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        """(B, n_z, h, w) -> (B, C, f h, f w) in float32; gradients reach z, and no weight."""
        with no_autocast(z):
            return self.model.decode(z.to(self.dtype)).float()

    def losses(self, student: DiagonalGaussian, teacher: Posterior, std: Tensor) -> dict[str, Tensor]:
        """The unweighted terms that compare posteriors, by name, if their weights are above 0.

        Args:
            teacher: with a distribution, if ``logvar_weight`` is above 0.
            std: the teacher's standard deviation per channel, (n_z).
        """
        terms: dict[str, Tensor] = {}
        if self.weights["latent"]:
            terms["latent"] = latent_loss(student.mean, teacher.mean, std)
        if self.weights["logvar"]:
            terms["logvar"] = logvar_loss(student.logvar, teacher.logvar)
        return terms

    def measure(self, images: Iterable[Tensor]) -> Tensor:
        """The standard deviation of the means per channel over images, (n_z), in float64 sums.

        Args:
            images: batches (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: as :meth:`check_std`.
        """
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for x in images:
            mean = self.posterior(x).mean.double().transpose(0, 1).flatten(1)  # (n_z, B h w)
            count += mean.shape[1]
            total, square = total + mean.sum(1).cpu(), square + mean.square().sum(1).cpu()
        return self.check_std((square / count - (total / count).square()).clamp(min=0.0).sqrt().float())

    def check_std(self, std: Tensor) -> Tensor:
        """The same standard deviations per channel, (n_z).

        Raises:
            ValueError: one is not finite, or 0.
        """
        if not bool(std.isfinite().all()):
            raise ValueError(f"{self.name}: its latents are not finite: set teacher_config.params.dtype to float32")
        if not bool((std > 0).all()):
            raise ValueError(f"{self.name}: channel {int(std.argmin())} of its latents is the same everywhere")
        return std

    def describe(self) -> str:
        """One line for the summary of a run."""
        weights = ", ".join(f"{weight:g} {name}" for name, weight in self.weights.items() if weight)
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}{f'; {weights}' if weights else ''}"


def _latent(model: Autoencoder) -> str:
    return f"f{model.downscale}, {model.latent_channels} channels"
