"""Metrics of networks' features: LPIPS of pairs; rFID, KID (Inception), FDD (DINOv2) of sets."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from olvae.devices import full_float32
from olvae.metrics.metric import Kind, Metric, Unavailable, check_pairs
from olvae.modules.frozen import Trunk, VisionEncoder, perceptual_network
from olvae.modules.mixed_precision import in_float64
from olvae.pretrained_networks import DINOV2, INCEPTION, read_weights_file

# The smallest sides in pixels at which the last layer still has a position.
LPIPS_SIZE: dict[Trunk, int] = {"vgg": 16, "alex": 31}

Features = NDArray[np.float32]
Extract = Callable[[Tensor], Features]  # uint8 (B, 3, H, W) to features (B, D)


class LPIPSDistance:
    """LPIPS of each pair (Zhang et al. 2018), version 0.1, by the lpips package, in float32."""

    def __init__(self, trunk: Trunk, path: Path, device: str | torch.device = "cpu") -> None:
        self._least = LPIPS_SIZE[trunk]
        self._network = perceptual_network(trunk, path).to(device)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Two batches of images, levels (B, 3, H, W) -> float64 (B,)."""
        if x.shape[1] != 3 or min(x.shape[-2:]) < self._least:
            least = f"3 channels and at least {self._least} pixels"
            raise Unavailable(f"LPIPS needs images of {least}, got {tuple(x.shape[1:])}")
        x = x.float() / 127.5 - 1.0
        y = y.float() / 127.5 - 1.0
        distances: Tensor = self._network(x, y)  # (B, 1, 1, 1)
        return in_float64(distances.flatten())


class Inception:
    """The 2048 features of torch-fidelity's InceptionV3, in float32.

    The network resizes to 299x299 itself.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # First a safe read, which refuses code: torch-fidelity's would run it.
        read_weights_file(path, INCEPTION)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            # load_state_dict lists names and shapes over many lines, after a heading.
            lines = str(error).splitlines()[1:2] or [str(error)]
            reason = lines[0].strip()[:120]
            raise ValueError(f"{path} is not a file of Inception weights: {reason}") from error
        self._network = network.to(device)
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Levels (B, 3, H, W) -> float32 (B, 2048)."""
        if images.shape[1] != 3:
            raise Unavailable(f"Inception needs images of 3 channels, got {images.shape[1]}")
        images = images.to(self._device)
        if images.dtype != torch.uint8:
            images = images.round().to(torch.uint8)
        with full_float32(images):
            (features,) = self._network(images)
        array: Features = features.cpu().numpy()
        return array


DINOV2_MODEL = "vit_large_patch14_dinov2.lvd142m"  # timm's name
DINOV2_SIZE = 224  # pixels a side that it sees


class DINOv2:
    """The class token of DINOv2, ViT-L/14, after its last norm: 1024 features, by timm, in float32.

    Images are resized to 224x224, antialiased bicubic, as in Stein et al. 2023 but for the
    resampling of position embeddings, which is timm's.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu") -> None:
        try:
            network = VisionEncoder(DINOV2_MODEL, read_weights_file(path, DINOV2))
        except ValueError as error:
            raise ValueError(f"{path} is not a file of DINOv2 weights: {error}") from error
        self._network = network.to(device)
        self._device = torch.device(device)

    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W) -> float32 (B, 1024)."""
        if images.shape[1] != 3:
            raise Unavailable(f"DINOv2 needs images of 3 channels, got {images.shape[1]}")
        images = images.to(self._device)
        with full_float32(images):
            token = self._network.class_token(images.float() / 127.5 - 1.0, DINOV2_SIZE)
        array: Features = token.cpu().numpy()
        return array


