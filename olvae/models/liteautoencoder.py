"""LiteAutoencoderKL: what happens in a training step."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from olvae.config import ConfigError, Node, instantiate
from olvae.data.pixels import from_uint8, to_uint8
from olvae.data.source import Batch
from olvae.losses.objective import Objective
from olvae.metrics.psnr import psnr
from olvae.metrics.ssim import ssim
from olvae.models.autoencoder import LiteVAE
from olvae.models.schedule import lr_factor
from olvae.modules.distributions import DiagonalGaussian

__all__ = ["LiteAutoencoderKL"]


class LiteAutoencoderKL(pl.LightningModule):
    """An autoencoder, its objective and its optimiser, under Lightning with manual optimisation.

    The weights lie here, under their published names [M]; ``autoencoder`` is the plain LiteVAE over them.
    ``global_step``, logs, schedules and checkpoint names count updates of the autoencoder.

    Args:
        encoder_config, decoder_config: the two halves.
        lossconfig: the :class:`Objective`. A config with another one (torch.nn.Identity in the published YAML)
            serves for inference, not for training.
        embed_dim: n_z, channels of the latent.
        use_quant: a 1x1 convolution on either side of the latent.
        initial_logvar: see :meth:`LiteVAE.from_config`.
        use_ema: average the weights with Lightning's callback; validation and checkpoints use the average.
        ema_decay: of that average.
        learning_rate: filled in from model.base_learning_rate, and used as it is: never scaled by batch or devices.
        betas: Adam's [P App. F].
        scheduler: ``constant`` or ``cosine``, after a linear warm-up.
        warmup_steps, decay_steps, min_lr_factor: see :func:`lr_factor`; decay_steps is the run's last step by
            default.
        accumulate_grad_batches, gradient_clip_val: filled in from lightning.trainer, where Lightning's users
            look for them.
        channels_last: memory layout of the weights and images; often faster.
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
        scheduler: Literal["constant", "cosine"] = "constant",
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        min_lr_factor: float = 0.0,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if scheduler not in ("constant", "cosine"):
            raise ValueError(f"scheduler must be constant or cosine, got {scheduler!r}")

        autoencoder = LiteVAE.from_config(encoder_config, decoder_config, embed_dim, use_quant, initial_logvar)
        self.encoder = autoencoder.encoder
        self.decoder = autoencoder.decoder
        self.quantizer = autoencoder.quantizer
        if channels_last:
            self.to(memory_format=torch.channels_last)
        self.loss: nn.Module = instantiate(lossconfig)

        self.use_ema = use_ema
        self.ema_decay = ema_decay
        self.learning_rate = learning_rate
        self.betas = (betas[0], betas[1])
        self.scheduler = scheduler
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.min_lr_factor = min_lr_factor
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.channels_last = channels_last

        self.seed = 0
        """Of the noise in training; set by the trainer."""
        self.images_seen = 0
        """Training images consumed, over all ranks: where a resumed run continues the data."""
        self._micro_batch = 0
        self._val_psnr, self._val_ssim = MeanMetric(), MeanMetric()

    # The autoencoder

    @property
    def autoencoder(self) -> LiteVAE:
        """The plain module over the same weights (a view: cheap to make, nothing is copied)."""
        return LiteVAE(self.encoder, self.decoder, self.quantizer)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """See :meth:`LiteVAE.encode`."""
        return self.autoencoder.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """See :meth:`LiteVAE.decode`."""
        return self.autoencoder.decode(z)

    def forward(self, x: Tensor, sample_posterior: bool = False) -> tuple[Tensor, DiagonalGaussian]:
        """See :meth:`LiteVAE.forward`."""
        reconstruction, posterior = self.autoencoder(x, sample_posterior)
        return reconstruction, posterior

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002  (Lightning's signature)
        x = self.images(batch)  # (B, C, H, W) in [-1, 1]
        step, micro_batch = self.global_step, self._micro_batch
        torch.manual_seed(_mix(self.seed, step, micro_batch, self.global_rank))

        # One forward pass of the autoencoder.
        reconstruction, posterior = self(x, sample_posterior=True)

        # The objective: named terms, their weighted sum.
        total, terms = self.objective(x, reconstruction, posterior)
        self.manual_backward(total / self.accumulate_grad_batches)
        self.log_dict({f"train/{name}": term.detach() for name, term in {"loss": total, **terms}.items()})

        # The update, once every accumulate_grad_batches micro-batches.
        self._micro_batch = (micro_batch + 1) % self.accumulate_grad_batches
        if self._micro_batch:
            return
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        if self.gradient_clip_val:
            self._clip(optimizer, self.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        self.images_seen += x.shape[0] * self.accumulate_grad_batches * self.trainer.world_size
        self.log("step", float(self.global_step))  # Lightning would count micro-batches on the logger's axis

    def _clip(self, optimizer: Any, max_norm: float) -> None:
        """Clip the norm of the true gradient: under fp16 the scale is taken off first."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.autoencoder_parameters(), max_norm)
        self.log("train/grad_norm", norm)

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        return [p for module in (self.encoder, self.decoder, self.quantizer) if module for p in module.parameters()]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.autoencoder_parameters(), lr=self.learning_rate, betas=self.betas, fused=True)
        decay_steps = self.decay_steps or self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: lr_factor(step, self.scheduler, self.warmup_steps, decay_steps, self.min_lr_factor),
        )
        return [optimizer], [schedule]

    def configure_callbacks(self) -> list[pl.Callback]:
        from lightning.pytorch.callbacks import EMAWeightAveraging

        return [EMAWeightAveraging(decay=self.ema_decay)] if self.use_ema else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_seen = checkpoint["images_seen"]

    # Validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        reconstruction, _ = self(self.images(batch))
        x, y = batch["image"], to_uint8(reconstruction)
        self._val_psnr(psnr(x, y).float())
        self._val_ssim(ssim(x, y).float())
        self.log_dict({"val/psnr": self._val_psnr, "val/ssim": self._val_ssim}, on_epoch=True, on_step=False)
        self.log("step", float(self.global_step), on_epoch=True, on_step=False)

    # Shared

    @property
    def objective(self) -> Objective:
        """The loss, if it is one to train with.

        Raises:
            ConfigError: the config is for inference.
        """
        if not isinstance(self.loss, Objective):
            kind = f"{type(self.loss).__module__}.{type(self.loss).__qualname__}"
            raise ConfigError(
                f"model.params.lossconfig is a {kind}, which does for inference only: "
                "to train, give it the target olvae.losses.objective.Objective"
            )
        return self.loss

    def images(self, batch: Batch) -> Tensor:
        """The batch's uint8 images in [-1, 1], (B, C, H, W)."""
        x = from_uint8(batch["image"])
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1, dtype=np.uint64)[0] >> 1)
