"""rFID: the Fréchet distance (Heusel et al. 2017) between images and their own reconstructions."""

import numpy as np
from numpy.typing import NDArray

from olvae.metrics.inception import Features, SetMetric

__all__ = ["RFID", "gaussian"]

CHUNK = 4096


class RFID(SetMetric):
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the two sets' features, by torch-fidelity's function.

    Means m and covariances S are in float64. The square root of a product leaves rounding errors of about 1e-4,
    which may make the distance of equal sets negative: that is given as 0.
    """

    def compute(self) -> float:
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

        images, reconstructions = self._sets()
        n, width = images.shape
        self._computed = {"features": width}
        if n <= width:
            self._computed["warning"] = (
                f"{n} images for {width} features: the covariances are singular and the distance is biased; "
                "compare it only with one of the same images"
            )
        distance = fid_statistics_to_metric(gaussian(images), gaussian(reconstructions), verbose=False)
        return max(0.0, float(distance[KEY_METRIC_FID]))


def gaussian(features: Features) -> dict[str, NDArray[np.float64]]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64."""
    mean = features.mean(0, dtype=np.float64)
    products = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), CHUNK):
        centred = features[start : start + CHUNK] - mean
        products += centred.T @ centred
    return {"mu": mean, "sigma": products / (len(features) - 1)}