class SetMetric(Metric):
    """A distance between the features of all images and of one target's reconstructions.

    All features are kept, 8 KB of Inception per image and side: KID draws subsets from them, and an
    image that two processes saw could not be taken back out of the sums of a Gaussian. Each is
    computed once per key, and pickled once: all targets share the images' features by key, and the
    metrics of a target share its reconstructions' features.
    """

    def __init__(
        self,
        kind: Kind,
        extract: Extract,
        reference: dict[str, Features],
        reconstructions: dict[str, Features],
    ) -> None:
        super().__init__(kind)
        self._extract = extract
        self._reference = reference
        self._reconstructions = reconstructions

    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        check_pairs(keys, x, y)
        for store, images in ((self._reference, x), (self._reconstructions, y)):
            # Images that are not in the store yet, which another metric may share, by their places.
            new = {key: place for place, key in enumerate(keys) if key not in store}
            if new:
                features = self._extract(images[list(new.values())])
                # Copies, so that a pickled row does not bring its whole batch along.
                store.update((key, row.copy()) for key, row in zip(new, features, strict=True))

    def state(self) -> tuple[dict[str, Features], dict[str, Features]]:
        return self._reference, self._reconstructions

    def merge(self, state: Any) -> None:
        for own, other in zip(self.state(), state, strict=True):
            # The first value stays, as a key counts once.
            for key, features in other.items():
                own.setdefault(key, features)

    def _sets(self) -> tuple[Features, Features]:
        """Features of images and of reconstructions, (N, D) each, in the order of the keys."""
        keys = sorted(self._reconstructions)
        if len(keys) < 2:
            raise Unavailable(f"{self.kind.label} needs at least 2 images, got {len(keys)}")
        images = np.stack([self._reference[key] for key in keys])
        reconstructions = np.stack([self._reconstructions[key] for key in keys])
        return images, reconstructions


class RFID(SetMetric):
    """The Fréchet distance of the two sets' features: see :func:`frechet_distance`.

    With DINOv2's features it is called FDD.
    """

    def compute(self) -> float:
        images, reconstructions = self._sets()
        self.details["features"] = images.shape[1]
        self.details.pop("warning", None)
        warning = few_images(*images.shape)
        if warning:
            self.details["warning"] = warning
        return frechet_distance(images, reconstructions)


def few_images(n: int, width: int) -> str | None:
    """Warn of a Fréchet distance of too few images; None if there are enough.

    ``n`` images with ``width`` features each.
    """
    if n > width:
        return None
    biased = "the covariances are singular and the distance is biased"
    return (
        f"{n} images for {width} features: {biased}; compare it only with values on the same images"
    )


def frechet_distance(a: Features, b: Features) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (N, D).

    By torch-fidelity's function. Means m and unbiased covariances S are in float64. The square root
    of the product has rounding errors of about 1e-4, which may make the distance between equal sets
    negative; it is then given as 0.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = [
        {"mu": f.mean(0, dtype=np.float64), "sigma": np.cov(f, rowvar=False)} for f in (a, b)
    ]
    result = fid_statistics_to_metric(*statistics, verbose=False)
    return max(0.0, float(result[KEY_METRIC_FID]))


class KID(SetMetric):
    """Mean over random subsets of the unbiased squared MMD with a cubic kernel.

    By torch-fidelity's function with its defaults: 100 subsets of 1000 images (of all N if there
    are fewer), drawn with seed 2020 from the images sorted by key. Equal sets give a value slightly
    below 0.
    """

    def compute(self) -> float:
        from torch_fidelity.defaults import DEFAULTS
        from torch_fidelity.metric_kid import (
            KEY_METRIC_KID_MEAN,
            KEY_METRIC_KID_STD,
            kid_features_to_metric,
        )

        images, reconstructions = map(torch.from_numpy, self._sets())
        size = min(DEFAULTS["kid_subset_size"], len(images))
        result = kid_features_to_metric(
            images, reconstructions, kid_subset_size=size, verbose=False
        )
        self.details |= {
            "subsets": DEFAULTS["kid_subsets"],
            "subset_size": size,
            "seed": DEFAULTS["rng_seed"],
            "std": float(result[KEY_METRIC_KID_STD]),
        }
        return float(result[KEY_METRIC_KID_MEAN])
