"""LiteAutoencoderKL: the training step of the autoencoder and its adversary."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from olvae.config import ConfigError, Node, instantiate, resolve_class
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange
from olvae.data.source import Batch, LoaderLayout, Source
from olvae.library_internals import count_batches, forget_logged
from olvae.losses.objective import IMAGE_TERMS, Objective
from olvae.models.adversary import Adversary
from olvae.models.autoencoder import LiteVAE
from olvae.models.conflicts import check_source, find_conflicts
from olvae.models.linear_code import start_linearly
from olvae.models.parts.part import Part, StandIn, Step, attach_parts
from olvae.models.spec import FOR_DIFFUSION
from olvae.models.updates.averaging import WeightAverage
from olvae.models.updates.ddp import PlayersStrategy
from olvae.models.updates.gradients import grad_scaler, gradient_norm, gradient_ratio, parameters_of
from olvae.models.updates.nonfinite import GRADIENT, NonFiniteGuard
from olvae.models.updates.optimizers import follow, make_optimizers, mix_seeds
from olvae.models.validation import Validation
from olvae.modules.base import HALVES, check_betas, check_not_negative, mean_over_processes
from olvae.modules.distributions import Posterior
from olvae.modules.mixed_precision import compile_networks
from olvae.modules.unetgan import shared_weights

Pair = tuple[Tensor, Tensor]  # real and fake images of a micro-batch


class LiteAutoencoderKL(pl.LightningModule):
    """An autoencoder with its objective, its adversary, its parts and their optimizers.

    The weights have their published names [M]; ``autoencoder`` is the plain LiteVAE over them.
    ``global_step``, logs, schedules and checkpoint names count updates of the autoencoder.

    Args:
        encoder_config, decoder_config, embed_dim, use_quant, initial_logvar: see
            :meth:`~olvae.models.autoencoder.LiteVAE.from_config`.
        lossconfig: the :class:`Objective`. Another loss (Identity in the published YAML) makes the
            config one for inference only.
        use_ema, ema_decay: average the trained weights; validation and checkpoints use the average.
        learning_rate: filled in from model.base_learning_rate; not scaled by batch size or devices.
        optimizer: the autoencoder's; with :class:`Muon` a small network learns more in a step.
        betas: Adam's [P App. F]; the first is Muon's momentum.
        scheduler: of the learning rates after the warm-up: ``constant``, or ``cosine``, half a
            cosine down to min_lr_factor; see :func:`lr_factor`.
        warmup_steps: steps in which the learning rates rise linearly from 1/warmup_steps of the
            base rate.
        decay_steps: the step at which a cosine ends; the run's last step by default.
        min_lr_factor: where a cosine ends, as a factor of the base rate.
        accumulate_grad_batches, gradient_clip_val: filled in from lightning.trainer.
        channels_last: memory layout of the weights and images; often faster.
        compile: compile the networks and the objective for training steps; validation, whose
            images may have any size, stays uncompiled.
        adversary_config: the :class:`Adversary` of phase B; None in phase A.
        sample_posterior: in training, decode a sample of the posterior, not its mode.
        freeze_encoder, freeze_decoder: train the other half alone.
        checkpoint: of the decoder, the encoder or both (true), keep only each block's inputs for
            the backward pass, which computes the rest again: less memory, the same gradients.
        parts: nodes of further ways to train, each a :class:`~olvae.models.parts.part.Part`, by a
            name of your choice; null removes one.
        scaling_factor, shift_factor, latents_mean, latents_std, force_upcast: for a diffusion
            model, in exports; by default from a part that brings latents, such as a teacher.
        val_metrics: metrics of validation beside PSNR and SSIM, such as lpips and rfid; logged as
            ``val/...``, and for the weights without averaging as ``val_raw/...``.
        weights_dir: a folder to search first for the metrics' pretrained networks.

    Raises ConfigError: settings are out of range or contradict each other, one line each.
    """

    seed = 0  # of the noise in training
    pixel_range: PixelRange = EIGHT_BITS  # of the source's images
    reports = False  # whether an update that logs, every log_every_n_steps-th, ends here
    images_seen = 0  # over all ranks: where a resumed run continues the data
    layouts: Sequence[LoaderLayout] = ()  # the loader processes so far, the present ones last
    order: Any = None  # of the source's images
    rate_factor = 1.0  # of both learning rates: below 1 after a return to an earlier checkpoint
    flop = 0  # of an image in a step of both players; counted where training runs on a GPU
    val_set: str | None = None  # the images of validation: see `Source.describe_val_set`
    linear_psnr: float | None = None  # in validation, of the linear code that training started as
    _micro_batch = 0  # within the update
    _logs = False  # whether the update does
    _in_update: set[str]  # names that it, of either side, has reported
    _iteration = 0  # updates of either side: global_step plus the discriminator's warm-up

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
        super().__init__()
        check_not_negative(warmup_steps=warmup_steps, gradient_clip_val=gradient_clip_val or 0.0)
        self.automatic_optimization = False  # the step calls backward passes and optimizers itself
        self.use_ema, self.ema_decay = use_ema, ema_decay
        self.optimizer = optimizer
        self.learning_rate, self.betas = learning_rate, check_betas(betas)
        self.scheduler = scheduler
        self.warmup_steps, self.decay_steps = warmup_steps, decay_steps
        self.min_lr_factor = min_lr_factor
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.channels_last, self.compiled = channels_last, compile
        self.sample_posterior = sample_posterior
        self.freeze_encoder, self.freeze_decoder = freeze_encoder, freeze_decoder
        self.checkpoint = checkpoint

        # Validation, and values to log.
        self.val_metrics = list(val_metrics)
        self.validation = Validation(self.val_metrics, weights_dir)
        self.validation_values: dict[str, float] = {}  # of the last one; empty if it read no image
        self.logged: dict[str, Tensor | float] = {}  # by the last step that logged
        self._reported: dict[str, list[Tensor | float]] = {}  # to be logged, by micro-batch

        # The autoencoder; a tuple hides it from torch, which would save its weights twice.
        networks = (encoder_config, decoder_config, embed_dim, use_quant, initial_logvar)
        vae = LiteVAE.from_config(*networks)
        self._autoencoder = (vae,)
        self.encoder, self.decoder, self.quantizer = vae.encoder, vae.decoder, vae.quantizer
        given = (scaling_factor, shift_factor, latents_mean, latents_std, force_upcast)
        factors = zip(FOR_DIFFUSION, given, strict=True)
        self.given_factors = {name: value for name, value in factors if value is not None}
        self.for_diffusion = vae.set_for_diffusion(self.given_factors).for_diffusion

        # What trains it; then, with everything in place, settings that contradict each other.
        self.loss: nn.Module = instantiate(lossconfig)
        self.adversary: Adversary | None = None
        if adversary_config is not None:
            resolve_class(adversary_config["target"], Adversary)
            self.adversary = instantiate(adversary_config)
        self._prepare_networks()
        self.parts = nn.ModuleDict()
        mistakes = [*attach_parts(self, parts or {}), *find_conflicts(self)]
        if mistakes:
            raise ConfigError(*(f"model.params.{mistake}" for mistake in mistakes))
        self.autoencoder.set_for_diffusion(self.for_diffusion)  # a teacher's, perhaps
        modules = (self.encoder, self.decoder, self.quantizer, self.adversary, self.parts)
        self.guard = NonFiniteGuard(modules)
        self._pairs: list[Pair] = []  # one for each micro-batch of the update

    def _prepare_networks(self) -> None:
        """Freeze halves, and set their checkpointing and memory layout."""
        for half, convolution in (("encoder", "quant_conv"), ("decoder", "post_quant_conv")):
            network = getattr(self, half)
            if half in self.frozen_halves:
                network.requires_grad_(False)
                if self.quantizer is not None:
                    getattr(self.quantizer, convolution).requires_grad_(False)
            if self.checkpoint in (True, half):
                network.checkpoint_steps()
        if self.channels_last:
            self.to(memory_format=torch.channels_last)

    @property
    def autoencoder(self) -> LiteVAE:
        """The plain module over the same weights; another one if a network has been replaced."""
        (vae,) = self._autoencoder
        networks = (self.encoder, self.decoder, self.quantizer)
        if (vae.encoder, vae.decoder, vae.quantizer) != networks:
            vae = LiteVAE(*networks).set_for_diffusion(self.for_diffusion)
            vae.pixel_range = self.pixel_range
            self._autoencoder = (vae,)
        return vae

    @property
    def frozen_halves(self) -> list[str]:
        """Which of :data:`HALVES` are not trained."""
        return [half for half in HALVES if getattr(self, f"freeze_{half}")]

    @property
    def trained_networks(self) -> list[nn.Module]:
        """The encoder and the decoder, without a frozen one."""
        return [getattr(self, half) for half in HALVES if half not in self.frozen_halves]

    @property
    def each_part(self) -> list[Part]:
        """The parts, in the order of the config."""
        return [cast("Part", part) for part in self.parts.values()]

    @property
    def stand_in(self) -> "StandIn | None":
        """The autoencoder that teaches the decoder and replaces a frozen half, if there is one."""
        for part in self.each_part:
            if part.stand_in is not None:
                return part.stand_in
        return None

    @property
    def players(self) -> dict[str, nn.Module]:
        """The modules of each player; a backward pass gives gradients to one player alone."""
        autoencoder = nn.ModuleList([self.encoder, self.decoder])
        if self.quantizer is not None:
            autoencoder.append(self.quantizer)
        for part in self.each_part:
            if any(p.requires_grad for p in part.parameters()):
                autoencoder.append(part)
        players: dict[str, nn.Module] = {"autoencoder": autoencoder}
        if self.adversary is not None:
            players["discriminator"] = self.adversary.discriminator
        return players

    @property
    def checksums(self) -> dict[str, str]:
        """Checksums of frozen weights that no checkpoint has, by part, or ``adversary``."""
        found = {part.name: part.checksum() for part in self.each_part}
        # A discriminator need not have any.
        checksum = getattr(getattr(self.adversary, "discriminator", None), "checksum", None)
        if checksum is not None:
            found["adversary"] = checksum()
        return {name: checksum for name, checksum in found.items() if checksum is not None}

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weights of the objective's terms by name; none if the config is for inference only."""
        return self.loss.weights if isinstance(self.loss, Objective) else {}

    @property
    def objective(self) -> Objective:
        """The loss; ConfigError if it is no :class:`Objective`, as in a config for inference."""
        if not isinstance(self.loss, Objective):
            raise ConfigError(
                f"model.params.lossconfig is a {type(self.loss).__name__}, for inference only: to "
                "train, take an Objective"
            )
        return self.loss

    def check(self, source: Source) -> None:
        """Raise ConfigError if a source's images do not fit the model, or a part can't use them."""
        self.pixel_range = source.pixel_range
        self.autoencoder.pixel_range = source.pixel_range
        check_source(self, source)
        for part in self.each_part:
            part.check(self, source)

    def prepare(
        self, source: Source, seed: int, device: torch.device, fresh: Collection[str]
    ) -> Iterator[str]:
        """Fit and measure on images of this seed, before a new run's first step.

        Yields lines for the run's summary. ``fresh``: the halves with initial weights, whose linear
        paths are to be fitted.
        """
        if any(getattr(self, half).linear is not None for half in fresh):
            self.parts.to(device)
            stand_in = self.stand_in
            teacher = None if stand_in is None else (lambda x: stand_in.posterior(x).mean)
            frozen = self.frozen_halves if teacher else ()
            self.linear_psnr, line = start_linearly(
                self.autoencoder, source, seed, device, teacher, fresh, frozen
            )
            yield line
        for part in self.each_part:
            part.prepare(self, source, seed, device)

    # Forward passes

    def images(self, batch: Batch) -> Tensor:
        """The batch's images in [-1, 1], (B, C, H, W)."""
        x = self.pixel_range.normalise(batch["image"])
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def encode(self, x: Tensor) -> Posterior:
        """See :meth:`LiteVAE.encode`."""
        return self.autoencoder.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """See :meth:`LiteVAE.decode`."""
        return self.autoencoder.decode(z)

    def decode_trained(self, z: Tensor) -> Tensor:
        """Decode, with the stand-in if the decoder is frozen."""
        stand_in = self.stand_in
        if stand_in is None or not self.freeze_decoder:
            return self.decode(z)
        return stand_in.decode(z)

    def forward(
        self, x: Tensor, sample_posterior: bool = False, moments: Tensor | None = None
    ) -> tuple[Tensor, Posterior]:
        """Reconstruct images of the decoder's size: see :meth:`LiteVAE.forward`, and ``shrink``.

        A stand-in (``moments``: its own) replaces a frozen half.
        """
        x = self.autoencoder.shrink(x)
        stand_in = self.stand_in if self.freeze_encoder else None
        posterior = self.encode(x) if stand_in is None else stand_in.posterior(x, moments)
        latent = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode_trained(latent), posterior

    def draw(self, posterior: Posterior) -> Tensor:
        """The latent of a training step, a sample or the mode: (B, n_z, H/f, W/f)."""
        return posterior.sample() if self.sample_posterior else posterior.mode()

    # A training step

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002  (Lightning's)
        """One micro-batch; every accumulate_grad_batches-th completes an update of each side."""
        images = self.images(batch)  # (B, C, H, W) in [-1, 1]
        last = self._micro_batch + 1 == self.accumulate_grad_batches
        if self._micro_batch == 0:
            self.guard.begin_step()
            self._in_update = set()
        self.guard.begin_micro_batch(batch.get("key", ()))

        # Noise: torch's differs in each micro-batch and process, `rng` draws the same in an update.
        numbers = (self.seed, self._iteration, self._micro_batch, self.global_rank)
        torch.manual_seed(mix_seeds(*numbers))
        rng = np.random.default_rng(mix_seeds(self.seed, self._iteration))

        # Logging: Lightning decides by its count of batches, which a resumed run continues.
        every: int = getattr(self.trainer, "log_every_n_steps")  # noqa: B009  (mypy misses it)
        batches = self._iteration * self.accumulate_grad_batches
        count_batches(self.trainer, batches + self._micro_batch)
        self._logs = every > 0 and (batches + self.accumulate_grad_batches) % every == 0
        self.reports = last and self._logs

        # Who plays: the autoencoder alone, both, or the discriminator alone while it warms up.
        adversary = self.adversary
        if adversary is not None and not adversary.plays(self.global_step):
            adversary = None
        warming_up = adversary is not None and adversary.warms_up(self.global_step)
        step = Step(images, batch.get("moments"), rng, warming_up, adversary is not None)

        # Forward: one pass of the autoencoder for both players; parts may change latent and target.
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
                losses = {"loss": total, **step.losses}
                self.report({f"train/{name}": loss for name, loss in losses.items()})

            # The discriminator: its loss on the same reconstruction, without the graph.
            if adversary is not None:
                assert step.reconstruction is not None
                pair = (step.target, step.reconstruction.detach())
                self._discriminator_backward(adversary, pair, last)
                if adversary.updates_per_step > 1:
                    self._pairs.append(pair)

        # Step, once every accumulate_grad_batches micro-batches.
        self._micro_batch += 1
        if last:
            self._micro_batch = 0
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

            # Compare with these images, and encode them, halved where the decoder doubles them.
            step.target = step.images
            step.images = self.autoencoder.shrink(step.images)

            # A stand-in gives the posterior; an encoder that learns from it runs as well.
            if stand_in is None:
                step.posterior = step.encoded = self.encode(step.images)
            else:
                step.posterior = stand_in.posterior(step.images, step.moments)
                step.encoded = None if self.freeze_encoder else self.encode(step.images)
            step.drawn = step.latent = self.draw(step.posterior)

            # Decode, unless the stand-in's decoder takes the place of a frozen one.
            for part in self.each_part:
                part.on_latent(self, step)
            step.reconstruction = None
            if stand_in is None or not self.freeze_decoder:
                step.reconstruction = self.decode(step.latent)

    def autoencoder_loss(self, step: Step) -> Tensor:
        """The weighted sum of the objective's and the parts' losses; the step gets the unweighted.

        The adversary's is left out, because its weight depends on gradients of the others.
        """
        total = step.images.new_zeros(())
        if step.reconstruction is not None:
            total, step.losses = self.objective(
                step.target, step.reconstruction, step.encoded, step.images
            )
        for part in self.each_part:
            losses = part.losses(self, step)
            if not losses:
                continue
            weighted = [weight * loss for loss, weight in losses.values()]
            total = total + torch.stack(weighted).sum()
            # A name of the objective's, or of an earlier part's, gets this part's name in front.
            taken = {*step.losses, "adversarial", "loss"}
            for name, (loss, _) in losses.items():
                if name in taken:
                    name = f"{part.name}_{name}"
                step.losses[name] = loss
        return total

    def ratio_of_gradients(
        self, step: Step, loss: Tensor, network: nn.Module | None = None
    ) -> Tensor:
        """|gradient of the weighted image terms| / |gradient of another loss|.

        At the decoder's last layer, or another network's; see :func:`gradient_ratio`.
        """
        terms = self.objective.weighted(step.losses, *IMAGE_TERMS)
        ratio = gradient_ratio(self, terms, loss, network)
        half = "decoder" if network is None else "encoder"
        step.ratios[f"{GRADIENT}{half}'s last layer"] = ratio
        return ratio

    def _discriminator_backward(self, adversary: Adversary, pair: Pair, last: bool) -> None:
        loss, logs = adversary.discriminator_loss(*pair)
        self.guard.observe({**logs, "the discriminator's loss": loss})
        self._backward("discriminator", loss, last)
        for name, value in logs.items():
            group = "health" if name in {"logits_real", "logits_fake", "accuracy"} else "train"
            self.report({f"{group}/{name}": value}, rare=True)

    def _backward(self, player: str, loss: Tensor, last: bool) -> None:
        """Accumulate a player's gradients; an update's last pass averages them over processes."""
        loss = self.guard.propagate(loss / self.accumulate_grad_batches)
        if last and isinstance(self.trainer.strategy, PlayersStrategy):
            self.trainer.strategy.reduce_next(player, loss)
        self.manual_backward(loss)

    @property
    def update_is_complete(self) -> bool:
        """Whether no gradient of a further update has been accumulated yet."""
        return self._micro_batch == 0

    def _update(self, adversary: Adversary | None, autoencoder: bool) -> None:
        """One update of the autoencoder, and ``updates_per_step`` of the discriminator if it plays.

        Under fp16 both gradients carry the same loss scale, so it may change only after both were
        used: the discriminator steps first, through the bare scaler; the autoencoder through
        Lightning, which then updates the scale, and counts the step.
        """
        optimizers = _as_list(self.optimizers())
        schedules = _as_list(self.lr_schedulers())
        scaler = grad_scaler(self)

        # If a gradient is not finite, in any process, then no player's weights change.
        norms: dict[str, Tensor] = {}
        if autoencoder:
            norms["autoencoder"] = gradient_norm(self, optimizers[0].optimizer)
        if adversary is not None:
            norms["discriminator"] = gradient_norm(self, optimizers[1].optimizer)
        bad = self.guard.is_bad(norms)

        # First update: the discriminator, then the autoencoder.
        if adversary is not None:
            norm = norms["discriminator"]
            self._step_discriminator(adversary, optimizers[1].optimizer, norm, bad)
        if autoencoder:
            optimizer = optimizers[0]
            self.report({"train/lr": optimizer.param_groups[0]["lr"]})
            self._clip(optimizer.optimizer, norms["autoencoder"], "train/grad_norm")
            self.guard.skip_if(bad, optimizer.optimizer, scaler)
            optimizer.step()
            optimizer.zero_grad()
            schedules[0].step()
        elif scaler is not None:
            scaler.update()  # as Lightning's step would have done
        self.guard.end_update()

        # Further updates of the discriminator, on the micro-batches that are kept in `_pairs`.
        if adversary is not None:
            for _ in range(adversary.updates_per_step - 1):
                self.guard.begin_update()
                self._in_update = set()
                for i, pair in enumerate(self._pairs):
                    self.guard.return_to(i)  # so that a bad loss names this micro-batch's images
                    last = i + 1 == len(self._pairs)
                    self._discriminator_backward(adversary, pair, last)
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
            parameters = parameters_of(optimizer)
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip_val, norm)

    # Logs

    def report(self, values: Mapping[str, Tensor | float], rare: bool = False) -> None:
        """Log values as means over an update's micro-batches and the processes.

        Each process reports the same names. At steps that do not log, nothing waits for the device,
        and only ``rare`` values, which few steps have, are kept for the next one that does.
        """
        if not (self._logs or rare):
            return
        for name, value in values.items():
            if name not in self._in_update:
                self._reported[name] = []
                self._in_update.add(name)
            self._reported[name].append(value.detach() if isinstance(value, Tensor) else value)

    def _log_reported(self) -> None:
        forget_logged(self.trainer)
        if not self.reports:
            return

        values: dict[str, Tensor | float] = {}
        for name, parts in self._reported.items():
            values[name] = parts[0] if len(parts) == 1 else sum(parts) / len(parts)
        self._reported = {}
        if self.trainer.world_size > 1:
            # One message for all values.
            numbers = [
                torch.as_tensor(value, dtype=torch.float32, device=self.device)
                for value in values.values()
            ]
            means = mean_over_processes(torch.stack(numbers)).unbind()
            values = dict(zip(values, means, strict=True))
        self.logged = values
        # With the step, or Lightning counts micro-batches on the logger's axis.
        self.log_dict({**values, "step": float(self.global_step)})

    # Lightning's hooks: validation

    def set_up_validation(self) -> None:
        """Prepare the metrics; FileNotFoundError if a pretrained network is missing."""
        self.validation.set_up(self.device)

    def on_validation_start(self) -> None:
        if self.compiled:
            torch.compiler.set_stance("force_eager")

    def on_validation_epoch_start(self) -> None:
        self.validation.begin(self)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation.update(self, batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        values = self.validation.summarise(self.each_part)
        # Lightning's sanity check has two batches: its values do not count.
        self.validation_values = {} if self.trainer.sanity_checking else values
        self.log_dict(values)
        self.log("step", float(self.global_step))

    def on_validation_end(self) -> None:
        if self.compiled:
            torch.compiler.set_stance("default")

    # Lightning's hooks: training

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """The autoencoder's parameters that training changes, with the parts'."""
        return [p for p in self.players["autoencoder"].parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        return make_optimizers(self)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [WeightAverage(self.guard, self.ema_decay)] if self.use_ema else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["images_seen"] = self.images_seen
        checkpoint["layouts"] = [list(layout) for layout in self.layouts]
        checkpoint["order"] = self.order
        checkpoint["iteration"] = self._iteration
        checkpoint["rate_factor"] = self.rate_factor
        checkpoint["linear_psnr"] = self.linear_psnr
        checkpoint["val_set"] = self.val_set

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_seen = checkpoint["images_seen"]
        self._iteration = checkpoint["iteration"]
        self.rate_factor = checkpoint["rate_factor"]
        # A number of other images is not to be compared.
        if self.val_set is None or checkpoint.get("val_set") in (None, self.val_set):
            self.linear_psnr = checkpoint.get("linear_psnr")
        # Lightning's counts, in batches: an update may have had another number of them.
        batches = self._iteration * self.accumulate_grad_batches
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for kind in ("total", "current"):
            counts[kind] = dict.fromkeys(counts[kind], batches)
        for schedule in checkpoint["lr_schedulers"]:
            schedule.pop("base_lrs", None)  # the config's, which may have changed

    def on_fit_start(self) -> None:
        if self.compiled:
            networks = [*self.trained_networks, self.loss]
            if self.adversary is not None:
                networks.append(self.adversary.discriminator)
            compile_networks(networks, self.device)

    def on_train_start(self) -> None:
        resumed = self._iteration > 0
        if resumed:
            follow(_as_list(self.lr_schedulers()))
        for part in self.each_part:
            part.start(self, resumed=resumed)
        for half in self.frozen_halves:
            getattr(self, half).eval()


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
