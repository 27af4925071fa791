"""Warnings of an imbalance in phase B: after which steps, at which values, and in a training."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.training.callbacks import Health
from tests.models.steps import against, build, fit

SETTINGS = "model.params.adversary_config.params"

WON = {"health/accuracy": 0.97}
BLIND = {"health/accuracy": 0.51}
DOMINATES = {"health/gradient_ratio": 3.14}
WELL = {"health/accuracy": 0.7, "health/gradient_ratio": 0.5}

SENTENCES = {
    "won": (
        WON,
        f"has won: it is right about 97% of its logits. Lower {SETTINGS}.learning_rate_ratio, ",
    ),
    "blind": (
        BLIND,
        "is blind: it is right about 51% of its logits, as a coin would be. Raise " + SETTINGS,
    ),
    "dominates": (
        DOMINATES,
        "it is 3.1 times the pixel terms' gradient. Lower " + SETTINGS + ".weight",
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


@pytest.fixture(scope="module")
def phase_b() -> LiteAutoencoderKL:
    return build(against())


@pytest.fixture
def watch(phase_b, capsys):
    """Give a callback the values of some steps.

    Return the step of each warning, and the warning.
    """

    def run(health, steps, values, model=phase_b, first=True, every=1) -> list[tuple[int, str]]:
        warnings = []
        for step in steps:
            logged = {name: torch.tensor(value) for name, value in values(step).items()}
            trainer = SimpleNamespace(global_step=step, is_global_zero=first)
            model.reports, model.logged = step % every == 0, logged
            health.on_train_batch_end(trainer, model, None, None, 0)
            warnings += [(step, line) for line in capsys.readouterr().err.splitlines()]
        return warnings

    return run


def steps_of(warnings: list[tuple[int, str]]) -> list[int]:
    return [step for step, _ in warnings]


@pytest.mark.parametrize(("values", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_health_warns_repeatedly_of_a_symptom_that_lasts(watch, values, sentence):
    warnings = watch(Health(patience=10), range(1, 40), lambda _: values)
    assert steps_of(warnings) == [11, 21, 31]  # first seen at 1
    for step, line in warnings:
        assert line.startswith(f"step {step}, for 10 steps: ")
        assert sentence in line


@pytest.mark.parametrize("between", [WELL, {}], ids=["well", "not logged"])
def test_an_interruption_restarts_the_patience_of_health(watch, between):
    for at, expected in ((9, [20, 30]), (13, [11, 24])):
        warnings = watch(
            Health(patience=10), range(1, 31), lambda step, at=at: between if step == at else WON
        )
        assert steps_of(warnings) == expected


def test_health_symptoms_have_clocks_of_their_own(watch):
    warnings = watch(
        Health(patience=10),
        range(1, 20),
        lambda step: {**(WON if step < 5 else BLIND), **(DOMINATES if step >= 7 else {})},
    )
    assert [(step, line.split(": ")[1]) for step, line in warnings] == [
        (15, "the discriminator is blind"),
        (17, "the adversarial gradient dominates"),
    ]


def test_health_limits_of_accuracy_and_gradient_ratio(watch):
    for name, ill, well in (
        ("accuracy", (0.951, 0.519, 0.481), (0.949, 0.521, 0.479)),
        ("gradient_ratio", (2.01,), (1.99,)),
    ):
        for values, expected in ((ill, True), (well, False)):
            for value in values:
                warned = watch(
                    Health(patience=1), [1, 2], lambda _, key=name, v=value: {f"health/{key}": v}
                )
                assert bool(warned) == expected, (name, value)


def test_health_reads_logged_values_once_a_step_in_phase_b_by_the_first_process(watch):
    warnings = watch(
        Health(patience=10), range(1, 31), lambda step: WON if step % 5 == 0 else WELL, every=5
    )
    assert steps_of(warnings) == [15, 25]
    health = Health(patience=2)
    assert watch(health, [0] * 50, lambda _: WON) == []
    assert steps_of(watch(health, [1, 1, 2, 2, 3, 3, 4, 4], lambda _: WON)) == [2, 4]
    assert watch(Health(patience=1), range(9), lambda _: WON, model=build()) == []
    assert watch(Health(patience=1), range(9), lambda _: WON, first=False) == []
    with pytest.raises(ValueError, match="at least 1"):
        Health(patience=0)


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (
            against({"target": f"{__name__}.Blind"}),
            "the discriminator is blind: it is right about 50%",
        ),
        (
            against({"target": f"{__name__}.Seer"}),
            "the discriminator has won: it is right about 100%",
        ),
        (against(weight=1e5), "the adversarial gradient dominates"),
    ],
    ids=SENTENCES,
)
def test_health_warns_of_a_bad_adversary_in_a_training(node, sentence, image_folder, capsys):
    health = [Health(patience=4)]
    fit(build(node), image_folder, 6, log_every_n_steps=1, callbacks=health)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"step 5, for 4 steps: {sentence}") for line in lines)
