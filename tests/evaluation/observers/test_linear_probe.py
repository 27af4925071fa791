"""The linear probe against scipy's minimiser, and folders that can and can't be told apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from olvae.evaluation.observers import linear_probe as module
from olvae.evaluation.observers.linear_probe import (
    LinearProbe,
    cross_validated_accuracy,
    fit_logistic_regression,
)
from olvae.evaluation.results import Row
from tests.evaluation.peers import seen


def test_the_classifier_is_the_minimum_that_scipy_finds():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (60,), generator=generator)
    weight, bias = fit_logistic_regression(z, labels)

    def loss(flat: np.ndarray) -> float:
        w, b = flat[:12].reshape(3, 4), flat[12:]
        logs = log_softmax(z.numpy() @ w.T + b, axis=1)
        return -logs[np.arange(60), labels.numpy()].mean() + 0.5e-3 * (w**2).sum()

    best = minimize(loss, np.zeros(15), tol=1e-10)
    ours = np.concatenate([weight.numpy().ravel(), bias.numpy()])
    assert loss(ours) == pytest.approx(best.fun, abs=1e-8)
    assert weight.numpy().ravel() == pytest.approx(best.x[:12], abs=1e-3)


@pytest.mark.parametrize("sizes", [(23, 17), (7, 11, 30), (5, 5)])
def test_the_accuracy_is_of_five_parts_that_are_dealt_by_class(sizes, monkeypatch):
    """Written down again: z scores, a shuffle with seed 0, and every fifth of each class."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    z = torch.randn(len(labels), 3, generator=generator, dtype=torch.float64)
    z[:, 0] += labels
    z[:, 1] *= 0.01
    z[:, 2] = 7.0  # a channel that says nothing
    deviation = z.std(0)
    deviation[2] = 1.0
    scores = (z - z.mean(0)) / deviation
    shuffled = torch.randperm(len(z), generator=torch.Generator().manual_seed(0)).tolist()
    right = 0
    fitted = []
    for fold in range(5):
        held_out = []
        for label in range(len(sizes)):
            members = [i for i in shuffled if labels[i] == label]
            held_out += members[fold::5]
        rest = [i for i in range(len(z)) if i not in held_out]
        fitted.append(scores[rest])
        weight, bias = fit_logistic_regression(scores[rest], labels[rest])
        right += int(((scores[held_out] @ weight.T + bias).argmax(1) == labels[held_out]).sum())
    seen_by_fits = []

    def fit(z, labels):
        seen_by_fits.append(z)
        return fit_logistic_regression(z, labels)

    monkeypatch.setattr(module, "fit_logistic_regression", fit)
    assert cross_validated_accuracy(z, labels) == right / len(z)
    torch.testing.assert_close(seen_by_fits, fitted)


def test_classes_are_folders_of_five_images(monkeypatch):
    """Of four and of other folders, whatever they hold, nothing is kept."""
    keys = [f"{name}/{i}.png" for name, n in (("a", 5), ("b", 6), ("c", 4)) for i in range(n)]
    z = torch.randn(15, 4, 2, 2)
    given = []

    def kept(z, labels):
        given.extend([z, labels])
        return 0.5

    monkeypatch.setattr(module, "cross_validated_accuracy", kept)
    found = entry(keys, z)
    assert found == {"accuracy": 0.5, "chance": 6 / 11, "classes": 2, "n": 11}
    assert given[1].tolist() == [0] * 5 + [1] * 6
    torch.testing.assert_close(given[0], z[:11].mean((2, 3)).double())
    probe = LinearProbe()
    assert probe.columns(found) == {"linear probe": "50.0%"}
    (line,) = probe.lines([Row("t", 15, {}, observed={"linear_probe": found})])
    assert "2 folders of 11 images" in line
    assert "54.5%" in line


def latents(classes: int, n: int, apart: float) -> tuple[list[str], torch.Tensor]:
    """Keys and latents (N, 4, 2, 2) whose means differ between classes."""
    generator = torch.Generator().manual_seed(3)
    keys = [f"{name}/{i:02d}.png" for name in "abcdef"[:classes] for i in range(n)]
    z = torch.randn(len(keys), 4, 2, 2, generator=generator)
    centres = apart * torch.eye(4)[:classes].repeat_interleave(n, 0)
    return keys, z + centres[:, :, None, None]


def entry(keys, z) -> dict:
    probe = LinearProbe()
    for part in (slice(0, 7), slice(7, None)):
        probe.update(seen("t", keys[part], latents=z[part]))
    return probe.result("t", 0)


def test_folders_that_differ_are_found_and_equal_ones_are_not():
    found = entry(*latents(3, 20, apart=5.0))
    assert (found["classes"], found["n"], found["chance"]) == (3, 60, pytest.approx(1 / 3))
    assert found["accuracy"] > 0.95
    assert entry(*latents(3, 40, apart=0.0))["accuracy"] < 0.55


def test_a_shard_is_no_folder_but_may_have_some_inside():
    keys, z = latents(2, 12, apart=5.0)

    def of_shards(keys: list[str]) -> dict:
        probe = LinearProbe()
        probe.update(replace(seen("t", keys, latents=z), shards=True))
        return probe.result("t", 0)

    assert of_shards([f"{i % 2:06d}/{i:08d}" for i in range(24)])["accuracy"] is None
    inside = of_shards([f"{i % 2:06d}/{key}" for i, key in enumerate(keys)])
    assert (inside["classes"], inside["accuracy"] > 0.95) == (2, True)


def test_the_accuracy_does_not_depend_on_the_order_of_images():
    keys, z = latents(2, 15, apart=1.0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    assert entry(keys, z) == entry([keys[i] for i in order], z[order])


def test_the_held_out_labels_are_not_seen():
    """Labels without a pattern: a classifier that saw them would do better than chance."""
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    labels = torch.arange(40) % 2
    assert cross_validated_accuracy(z, labels) < 0.75
    weight, bias = fit_logistic_regression(z, labels)
    assert ((z @ weight.T + bias).argmax(1) == labels).double().mean() > 0.95


def test_a_set_without_two_folders_of_five_says_so():
    keys, z = latents(2, 4, apart=5.0)
    found = entry(keys, z)
    assert found == {"accuracy": None, "classes": 0}
    probe = LinearProbe()
    assert probe.columns(found) == {"linear probe": "skipped"}
    (line,) = probe.lines([Row("t", 8, {}, observed={"linear_probe": found})])
    assert "at least 5 images, found 0" in line
    assert list(probe.lines([])) == []
