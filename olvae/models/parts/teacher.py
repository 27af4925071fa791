"""Teacher: distil an existing autoencoder, whose latents the student learns."""

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import add
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from olvae.checkpoint import tensors_sum
from olvae.config import ConfigError
from olvae.data.source import Source
from olvae.devices import DTYPES
from olvae.files import counted, warn_once
from olvae.losses.terms import latent_loss, logvar_loss
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.families import drop_factors
from olvae.models.loading.targets import find_without_options
from olvae.models.parts.part import Loss, Model, Part, Step, first_images
from olvae.modules.base import check_not_negative
from olvae.modules.distributions import DiagonalGaussian, Posterior, in_float32
from olvae.modules.frozen import Frozen
from olvae.modules.mixed_precision import no_autocast
from olvae.modules.moments import Moments

TEACHER_HAS_NO_FACTORS = (
    "its file holds no factors for a diffusion model: set model.params.scaling_factor "
    "(Stable Diffusion 1 has 0.18215, SDXL 0.13025, SD3 1.5305 with shift_factor 0.0609, "
    "FLUX.1 0.3611 with 0.1159)"
)

# The standard deviation of the teacher's latents is measured on this many training images.
STD_IMAGES = 64


class Teacher(Part):
    """Teach the encoder a frozen autoencoder's posterior, and the decoder images from its latents.

    Where a half of the student is frozen, validation uses the teacher's half. The teacher's tensors
    are in no state dict, optimizer, average or checkpoint, and copies of the student share them;
    only the standard deviations of its latents are saved. Its factors for a diffusion model replace
    the student's, whatever the config has; the config's count if the teacher's file has none, or
    its training has outdated them.
    force_upcast is not taken over, because it is about a decoder's weights.

    Args:
        autoencoder: a TARGET: ``diffusers:ID_OR_FOLDER``, a file, a run, ...
        dtype: precision of its weights and computation; bfloat16 halves memory and time on a GPU.
        latent_weight: weight of the squared distance of the means, in units of the teacher's
            standard deviation per channel.
        logvar_weight: weight of the KL divergence between the teacher's and the student's Gaussians
            with equal means, which teaches the log-variances. 0 for a teacher without a
            distribution.
        decoder_weight: weight of the objective's image terms between the image and the student's
            latents, decoded by the teacher: the gradient goes through that decoder, in bfloat16 or
            float32. 0 saves the time.
    """

    latents = "given"
    better: ClassVar[Mapping[str, str]] = {"latent_rmse": "lower"}

    # Standard deviation of the teacher's means per channel, (n_z), measured before the first step.
    std: Tensor

    def __init__(
        self,
        autoencoder: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        latent_weight: float = 1.0,
        logvar_weight: float = 0.1,
        decoder_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_not_negative(
            latent_weight=latent_weight, logvar_weight=logvar_weight, decoder_weight=decoder_weight
        )
        if dtype == "float16" and decoder_weight:
            raise ValueError(
                "decoder_weight: the gradients of a mean over pixels are 0 in float16: use bfloat16"
            )
        self.target = autoencoder
        self.dtype = DTYPES[dtype]
        self.weights = {
            "latent": latent_weight,
            "logvar": logvar_weight,
            "teacher_decoder": decoder_weight,
        }
        target = find_without_options(autoencoder)
        with torch.device("cpu"):
            model = target.load()
        self._checksum = tensors_sum(model.state_dict())
        self.factors_measured = model.factors_known and not target.factors_outdated
        if target.factors_outdated and isinstance(model, LiteVAE):
            drop_factors(model)
        self.frozen = Frozen(model.to(self.dtype))

    @property
    def model(self) -> Autoencoder:
        return cast("Autoencoder", self.frozen.network)

    @property
    def stand_in(self) -> "Teacher":
        return self

    @property
    def deterministic(self) -> bool:
        return self.model.deterministic

    def attach(self, model: Model) -> None:
        """Take the teacher's factors for a diffusion model over into the student."""
        factors = dict(self.model.for_diffusion)
        factors.pop("force_upcast", None)
        # If the channels differ, `conflicts` reports that, once.
        if self.model.latent_channels == model.autoencoder.latent_channels:
            given = model.given_factors
            if self.factors_measured:
                other = [name for name, value in factors.items() if given.get(name, value) != value]
                if other:
                    warn_once(
                        f"model.params: {', '.join(other)}: not {self.target}'s, which are taken"
                    )
                model.for_diffusion |= given | factors
            else:
                model.for_diffusion |= factors | given
        self.register_buffer("std", torch.ones(model.autoencoder.latent_channels))

    def conflicts(self, model: Model) -> Iterable[str]:
        here = f"parts.{self.name}"

        # The student's networks have to fit the teacher's latents and images.
        ours = _shape(model.autoencoder)
        theirs = _shape(self.model)
        if ours != theirs:
            n = self.model.latent_channels
            channels = self.model.in_channels
            images = ""
            if channels != model.autoencoder.in_channels:
                images = (
                    "; in_channels of the encoder, out_channels of the decoder and "
                    f"data.params.channels={channels}"
                )
            yield (
                f"{here}: {self.target} has {theirs}, but the student {ours}: "
                f"set model.params.embed_dim={n} "
                f"model.params.decoder_config.params.z_channels={n}, "
                f"and networks of f{self.model.downscale} "
                f"(dct_levels, channel_mult or blocks){images}"
            )
        if not self.model.factors_known and "scaling_factor" not in model.given_factors:
            yield f"scaling_factor: {TEACHER_HAS_NO_FACTORS}"

        if model.freeze_decoder and model.autoencoder.enlarge > 1:
            yield (
                "decoder_config.params.enlarge: the decoder is frozen (freeze_decoder), and the "
                "teacher's takes its place: leave it out"
            )

        # Nothing else may pull the latents away.
        if "kl" in model.loss_weights:
            yield (
                "lossconfig.params.kl_weight: the latents have to be the teacher's, "
                "KL pulls them away: set it to 0"
            )
        for part in model.each_part:
            if part.latents == "kept":
                yield (
                    f"parts.{part.name}: the latents have to be the teacher's, "
                    "not the initial ones: leave it out"
                )

        # A weight without a half to train is a mistake.
        if model.freeze_encoder and self.weights["teacher_decoder"]:
            yield (
                f"{here}.params.decoder_weight: the encoder is frozen (freeze_encoder): "
                "leave it out"
            )
        if not model.freeze_encoder and not any(self.weights.values()):
            yield f"{here}.params: every weight is 0: nothing teaches the encoder"
        without = self.deterministic or model.encoder.deterministic
        if without and not model.freeze_encoder and self.weights["logvar"]:
            whose = "teacher" if self.deterministic else "encoder"
            yield (
                f"{here}.params.logvar_weight: the {whose}'s latents have no distribution: "
                "set it to 0"
            )

    def check(self, model: Model, source: Source) -> None:
        """Raise ConfigError if the data's pixel values or latents are not the teacher's."""
        pixels = self.model.pixel_range
        if not pixels.eight_bits:
            pixels.check_data(source.pixel_range)
        for stats in source.latent_stats:
            if stats["weights"] != self._checksum:
                raise ConfigError(
                    f"data: its latents are of {stats['target']}, "
                    f"whose weights are not {self.target}'s"
                )

    def prepare(self, model: Model, source: Source, seed: int, device: torch.device) -> None:
        """Measure the standard deviation of the means per channel; ValueError if 0, or not finite.

        The student gets the statistics of the teacher's latents here, because its starting weights
        are loaded by now.
        """
        if source.means_std is not None:
            std = torch.tensor(source.means_std)
        else:
            # Of the size that is encoded: smaller than the source's for a decoder at 2x.
            images = first_images(source, seed, STD_IMAGES, device)
            std = self.to(device).measure(map(model.autoencoder.shrink, images))
        if not bool(std.isfinite().all()):
            raise ValueError(
                f"{self.target}: its latents are not finite: set dtype of the teacher to float32"
            )
        if not bool((std > 0).all()):
            raise ValueError(
                f"{self.target}: channel {int(std.argmin())} of its latents is the same everywhere"
            )
        self.std.copy_(std)
        for half in (model.encoder, model.decoder):
            half.use_latents(*model.autoencoder.statistics())

    def measure(self, images: Iterable[Tensor]) -> Tensor:
        """Return the standard deviation of the means per channel, (n_z).

        ``images``: batches (B, C, H, W) in [-1, 1].
        """
        moments = (Moments.of(self.posterior(x).mean) for x in images)
        return reduce(add, moments).std_of_means.float()

    @torch.no_grad()
    def posterior(self, x: Tensor, moments: Tensor | None = None) -> Posterior:
        """Return the teacher's posterior in float32, from ``moments`` if the data provide them."""
        if moments is not None:
            return DiagonalGaussian(moments.float())
        with no_autocast(x):
            return in_float32(self.model.encode(x.to(self.dtype)))

    def decode(self, z: Tensor) -> Tensor:
        """Decode (B, n_z, h, w) -> (B, C, f h, f w) in float32; only z gets gradients.

        The images of a teacher that enlarges them are shrunk again.
        """
        with no_autocast(z):
            return self.model.shrink(self.model.decode(z.to(self.dtype)).float())

    def losses(self, model: Model, step: Step) -> Mapping[str, Loss]:
        if step.encoded is None:
            return {}
        terms: dict[str, Tensor] = {}
        if self.weights["latent"]:
            terms["latent"] = latent_loss(step.encoded.mean, step.posterior.mean, self.std)
        if self.weights["logvar"]:
            terms["logvar"] = logvar_loss(step.encoded.logvar, step.posterior.logvar)
        if self.weights["teacher_decoder"]:
            decoded = self.decode(model.draw(step.encoded))
            terms["teacher_decoder"], _ = model.objective(step.images, decoded, step.encoded)
        return {name: (term, self.weights[name]) for name, term in terms.items()}

    def validate(self, model: Model, x: Tensor, moments: Tensor | None) -> Mapping[str, Tensor]:
        if model.freeze_encoder:
            return {}
        means = model.encode(x).mean
        return {"latent_rmse": latent_loss(means, self.posterior(x, moments).mean, self.std)}

    def summarise(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the RMS distance from the teacher's means, in its standard deviations."""
        return {name: mean**0.5 for name, mean in means.items()}

    def checksum(self) -> str:
        return self._checksum

    def describe(self) -> str:
        weights = [f"{weight:g} {name}" for name, weight in self.weights.items() if weight]
        return ", ".join([f"{self.target}, {str(self.dtype).removeprefix('torch.')}", *weights])


def _shape(model: Autoencoder) -> str:
    return (
        f"f{model.downscale}, {counted(model.latent_channels, 'channel')}, "
        f"for images of {counted(model.in_channels, 'channel')}"
    )
