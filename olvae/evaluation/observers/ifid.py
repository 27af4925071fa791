"""Observe iFID: decode midpoints of neighbouring latents, and compare them with the images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olvae.data.pixels.size_and_range import to_uint8
from olvae.devices import full_float32
from olvae.evaluation.cells import number
from olvae.evaluation.observers.observer import Observation, PerImageObserver, Subject
from olvae.evaluation.results import Row
from olvae.metrics.features import Features, Inception, few_images, frechet_distance
from olvae.models.autoencoder import Autoencoder
from olvae.pretrained_networks import INCEPTION, find_weights, provenance

IMAGES = ""  # a key beside the targets' names, which are not empty
CANDIDATES = 4  # neighbours by float32 whose distances are computed again in float64
CHECKED = 64  # latents whose neighbours are searched once more, by differences


class InterpolatedFID(PerImageObserver):
    """The interpolated FID (iFID, arXiv 2603.05630).

    It follows a diffusion model's FID where rFID does not.

    For each image, its latent and the nearest other one of the set, by Euclidean distance, are
    averaged and decoded. An entry has:

    - ``value``, the Fréchet distance between the set and these pictures, in the features of rFID;
    - ``neighbours``, the mean distance of neighbours over the root mean square distance of any two
      latents: near 1 there are no real neighbours, and the pictures are double exposures;
    - ``wrong``, the share of ``checked`` latents to which another one is nearer than the neighbour
      that was found.

    Latents are posterior means, in float32. All are kept, so 50,000 of 12x32x32 take 2.5 GB for
    each target, and all are searched.

    Args:
        weights_dir: a folder with Inception's weights, searched first. If they are missing,
            :meth:`derive` raises MissingWeights, before any work.
    """

    name = "ifid"

    def __init__(self, weights_dir: str | Path | None = None) -> None:
        super().__init__()  # rows are a target's latents, and the features of IMAGES
        self._weights_dir = weights_dir
        self._batch = 1  # images of the largest batch
        self._extract: Inception | None = None
        self._entries: dict[str, dict[str, Any]] = {}

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        self._path = find_weights(INCEPTION, self._weights_dir)
        return dict(subjects)

    def measure(self, batch: Observation) -> Iterable[Tensor]:
        """The latents; also keeps the features of images that are new."""
        if self._extract is None:
            self._extract = Inception(self._path, batch.latents.device)
        self._batch = max(self._batch, len(batch.keys))
        references = self._rows.setdefault(IMAGES, {})
        new = {key: i for i, key in enumerate(batch.keys) if key not in references}
        if new:
            features = self._extract(batch.x[list(new.values())])
            references.update((key, row.copy()) for key, row in zip(new, features, strict=True))
        return (latent.clone() for latent in batch.latents.cpu())

    def examine(self, subjects: Mapping[str, Subject], size: int, device: str) -> None:
        # The images' features; a single image has no covariance.
        self._extract = self._extract or Inception(self._path, device)
        references = self._rows.pop(IMAGES, {})
        if len(references) < 2:
            return
        images = np.stack([references[key] for key in sorted(references)])
        weights = provenance(self._path, INCEPTION)

        for target, found in self._rows.items():
            # The latents in the order of their keys, (N, n_z, h, w); popped, to be in memory once.
            z = torch.empty(len(found), *next(iter(found.values())).shape)
            for row, key in enumerate(sorted(found)):
                z[row] = found.pop(key)

            # Pictures between neighbours, and how near these are.
            nearest, distances = nearest_neighbours(z.flatten(1), device)
            features = self._decoded(subjects[target].model, z, nearest, device)
            checked = torch.linspace(0, len(z) - 1, min(len(z), CHECKED)).long()
            # Half the mean square distance of two latents is the sum of all variances.
            spread = sum(float(channel.double().var(0).sum()) for channel in z.unbind(1))
            self._entries[target] = {
                "value": frechet_distance(images, features),
                "neighbours": float(distances.mean()) / (2.0 * spread) ** 0.5 if spread else 0.0,
                "wrong": share_of_wrong(z.flatten(1), distances, checked),
                "checked": len(checked),
                "weights": weights,
                "warning": few_images(*features.shape),
            }

    def _decoded(self, model: Autoencoder, z: Tensor, nearest: Tensor, device: str) -> Features:
        """Features of the pictures at the midpoints of each latent and its neighbour."""
        assert self._extract is not None
        features = []
        for some, others in zip(z.split(self._batch), nearest.split(self._batch), strict=True):
            middle = ((some + z[others]) / 2.0).to(device)
            with torch.inference_mode(), full_float32(middle):
                y = model.decode(middle)
            if not y.isfinite().all():
                raise ArithmeticError("iFID: a picture between two latents is not finite")
            features.append(self._extract(to_uint8(y)))
        return np.concatenate(features)

    def result(self, target: str, draw: int) -> dict[str, Any] | None:
        return self._entries.get(target)

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        return {"iFID": number(entry["value"], 3)}

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        # The numbers of each target.
        found = {row.target: row.observed[self.name] for row in rows if self.name in row.observed}
        near = []
        wrong = []
        for target, entry in found.items():
            near.append(f"{entry['neighbours']:.2f} ({target})")
            wrong.append(f"{entry['wrong']:.1%} of {entry['checked']} ({target})")
        if found:
            distances = ", ".join(near)
            yield f"iFID: nearest neighbours are at {distances} of the distance of any two latents"
            yield f"iFID: of the neighbours, wrong by a direct search: {', '.join(wrong)}"

        # Each warning once: first about the number of images, then about the weights.
        warnings = [entry["warning"] for entry in found.values() if entry["warning"]]
        for entry in found.values():
            if not entry["weights"]["published"]:
                file = entry["weights"]["file"]
                warnings.append(f"it rests on a {file} that is not the published file")
        for warning in dict.fromkeys(warnings):
            yield f"warning: iFID: {warning}"


def nearest_neighbours(
    z: Tensor, device: str | torch.device = "cpu", block: int = 1024
) -> tuple[Tensor, Tensor]:
    """Find the nearest other row, by Euclidean distance, of each row of ``z``.

    ``z`` is (N, D) in float32 on the CPU. Returns the rows' numbers, (N,), and their distances in
    float64, (N,). A block of rows at a time is compared with the others by products in float32, on
    the device, which give :data:`CANDIDATES`; their distances are in float64. So memory is two
    blocks of rows, and distances of one block, block x N.
    """
    # Without the mean: differences of large numbers would lose digits.
    n = len(z)
    mean = z.mean(0)
    squares = [(part - mean).square().sum(1) for part in z.split(block)]
    norms = torch.cat(squares).to(device)  # (N,)
    nearest, distances = [], []
    for start in range(0, n, block):
        # Scores |b|^2 - 2 a b order the other rows b like their distances |a - b|^2 from a row a.
        part = z[start : start + block]  # (b, D)
        rows = (part - mean).to(device)
        scores = torch.empty(len(part), n, device=device)
        with full_float32(rows):
            for other in range(0, n, block):
                products = rows @ (z[other : other + block] - mean).to(device).T
                scores[:, other : other + block] = norms[other : other + block] - 2.0 * products
        scores[:, start : start + block].fill_diagonal_(torch.inf)  # a row itself is no neighbour

        # Of a few candidates, the nearest by exact distances.
        candidates = scores.topk(min(CANDIDATES, n - 1), largest=False).indices.cpu()  # (b, k)
        exact = [(part.double() - z[some].double()).square().sum(1) for some in candidates.T]
        least, place = torch.stack(exact, dim=1).min(1)
        nearest.append(candidates.gather(1, place[:, None])[:, 0])
        distances.append(least.sqrt())
    return torch.cat(nearest), torch.cat(distances)


def share_of_wrong(z: Tensor, distances: Tensor, checked: Tensor) -> float:
    """The share of the rows ``checked`` that have a nearer row than the ``distances`` found."""
    # By differences, not products: exact to 7 digits.
    direct = torch.cdist(z[checked], z, compute_mode="donot_use_mm_for_euclid_dist")
    direct[torch.arange(len(checked)), checked] = torch.inf
    return float((direct.amin(1) < distances[checked] * (1.0 - 1e-5)).float().mean())
