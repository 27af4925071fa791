"""Find neighbouring latents, interpolate them, and extract features of the decoded pictures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.data.pixels.size_and_range import to_uint8
from olvae.devices import full_float32
from olvae.evaluation.observers.observer import Observation, PerImageObserver, Subject
from olvae.evaluation.results import Row
from olvae.metrics.features import Features, Inception
from olvae.models.autoencoder import Autoencoder
from olvae.modules.base import check_choice
from olvae.modules.distributions import keyed_seed
from olvae.pretrained_networks import INCEPTION, find_weights, provenance

How = Literal["paper", "nearest"]

IMAGES = ""  # a key beside the targets' names, which are not empty
DRAWN_FROM = 10  # most similar latents: one of them is drawn
CANDIDATES = 4  # more rows than needed by float32, whose distances are computed again in float64
CHECKED = 64  # latents whose neighbours are searched once more, by differences


class Interpolated(PerImageObserver):
    """Compare pictures between neighbouring latents with the images.

    Each image's latent gets a neighbour in the set, and the picture between the two is decoded:

    - ``paper``: one of the ten most similar latents by cosine, drawn by a softmax of the negative
      mean squared distance; slerp, halfway (arXiv 2603.05630's code, bac6ede). The image's pixels
      are the seed, so that the order of images changes nothing.
    - ``nearest``: the nearest latent by Euclidean distance; the average of the two.

    Latents are posterior means, in float32, and flattened. All are kept, so 50,000 of 12x32x32 take
    2.5 GB for each target, and all are searched.

    A subclass computes the numbers in :meth:`compare`, and has a ``label`` for lines. An entry also
    has:

    - ``neighbours``, the mean distance of neighbours over the root mean square distance of any two
      latents: near 1 there are no real neighbours, and the pictures are double exposures;
    - ``wrong``, the share of ``checked`` latents to which another one is nearer than the neighbours
      that were found.

    Args:
        weights_dir: a folder with Inception's weights, searched first. If they are missing,
            :meth:`derive` raises MissingWeights, before any work.
        how: to choose the neighbour and to interpolate.
        normalise: shift and scale each channel to mean 0 and deviation 1 first.
    """

    label = ""

    def __init__(
        self,
        weights_dir: str | Path | None = None,
        how: How = "paper",
        normalise: bool = False,
    ) -> None:
        super().__init__()  # rows are a target's latents, and the features of IMAGES
        check_choice(("paper", "nearest"), how=how)
        self.how: How = how
        self.normalise = normalise
        self._weights_dir = weights_dir
        self._batch = 1  # images of the largest batch
        self._extract: Inception | None = None
        self._entries: dict[str, dict[str, Any]] = {}

    def compare(self, images: Features, pictures: Features) -> Mapping[str, Any]:
        """Return the numbers of an entry, by the features (N, D) of images and of pictures."""
        raise NotImplementedError

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        self._path = find_weights(INCEPTION, self._weights_dir)
        return dict(subjects)

    def measure(self, batch: Observation) -> Iterable[tuple[float, Tensor]]:
        """A number that the image's pixels draw, and its latent; keeps features of new images."""
        if self._extract is None:
            self._extract = Inception(self._path, batch.latents.device)
        self._batch = max(self._batch, len(batch.keys))
        references = self._rows.setdefault(IMAGES, {})
        new = {key: i for i, key in enumerate(batch.keys) if key not in references}
        if new:
            features = self._extract(batch.x[list(new.values())])
            references.update((key, row.copy()) for key, row in zip(new, features, strict=True))
        draws = [keyed_seed(image.numpy().tobytes()) % 2**53 / 2**53 for image in batch.x]
        latents = [latent.clone() for latent in batch.latents.cpu()]
        return zip(draws, latents, strict=True)

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
            _, first = next(iter(found.values()))
            z = torch.empty(len(found), *first.shape)
            uniform = torch.empty(len(found), dtype=torch.float64)
            for row, key in enumerate(sorted(found)):
                uniform[row], z[row] = found.pop(key)
            undo = normalise_channels(z) if self.normalise else (torch.zeros(1), torch.ones(1))

            # Pictures between neighbours, and how near these are.
            flat = z.flatten(1)
            checked = torch.linspace(0, len(z) - 1, min(len(z), CHECKED)).long()
            if self.how == "paper":
                chosen, distances, farthest = drawn_neighbours(flat, uniform, device)
                amount = min(DRAWN_FROM, len(z) - 1)
                wrong = share_of_wrong(flat, farthest, checked, amount, directions=True)
            else:
                chosen, distances = nearest_neighbours(flat, device)
                wrong = share_of_wrong(flat, distances, checked)
            pictures = self._decoded(subjects[target].model, z, chosen, undo, device)

            # Half the mean square distance of two latents is the sum of all variances.
            spread = sum(float(channel.double().var(0).sum()) for channel in z.unbind(1))
            self._entries[target] = {
                **self.compare(images, pictures),
                "how": self.how,
                "neighbours": float(distances.mean()) / (2.0 * spread) ** 0.5 if spread else 0.0,
                "wrong": wrong,
                "checked": len(checked),
                "weights": weights,
            }

    def _decoded(
        self,
        model: Autoencoder,
        z: Tensor,
        chosen: Tensor,
        undo: tuple[Tensor, Tensor],
        device: str,
    ) -> Features:
        """Features of the pictures halfway between each latent and the one chosen for it."""
        assert self._extract is not None
        shift, scale = undo
        features = []
        for some, others in zip(z.split(self._batch), chosen.split(self._batch), strict=True):
            middle = (some + z[others]) / 2.0
            if self.how == "paper":
                middle = slerp_halfway(some, z[others])
            middle = (middle * scale + shift).to(device)
            with torch.inference_mode(), full_float32(middle):
                y = model.decode(middle)
            if not y.isfinite().all():
                raise ArithmeticError(f"{self.name}: a picture between two latents is not finite")
            features.append(self._extract(to_uint8(y)))
        return np.concatenate(features)

    def result(self, target: str, draw: int) -> dict[str, Any] | None:
        return self._entries.get(target)

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        # How near neighbours are, by target.
        found = {row.target: row.observed[self.name] for row in rows if self.name in row.observed}
        label = self.label
        near = []
        wrong = []
        for target, entry in found.items():
            near.append(f"{entry['neighbours']:.2f} ({target})")
            wrong.append(f"{entry['wrong']:.1%} of {entry['checked']} ({target})")
        if found:
            distances = ", ".join(near)
            yield f"{label}: neighbours are at {distances} of the distance of any two latents"
            yield f"{label}: of the neighbours, wrong by a direct search: {', '.join(wrong)}"

        # Each warning once: first about the number of images, then about the weights.
        warnings = [entry["warning"] for entry in found.values() if entry.get("warning")]
        for entry in found.values():
            if not entry["weights"]["published"]:
                file = entry["weights"]["file"]
                warnings.append(f"it rests on a {file} that is not the published file")
        for warning in dict.fromkeys(warnings):
            yield f"warning: {label}: {warning}"


def normalise_channels(z: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale the channels of (N, n_z, h, w) in place; return what undoes it.

    These are means and deviations, (n_z, 1, 1).
    """
    channels = z.unbind(1)
    shift = torch.stack([channel.double().mean() for channel in channels]).float()[:, None, None]
    deviations = torch.stack([channel.double().std() for channel in channels]).float()
    scale = deviations.clamp(min=1e-12)[:, None, None]
    z.sub_(shift).div_(scale)
    return shift, scale


def slerp_halfway(a: Tensor, b: Tensor) -> Tensor:
    """Interpolate spherically between latents (B, ...), halfway: (a + b) / (2 cos(angle / 2)).

    The angle is between flattened latents. Opposite ones have no point halfway: they are averaged.
    """
    cosine = F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double())  # (B,)
    half = ((1.0 + cosine) / 2.0).clamp(min=0.0).sqrt()
    half = torch.where(half > 1e-6, half, 1.0).to(a.dtype)
    return (a + b) / (2.0 * half.view(-1, *(1,) * (a.ndim - 1)))


def nearest_neighbours(
    z: Tensor, device: str | torch.device = "cpu", block: int = 1024
) -> tuple[Tensor, Tensor]:
    """Find the nearest other row, by Euclidean distance, of each row of ``z``.

    ``z`` is (N, D) in float32 on the CPU. Returns the rows' numbers, (N,), and their distances in
    float64, (N,).
    """
    nearest, distances = [], []
    for _, rows, exact in _nearest_others(z, 1, False, device, block):
        nearest.append(rows[:, 0])
        distances.append(exact[:, 0])
    return torch.cat(nearest), torch.cat(distances)


def drawn_neighbours(
    z: Tensor, uniform: Tensor, device: str | torch.device = "cpu", block: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one of the ten rows that are most similar by cosine, for each row of ``z``.

    The chances are a softmax of the negative mean squared distances; ``uniform`` are a number in
    [0, 1) for each row, (N,), that decide. ``z`` is (N, D) in float32 on the CPU. Returns the rows'
    numbers, (N,); their Euclidean distances in float64, (N,); and the distance of the tenth, (N,),
    where rows are scaled to length 1.
    """
    drawn, distances, farthest = [], [], []
    for start, rows, exact in _nearest_others(z, DRAWN_FROM, True, device, block):
        part = z[start : start + block].double()  # (b, D)
        squares = [(part - z[some].double()).square().sum(1) for some in rows.T]
        square = torch.stack(squares, dim=1)  # (b, k)

        # The first place at which the chances add up to a uniform number.
        total = (-square / z.shape[1]).softmax(1).cumsum(1)
        below = total < uniform[start : start + len(part), None]
        place = below.sum(1, keepdim=True).clamp(max=rows.shape[1] - 1)
        drawn.append(rows.gather(1, place)[:, 0])
        distances.append(square.gather(1, place)[:, 0].sqrt())
        farthest.append(exact[:, -1])
    return torch.cat(drawn), torch.cat(distances), torch.cat(farthest)


def _nearest_others(
    z: Tensor, amount: int, directions: bool, device: str | torch.device, block: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, for blocks of rows, where each begins, the nearest other rows, and their distances.

    Rows' numbers and distances are (b, amount), the nearest first. With ``directions`` rows are
    scaled to length 1: Euclidean distance then orders them like the cosine. A block of rows at a
    time is compared with the others by products in float32, on the device, which give a few
    candidates more than needed; their distances are in float64. So memory is two blocks of rows,
    and distances of one block, block x N.
    """
    n = len(z)

    def scaled(rows: Tensor) -> Tensor:
        return F.normalize(rows) if directions else rows

    # Without the mean: differences of large numbers would lose digits.
    mean = torch.zeros(z.shape[1]) if directions else z.mean(0)
    squares = [(scaled(part) - mean).square().sum(1) for part in z.split(block)]
    norms = torch.cat(squares).to(device)  # (N,)
    amount = min(amount, n - 1)
    for start in range(0, n, block):
        # Scores |b|^2 - 2 a b order the other rows b like their distances |a - b|^2 from a row a.
        part = z[start : start + block]  # (b, D)
        rows = (scaled(part) - mean).to(device)
        scores = torch.empty(len(part), n, device=device)
        with full_float32(rows):
            for other in range(0, n, block):
                products = rows @ (scaled(z[other : other + block]) - mean).to(device).T
                scores[:, other : other + block] = norms[other : other + block] - 2.0 * products
        scores[:, start : start + block].fill_diagonal_(torch.inf)  # a row itself is no neighbour

        # Of a few candidates, the nearest by exact distances.
        candidates = scores.topk(min(amount + CANDIDATES - 1, n - 1), largest=False).indices.cpu()
        own = scaled(part.double())
        exact = [(own - scaled(z[some].double())).square().sum(1) for some in candidates.T]
        least, places = torch.stack(exact, dim=1).topk(amount, largest=False)  # (b, amount)
        yield start, candidates.gather(1, places), least.sqrt()


def share_of_wrong(
    z: Tensor, distances: Tensor, checked: Tensor, amount: int = 1, directions: bool = False
) -> float:
    """The share of the rows ``checked`` with ``amount`` rows nearer than the ``distances`` found.

    With ``directions`` rows are scaled to length 1.
    """
    # By differences, not products: exact to 7 digits.
    some = F.normalize(z[checked]) if directions else z[checked]
    blocks = []
    for part in z.split(1024):
        others = F.normalize(part) if directions else part
        blocks.append(torch.cdist(some, others, compute_mode="donot_use_mm_for_euclid_dist"))
    direct = torch.cat(blocks, dim=1)  # (checked, N)
    direct[torch.arange(len(checked)), checked] = torch.inf
    nearest: Sequence[Tensor] = direct.kthvalue(amount, dim=1)
    return float((nearest[0] < distances[checked] * (1.0 - 1e-5)).float().mean())
