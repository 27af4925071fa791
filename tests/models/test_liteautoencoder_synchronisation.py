"""Between two logging steps nothing waits for the device."""

import traceback
from itertools import repeat

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from olvae.training.callbacks import BadSteps, GracefulStop, Health
from olvae.training.progress import StepProgress
from olvae.training.saving import KeepCheckpoints
from tests.conftest import parts
from tests.models.steps import UNETGAN, against, build_shallow

WAITS = (
    "aten._local_scalar_dense",  # a tensor's value becomes a number
    "aten.lift_fresh",  # a number becomes a tensor, on the CPU first
    "aten.nonzero",
    "aten.masked_select",
    "aten.index.Tensor",  # by a mask: the shape depends on the data
    "aten.index_put",
    "aten.equal",
)


class Waits(TorchDispatchMode):
    """Notes where operations that would wait for a GPU come from,
    after the step at which it is switched on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.operations = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += self.on
        if self.on and str(func).startswith(WAITS):
            self.found.append(f"{func}: {traceback.format_stack(limit=12)}")
        return func(*args, **(kwargs or {}))


class Between(pl.Callback):
    """Watches the steps of which no value is logged, callbacks included."""

    def __init__(self, mode: Waits) -> None:
        self.mode = mode

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.mode.on = (trainer.global_step + 1) % trainer.log_every_n_steps != 0

    def on_train_end(self, trainer, pl_module) -> None:
        self.mode.on = False


def traced(tmp_path, size: int, **model) -> Waits:
    """Four steps of two images, of which every second one is logged."""
    batch = {
        "image": torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8),
        "key": list("ab"),
    }
    mode = Waits()
    module = build_shallow(gradient_clip_val=1.0, warmup_steps=2, use_ema=True, **model)
    callbacks = [
        GracefulStop(),
        BadSteps(),
        Health(),
        KeepCheckpoints(every_n_steps=4),
        StepProgress(1e-9),
    ]
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        log_every_n_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=True,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Between(mode), *callbacks],
    )
    with mode:
        trainer.fit(module, repeat(batch, 4))
    assert trainer.global_step == 4
    assert mode.operations > 1000
    return mode


EVERYTHING = {
    "cutmix_probability": 1.0,
    "r1_weight": 1.0,
    "r1_every": 1,
    "lecam_weight": 0.1,
    "adaptive_weight": True,
}


@pytest.mark.parametrize(
    ("size", "model"),
    [
        (16, {}),
        (
            32,
            {
                "parts": parts(
                    equivariance={}, latent_noise={"std": 0.1, "relative_to": "data"}, anchor={}
                )
            },
        ),
        (
            32,
            {
                "parts": parts(
                    spectrum_matching={},
                    local_correlation={},
                    shared_low_pass={"cuts": [2], "block": 2},
                    latent_masking={"ratios": [0.5], "probabilities": [1.0]},
                    channel_masking={"widths": [2, 4], "at_once": 2},
                )
            },
        ),
        (64, {"adversary": against(UNETGAN, **EVERYTHING)}),
    ],
    ids=["phase A", "fine-tuning", "statistics", "phase B"],
)
def test_steps_between_logging_steps_do_not_wait_for_the_device(tmp_path, size, model):
    assert traced(tmp_path, size, **model).found == []


def test_esrgan_loss_does_not_wait_for_the_device(tmp_path, vgg19):
    node = {
        "target": "olvae.losses.objective.Objective",
        "params": {"perceptual": "esrgan", "lpips_weights": str(vgg19)},
    }
    assert traced(tmp_path, 16, lossconfig=node).found == []


def test_waits_for_the_device_are_found():
    mode, x = Waits(), torch.ones(3)
    mode.on = True
    with mode:
        for count, wait in enumerate(
            (lambda: x[0].item(), lambda: x[x > 0], lambda: torch.equal(x, x)), start=1
        ):
            wait()
            assert len(mode.found) >= count
