"""LiteAutoencoderKL: a training step of the autoencoder and its adversary, under Lightning's manual optimisation."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from olvae.config import ConfigError, Node, instantiate, resolve_class
from olvae.data.source import Batch, Source
from olvae.losses.objective import IMAGE_TERMS, Objective
from olvae.models.adversary import Adversary
from olvae.models.autoencoder import LiteVAE
from olvae.models.averaging import WeightAverage
from olvae.models.linear_code import start_linearly
from olvae.models.optimization import (
    GRADIENT,
    OPTIMIZERS,
    NonFiniteGuard,
    PlayersStrategy,
    compile_networks,
    follow,
    grad_scaler,
    gradient_norm,
    gradient_ratio,
    lr_factor,
    make_optimizer,
    mix_seeds,
    parameters_of,
)
from olvae.models.parts.part import Step, attach_parts
from olvae.models.spec import FOR_DIFFUSION, check_factors
from olvae.models.validation import ValidatedModule
from olvae.modules.base import HALVES, check_betas, check_not_negative
from olvae.modules.distributions import Posterior
from olvae.modules.unetgan import shared_weights


class LiteAutoencoderKL(ValidatedModule):
    """An autoencoder with its objective, its adversary, its parts and their optimizers.

    The weights are held under their published names [M]; ``autoencoder`` is the plain LiteVAE over them.
    ``global_step``, logs, schedules and checkpoint names count updates of the autoencoder.

    Args:
        encoder_config, decoder_config, embed_dim, use_quant, initial_logvar: see :meth:`LiteVAE.from_config`.
        lossconfig: the :class:`Objective`. With another loss (torch.nn.Identity in the published YAML) the config is
            for inference only.
        use_ema, ema_decay: average the weights that are trained; validation and checkpoints use the average.
        learning_rate: filled in from model.base_learning_rate; not scaled by batch size or devices.
        optimizer: of the autoencoder's side: Adam, or :class:`Muon`, with which a small network learns more in a step.
        betas: Adam's [P App. F]; the first is Muon's momentum.
        scheduler, warmup_steps, decay_steps, min_lr_factor: see :func:`lr_factor`; decay_steps is the run's last step
            by default.
        accumulate_grad_batches, gradient_clip_val: filled in from lightning.trainer.
        channels_last: memory layout of the weights and images; often faster.
        compile: compile the networks and the objective for training steps; validation stays uncompiled, because its
            images may have any size.
        adversary_config: the :class:`Adversary` of phase B; None in phase A.
        sample_posterior: decode a sample of the posterior in training, not its mode.
        freeze_encoder, freeze_decoder: train the other half alone.
        checkpoint: keep only the inputs of each block of the decoder, the encoder, or both (true) for the backward
            pass, and compute the rest again there: less memory, more time, the same gradients.
        parts: nodes of further ways to train, each a :class:`~olvae.models.parts.part.Part`, by a name of your choice;
            null removes one.
        scaling_factor, shift_factor, latents_mean, latents_std, force_upcast: of the latents for a diffusion model, for
            exports; by default those of a part that brings latents, such as a teacher.
        val_metrics: metrics of validation beside PSNR and SSIM, such as lpips and rfid; logged as ``val/…``, and of the
            weights without averaging as ``val_raw/…``.
        weights_dir: a folder in which the metrics' pretrained networks are looked for first.

    Raises ConfigError: settings are out of range or contradict each other, one line each.
    """

    seed = 0  # of the noise in training; set by the trainer
    images_seen = 0  # in training, over all ranks: where a resumed run continues the data
    linear_psnr: float | None = (
        None  # of the linear code that training started as, on validation images
    )
    flop = 0  # of an image in a step of both players; counted where training runs on a GPU
    rate_factor = 1.0  # of both learning rates: below one after a return to an earlier checkpoint
    _pairs: list[tuple[Tensor, Tensor]]  # for the discriminator's further updates
    _micro_batch = 0  # within the update
    _iteration = 0  # updates of either side; more than global_step by the discriminator's warm-up

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
        optimizer: Literal["adam", "muon"] = "adam",
        betas: tuple[float, float] | list[float] = (0.5, 0.9),
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
        check_not_negative(warmup_steps=warmup_steps, gradient_clip_val=gradient_clip_val or 0.0)
        self.automatic_optimization, self.channels_last, self.sample_posterior = (
            False,
            channels_last,
            sample_posterior,
        )
        self.freeze_encoder, self.freeze_decoder, self.checkpoint = (
            freeze_encoder,
            freeze_decoder,
            checkpoint,
        )
        self.use_ema, self.ema_decay, self.compiled, self.scheduler = (
            use_ema,
            ema_decay,
            compile,
            scheduler,
        )
        self.optimizer, self.learning_rate, self.betas = (
            optimizer,
            learning_rate,
            check_betas(betas),
        )
        self.warmup_steps, self.decay_steps, self.min_lr_factor = (
            warmup_steps,
            decay_steps,
            min_lr_factor,
        )
        self.accumulate_grad_batches, self.gradient_clip_val = (
            accumulate_grad_batches,
            gradient_clip_val,
        )

        vae = LiteVAE.from_config(
            encoder_config, decoder_config, embed_dim, use_quant, initial_logvar
        )
        self.encoder, self.decoder, self.quantizer = vae.encoder, vae.decoder, vae.quantizer
        self.loss: nn.Module = instantiate(lossconfig)
        self.adversary: Adversary | None = None
        if adversary_config is not None:
            resolve_class(adversary_config["target"], Adversary)
            self.adversary = instantiate(adversary_config)
        given = (scaling_factor, shift_factor, latents_mean, latents_std, force_upcast)
        self.given_factors = {
            n: v for n, v in zip(FOR_DIFFUSION, given, strict=True) if v is not None
        }
        self.for_diffusion = vae.set_for_diffusion(self.given_factors).for_diffusion
        self._prepare_networks()
        self.parts = nn.ModuleDict()
        if mistakes := [*(attach_parts(self, parts) if parts else ()), *self._conflicts()]:
            raise ConfigError(*(f"model.params.{mistake}" for mistake in mistakes))
        self.guard = NonFiniteGuard(
            [self.encoder, self.decoder, self.quantizer, self.adversary, self.parts]
        )
        self._pairs = []

    def _prepare_networks(self) -> None:
        """Freeze halves, and set their checkpointing and memory layout."""
        halves = (
            ("encoder", self.encoder, "quant_conv"),
            ("decoder", self.decoder, "post_quant_conv"),
        )
        for half, network, convolution in halves:
            if getattr(self, f"freeze_{half}"):
                network.requires_grad_(False)
                if self.quantizer is not None:
                    getattr(self.quantizer, convolution).requires_grad_(False)
            if self.checkpoint in (True, half):
                network.checkpoint_steps()
        if self.channels_last:
            self.to(memory_format=torch.channels_last)

    def _out_of_range(self) -> Iterator[str]:
        """One line for each setting that has no such value."""
        if self.accumulate_grad_batches < 1:
            yield f"accumulate_grad_batches must be at least 1, got {self.accumulate_grad_batches}"
        choices = {"scheduler": ("constant", "cosine"), "optimizer": tuple(OPTIMIZERS)}
        for name in (
            name for name, possible in choices.items() if getattr(self, name) not in possible
        ):
            yield f"{name} must be {' or '.join(choices[name])}, got {getattr(self, name)!r}"
        for name in ("min_lr_factor", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{name} must be between 0 and 1, got {getattr(self, name)}"
        if (
            self.scheduler == "cosine"
            and self.decay_steps is not None
            and self.decay_steps <= self.warmup_steps
        ):
            yield f"decay_steps must be more than warmup_steps, {self.warmup_steps}, got {self.decay_steps}"

    def _conflicts(self) -> Iterator[str]:
        """One line for each setting that is out of range, or contradicts another one."""
        yield from self._out_of_range()
        if (
            self.quantizer is None
            and not self.freeze_encoder
            and next(self.encoder.parameters(), None) is None
        ):
            yield f"freeze_encoder: {type(self.encoder).__name__} has nothing to train: set it to true"
        if self.checkpoint in self.frozen_halves:
            yield f"checkpoint: the {self.checkpoint} is frozen, so it needs nothing for a backward pass: leave it out"
        if self.freeze_encoder and self.freeze_decoder:
            yield "freeze_encoder, freeze_decoder: nothing is left to train"
        if self.encoder.deterministic and "kl" in self.loss_weights:
            yield "lossconfig.params.kl_weight: the encoder's latents have no distribution: set it to 0"
        elif self.freeze_encoder and "kl" in self.loss_weights:
            why = "the encoder is frozen (freeze_encoder, the default of `start_from`), and KL is a loss of it"
            yield f"lossconfig.params.kl_weight: {why}: set it to 0, or freeze_encoder to false to train both halves"
        if self.given_factors or self.parts:
            yield from check_factors(self.for_diffusion, self.autoencoder.latent_channels)
        if self.adversary is not None and self.freeze_decoder:
            yield "adversary_config: the decoder is frozen (freeze_decoder), so an adversary has nothing to train"
        for part in self.each_part:
            yield from part.conflicts(self)

    @property
    def trained_networks(self) -> list[nn.Module]:
        """The encoder and the decoder, without a frozen one."""
        return [getattr(self, half) for half in HALVES if half not in self.frozen_halves]

    @property
    def players(self) -> dict[str, nn.Module]:
        """The modules of each player, whose gradients no backward pass of the other one touches."""
        learning = (
            part for part in self.each_part if any(p.requires_grad for p in part.parameters())
        )
        modules = (self.encoder, self.decoder, self.quantizer, *learning)
        sides: dict[str, nn.Module] = {
            "autoencoder": nn.ModuleList([m for m in modules if m is not None])
        }
        return (
            sides
            if self.adversary is None
            else {**sides, "discriminator": self.adversary.discriminator}
        )

    @property
    def checksums(self) -> dict[str, str]:
        """Checksums of the parts' frozen weights, by part."""
        return {
            part.name: found for part in self.each_part if (found := part.checksum()) is not None
        }

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weights of the objective's terms by name; none for a config that is for inference only."""
        return self.loss.weights if isinstance(self.loss, Objective) else {}

    @property
    def objective(self) -> Objective:
        """The loss; ConfigError if it is no :class:`Objective`, as in a config for inference."""
        if not isinstance(self.loss, Objective):
            kind = type(self.loss).__name__
            raise ConfigError(
                f"model.params.lossconfig is a {kind}, for inference only: to train, take an Objective"
            )
        return self.loss

    def check(self, source: Source) -> None:
        """Raise ConfigError if a source's images do not fit in size or channels, or a part can't use them."""
        f, channels = self.autoencoder.downscale, self.encoder.in_channels
        self.pixel_range = source.pixel_range
        if not source.size.fits(f):
            raise ConfigError(
                f"data.params.size: {source.size.node} is not a multiple of {f}, the model's downscaling factor: "
                f"use {' or '.join(str(size.node) for size in source.size.multiples(f))}"
            )
        if source.channels != channels:
            raise ConfigError(
                f"the images have {source.channels} channels, the model takes {channels}: set data.params.channels, or "
                "in_channels of encoder_config.params and out_channels of decoder_config.params"
            )
        if self.stand_in is None and source.latent_stats:
            raise ConfigError(
                "data: it has the latents of a teacher, but there is none: set `teacher`"
            )
        for part in self.each_part:
            part.check(self, source)

    def prepare(
        self, source: Source, seed: int, device: torch.device, fresh: Collection[str]
    ) -> Iterator[str]:
        """Fit and measure what needs images of this seed before a new run's first step; yield lines for its summary.

        ``fresh``: the halves with initial weights, whose linear paths are to be fitted.
        """
        if any(getattr(self, half).linear is not None for half in fresh):
            self.parts.to(device)
            teacher = (
                None
                if (stand_in := self.stand_in) is None
                else (lambda x: stand_in.posterior(x).mean)
            )
            frozen = self.frozen_halves if teacher else ()
            self.linear_psnr, line = start_linearly(
                self.autoencoder, source, seed, device, teacher, fresh, frozen
            )
            yield line
        for part in self.each_part:
            part.prepare(self, source, seed, device)

    # A training step

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002  (Lightning's signature)
        """One micro-batch; every accumulate_grad_batches-th completes an update of each side."""
        images = self.images(batch)  # (B, C, H, W) in [-1, 1]
        last = self._micro_batch + 1 == self.accumulate_grad_batches
        if self._micro_batch == 0:
            self.guard.begin_step()
        self.guard.begin_micro_batch(batch.get("key", ()))
        torch.manual_seed(
            mix_seeds(self.seed, self._iteration, self._micro_batch, self.global_rank)
        )
        every: int = getattr(self.trainer, "log_every_n_steps")  # noqa: B009  (mypy does not see it)
        batches = self._iteration * self.accumulate_grad_batches + self._micro_batch
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = (
            batches  # by which Lightning decides what it logs
        )
        self.reports = last and every > 0 and (batches + 1) % every == 0
        adversary = (
            self.adversary
            if self.adversary is not None and self.adversary.plays(self.global_step)
            else None
        )
        warming_up = adversary is not None and adversary.warms_up(self.global_step)
        shared = np.random.default_rng(mix_seeds(self.seed, self._iteration))
        step = Step(
            images, batch.get("moments"), shared, warming_up, adversary_plays=adversary is not None
        )

        # Forward: one pass of the autoencoder, for both players. Parts may change the latent and the target.
        with torch.set_grad_enabled(not warming_up):
            self.forward_pass(step)
        if not step.adversary_plays:
            adversary = None

        with nullcontext() if adversary is None else shared_weights(adversary.discriminator):
            # The autoencoder: losses by name, and their weighted sum.
            if not warming_up:
                total = self.autoencoder_loss(step)
                if adversary is not None:
                    assert step.reconstruction is not None
                    step.losses["adversarial"] = adversary.generator_loss(step.reconstruction)
                    total = total + adversary.weight_in(self, step) * step.losses["adversarial"]
                self.guard.observe({**step.losses, **step.ratios, "loss": total})
                self._backward("autoencoder", total, last)
                self.report(
                    {f"train/{name}": loss for name, loss in {"loss": total, **step.losses}.items()}
                )

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
            self._log_reported()

    def forward_pass(self, step: Step) -> None:
        """Encode and decode a micro-batch: fill in a step up to its reconstruction."""
        stand_in = self.stand_in
        with ExitStack() as watching:
            for part in self.each_part:
                watching.enter_context(part.watch(self))
                part.on_images(self, step)
            given = None if stand_in is None else stand_in.posterior(step.images, step.moments)
            step.encoded = (
                self.encode(step.images) if given is None or not self.freeze_encoder else None
            )
            posterior = given or step.encoded
            assert posterior is not None
            step.posterior, step.target = posterior, step.images
            step.drawn = step.latent = self.draw(posterior)
            for part in self.each_part:
                part.on_latent(self, step)
            decodes = stand_in is None or not self.freeze_decoder
            step.reconstruction = self.decode(step.latent) if decodes else None

    def draw(self, posterior: Posterior) -> Tensor:
        """A sample of a posterior in training, or its mode without ``sample_posterior``: (B, n_z, H/f, W/f)."""
        return posterior.sample() if self.sample_posterior else posterior.mode()

    def autoencoder_loss(self, step: Step) -> Tensor:
        """The weighted sum of the objective's losses and the parts'; each unweighted one is noted in the step.

        The sum is without the adversary's, whose weight depends on the other gradients.
        """
        total = step.images.new_zeros(())
        if step.reconstruction is not None:
            total, step.losses = self.objective(
                step.target, step.reconstruction, step.encoded, step.images
            )
        for part in self.each_part:
            losses = part.losses(self, step)
            if losses:
                total = (
                    total + torch.stack([weight * loss for loss, weight in losses.values()]).sum()
                )
                taken = {
                    *step.losses,
                    "adversarial",
                    "loss",
                }  # by the objective, or by another part
                of_part = {
                    name: f"{part.name}_{name}" if name in taken else name for name in losses
                }
                step.losses |= {of_part[name]: loss for name, (loss, _) in losses.items()}
        return total

    def ratio_of_gradients(
        self, step: Step, loss: Tensor, network: nn.Module | None = None
    ) -> Tensor:
        """|gradient of the weighted image terms| / |gradient of another loss|; see :func:`gradient_ratio`."""
        ratio = gradient_ratio(
            self, self.objective.weighted(step.losses, *IMAGE_TERMS), loss, network
        )
        step.ratios[f"{GRADIENT}{'decoder' if network is None else 'encoder'}'s last layer"] = ratio
        return ratio

    def _discriminator_backward(
        self, adversary: Adversary, real: Tensor, fake: Tensor, last: bool
    ) -> None:
        loss, logs = adversary.discriminator_loss(real, fake)
        self.guard.observe({**logs, "the discriminator's loss": loss})
        self._backward("discriminator", loss, last)
        health = {"logits_real", "logits_fake", "accuracy"}
        self.report(
            {f"{'health' if n in health else 'train'}/{n}": value for n, value in logs.items()},
            rare=True,
        )

    def _backward(self, player: str, loss: Tensor, last: bool) -> None:
        """Add up a player's gradients; the last backward pass of an update averages them over the processes."""
        loss = self.guard.propagate(loss / self.accumulate_grad_batches)
        if last and isinstance(self.trainer.strategy, PlayersStrategy):
            self.trainer.strategy.reduce_next(player, loss)
        self.manual_backward(loss)

    @property
    def update_is_complete(self) -> bool:
        """Whether no gradient of a further update has been accumulated yet."""
        return self._micro_batch == 0

    def _update(self, adversary: Adversary | None, autoencoder: bool) -> None:
        """One update of the autoencoder, and ``updates_per_step`` of the discriminator if the adversary plays.

        Under fp16 both gradients carry the same loss scale, so it may change only after both were used: the
        discriminator steps first, through the bare scaler; the autoencoder through Lightning, which then updates
        the scale, and counts the step.
        """
        optimizers, schedules = _as_list(self.optimizers()), _as_list(self.lr_schedulers())
        scaler = grad_scaler(self)
        playing = {"autoencoder": autoencoder, "discriminator": adversary is not None}
        norms = {
            p: gradient_norm(self, o.optimizer)
            for o, p in zip(optimizers, playing, strict=False)
            if playing[p]
        }
        bad = self.guard.is_bad(norms)
        if adversary is not None:
            self._step_discriminator(
                adversary, optimizers[1].optimizer, norms["discriminator"], bad
            )
        if autoencoder:
            optimizer = optimizers[0]
            self.report({"train/lr": optimizer.param_groups[0]["lr"]})
            self._clip(optimizer.optimizer, norms["autoencoder"], "train/grad_norm")
            self.guard.skip_if(bad, optimizer.optimizer, scaler)
            optimizer.step()
            optimizer.zero_grad()
            schedules[0].step()
        elif scaler is not None:
            scaler.update()
        self.guard.end_update()
        if adversary is not None:
            for _ in range(adversary.updates_per_step - 1):
                self.guard.begin_update()
                for i, pair in enumerate(self._pairs):
                    self.guard.return_to(i)
                    self._discriminator_backward(adversary, *pair, last=i + 1 == len(self._pairs))
                norm = gradient_norm(self, optimizers[1].optimizer)
                bad = self.guard.is_bad({"discriminator": norm})
                self._step_discriminator(adversary, optimizers[1].optimizer, norm, bad)
                if scaler is not None:
                    scaler.update()
                self.guard.end_update()
            schedules[1].step()
            self._pairs.clear()
        self.guard.end_step(self.global_step, scaler)

    def _step_discriminator(
        self, adversary: Adversary, optimizer: Optimizer, norm: Tensor, bad: Tensor
    ) -> None:
        self._clip(optimizer, norm, "train/grad_norm_discriminator")
        scaler = grad_scaler(self)
        self.guard.skip_if(bad, optimizer, scaler)
        if scaler is not None:
            scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad()
        adversary.updated()

    def _clip(self, optimizer: Optimizer, norm: Tensor, name: str) -> None:
        if self.gradient_clip_val:
            self.report({name: norm})
            torch.nn.utils.clip_grads_with_norm_(
                parameters_of(optimizer), self.gradient_clip_val, norm
            )

    # Lightning's hooks

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """The parameters of the autoencoder's side that training changes."""
        return [p for p in self.players["autoencoder"].parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        decay_steps = self.decay_steps or self.trainer.max_steps

        def factor(step: int) -> float:
            factor = lr_factor(
                step, self.scheduler, self.warmup_steps, decay_steps, self.min_lr_factor
            )
            return factor * self.rate_factor

        optimizers = [
            make_optimizer(
                self.optimizer, self.autoencoder_parameters(), self.learning_rate, self.betas
            )
        ]
        schedules = [LambdaLR(optimizers[0], factor)]
        if self.adversary is not None:
            rate = self.learning_rate * self.adversary.learning_rate_ratio
            parameters, start_step = (
                list(self.adversary.discriminator.parameters()),
                self.adversary.start_step,
            )

            def own_warmup(
                updates: int,
            ) -> float:  # counted from its first update, times the autoencoder's schedule
                rise = min(1.0, (updates + 1) / max(1, self.warmup_steps))
                return rise * factor(max(self.global_step, self.warmup_steps, start_step))

            optimizers.append(make_optimizer("adam", parameters, rate, self.adversary.betas))
            schedules.append(LambdaLR(optimizers[1], own_warmup))
        return optimizers, schedules

    def configure_callbacks(self) -> list[pl.Callback]:
        return [WeightAverage(self.guard, self.ema_decay)] if self.use_ema else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["images_seen"], checkpoint["iteration"] = self.images_seen, self._iteration
        checkpoint["rate_factor"], checkpoint["linear_psnr"] = self.rate_factor, self.linear_psnr

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_seen, self._iteration = checkpoint["images_seen"], checkpoint["iteration"]
        self.rate_factor, self.linear_psnr = (
            checkpoint["rate_factor"],
            checkpoint.get("linear_psnr"),
        )
        batches = (
            self._iteration * self.accumulate_grad_batches
        )  # of another number in an update than before, perhaps
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        counts |= {kind: dict.fromkeys(counts[kind], batches) for kind in ("total", "current")}
        for schedule in checkpoint["lr_schedulers"]:
            schedule.pop("base_lrs", None)  # the config's, which may have changed

    def on_fit_start(self) -> None:
        if self.compiled:
            discriminators = [self.adversary.discriminator] if self.adversary is not None else []
            compile_networks([*self.trained_networks, self.loss, *discriminators], self.device)

    def on_validation_start(self) -> None:
        if self.compiled:
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        if self.compiled:
            torch.compiler.set_stance("default")

    def on_train_start(self) -> None:
        if self._iteration > 0:
            first, *others = _as_list(self.lr_schedulers())
            saved = first.optimizer.param_groups[0]["lr"]
            follow(first)
            if (
                first.optimizer.param_groups[0]["lr"] != saved
            ):  # else the discriminator's is of its own last update
                for schedule in others:
                    follow(schedule)
        for part in self.each_part:
            part.start(self, resumed=self._iteration > 0)
        for half in self.frozen_halves:
            getattr(self, half).eval()


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
