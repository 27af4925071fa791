"""Metrics of networks' features: LPIPS of pairs; rFID, KID (Inception), FDD (DINOv2) of sets."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from olvae.devices import full_float32
from olvae.launcher import this_process
from olvae.metrics.metric import Kind, Metric, Unavailable, check_pairs
from olvae.modules.frozen import Trunk, VisionEncoder, perceptual_network
from olvae.modules.mixed_precision import in_float64
from olvae.pretrained_networks import DINOV2, INCEPTION, read_weights_file

# The smallest sides in pixels at which the last layer still has a position.
LPIPS_SIZE: dict[Trunk, int] = {"vgg": 16, "alex": 31}

Features = NDArray[np.float32]
Extract = Callable[[Tensor], Features]  # uint8 (B, 3, H, W) to features (B, D)
Gaussian = dict[str, NDArray[np.float64]]  # "mu" (D,) and "sigma" (D, D), as torch-fidelity's

# Rows of features in memory at a time: 32 MB of Inception's, and 64 MB where they are float64.
ROWS_AT_ONCE = 4096


class LPIPSDistance:
    """LPIPS of each pair (Zhang et al. 2018), version 0.1, in float32."""

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


class FeatureFile:
    """Features by key in a temporary file: memory holds the keys, and some rows at a time.

    The file lies in ``TMPDIR`` without a name, so it ends with this object, and with the process
    however that ends.
    """

    def __init__(self) -> None:
        self.places: dict[str, int] = {}  # rows of the file, by key
        self.width = 0
        # Opened late: loader processes, forked before, would keep a copy, and the disk's space.
        self._file: Any = None
        self._sent = 0  # rows that left by unsent()

    def add(self, keys: Sequence[str], features: Features) -> None:
        """Append the features (B, D) of B distinct keys; a key that is there keeps its own.

        Raises OSError, with the remedy, if the disk is full.
        """
        new = [row for row, key in enumerate(keys) if key not in self.places]
        if not new:
            return
        rows = np.ascontiguousarray(features[new], np.float32)
        try:
            self._file = self._file or tempfile.TemporaryFile(prefix="olvae-")  # noqa: SIM115
            self._file.seek(0, os.SEEK_END)
            self._file.write(rows.data.cast("B"))
            self._file.flush()
        except OSError as error:
            why = f"{error.strerror}; set `TMPDIR` to a folder with room for features of images"
            raise OSError(error.errno, why, tempfile.gettempdir()) from error
        self.width = rows.shape[1]
        for row in new:
            self.places[keys[row]] = len(self.places)

    def read(self, keys: Sequence[str]) -> Features:
        """Return the features of keys, (B, D)."""
        # Mapped for this read only: pages of a lasting map would count as this process's memory.
        shape = (len(self.places), self.width)
        rows = np.memmap(self._file, np.float32, "r", shape=shape)
        return np.asarray(rows[[self.places[key] for key in keys]])

    def unsent(self) -> Iterator[tuple[list[str], Features]]:
        """Yield keys and their features that were not yielded before, some rows at a time.

        The first process gets as many from all others together as it reads at a time.
        """
        keys = list(self.places)[self._sent :]
        self._sent = len(self.places)
        rows = max(1, ROWS_AT_ONCE // this_process()[1])
        for start in range(0, len(keys), rows):
            some = keys[start : start + rows]
            yield some, self.read(some)

    def moments(self, keys: Sequence[str]) -> Gaussian:
        """Return the mean and the unbiased covariance of the features of keys, at least two.

        In float64 and in two passes, as the products are of differences from the mean: sums of
        plain squares would lose digits. Keys in one order give the same bits, whatever the order
        of the file.
        """
        n = len(keys)
        mean = np.zeros(self.width)
        for block in self._blocks(keys):
            mean += block.sum(0, dtype=np.float64)
        mean /= n
        covariance = np.zeros((self.width, self.width))
        for block in self._blocks(keys):
            difference = block - mean
            covariance += difference.T @ difference
        covariance *= 1.0 / (n - 1)
        return {"mu": mean, "sigma": covariance}

    def _blocks(self, keys: Sequence[str]) -> Iterator[Features]:
        for start in range(0, len(keys), ROWS_AT_ONCE):
            yield self.read(keys[start : start + ROWS_AT_ONCE])


class SetMetric(Metric):
    """A distance between the features of all images and of one target's reconstructions.

    All features are kept in files, 8 KB of Inception per image and side: KID draws subsets from
    them, and an image that two processes saw could not be taken back out of the sums of a Gaussian.
    Each is computed once per key, and sent once: all targets share the images' features by key, and
    the metrics of a target share its reconstructions' features.
    """

    def __init__(
        self, kind: Kind, extract: Extract, reference: FeatureFile, reconstructions: FeatureFile
    ) -> None:
        super().__init__(kind)
        self._extract = extract
        self._reference = reference
        self._reconstructions = reconstructions

    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        check_pairs(keys, x, y)
        for file, images in ((self._reference, x), (self._reconstructions, y)):
            # Images that are not in the file yet, which another metric may share, by their places.
            new = {key: place for place, key in enumerate(keys) if key not in file.places}
            if new:
                file.add(list(new), self._extract(images[list(new.values())]))

    def states(self) -> Iterator[tuple[bool, list[str], Features]]:
        for is_reference, file in ((True, self._reference), (False, self._reconstructions)):
            for keys, features in file.unsent():
                yield is_reference, keys, features

    def merge(self, state: Any) -> None:
        is_reference, keys, features = state
        file = self._reference if is_reference else self._reconstructions
        file.add(keys, features)

    def _keys(self) -> list[str]:
        """Return the keys of the images, sorted, at least two."""
        keys = sorted(self._reconstructions.places)
        if len(keys) < 2:
            raise Unavailable(f"{self.kind.label} needs at least 2 images, got {len(keys)}")
        return keys


class RFID(SetMetric):
    """The Fréchet distance of the two sets' features: see :func:`frechet_distance`.

    With DINOv2's features it is called FDD.
    """

    def compute(self) -> float:
        keys = self._keys()
        width = self._reference.width
        self.details["features"] = width
        self.details.pop("warning", None)
        warning = few_images(len(keys), width)
        if warning:
            self.details["warning"] = warning
        return _frechet(self._reference.moments(keys), self._reconstructions.moments(keys))


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
    sets = [{"mu": f.mean(0, dtype=np.float64), "sigma": np.cov(f, rowvar=False)} for f in (a, b)]
    return _frechet(*sets)


def _frechet(a: Gaussian, b: Gaussian) -> float:
    """See :func:`frechet_distance`."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    result = fid_statistics_to_metric(a, b, verbose=False)
    return max(0.0, float(result[KEY_METRIC_FID]))


class KID(SetMetric):
    """Mean over random subsets of the unbiased squared MMD with a cubic kernel.

    By torch-fidelity's function with its defaults: 100 subsets of 1000 images (of all N if there
    are fewer), drawn with seed 2020 from the images sorted by key, as torch-fidelity draws them,
    but one at a time from files. Equal sets give a value slightly below 0.
    """

    def compute(self) -> float:
        from torch_fidelity.defaults import DEFAULTS
        from torch_fidelity.metric_kid import kernel_mmd

        keys = self._keys()
        size = min(DEFAULTS["kid_subset_size"], len(keys))
        rng = np.random.RandomState(DEFAULTS["rng_seed"])
        distances = []
        for _ in range(DEFAULTS["kid_subsets"]):
            drawn = []
            for file in (self._reference, self._reconstructions):
                places = rng.choice(len(keys), size, replace=False)
                drawn.append(file.read([keys[place] for place in places]))
            distances.append(float(kernel_mmd(*drawn)))
        self.details |= {
            "subsets": DEFAULTS["kid_subsets"],
            "subset_size": size,
            "seed": DEFAULTS["rng_seed"],
            "std": float(np.std(distances)),
        }
        return float(np.mean(distances))
