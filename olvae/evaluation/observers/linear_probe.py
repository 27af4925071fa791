"""Observe how well a linear classifier tells the images' folders apart by their mean latents."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.evaluation.observers.observer import Observation, PerImageObserver
from olvae.evaluation.results import Row

FOLDS = 5  # of the cross-validation, and the fewest images of a class
DECAY = 1e-3  # of the classifier's weights


class LinearProbe(PerImageObserver):
    """The accuracy of a linear probe on mean-pooled latents, where images' folders are classes.

    It follows a diffusion model's FID over autoencoders (arXiv 2603.05630's data: Pearson -.53,
    Spearman -.82). A latent's mean over its positions, n_z numbers that are standardised over the
    set, goes through a multinomial logistic regression with a weight decay of 1e-3, fitted to the
    minimum. ``accuracy`` is the share of images whose folder is found, in a cross-validation of
    five parts, the same for all targets; ``chance`` is the largest class's. Classes are the
    folders with at least five images; there have to be two. Shards are no folders, but may have
    some inside.
    """

    name = "linear_probe"

    def measure(self, batch: Observation) -> list[tuple[str, list[float]]]:
        means = batch.latents.mean((2, 3), dtype=torch.float32).cpu().tolist()
        paths = [PurePosixPath(key) for key in batch.keys]
        if batch.shards:
            paths = [path.relative_to(path.parts[0]) for path in paths]
        folders = [str(path.parent) for path in paths]
        return list(zip(folders, means, strict=True))

    def summarise(self, columns: Sequence[Any]) -> dict[str, Any]:
        folders, means = columns
        images = Counter(folders)
        classes = sorted(name for name in images if images[name] >= FOLDS)
        if len(classes) < 2:
            return {"accuracy": None, "classes": len(classes)}
        numbers = {name: number for number, name in enumerate(classes)}
        kept = [i for i, name in enumerate(folders) if name in numbers]
        labels = torch.tensor([numbers[folders[i]] for i in kept])  # (N,)
        z = torch.tensor([means[i] for i in kept], dtype=torch.float64)  # (N, n_z)
        return {
            "accuracy": cross_validated_accuracy(z, labels),
            "chance": float(labels.bincount().max()) / len(labels),
            "classes": len(classes),
            "n": len(labels),
        }

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        accuracy = entry["accuracy"]
        return {"linear probe": "skipped" if accuracy is None else f"{accuracy:.1%}"}

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        entries = [row.observed[self.name] for row in rows if self.name in row.observed]
        if not entries:
            return
        first = entries[0]
        if first["accuracy"] is None:
            yield (
                f"linear probe: skipped: it needs two folders with at least {FOLDS} images, "
                f"found {first['classes']}"
            )
        else:
            yield (
                f"linear probe: {first['classes']} folders of {first['n']} images; the largest "
                f"class alone would be right in {first['chance']:.1%}"
            )


def cross_validated_accuracy(z: Tensor, labels: Tensor) -> float:
    """The share of rows whose label a linear classifier finds that was fitted on the others.

    ``z`` is (N, D) in float64, ``labels`` (N,) are numbers from 0. Each class is dealt to five
    parts in turn, after a shuffle with seed 0.
    """
    z = (z - z.mean(0)) / z.std(0).clamp(min=1e-12)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    part = torch.empty(len(z), dtype=torch.long)
    for label in range(int(labels.max()) + 1):
        members = order[labels[order] == label]
        part[members] = torch.arange(len(members)) % FOLDS

    right = 0
    for fold in range(FOLDS):
        held_out = part == fold
        weight, bias = fit_logistic_regression(z[~held_out], labels[~held_out])
        found = (z[held_out] @ weight.T + bias).argmax(1)
        right += int((found == labels[held_out]).sum())
    return right / len(z)


@torch.enable_grad()
def fit_logistic_regression(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise cross-entropy + 1e-3 / 2 * |weight|^2 from zero; return weight (K, D), bias (K,)."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, z.shape[1], dtype=z.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=z.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = F.cross_entropy(z @ weight.T + bias, labels)
        total = error + 0.5 * DECAY * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()
