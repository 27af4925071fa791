"""LiteAutoencoderKL: what happens in a training step."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from olvae.config import ConfigError, Node, instantiate
from olvae.data.image import from_uint8
from olvae.data.source import Batch, Source
from olvae.losses.objective import IMAGE_TERMS, Objective
from olvae.models.adversary import Adversary
from olvae.models.autoencoder import LiteVAE
from olvae.models.averaging import WeightAverage
from olvae.models.bad_steps import StepGuard
from olvae.models.compilation import compile_networks
from olvae.models.optimization import adam_of, grad_scaler, gradient_ratio, lr_factor, mix_seeds
from olvae.models.parts.part import Part, StandIn, Step
from olvae.models.parts.teacher import pair_sources
from olvae.models.players import PlayersStrategy
from olvae.models.spec import FOR_DIFFUSION, check_factors
from olvae.models.validation import ValidatedModule
from olvae.modules.distributions import DiagonalGaussian, Posterior


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
        freeze_encoder: train the decoder alone, so that latents do not change.
        freeze_decoder: train the encoder alone.
        checkpoint: keep only what goes into each block of the decoder, the encoder, or both (true) for the backward
            pass, and compute the rest again there: less memory, more time, the same gradients.
        parts: nodes of further ways to train, each a :class:`~olvae.models.parts.part.Part`, by a name of your choice;
            null removes one.
        scaling_factor, shift_factor, latents_mean, latents_std, force_upcast: of the latents for a diffusion model,
            which exports hand on; see :class:`~olvae.models.spec.AutoencoderSpec`. By default they are those of a part
            that brings latents, such as a teacher.
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
        freeze_encoder: bool = False,
        freeze_decoder: bool = False,
        checkpoint: bool | Literal["encoder", "decoder"] = False,
        parts: Mapping[str, Node | None] | None = None,
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
        self.given_factors = {n: v for n, v in zip(FOR_DIFFUSION, given, strict=True) if v is not None}
        self.for_diffusion = autoencoder.set_for_diffusion(self.given_factors).for_diffusion
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
        self.freeze_encoder = freeze_encoder
        self.freeze_decoder = freeze_decoder
        self.checkpoint = checkpoint
        self.parts = nn.ModuleDict()
        mistakes = [
            *self._attach(parts or {}),
            *check_factors(self.for_diffusion, autoencoder.latent_channels),
            *self._conflicts(),
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
        changing = (self.encoder, self.decoder, self.quantizer, self.adversary, self.parts)
        self.guard = StepGuard([part for part in changing if part is not None])
        """Keeps steps of non-finite numbers from changing anything."""

    def _attach(self, nodes: Mapping[str, Node | None]) -> Iterator[str]:
        """Build the parts; one line for each that can't be built."""
        for name, node in nodes.items():
            if node is None:
                continue
            try:
                part = instantiate(node)
            except ConfigError as error:
                yield from (f"parts.{name}: {mistake}" for mistake in error.mistakes)
                continue
            except ValueError as error:
                yield f"parts.{name}: {error}"
                continue
            if not name.isidentifier():
                yield f"parts.{name}: expected a name without dots"
            elif not isinstance(part, Part):
                yield f"parts.{name}: {node['target']} is not a Part"
            else:
                part.name = name
                self.parts[name] = part
                part.attach(self)

    def _conflicts(self) -> Iterator[str]:
        """One line for each setting that contradicts another one."""
        if self.checkpoint not in (True, False, "encoder", "decoder"):
            yield f"checkpoint must be true, false, encoder or decoder, got {self.checkpoint!r}"
        elif self.checkpoint in ("encoder", "decoder") and getattr(self, f"freeze_{self.checkpoint}"):
            half = self.checkpoint
            yield f"checkpoint: the {half} is frozen, so nothing of it is kept for a backward pass: leave it out"
        if self.freeze_encoder and self.freeze_decoder:
            yield "freeze_encoder, freeze_decoder: nothing is left to train"
        if self.freeze_encoder and "kl" in self.loss_weights:
            yield "lossconfig.params.kl_weight: the encoder is frozen (freeze_encoder), KL is a loss of it: set it to 0"
        if self.freeze_decoder and self.adversary is not None:
            yield "adversary_config: the decoder is frozen (freeze_decoder), so an adversary has nothing to train"
        for part in self.each_part:
            yield from part.conflicts(self)

    @property
    def each_part(self) -> list[Part]:
        """The parts, in the order of the config."""
        return [cast("Part", part) for part in self.parts.values()]

    @property
    def stand_in(self) -> StandIn | None:
        """The autoencoder that the decoder learns from, and that takes the place of a frozen half, if there is one."""
        return next((part.stand_in for part in self.each_part if part.stand_in is not None), None)

    @property
    def checksums(self) -> dict[str, str]:
        """Checksums of the parts' frozen weights, by part."""
        return {part.name: found for part in self.each_part if (found := part.checksum()) is not None}

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weights of the objective's terms by name; none for a config that is for inference only."""
        return self.loss.weights if isinstance(self.loss, Objective) else {}

    def check(self, source: Source) -> None:
        """Check that the model can train on a source's images.

        Raises:
            ConfigError: their size or channels do not fit, or a part can't use them.
        """
        f, channels = self.autoencoder.downscale, self.encoder.in_channels
        if source.size % f:
            raise ConfigError(
                f"data.params.size: {source.size} is not a multiple of {f}, the model's downscaling factor: "
                f"use {max(f, source.size // f * f)} or {(source.size // f + 1) * f}"
            )
        if source.channels != channels:
            raise ConfigError(
                f"the images have {source.channels} channels, the model takes {channels}: set data.params.channels, or "
                "in_channels of encoder_config.params and out_channels of decoder_config.params"
            )
        if self.stand_in is None and pair_sources(source):
            raise ConfigError(
                "data: it has the latents of a teacher, but there is none: set `teacher`, or take the images alone"
            )
        for part in self.each_part:
            part.check(self, source)

    def prepare(self, source: Source, seed: int, device: torch.device) -> None:
        """Let the parts measure or fit what they need before the first step of a new run.

        Args:
            source: of the training images.
            seed: of their order.
            device: of this process.
        """
        for part in self.each_part:
            part.prepare(self, source, seed, device)

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
        """See :meth:`LiteVAE.forward`; a stand-in takes the place of a half that is frozen.

        Args:
            moments: of the stand-in's posterior, if they are known.
        """
        stand_in = self.stand_in if self.freeze_encoder else None
        posterior = self.encode(x) if stand_in is None else stand_in.posterior(x, moments)
        return self.decode_trained(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def decode_trained(self, z: Tensor) -> Tensor:
        """Decode, with the stand-in if the decoder is frozen."""
        stand_in = self.stand_in if self.freeze_decoder else None
        return self.decode(z) if stand_in is None else stand_in.decode(z)

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
        images = self.images(batch)  # (B, C, H, W) in [-1, 1]
        last = self._micro_batch + 1 == self.accumulate_grad_batches
        if self._micro_batch == 0:
            self.guard.start()
        self.guard.batch(batch.get("key", ()))
        torch.manual_seed(mix_seeds(self.seed, self._iteration, self._micro_batch, self.global_rank))
        every: int = getattr(self.trainer, "log_every_n_steps")  # noqa: B009  (mypy does not see it)
        self.reports = last and every > 0 and (self._iteration + 1) * self.accumulate_grad_batches % every == 0
        adversary = self.adversary if self.adversary is not None and self.adversary.plays(self.global_step) else None
        warming_up = adversary is not None and adversary.warms_up(self.global_step)
        shared = np.random.default_rng(mix_seeds(self.seed, self._iteration))
        step = Step(images, batch.get("moments"), shared, warming_up, adversary_plays=adversary is not None)

        # Forward: one pass of the autoencoder, for both players. Parts may change the latent and the target.
        with torch.set_grad_enabled(not warming_up):
            self.forward_pass(step)
        if not step.adversary_plays:
            adversary = None

        # The autoencoder: losses by name, and their weighted sum.
        if not warming_up:
            total = self.autoencoder_loss(step)
            if adversary is not None:
                assert step.reconstruction is not None
                step.losses["adversarial"] = adversary.generator_loss(step.reconstruction)
                total = total + self._adversarial_weight(adversary, step.losses) * step.losses["adversarial"]
            self.guard.see({**step.losses, "loss": total})
            self._backward("autoencoder", total, last)
            self.report({f"train/{name}": loss for name, loss in {"loss": total, **step.losses}.items()})

        # The discriminator: its loss on the same reconstruction, without the graph.
        if adversary is not None:
            assert step.reconstruction is not None
            pair = (step.target, step.reconstruction.detach())
            self._discriminator_backward(adversary, *pair, last)
            if adversary.updates_per_step > 1:
                self._pairs.append(pair)

        # Step, once every accumulate_grad_batches micro-batches.
        self._micro_batch = 0 if last else self._micro_batch + 1
        if last:
            self._update(adversary, autoencoder=not warming_up)
            self._iteration += 1
            self.images_seen += len(images) * self.accumulate_grad_batches * self.trainer.world_size
            self.report({"step": float(self.global_step)})  # else Lightning counts micro-batches on the logger's axis

    def forward_pass(self, step: Step) -> None:
        """Encode and decode a micro-batch: fill in a step up to its reconstruction."""
        stand_in = self.stand_in
        with ExitStack() as watching:
            for part in self.each_part:
                watching.enter_context(part.watch(self))
            given = None if stand_in is None else stand_in.posterior(step.images, step.moments)
            step.encoded = self.encode(step.images) if given is None or not self.freeze_encoder else None
            posterior = given or step.encoded
            assert posterior is not None
            step.posterior, step.latent, step.target = posterior, self.draw(posterior), step.images
            for part in self.each_part:
                part.on_latent(self, step)
            decoded = stand_in is None or not self.freeze_decoder
            step.reconstruction = self.decode(step.latent) if decoded else None

    def autoencoder_loss(self, step: Step) -> Tensor:
        """The weighted sum of the objective's losses and the parts'; each unweighted one is noted in the step.

        The sum is without the adversary's, whose weight depends on the other gradients.
        """
        total = step.images.new_zeros(())
        if step.reconstruction is not None:
            total, step.losses = self.objective(step.target, step.reconstruction, step.encoded, step.images)
        for part in self.each_part:
            losses = part.losses(self, step)
            if losses:
                total = total + torch.stack([weight * loss for loss, weight in losses.values()]).sum()
                step.losses |= {name: loss for name, (loss, _) in losses.items()}
        return total

    def draw(self, posterior: Posterior) -> Tensor:
        """A sample of a posterior in training, or its mode without ``sample_posterior``: (B, n_z, H/f, W/f)."""
        return posterior.sample() if self.sample_posterior else posterior.mode()

    def _backward(self, player: str, loss: Tensor, last: bool) -> None:
        """Add up a player's gradients; the last backward pass of an update averages them over the processes."""
        if last and isinstance(self.trainer.strategy, PlayersStrategy):
            self.trainer.strategy.reduce_next(player)
        self.manual_backward(self.guard.spread(loss / self.accumulate_grad_batches))

    def report(self, values: Mapping[str, Tensor | float]) -> None:
        """Log the values of a step that the loggers take; at the others nothing waits for the device."""
        if self.reports:
            self.log_dict({name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})

    @property
    def trained_networks(self) -> list[nn.Module]:
        """The encoder and the decoder, without a frozen one."""
        halves = ((self.encoder, self.freeze_encoder), (self.decoder, self.freeze_decoder))
        return [network for network, frozen in halves if not frozen]

    @property
    def players(self) -> dict[str, nn.Module]:
        """The modules of each player, whose gradients no backward pass of the other one touches."""
        learning = (part for part in self.each_part if any(p.requires_grad for p in part.parameters()))
        modules = (self.encoder, self.decoder, self.quantizer, *learning)
        sides: dict[str, nn.Module] = {"autoencoder": nn.ModuleList([m for m in modules if m is not None])}
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
                self.report({"health/adaptive_weight": ratio.clamp(0.0, adversary.adaptive_max)})
            self.report({"health/gradient_ratio": weight / ratio.clamp_min(1e-12)})
        return weight

    def _discriminator_backward(self, adversary: Adversary, real: Tensor, fake: Tensor, last: bool) -> None:
        loss, logs = adversary.discriminator_loss(real, fake)
        self.guard.see({**logs, "the discriminator's loss": loss})
        self._backward("discriminator", loss, last)
        health = {"logits_real", "logits_fake", "accuracy"}
        self.report({f"{'health' if n in health else 'train'}/{n}": value for n, value in logs.items()})

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
            self.report({"train/lr": optimizer.param_groups[0]["lr"]})
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
            self.report({name: norm})
            torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), self.gradient_clip_val, norm)

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
        if self.compiled:
            networks = [
                *self.trained_networks,
                self.loss,
                *([self.adversary.discriminator] if self.adversary else []),
            ]
            compile_networks(networks, self.device)

    def on_validation_start(self) -> None:
        if self.compiled:
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        if self.compiled:
            torch.compiler.set_stance("default")

    def on_train_start(self) -> None:
        self.guard.prepare()
        for part in self.each_part:
            part.start(self, resumed=self._iteration > 0)
        if self.freeze_encoder:
            self.encoder.eval()
        if self.freeze_decoder:
            self.decoder.eval()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
