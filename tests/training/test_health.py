import io
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from olvae.data.mapped.dataset import SamplePhotographs
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.training.callbacks import Health
from tests.conftest import tiny_config

PATCHGAN = {"target": "olvae.modules.patchgan.PatchGAN", "params": {"base_channels": 4, "n_layers": 1}}
SETTINGS = "model.params.adversary_config.params"

WON = {"health/accuracy": 0.97}
BLIND = {"health/accuracy": 0.51}
DOMINATES = {"health/gradient_ratio": 3.14}
WELL = {"health/accuracy": 0.7, "health/gradient_ratio": 0.5}

SENTENCES = [
    (WON, "the discriminator has won: it is right about 97% of its logits. ", f"Lower {SETTINGS}.learning_rate_ratio"),
    (
        BLIND,
        "the discriminator is blind: it is right about 51% of its logits, as a coin would be. ",
        f"Raise {SETTINGS}.learning_rate_ratio or updates_per_step",
    ),
    (
        DOMINATES,
        "the adversarial gradient dominates: at the decoder's last layer it is 3.1 times that of the pixel terms. ",
        f"Lower {SETTINGS}.weight",
    ),
]
each = pytest.mark.parametrize(("values", "sentence", "setting"), SENTENCES, ids=["won", "blind", "dominates"])


class Blind(nn.Module):
    """Says nothing of any image."""

    num_outputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.weight * 0 * x]


class Seer(Blind):
    """Real images have values in steps of 1/127.5."""

    def forward(self, x: Tensor) -> list[Tensor]:
        values = (x + 1) * 127.5
        on_grid = ((values - values.round()).abs() < 1e-3).all(1).all(1).all(1)
        return [torch.where(on_grid, 3.0, -3.0) + self.weight * 0 * x.mean()]


def build(discriminator=PATCHGAN, **adversary) -> LiteAutoencoderKL:
    torch.manual_seed(0)
    params = {"discriminator_config": discriminator, **adversary}
    node = {"target": "olvae.models.adversary.Adversary", "params": params}
    return LiteAutoencoderKL(**tiny_config(adversary_config=node)["model"]["params"])


def listen(health: Health, width: int = 400) -> io.StringIO:
    health.console = Console(file=io.StringIO(), width=width)
    return health.console.file


def watch(
    health: Health,
    steps: Iterable[int],
    values: Callable[[int], dict[str, float]],
    model: LiteAutoencoderKL | None = None,
    first: bool = True,
    width: int = 400,
    every: int = 1,
) -> list[tuple[int, str]]:
    """The step at which each line was told, and the line."""
    output, model = listen(health, width), build() if model is None else model
    told: list[tuple[int, str]] = []
    for step in steps:
        trainer = SimpleNamespace(
            global_step=step,
            is_global_zero=first,
            callback_metrics={name: torch.tensor(value) for name, value in values(step).items()},
        )
        model.reports = step % every == 0
        health.on_train_batch_end(trainer, model, None, None, 0)
        lines = output.getvalue().splitlines()
        told += [(step, line) for line in lines[len(told) :]]
    return told


@each
def test_a_symptom_is_told_after_patience_and_again_after_as_many_steps(values, sentence, setting):
    told = watch(Health(patience=10), range(1, 40), lambda _: values)
    assert [step for step, _ in told] == [11, 21, 31]  # first seen at 1
    for step, line in told:
        assert line.startswith(f"step {step}, for 10 steps: {sentence}{setting}")


@each
def test_not_before_and_not_when_it_comes_and_goes(values, sentence, setting):
    health = Health(patience=10)
    assert watch(health, range(1, 11), lambda _: values) == []
    assert watch(health, [11], lambda _: WELL) == []
    assert watch(health, range(12, 22), lambda _: values) == []  # 10 steps from 12 on end at 22
    assert [step for step, _ in watch(health, [22], lambda _: values)] == [22]


