"""Distances between distributions of Inception features: rFID and KID."""

import numpy as np
import torch
from numpy.typing import NDArray

from olvae.metrics.inception import Features, SetMetric

__all__ = ["KID", "RFID", "frechet_distance", "gaussian"]


CHUNK = 4096


class RFID(SetMetric):
    """The Fréchet distance of the two sets' features: :func:`frechet_distance`."""

    def compute(self) -> float:
        images, reconstructions = self._sets()
        n, width = images.shape
        self._computed = {"features": width}
        if n <= width:
            self._computed["warning"] = (
                f"{n} images for {width} features: the covariances are singular and the distance is biased; "
                "compare it only with values on the same images"
            )
        return frechet_distance(images, reconstructions)


def frechet_distance(a: Features, b: Features) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (N, D), by torch-fidelity's function.

    Means m and covariances S are in float64. The square root of the product has rounding errors of about 1e-4, which
    may make the distance between equal sets negative; it is then given as 0.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    distance = fid_statistics_to_metric(gaussian(a), gaussian(b), verbose=False)
    return max(0.0, float(distance[KEY_METRIC_FID]))


def gaussian(features: Features) -> dict[str, NDArray[np.float64]]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64."""
    mean = features.mean(0, dtype=np.float64)
    products = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), CHUNK):
        centred = features[start : start + CHUNK] - mean
        products += centred.T @ centred
    return {"mu": mean, "sigma": products / (len(features) - 1)}


SUBSET = 1000


class KID(SetMetric):
    """Mean over random subsets of the unbiased squared MMD with a cubic kernel, by torch-fidelity's function.

    With its defaults: 100 subsets of 1000 images (of all N if there are fewer), drawn with seed 2020 from the images
    sorted by key. Equal sets give a value slightly below 0.
    """

    def compute(self) -> float:
        from torch_fidelity.defaults import DEFAULTS
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

        images, reconstructions = (torch.from_numpy(features) for features in self._sets())
        size = min(SUBSET, len(images))
        result = kid_features_to_metric(images, reconstructions, kid_subset_size=size, verbose=False)
        self._computed = {
            "subsets": DEFAULTS["kid_subsets"],
            "subset_size": size,
            "seed": DEFAULTS["rng_seed"],
            "std": float(result[KEY_METRIC_KID_STD]),
        }
        return float(result[KEY_METRIC_KID_MEAN])
