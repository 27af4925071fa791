"""LiteAutoencoderKL: what happens in a training step."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from olvae.config import ConfigError, Node, instantiate
from olvae.data.image import from_uint8
from olvae.data.source import Batch
from olvae.losses.objective import IMAGE_TERMS, Objective
from olvae.losses.terms import latent_loss
from olvae.models.adversary import Adversary
from olvae.models.alignment import ADAPTIVE_MAX, Alignment
from olvae.models.autoencoder import LiteVAE
from olvae.models.averaging import WeightAverage
from olvae.models.bad_steps import StepGuard
from olvae.models.choices import contradictions
from olvae.models.compilation import compile_networks
from olvae.models.optimization import adam_of, grad_scaler, gradient_ratio, lr_factor, mix_seeds
from olvae.models.players import PlayersStrategy
from olvae.models.regularizers import ActivationBound, Anchor, transform_alike
from olvae.models.spec import FOR_DIFFUSION, check_factors
from olvae.models.teacher import NO_FACTORS, Teacher
from olvae.models.validation import ValidatedModule
from olvae.modules.distributions import DiagonalGaussian, Posterior
from olvae.modules.precision import island

__all__ = ["LiteAutoencoderKL"]


class LiteAutoencoderKL(ValidatedModule):
    """An autoencoder with its objective, its adversary and their optimizers, under Lightning's manual optimisation.

    The weights are held under their published names [M]; ``autoencoder`` is the plain LiteVAE over them.
    ``global_step``, logs, schedules and checkpoint names count updates of the autoencoder.

    Args:
        encoder_config, decoder_config: nodes of an Encoder and a Decoder.
        adversary_config: the :class:`Adversary` of phase B; None in phase A.
        lossconfig: the :class:`Objective`. With another loss (torch.nn.Identity in the published YAML) the config is
            for inference only.
        embed_dim: n_z, channels of the latent.
        use_quant: a 1x1 convolution on either side of the latent.
        initial_logvar: see :meth:`LiteVAE.from_config`.
        use_ema: average the weights that are trained; validation and checkpoints use the average.
        ema_decay: decay of that average.
        learning_rate: filled in from model.base_learning_rate; not scaled by batch size or devices.
        betas: Adam's [P App. F].
        optimizer: ``adam``, or ``adam8bit``, bitsandbytes', whose states take two bytes a weight instead of eight.
        scheduler: ``constant`` or ``cosine``, after a linear warm-up.
        warmup_steps, decay_steps, min_lr_factor: see :func:`lr_factor`; decay_steps is the run's last step by
            default.
        accumulate_grad_batches, gradient_clip_val: filled in from lightning.trainer.
        channels_last: memory layout of the weights and images; often faster.
        compile: compile the encoder, the decoder, the objective and the discriminator for training steps; validation
            stays uncompiled, because its images may have any size.
        sample_posterior: decode a sample of the posterior in training, not its mode.
        latent_noise: the standard deviation of noise that is added to what the decoder gets in training, so that it
            learns to decode a diffusion model's errors too; in units of ``latent_noise_of``: the ``posterior``'s
            standard deviation at each element, or the ``data``'s in each channel, measured on the batch.
        freeze_encoder: train the decoder alone, so that latents do not change.
        freeze_decoder: train the encoder alone.
        anchor_weight: weight of the mean squared distance between the posterior's means and those of the encoder that
            training started from: fine-tunes encoder and decoder, and keeps old latents usable.
        equivariance: share of the steps on which the latent and the image are scaled and rotated alike before the
            reconstruction is compared with the image, as in EQ-VAE; the adversary pauses on them.
        activation_bound: a size that activations should not exceed in the networks that are trained, such as 8192 to be
            safe in fp16, which ends at 65504; None bounds nothing.
        activation_weight: of what exceeds the bound, relative to it, squared.
        checkpoint: keep only what goes into each block of the decoder, the encoder, or both (true) for the backward
            pass, and compute the rest again there: less memory, more time, the same gradients.
        teacher_config: the :class:`Teacher` of a distillation. The encoder learns its latents; the decoder learns
            images from its latents; with one of them frozen, validation takes the teacher's half in its place.
        alignment_config: the :class:`Alignment` of the latent with a vision encoder.
        scaling_factor, shift_factor, latents_mean, latents_std, force_upcast: of the latents for a diffusion model,
            which exports hand on; see :class:`~olvae.models.spec.AutoencoderSpec`. By default they are the teacher's,
            except for force_upcast.
        val_metrics: metrics of validation beside PSNR and SSIM, such as lpips and rfid; logged as ``val/…``, with the
            averaged weights if there are any, and then also as ``val_raw/…``, with the raw ones.
        weights_dir: a folder in which the metrics' pretrained networks are looked for first.
    """

    def __init__(
        self,
        encoder_config: Node,
        decoder_config: Node,
        lossconfig: Node,
        embed_dim: int,
        use_quant: bool = False,
        initial_logvar: float = 0.0,
        use_ema: bool = False,
        ema_decay: float = 0.999,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] | list[float] = (0.5, 0.9),
        optimizer: Literal["adam", "adam8bit"] = "adam",
        scheduler: Literal["constant", "cosine"] = "constant",
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        min_lr_factor: float = 0.0,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002  (the config's name)
        adversary_config: Node | None = None,
        sample_posterior: bool = True,
        latent_noise: float = 0.0,
        latent_noise_of: Literal["posterior", "data"] = "posterior",
        freeze_encoder: bool = False,
        freeze_decoder: bool = False,
        anchor_weight: float = 0.0,
        equivariance: float = 0.0,
        activation_bound: float | None = None,
        activation_weight: float = 1.0,
        checkpoint: bool | Literal["encoder", "decoder"] = False,
        teacher_config: Node | None = None,
        alignment_config: Node | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool | None = None,
        val_metrics: Sequence[str] = (),
        weights_dir: str | None = None,
    ) -> None:
        super().__init__(val_metrics, weights_dir)
        self.automatic_optimization = False
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches must be at least 1, got {accumulate_grad_batches}")
        if gradient_clip_val is not None and gradient_clip_val < 0:
            raise ValueError(f"gradient_clip_val must not be negative, got {gradient_clip_val}")
        if scheduler not in ("constant", "cosine"):
            raise ValueError(f"scheduler must be constant or cosine, got {scheduler!r}")
        adam_of(optimizer)  # raises if its library is missing

        autoencoder = LiteVAE.from_config(encoder_config, decoder_config, embed_dim, use_quant, initial_logvar)
        self.encoder = autoencoder.encoder
        self.decoder = autoencoder.decoder
        self.quantizer = autoencoder.quantizer
        self.loss: nn.Module = instantiate(lossconfig)
        self.adversary: Adversary | None = None
        if adversary_config is not None:
            self.adversary = instantiate(adversary_config)
            if not isinstance(self.adversary, Adversary):
                raise ConfigError(f"adversary_config: {adversary_config['target']} is not an Adversary")
        self.teacher: Teacher | None = None
        self.teacher_std: Tensor  # of its latents per channel, (n_z), measured by the trainer
        if teacher_config is not None:
            self.teacher = instantiate(teacher_config)
            if not isinstance(self.teacher, Teacher):
                raise ConfigError(f"teacher_config: {teacher_config['target']} is not a Teacher")
            self.teacher.check_student(autoencoder)
            factors = {n: v for n, v in self.teacher.model.for_diffusion.items() if n != "force_upcast"}
            autoencoder.set_for_diffusion(factors)  # upcasting is about the weights of a decoder
            self.register_buffer("teacher_std", torch.ones(autoencoder.latent_channels))
        self.alignment: Alignment | None = None
        if alignment_config is not None:
            self.alignment = instantiate(alignment_config, latent_channels=autoencoder.latent_channels)
            if not isinstance(self.alignment, Alignment):
                raise ConfigError(f"alignment_config: {alignment_config['target']} is not an Alignment")
        if self.quantizer is None and not freeze_encoder and next(self.encoder.parameters(), None) is None:
            name = type(self.encoder).__name__
            raise ConfigError(f"model.params.freeze_encoder: {name} has nothing to train: set it to true")
        if freeze_encoder:
            self.encoder.requires_grad_(False)
            if self.quantizer is not None:
                self.quantizer.quant_conv.requires_grad_(False)
        if freeze_decoder:
            self.decoder.requires_grad_(False)
            if self.quantizer is not None:
                self.quantizer.post_quant_conv.requires_grad_(False)
        given = (scaling_factor, shift_factor, latents_mean, latents_std, force_upcast)
        autoencoder.set_for_diffusion({n: v for n, v in zip(FOR_DIFFUSION, given, strict=True) if v is not None})
        self.for_diffusion = autoencoder.for_diffusion
        self.anchor = Anchor(self.encoder, self.quantizer) if anchor_weight else None
        self.bound = ActivationBound(activation_bound) if activation_bound is not None else None
        for half, network in (("encoder", self.encoder), ("decoder", self.decoder)):
            if checkpoint in (True, half):
                network.checkpoint_steps()
        if channels_last:
            self.to(memory_format=torch.channels_last)

        self.use_ema = use_ema
        self.ema_decay = ema_decay
        self.learning_rate = learning_rate
        self.betas = (betas[0], betas[1])
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.min_lr_factor = min_lr_factor
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.channels_last = channels_last
        self.compiled = compile
        self.sample_posterior = sample_posterior
        self.latent_noise = latent_noise
        self.latent_noise_of = latent_noise_of
        self.freeze_encoder = freeze_encoder
        self.freeze_decoder = freeze_decoder
        self.anchor_weight = anchor_weight
        self.equivariance = equivariance
        self.activation_weight = activation_weight
        self.checkpoint = checkpoint
        guessed = self.teacher is not None and not self.teacher.model.factors_known and scaling_factor is None
        mistakes = [
            *([f"scaling_factor: {NO_FACTORS}"] if guessed else ()),
            *check_factors(self.for_diffusion, autoencoder.latent_channels),
            *contradictions(
                self.loss.weights if isinstance(self.loss, Objective) else (),
                self.teacher,
                freeze_encoder,
                freeze_decoder,
                anchored=self.anchor is not None,
                adversarial=self.adversary is not None,
                equivariance=equivariance,
                latent_noise=latent_noise,
                latent_noise_of=latent_noise_of,
                checkpoint=checkpoint,
                bounded=self.bound is not None,
                compiled=compile,
                alignment=self.alignment,
                in_channels=autoencoder.in_channels,
            ),
        ]
        if mistakes:
            raise ConfigError(*(f"model.params.{mistake}" for mistake in mistakes))

        self.seed = 0
        """Seed of the noise in training; set by the trainer."""
        self.images_seen = 0
        """Training images consumed, over all ranks: where a resumed run continues the data."""
        self.reports = False
        """Whether the last training step logged its values: every log_every_n_steps-th does."""
        self._micro_batch = 0  # within the update
        self._iteration = 0  # updates of either side; more than global_step by the discriminator's warm-up
        self._pairs: list[tuple[Tensor, Tensor]] = []  # for the discriminator's further updates
        self.rate_factor = 1.0
        """Of both learning rates: below one after a return to an earlier checkpoint."""
        changing = (self.encoder, self.decoder, self.quantizer, self.adversary)
        self.guard = StepGuard([part for part in changing if part is not None])
        """Keeps steps of non-finite numbers from changing anything."""

    @property
    def autoencoder(self) -> LiteVAE:
        """The plain module over the same weights (a view: cheap to make, nothing is copied)."""
        return LiteVAE(self.encoder, self.decoder, self.quantizer).set_for_diffusion(self.for_diffusion)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """See :meth:`LiteVAE.encode`."""
        return self.autoencoder.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """See :meth:`LiteVAE.decode`."""
        return self.autoencoder.decode(z)

    def forward(
        self, x: Tensor, sample_posterior: bool = False, moments: Tensor | None = None
    ) -> tuple[Tensor, Posterior]:
        """See :meth:`LiteVAE.forward`; with a teacher, its half takes the place of the one that is not trained.

        Args:
            moments: of the teacher's posterior, if they are known.
        """
        taught = self.teacher if self.freeze_encoder else None
        posterior = taught.posterior(x, moments) if taught is not None else self.encode(x)
        return self.decode_trained(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def decode_trained(self, z: Tensor) -> Tensor:
        """Decode, with the teacher's decoder if this one is not trained."""
        return self.teacher.decode(z) if self.teacher is not None and self.freeze_decoder else self.decode(z)

    def images(self, batch: Batch) -> Tensor:
        """The batch's uint8 images in [-1, 1], (B, C, H, W)."""
        x = from_uint8(batch["image"])
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    @property
    def objective(self) -> Objective:
        """The loss, which training needs to be an :class:`Objective`.

        Raises:
            ConfigError: the config is for inference.
        """
        if not isinstance(self.loss, Objective):
            kind = f"{type(self.loss).__module__}.{type(self.loss).__qualname__}"
            raise ConfigError(
                f"model.params.lossconfig is a {kind}, which is for inference only: "
                "to train, give it the target olvae.losses.objective.Objective"
            )
        return self.loss

    # A training step

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002  (Lightning's signature)
        """One micro-batch; every accumulate_grad_batches-th completes an update of each side."""
        x = encoded = self.images(batch)  # (B, C, H, W) in [-1, 1]
        last = self._micro_batch + 1 == self.accumulate_grad_batches
        if self._micro_batch == 0:
            self.guard.start()
        self.guard.batch(batch.get("key", ()))
        torch.manual_seed(mix_seeds(self.seed, self._iteration, self._micro_batch, self.global_rank))
        every: int = getattr(self.trainer, "log_every_n_steps")  # noqa: B009  (mypy does not see it)
        self.reports = last and every > 0 and (self._iteration + 1) * self.accumulate_grad_batches % every == 0
        adversary = self.adversary if self.adversary is not None and self.adversary.plays(self.global_step) else None
        warming_up = adversary is not None and adversary.warms_up(self.global_step)

        # Forward: one pass of the autoencoder, for both sides. With a teacher, the decoder learns from its latents.
        with torch.set_grad_enabled(not warming_up), self.watched():
            taught, posterior, z = self.encode_in_training(x, batch.get("moments"))
            if self.equivariance:  # the same on every rank and for the whole update
                shared = np.random.default_rng(mix_seeds(self.seed, self._iteration))
                if not warming_up and shared.random() < self.equivariance:
                    z, x = transform_alike(z, x, shared)
                    adversary = None
            reconstruction = self.decode_in_training(z)

        # The autoencoder: losses by name, and their weighted sum.
        if not warming_up:
            total, losses = self._losses(x, encoded, reconstruction, posterior, taught)
            if self.alignment is not None:
                total = total + self._alignment_loss(self.alignment, losses)
            if adversary is not None:
                assert reconstruction is not None
                losses["adversarial"] = adversary.generator_loss(reconstruction)
                total = total + self._adversarial_weight(adversary, losses) * losses["adversarial"]
            self.guard.see({**losses, "loss": total})
            self._backward("autoencoder", total, last)
            self._report({f"train/{name}": loss for name, loss in {"loss": total, **losses}.items()})

        # The discriminator: its loss on the same reconstruction, without the graph.
        if adversary is not None:
            assert reconstruction is not None
            pair = (x, reconstruction.detach())
            self._discriminator_backward(adversary, *pair, last)
            if adversary.updates_per_step > 1:
                self._pairs.append(pair)

        # Step, once every accumulate_grad_batches micro-batches.
        self._micro_batch = 0 if last else self._micro_batch + 1
        if last:
            self._update(adversary, autoencoder=not warming_up)
            self._iteration += 1
            self.images_seen += x.shape[0] * self.accumulate_grad_batches * self.trainer.world_size
            self._report({"step": float(self.global_step)})  # else Lightning counts micro-batches on the logger's axis

    def watched(self) -> AbstractContextManager[None]:
        """Where networks run whose activations are bounded, if they are."""
        return self.bound.watch(*self._trained_networks()) if self.bound is not None else nullcontext()

    def encode_in_training(
        self, x: Tensor, moments: Tensor | None = None
    ) -> tuple[Posterior | None, DiagonalGaussian | None, Tensor]:
        """The teacher's posterior and this encoder's, each if there is one, and what the decoder gets."""
        taught = self.teacher.posterior(x, moments) if self.teacher is not None else None
        posterior = self.encode(x) if taught is None or not self.freeze_encoder else None
        return taught, posterior, self._latent(taught or posterior)  # z: (B, n_z, H/f, W/f)

    def decode_in_training(self, z: Tensor) -> Tensor | None:
        """The reconstruction; None if the decoder is not trained, and a teacher decodes."""
        return self.decode(z) if self.teacher is None or not self.freeze_decoder else None

    def _backward(self, player: str, loss: Tensor, last: bool) -> None:
        """Add up a player's gradients; the last backward pass of an update averages them over the processes."""
        if last and isinstance(self.trainer.strategy, PlayersStrategy):
            self.trainer.strategy.reduce_next(player)
        self.manual_backward(self.guard.spread(loss / self.accumulate_grad_batches))

    def _report(self, values: Mapping[str, Tensor | float]) -> None:
        """Log the values of a step that the loggers take; at the others nothing waits for the device."""
        if self.reports:
            self.log_dict({name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})

    def _trained_networks(self) -> list[nn.Module]:
        halves = ((self.encoder, self.freeze_encoder), (self.decoder, self.freeze_decoder))
        return [network for network, frozen in halves if not frozen]

    def _draw(self, posterior: Posterior) -> Tensor:
        """A sample of the posterior in training, or its mode: (B, n_z, H/f, W/f)."""
        return posterior.sample() if self.sample_posterior else posterior.mode()

    def _latent(self, posterior: Posterior | None) -> Tensor:
        """What the decoder gets in training: a sample of the posterior, or its mode, and noise on it if asked for."""
        assert posterior is not None
        z = self._draw(posterior)
        if not self.latent_noise:
            return z
        if self.latent_noise_of == "data":
            std = island(posterior.mean.detach()).std((0, 2, 3), keepdim=True)  # (1, n_z, 1, 1)
        else:
            std = posterior.std.detach()
        return z + self.latent_noise * std * torch.randn_like(z)

    def _losses(
        self,
        x: Tensor,
        encoded: Tensor,
        reconstruction: Tensor | None,
        posterior: DiagonalGaussian | None,
        taught: Posterior | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the autoencoder's losses, and each unweighted loss by name.

        The sum is without the adversary's and without the alignment's, whose weights depend on the other gradients.

        Args:
            x: what the reconstruction is compared with.
            encoded: what the posterior is of.
            reconstruction: None if the decoder is not trained, and a teacher decodes.
            posterior: None if the encoder is not trained, and a teacher encodes.
            taught: the teacher's.
        """
        total, losses = encoded.new_zeros(()), {}
        if reconstruction is not None:
            total, losses = self.objective(x, reconstruction, posterior, encoded)
        if self.anchor is not None:
            losses["anchor"] = self.anchor(encoded, posterior)
            total = total + self.anchor_weight * losses["anchor"]
        if self.alignment is not None:
            assert posterior is not None
            losses |= self.alignment(encoded, posterior.mean)
        if self.teacher is not None and posterior is not None:
            assert taught is not None
            terms = self.teacher.losses(posterior, taught, self.teacher_std)
            if self.teacher.weights["teacher_decoder"]:
                decoded = self.teacher.decode(self._draw(posterior))
                terms["teacher_decoder"], _ = self.objective(encoded, decoded, posterior)
            total = total + torch.stack([self.teacher.weights[name] * term for name, term in terms.items()]).sum()
            losses |= terms
        if self.bound is not None:
            losses["activation"] = self.bound.penalty()
            total = total + self.activation_weight * losses["activation"]
        return total, losses

    @property
    def players(self) -> dict[str, nn.Module]:
        """The modules of each player, whose gradients no backward pass of the other one touches."""
        parts = (self.encoder, self.decoder, self.quantizer, self.alignment)
        sides: dict[str, nn.Module] = {"autoencoder": nn.ModuleList([part for part in parts if part is not None])}
        return sides if self.adversary is None else {**sides, "discriminator": self.adversary.discriminator}

    @property
    def update_is_complete(self) -> bool:
        """Whether no gradient of a further update has been accumulated yet."""
        return self._micro_batch == 0

    def _adversarial_weight(self, adversary: Adversary, losses: dict[str, Tensor]) -> Tensor | float:
        """The weight of the adversarial loss; reports health."""
        weight: Tensor | float = adversary.weight_at(self.global_step)
        if adversary.adaptive_weight or self.reports:
            pixels = self.objective.weighted(losses, *IMAGE_TERMS)
            ratio = gradient_ratio(self, pixels, losses["adversarial"])  # |pixels| / |adversarial|
            if adversary.adaptive_weight:
                weight = weight * ratio.clamp(0.0, adversary.adaptive_max)
                self._report({"health/adaptive_weight": ratio.clamp(0.0, adversary.adaptive_max)})
            self._report({"health/gradient_ratio": weight / ratio.clamp_min(1e-12)})
        return weight

    def _alignment_loss(self, alignment: Alignment, losses: dict[str, Tensor]) -> Tensor:
        """The weighted alignment of the latent; reports its adaptive factor."""
        loss = losses["align_cosine"] + losses["align_distance"]
        if not alignment.adaptive_weight:
            return alignment.weight * loss
        pixels = self.objective.weighted(losses, *IMAGE_TERMS)
        last = self.encoder if self.quantizer is None else self.quantizer.quant_conv
        factor = gradient_ratio(self, pixels, loss, last).clamp(max=ADAPTIVE_MAX)
        self._report({"health/alignment_weight": factor})
        return alignment.weight * factor * loss

    def _discriminator_backward(self, adversary: Adversary, real: Tensor, fake: Tensor, last: bool) -> None:
        loss, logs = adversary.discriminator_loss(real, fake)
        self.guard.see({**logs, "the discriminator's loss": loss})
        self._backward("discriminator", loss, last)
        health = {"logits_real", "logits_fake", "accuracy"}
        self._report({f"{'health' if n in health else 'train'}/{n}": value for n, value in logs.items()})

    def _update(self, adversary: Adversary | None, autoencoder: bool) -> None:
        """One update of the autoencoder, and ``updates_per_step`` of the discriminator if the adversary plays.

        Under fp16 both gradients carry the same loss scale, so it may change only after both were used: the
        discriminator steps first, through the bare scaler; the autoencoder through Lightning, which then updates
        the scale, and counts the step.
        """
        optimizers, schedules = _as_list(self.optimizers()), _as_list(self.lr_schedulers())
        scaler = grad_scaler(self)
        norms: dict[str, Tensor] = {}
        if autoencoder:
            norms["autoencoder"] = self._norm(optimizers[0].optimizer)
        if adversary is not None:
            norms["discriminator"] = self._norm(optimizers[1].optimizer)
        updates = [self.guard.judge(norms)]
        if adversary is not None:
            self._step_discriminator(adversary, optimizers[1].optimizer, norms["discriminator"], updates[0])
        if autoencoder:
            optimizer = optimizers[0]
            self._report({"train/lr": optimizer.param_groups[0]["lr"]})
            self._clip(optimizer.optimizer, norms["autoencoder"], "train/grad_norm")
            self.guard.mask(optimizer.optimizer, updates[0], scaler)
            optimizer.step()
            optimizer.zero_grad()
            schedules[0].step()
        elif scaler is not None:
            scaler.update()
        if adversary is not None:
            for _ in range(adversary.updates_per_step - 1):
                for i, pair in enumerate(self._pairs, start=1):
                    self._discriminator_backward(adversary, *pair, last=i == len(self._pairs))
                norm = self._norm(optimizers[1].optimizer)
                updates.append(self.guard.judge({"discriminator": norm}))
                self._step_discriminator(adversary, optimizers[1].optimizer, norm, updates[-1])
                if scaler is not None:
                    scaler.update()
            schedules[1].step()
            self._pairs.clear()
        self.guard.end(self.global_step, updates, scaler)

    def _step_discriminator(
        self, adversary: Adversary, optimizer: torch.optim.Optimizer, norm: Tensor, bad: Tensor
    ) -> None:
        self._clip(optimizer, norm, "train/grad_norm_discriminator")
        scaler = grad_scaler(self)
        self.guard.mask(optimizer, bad, scaler)
        if scaler is not None:
            scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad()
        adversary.updated()

    def _norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """The norm of the true gradient of what an optimizer trains: under fp16 the scale is taken off first."""
        scaler = grad_scaler(self)
        if scaler is not None:
            scaler.unscale_(optimizer)
        gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _clip(self, optimizer: torch.optim.Optimizer, norm: Tensor, name: str) -> None:
        if self.gradient_clip_val:
            self._report({name: norm})
            torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), self.gradient_clip_val, norm)

    # Validation of a student: how far its latents are from the teacher's

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._latent_error = torch.zeros(2, dtype=torch.float64)  # sum over images of the mean square, their number

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.teacher is not None and not self.freeze_encoder:
            x = self.images(batch)
            taught = self.teacher.posterior(x, batch.get("moments"))
            error = latent_loss(self.encode(x).mean, taught.mean, self.teacher_std)
            self._latent_error += torch.tensor([float(error) * len(x), len(x)], dtype=torch.float64)

    def further_values(self) -> dict[str, float]:
        """``val/latent_rmse``: the root mean square distance from the teacher's means, in its standard deviations."""
        if self.teacher is None or self.freeze_encoder:
            return {}
        error = self._latent_error.to(self.device, torch.float32)
        if self.trainer.world_size > 1:
            error = self.trainer.strategy.reduce(error, reduce_op="sum")
        square, images = error.tolist()
        return {"val/latent_rmse": math.sqrt(square / images)} if images else {}

    # Lightning's hooks

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """The parameters of the autoencoder's side that training changes."""
        return [p for p in self.players["autoencoder"].parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        decay_steps = self.decay_steps or self.trainer.max_steps

        def factor(step: int) -> float:
            factor = lr_factor(step, self.scheduler, self.warmup_steps, decay_steps, self.min_lr_factor)
            return factor * self.rate_factor

        adam, schedule = adam_of(self.optimizer), torch.optim.lr_scheduler.LambdaLR
        optimizers = [adam(self.autoencoder_parameters(), lr=self.learning_rate, betas=self.betas)]
        schedules = [schedule(optimizers[0], factor)]
        if self.adversary is not None:
            rate = self.learning_rate * self.adversary.learning_rate_ratio
            parameters = list(self.adversary.discriminator.parameters())

            def own_warmup(updates: int) -> float:  # counted from its first update; then it follows the autoencoder's
                return factor(updates if updates < self.warmup_steps else max(self.global_step, self.warmup_steps))

            optimizers.append(adam(parameters, lr=rate, betas=self.adversary.betas))
            schedules.append(schedule(optimizers[1], own_warmup))
        return optimizers, schedules

    def configure_callbacks(self) -> list[pl.Callback]:
        return [WeightAverage(self.guard, self.ema_decay)] if self.use_ema else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["images_seen"] = self.images_seen
        checkpoint["iteration"] = self._iteration
        checkpoint["rate_factor"] = self.rate_factor

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_seen = checkpoint["images_seen"]
        self._iteration = checkpoint["iteration"]
        self.rate_factor = checkpoint.get("rate_factor", 1.0)  # of a run that began before there was one

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)
        if self.compiled:
            networks = [
                *self._trained_networks(),
                self.loss,
                *([self.adversary.discriminator] if self.adversary else []),
            ]
            compile_networks(networks, self.device)

    def on_validation_start(self) -> None:
        if self.teacher is not None:  # of a model that was not fitted
            self.teacher.to(self.device)
        if self.compiled:
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        if self.compiled:
            torch.compiler.set_stance("default")

    def on_train_start(self) -> None:
        self.guard.prepare()
        if self.anchor is not None:
            if self._iteration == 0:
                self.anchor.set(self.encoder, self.quantizer)  # whatever weights training starts from
            self.anchor.eval()
        if self.freeze_encoder:
            self.encoder.eval()
        if self.freeze_decoder:
            self.decoder.eval()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
