"""Tells in a sentence when adversarial training has gone wrong, and which setting to change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from olvae.models.liteautoencoder import LiteAutoencoderKL

__all__ = ["Health"]

SETTINGS = "model.params.adversary_config.params"


@dataclass(frozen=True)
class _Symptom:
    """A condition on one of the logged values, and what to say when it has held for long."""

    metric: str
    holds: Callable[[float], bool]
    sentence: str


SYMPTOMS = (
    _Symptom(
        "health/accuracy",
        lambda accuracy: accuracy > 0.95,
        "the discriminator has won: it is right about {value:.0%} of its logits. "
        f"Lower {SETTINGS}.learning_rate_ratio, or set lecam_weight or r1_weight",
    ),
    _Symptom(
        "health/accuracy",
        lambda accuracy: abs(accuracy - 0.5) < 0.02,
        "the discriminator is blind: it is right about {value:.0%} of its logits, as a coin would be. "
        f"Raise {SETTINGS}.learning_rate_ratio or updates_per_step, or take a larger discriminator",
    ),
    _Symptom(
        "health/gradient_ratio",
        lambda ratio: ratio > 2.0,
        "the adversarial gradient dominates: at the decoder's last layer it is {value:.1f} times that of the pixel "
        f"terms. Lower {SETTINGS}.weight, or set adaptive_weight",
    ),
)


class Health(Callback):
    """Watches the health values of phase B.

    Args:
        patience: steps of the autoencoder that a symptom must last, without a break, before it is told; it is told
            again after as many more.
        every_n_steps: how often to look; each look waits for the device.
    """

    def __init__(self, patience: int = 1000, every_n_steps: int = 50) -> None:
        if patience < 1 or every_n_steps < 1:
            raise ValueError("patience and every_n_steps must be at least 1")
        self.patience = patience
        self.every_n_steps = every_n_steps
        self.console = Console(stderr=True)
        self._since: list[int | None] = [None] * len(SYMPTOMS)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LiteAutoencoderKL)
        step = trainer.global_step
        if pl_module.adversary is None or not trainer.is_global_zero or step % self.every_n_steps:
            return
        for i, symptom in enumerate(SYMPTOMS):
            value = trainer.callback_metrics.get(symptom.metric)
            if value is None or not symptom.holds(float(value)):
                self._since[i] = None
                continue
            since = self._since[i]
            if since is None:
                self._since[i] = step
            elif step - since >= self.patience:
                text = symptom.sentence.format(value=float(value))
                self.console.print(
                    f"[bold yellow]step {step}, for {step - since} steps: {text}", highlight=False, soft_wrap=True
                )
                self._since[i] = step
