"""KID: the kernel distance (Bińkowski et al. 2018) between images and their own reconstructions."""

import torch

from olvae.metrics.inception import SetMetric

__all__ = ["KID"]

SUBSET = 1000


class KID(SetMetric):
    """Mean over random subsets of the unbiased squared MMD with a cubic kernel, by torch-fidelity's function.

    Its defaults hold: 100 subsets of 1000, or of N where there are fewer images, drawn with seed 2020 from the
    images in the order of their keys. Equal sets give a value slightly below 0.
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
