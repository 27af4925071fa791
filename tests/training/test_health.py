"""Warnings of an imbalance in phase B: after which steps, at which values, and in a training."""

import io
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from olvae.data.dataset import SamplePhotographs
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.training.callbacks import Health
from tests.conftest import tiny_config

PATCHGAN = {"target": "olvae.modules.patchgan.PatchGAN", "params": {"base_channels": 4, "n_layers": 1}}
SETTINGS = "model.params.adversary_config.params"

WON = {"health/accuracy": 0.97}
BLIND = {"health/accuracy": 0.51}
DOMINATES = {"health/gradient_ratio": 3.14}
WELL = {"health/accuracy": 0.7, "health/gradient_ratio": 0.5}

SENTENCES = {
    "won": (
        WON,
        "the discriminator has won: it is right about 97% of its logits. "
        f"Lower {SETTINGS}.learning_rate_ratio, or set lecam_weight",
    ),
    "blind": (
        BLIND,
        "the discriminator is blind: it is right about 51% of its logits, as a coin would be. "
        f"Raise {SETTINGS}.learning_rate_ratio or updates_per_step",
    ),
    "dominates": (
        DOMINATES,
        "the adversarial gradient dominates: at the decoder's last layer it is 3.1 times that of the pixel terms. "
        f"Lower {SETTINGS}.weight",
    ),
}


class Blind(nn.Module):
    """A discriminator whose logits are 0."""

    num_outputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.weight * 0 * x]


class Seer(Blind):
    """One that knows that real images have values in steps of 1/127.5."""

    def forward(self, x: Tensor) -> list[Tensor]:
        values = (x + 1) * 127.5
        on_grid = ((values - values.round()).abs() < 1e-3).all(1).all(1).all(1)
        return [torch.where(on_grid, 3.0, -3.0) + self.weight * 0 * x.mean()]


def build(discriminator=PATCHGAN, **adversary) -> LiteAutoencoderKL:
    torch.manual_seed(0)
    node = {
        "target": "olvae.models.adversary.Adversary",
        "params": {"discriminator_config": discriminator, **adversary},
    }
    return LiteAutoencoderKL(**tiny_config(adversary_config=node)["model"]["params"])


@pytest.fixture(scope="module")
def phase_b() -> LiteAutoencoderKL:
    return build()


@pytest.fixture
def watch(phase_b):
    """Give a callback the values of some steps; return the step of each warning, and its line on a narrow console."""

    def run(
        health: Health,
        steps: Iterable[int],
        values: Callable[[int], dict[str, float]],
        model: LiteAutoencoderKL = phase_b,
        first: bool = True,
        every: int = 1,
    ) -> list[tuple[int, str]]:
        health.console = Console(file=io.StringIO(), width=80)
        warnings: list[tuple[int, str]] = []
        for step in steps:
            trainer = SimpleNamespace(
                global_step=step,
                is_global_zero=first,
                callback_metrics={name: torch.tensor(value) for name, value in values(step).items()},
            )
            model.reports = step % every == 0
            health.on_train_batch_end(trainer, model, None, None, 0)
            lines = health.console.file.getvalue().splitlines()
            warnings += [(step, line) for line in lines[len(warnings) :]]
        return warnings

    return run


def steps_of(warnings: list[tuple[int, str]]) -> list[int]:
    return [step for step, _ in warnings]


@pytest.mark.parametrize(("values", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_a_symptom_that_lasts_is_warned_of_again_and_again(watch, values, sentence):
    warnings = watch(Health(patience=10), range(1, 40), lambda _: values)
    assert steps_of(warnings) == [11, 21, 31]  # first seen at 1
    for step, line in warnings:
        assert line.startswith(f"step {step}, for 10 steps: {sentence}")


@pytest.mark.parametrize("between", [WELL, {}], ids=["well", "not logged"])
def test_an_interruption_starts_anew(watch, between):
    for at, expected in ((9, [20, 30]), (13, [11, 24])):
        warnings = watch(Health(patience=10), range(1, 31), lambda step, at=at: between if step == at else WON)
        assert steps_of(warnings) == expected


def test_symptoms_have_clocks_of_their_own(watch):
    def values(step: int) -> dict[str, float]:
        return {**(WON if step < 5 else BLIND), **(DOMINATES if step >= 7 else {})}

    warnings = watch(Health(patience=10), range(1, 20), values)
    assert [(step, line.split(": ")[1]) for step, line in warnings] == [
        (15, "the discriminator is blind"),
        (17, "the adversarial gradient dominates"),
    ]


@pytest.mark.parametrize(
    ("name", "value", "ill"),
    [
        ("accuracy", 0.951, True),
        ("accuracy", 0.949, False),
        ("accuracy", 0.519, True),
        ("accuracy", 0.521, False),
        ("accuracy", 0.481, True),
        ("accuracy", 0.479, False),
        ("gradient_ratio", 2.01, True),
        ("gradient_ratio", 1.99, False),
    ],
)
def test_limits(watch, name, value, ill):
    assert bool(watch(Health(patience=1), [1, 2], lambda _: {f"health/{name}": value})) == ill


def test_it_reads_values_where_they_are_logged(watch):
    warnings = watch(Health(patience=10), range(1, 31), lambda step: WON if step % 5 == 0 else WELL, every=5)
    assert steps_of(warnings) == [15, 25]


def test_batches_of_one_step_count_once(watch):
    health = Health(patience=2)
    assert watch(health, [0] * 50, lambda _: WON) == []
    assert steps_of(watch(health, [1, 1, 2, 2, 3, 3, 4, 4], lambda _: WON)) == [2, 4]


def test_silent_in_phase_a_and_on_other_ranks(watch):
    phase_a = LiteAutoencoderKL(**tiny_config()["model"]["params"])
    assert watch(Health(patience=1), range(9), lambda _: WON, model=phase_a) == []
    assert watch(Health(patience=1), range(9), lambda _: WON, first=False) == []


def test_errors():
    with pytest.raises(ValueError, match="at least 1"):
        Health(patience=0)


@pytest.mark.parametrize(
    ("adversary", "sentence"),
    [
        ({"discriminator": {"target": f"{__name__}.Blind"}}, "the discriminator is blind: it is right about 50%"),
        ({"discriminator": {"target": f"{__name__}.Seer"}}, "the discriminator has won: it is right about 100%"),
        ({"weight": 1e5}, "the adversarial gradient dominates"),
    ],
    ids=SENTENCES,
)
def test_the_values_that_a_training_logs(adversary, sentence):
    health = Health(patience=4)
    health.console = Console(file=io.StringIO(), width=80)
    pl.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        callbacks=[health],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(build(**adversary), SamplePhotographs(size=16, batch_size=4).train_loader())
    lines = health.console.file.getvalue().splitlines()
    assert any(line.startswith(f"step 5, for 4 steps: {sentence}") for line in lines)