@each
def test_a_value_that_is_missing_interrupts(values, sentence, setting):
    told = watch(Health(patience=10), range(1, 31), lambda step: {} if step == 9 else values)
    assert [step for step, _ in told] == [20, 30]


@each
def test_after_it_was_told_an_interruption_starts_anew(values, sentence, setting):
    told = watch(Health(patience=10), range(1, 31), lambda step: WELL if step == 13 else values)
    assert [step for step, _ in told] == [11, 24]


def test_symptoms_have_clocks_of_their_own():
    told = watch(
        Health(patience=10),
        range(1, 20),
        lambda step: {**(WON if step < 5 else BLIND), **(DOMINATES if step >= 7 else {})},
    )
    assert [(step, line.split(": ")[1]) for step, line in told] == [
        (15, "the discriminator is blind"),
        (17, "the adversarial gradient dominates"),
    ]


@pytest.mark.parametrize(
    ("values", "ill"),
    [
        ({"health/accuracy": 0.951}, True),
        ({"health/accuracy": 0.949}, False),
        ({"health/accuracy": 0.519}, True),
        ({"health/accuracy": 0.521}, False),
        ({"health/accuracy": 0.481}, True),
        ({"health/accuracy": 0.479}, False),
        ({"health/gradient_ratio": 2.01}, True),
        ({"health/gradient_ratio": 1.99}, False),
        (WELL, False),
    ],
)
def test_limits(values, ill):
    assert bool(watch(Health(patience=1), [1, 2], lambda _: values)) == ill


def test_it_looks_where_values_are_logged():
    told = watch(Health(patience=10), range(1, 31), lambda step: WON if step % 5 == 0 else WELL, every=5)
    assert [step for step, _ in told] == [15, 25]


def test_micro_batches_and_updates_of_the_discriminator_alone_are_no_steps():
    """One step's batches come one after another; the sentence comes once, and not before the steps have passed."""
    health = Health(patience=2)
    assert watch(health, [0] * 50, lambda _: WON) == []
    assert [step for step, _ in watch(health, [1, 1, 2, 2, 3, 3, 4, 4], lambda _: WON)] == [2, 4]


def test_a_sentence_is_one_line_on_a_narrow_console():
    """So that a search in a log file finds it."""
    assert len(watch(Health(patience=1), [1, 2], lambda _: WON, width=80)) == 1


def test_silent_in_phase_a_and_on_other_ranks():
    ill = {**WON, **DOMINATES}
    phase_a = LiteAutoencoderKL(**tiny_config()["model"]["params"])
    assert phase_a.adversary is None
    assert watch(Health(patience=1), range(9), lambda _: ill, model=phase_a) == []
    assert watch(Health(patience=1), range(9), lambda _: ill, first=False) == []
    assert watch(Health(patience=1), range(9), lambda _: ill) != []


def test_errors():
    with pytest.raises(ValueError, match="at least 1"):
        Health(patience=0)


# In training: the values that the step logs are those that are watched


def train(model: LiteAutoencoderKL, steps: int = 6) -> list[str]:
    health = Health(patience=4)
    output = listen(health)
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[health],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(model, SamplePhotographs(size=16, batch_size=4).train_loader())
    return output.getvalue().splitlines()


def test_a_discriminator_that_is_blind():
    (line,) = train(build({"target": f"{__name__}.Blind"}))
    assert line.startswith("step 5, for 4 steps: the discriminator is blind: it is right about 50% of its logits")


def test_a_discriminator_that_has_won():
    (line,) = train(build({"target": f"{__name__}.Seer"}))
    assert line.startswith("step 5, for 4 steps: the discriminator has won: it is right about 100% of its logits")


def test_an_adversarial_gradient_that_dominates():
    lines = train(build(weight=1e5))
    assert any(line.startswith("step 5, for 4 steps: the adversarial gradient dominates") for line in lines)


def test_without_an_adversary_nothing_is_told():
    phase_a = LiteAutoencoderKL(**tiny_config()["model"]["params"])
    assert train(phase_a) == []
