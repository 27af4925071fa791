"""The adversary of phase B: a discriminator, the losses of both sides, and their schedule."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from olvae.config import ConfigError, Node, instantiate
from olvae.data.pixels.size_and_range import Sides, Size
from olvae.data.source import Source
from olvae.losses import gan_losses
from olvae.losses.cutmix import cutmix, cutmix_consistency, cutmix_loss
from olvae.losses.objective import IMAGE_TERMS
from olvae.models.parts.part import Model, Step
from olvae.models.updates.optimizers import mix_seeds
from olvae.modules.base import check_betas, check_choice, check_counts, check_not_negative
from olvae.modules.mixed_precision import no_autocast
from olvae.modules.unetgan import power_iteration, shared_weights, stop_power_iterations

LECAM = {"paper": (0.99, False), "code": (0.999, True)}  # decay, and whether there is a ReLU


class Adversary(nn.Module):
    """A discriminator with its losses. It owns no optimizer, and sees only the images.

    Args:
        discriminator_config: PatchGAN, GigaGAN or UNetGAN, or any module from images to a list of
            logit tensors with their number in ``num_outputs``.
        loss: hinge [D], logistic, lsgan, wgan or bce; hinge and logistic do equally well
            [P Table 16].
        weight: of the adversarial loss in the autoencoder's; constant [P Table 8], 0.1 [D].
        start_step: the autoencoder's step at which the adversary starts to play.
        ramp_steps: steps over which the weight then grows linearly from 0; and updates of the
            discriminator over which cutmix_probability does.
        warmup_updates: updates of the discriminator alone, at the start step, before the
            autoencoder continues.
        updates_per_step: updates of the discriminator for each one of the autoencoder.
        adaptive_weight: multiply the weight by the ratio of the gradients of the pixel terms and of
            the adversarial term at the decoder's last layer, as the latent-diffusion code does.
        adaptive_max: the ratio's ceiling in the unit of that code, whose pixel terms are sums over
            an image. Here they are means, so the ratio is clamped to adaptive_max / (C H W): for
            1e4, 0.051 at 256 pixels.
        learning_rate_ratio: the discriminator's learning rate over the autoencoder's.
        betas: of the discriminator's Adam.
        r1_weight: gamma of the R1 penalty, gamma / 2 E |grad_x sum of logits|^2; 0 turns it off.
            Computed at every r1_every-th update, times r1_every. The sum grows with the number of
            logits: choose gamma by ``train/r1``.
        r1_every: updates of the discriminator from one R1 penalty to the next.
        lecam_weight: of the LeCam penalty; 0 turns it off.
        lecam_variant: ``paper``, or ``code`` with the ReLU and the decay of the published code; see
            :class:`LeCam`.
        cutmix_probability: share of the discriminator's updates with CutMix: the loss on mixed
            images plus the consistency term (MSE, weight 1) in place of the normal loss. The
            published code has 0.5 after a ramp. Needs per-pixel logits, such as UNetGAN's.
    """

    def __init__(
        self,
        discriminator_config: Node,
        loss: Literal["hinge", "logistic", "lsgan", "wgan", "bce"] = "hinge",
        weight: float = 0.1,
        start_step: int = 0,
        ramp_steps: int = 0,
        warmup_updates: int = 0,
        updates_per_step: int = 1,
        adaptive_weight: bool = False,
        adaptive_max: float = 1e4,
        learning_rate_ratio: float = 1.0,
        betas: tuple[float, float] | list[float] = (0.5, 0.9),
        r1_weight: float = 0.0,
        r1_every: int = 16,
        lecam_weight: float = 0.0,
        lecam_variant: Literal["paper", "code"] = "paper",
        cutmix_probability: float = 0.0,
    ) -> None:
        super().__init__()
        # Ranges of the numbers
        check_not_negative(
            weight=weight,
            start_step=start_step,
            ramp_steps=ramp_steps,
            warmup_updates=warmup_updates,
            r1_weight=r1_weight,
            lecam_weight=lecam_weight,
            adaptive_max=adaptive_max,
        )
        check_counts(1, updates_per_step=updates_per_step, r1_every=r1_every)
        if learning_rate_ratio <= 0:
            raise ValueError(f"learning_rate_ratio must be above 0, got {learning_rate_ratio}")
        if not 0 <= cutmix_probability <= 1:
            raise ValueError(
                f"cutmix_probability must be between 0 and 1, got {cutmix_probability}"
            )
        check_choice(LECAM, lecam_variant=lecam_variant)

        # The discriminator: power iterations run once an update, not in each forward pass.
        self.discriminator: nn.Module = instantiate(discriminator_config)
        if not isinstance(getattr(self.discriminator, "num_outputs", None), int):
            raise ConfigError(
                f"discriminator_config: {discriminator_config['target']} has no num_outputs (of "
                "logits)"
            )
        stop_power_iterations(self.discriminator)

        # The losses, and their schedule
        self.loss = loss
        self.weight = weight
        self.start_step, self.ramp_steps = start_step, ramp_steps
        self.warmup_updates = warmup_updates
        self.updates_per_step = updates_per_step
        self.adaptive_weight = adaptive_weight
        self.adaptive_max = adaptive_max
        self.learning_rate_ratio = learning_rate_ratio
        self.betas = check_betas(betas)
        self.r1_weight, self.r1_every = r1_weight, r1_every
        self.cutmix_probability = cutmix_probability
        self.lecam_weight = lecam_weight
        self.lecam: gan_losses.LeCam | None = None
        if lecam_weight:
            decay, relu = LECAM[lecam_variant]
            self.lecam = gan_losses.LeCam(self.discriminator.num_outputs, decay, relu)
        self.updates = 0  # of the discriminator so far

    def check(self, model: Model, source: Source, max_steps: int) -> None:
        """Raise ConfigError if the adversary can't play in this run, or on these images."""
        if self.start_step >= max_steps:
            raise ConfigError(
                f"model.params.adversary_config.params.start_step: {self.start_step} is not below "
                f"max_steps, {max_steps}: set it lower, or model.params.adversary_config=null"
            )
        if not set(IMAGE_TERMS) & set(model.loss_weights):
            raise ConfigError(
                "lossconfig.params: an adversary needs one of the losses that compare images "
                "beside it"
            )
        self.check_image(model.encoder.in_channels, source.size)

    def check_image(self, channels: int, size: Size) -> None:
        """Run the discriminator on a grey image; ConfigError if it does not take this size."""
        sides = Sides.of(size)
        try:
            with torch.no_grad():
                logits = self.discriminator.eval()(torch.zeros(1, channels, *sides))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                "adversary_config.params.discriminator_config.params: it does not take images of "
                f"{channels}x{sides}: {error}"
            ) from error
        finally:
            self.discriminator.train()
        if self.cutmix_probability and logits[0].shape[-2:] != sides:
            raise ConfigError(
                "cutmix_probability needs a discriminator with one logit per pixel first, such as "
                "UNetGAN"
            )

    def plays(self, step: int) -> bool:
        """Whether both sides play at this step of the autoencoder."""
        return step >= self.start_step

    def warms_up(self, step: int) -> bool:
        """Whether the discriminator is trained alone at this step."""
        return self.plays(step) and self.updates < self.warmup_updates

    def weight_at(self, step: int) -> float:
        """The weight at this step of the autoencoder: the constant times the ramp."""
        return self.weight * min(1.0, max(0, step - self.start_step + 1) / max(1, self.ramp_steps))

    def weight_in(self, model: Model, step: Step) -> Tensor | float:
        """The weight of the loss ``adversarial`` in this step, adaptive if that is on.

        Also reports the adaptive factor, and the adversarial gradient over the image terms'.
        """
        weight: Tensor | float = self.weight_at(model.global_step)
        if self.adaptive_weight or model.reports:
            ratio = model.ratio_of_gradients(step, step.losses["adversarial"])
            if self.adaptive_weight:
                factor = ratio.clamp(0.0, self.adaptive_max / step.target[0].numel())
                weight = weight * factor
                model.report({"health/adaptive_weight": factor})
            model.report({"health/gradient_ratio": weight / ratio.clamp_min(1e-12)})
        return weight

    def generator_loss(self, fake: Tensor) -> Tensor:
        """The autoencoder's loss: its gradient reaches ``fake``, but not the discriminator."""
        learning = nn.ParameterList(p for p in self.discriminator.parameters() if p.requires_grad)
        learning.requires_grad_(False)
        try:
            return gan_losses.generator_loss(self.loss, self.discriminator(fake))
        finally:
            learning.requires_grad_(True)

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on images (B, C, H, W), which get no gradient; and values to log.

        These are the terms, logits and accuracy. ``discriminator`` is the normal loss, also in an
        update with CutMix.
        """
        real = real.detach()
        fake = fake.detach()
        with shared_weights(self.discriminator):
            # The normal loss
            real_logits: list[Tensor] = self.discriminator(real)
            fake_logits: list[Tensor] = self.discriminator(fake)
            total = gan_losses.discriminator_loss(self.loss, real_logits, fake_logits)
            logs = {
                "discriminator": total.detach(),
                "logits_real": gan_losses.mean_of_outputs(real_logits),
                "logits_fake": gan_losses.mean_of_outputs(fake_logits),
                "accuracy": gan_losses.discriminator_accuracy(real_logits, fake_logits, self.loss),
            }

            # CutMix takes its place; penalties come on top.
            terms = self.rare_terms(self.updates)
            if "CutMix" in terms:
                mixed, mask = cutmix(real, fake)
                # (B, 1, H, W), then any logits of whole images
                logits: list[Tensor] = self.discriminator(mixed)
                total = cutmix_consistency(logits[0], real_logits[0], fake_logits[0], mask)
                total = total + cutmix_loss(self.loss, logits, mask)
                logs["cutmix"] = total
            if self.lecam is not None:
                logs["lecam"] = self.lecam(real_logits, fake_logits)
                total = total + self.lecam_weight * logs["lecam"]
            if "R1" in terms:
                # Fused attention, of a vision encoder, has no second derivative.
                with no_autocast(real), sdpa_kernel(SDPBackend.MATH):
                    image = real.float().requires_grad_()
                    # `forward`, because a compiled network can't be differentiated twice.
                    logs["r1"] = gan_losses.r1_penalty(self.discriminator.forward(image), image)
                total = total + self.r1_weight * self.r1_every * logs["r1"]
        return total, {name: value.detach() for name, value in logs.items()}

    def updated(self) -> None:
        """Call it after every update of the discriminator."""
        self.updates += 1
        power_iteration(self.discriminator)

    def rare_terms(self, updates: int) -> list[str]:
        """Which of CutMix and R1 belong to the update after this number of updates.

        The same in all processes and micro-batches.
        """
        ramp = min(1.0, updates / self.ramp_steps) if self.ramp_steps else 1.0
        draw = np.random.default_rng(mix_seeds(updates)).random()
        terms = []
        if draw < self.cutmix_probability * ramp:
            terms.append("CutMix")
        if self.r1_weight and updates % self.r1_every == 0:
            terms.append("R1")
        return terms

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        self.updates = int(state)
