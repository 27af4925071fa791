"""Inception features of images and reconstructions, kept by key, for the metrics that compare the two sets."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from olvae.metrics.metric import Kind, Metric, Unavailable, check_pairs
from olvae.modules.precision import full_float32
from olvae.weights import INCEPTION, read_weights_file

__all__ = ["Features", "Inception", "PairFeatures", "SetMetric"]

Features = NDArray[np.float32]
Extract = Callable[[Tensor], Features]
"""uint8 (B, 3, H, W) to features (B, D)."""


class Inception:
    """The 2048 features of torch-fidelity's InceptionV3, in float32. The network resizes to 299x299 itself.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        read_weights_file(path, INCEPTION)  # a safe read: torch-fidelity's would run code from the file
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:  # the names and shapes of load_state_dict, over many lines
            reason = str(error).splitlines()[1:2] or [str(error)]
            raise ValueError(f"{path} is not a file of Inception weights: {reason[0].strip()[:120]}") from error
        self._network = network.to(device)
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W) -> float32 (B, 2048)."""
        if images.shape[1] != 3:
            raise Unavailable(f"Inception needs images of 3 channels, got {images.shape[1]}")
        images = images.to(self._device)
        with full_float32(images):
            (features,) = self._network(images)
        array: Features = features.cpu().numpy()
        return array


class PairFeatures:
    """Features of images and of one target's reconstructions, each computed once per key.

    All of them are kept, 8 KB per image and side: KID draws subsets from them, and an image that two processes saw
    could not be taken back out of the sums of a Gaussian.

    Args:
        extract: such as :class:`Inception`.
        reference: features of the images by key, shared by all targets; filled here as images come.
    """

    def __init__(self, extract: Extract, reference: dict[str, Features]) -> None:
        self._extract = extract
        self._reference = reference
        self._reconstructions: dict[str, Features] = {}

    def __len__(self) -> int:
        return len(self._reconstructions)

    def add(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Add images and reconstructions whose keys are new; see :meth:`Metric.update`."""
        check_pairs(keys, x, y)
        self._fill(self._reference, keys, x)
        self._fill(self._reconstructions, keys, y)

    def state(self) -> tuple[dict[str, Features], dict[str, Features]]:
        """Features of the images, and of the reconstructions. Metrics that share features pickle them once."""
        return self._reference, self._reconstructions

    def merge(self, state: tuple[Mapping[str, Features], Mapping[str, Features]]) -> None:
        for own, other in zip(self.state(), state, strict=True):
            if own is not other:
                own.update((key, features) for key, features in other.items() if key not in own)

    def sets(self) -> tuple[Features, Features]:
        """Features of images and of reconstructions, (N, D) each, in the order of the keys."""
        keys = sorted(self._reconstructions)
        return np.stack([self._reference[key] for key in keys]), np.stack([self._reconstructions[key] for key in keys])

    def _fill(self, store: dict[str, Features], keys: Sequence[str], images: Tensor) -> None:
        new = {key: place for place, key in enumerate(keys) if key not in store}
        if new:
            features = self._extract(images if len(new) == len(keys) else images[list(new.values())])
            # Copies, so that a pickled row does not bring its whole batch along.
            store.update((key, row.copy()) for key, row in zip(new, features, strict=True))


class SetMetric(Metric):
    """A distance between the features of all images and those of all reconstructions.

    Args:
        features: may be shared by several metrics of one target; each key is computed once.
    """

    def __init__(self, kind: Kind, features: PairFeatures, details: Mapping[str, object] | None = None) -> None:
        super().__init__(kind, details)
        self._features = features
        self._computed: dict[str, object] = {}
        """Details of the last value; compute() sets them."""

    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        self._features.add(keys, x, y)

    def state(self) -> tuple[dict[str, Features], dict[str, Features]]:
        return self._features.state()

    def merge(self, state: Any) -> None:
        self._features.merge(state)

    def details(self) -> dict[str, object]:
        return {**self._details, **self._computed}

    def _sets(self) -> tuple[Features, Features]:
        if len(self._features) < 2:
            raise Unavailable(f"{self.kind.label} needs at least 2 images, got {len(self._features)}")
        return self._features.sets()
