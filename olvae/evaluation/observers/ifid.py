"""Observe iFID and its precision: compare pictures between neighbouring latents with images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from olvae.evaluation.cells import number
from olvae.evaluation.observers.interpolated import Interpolated
from olvae.metrics.features import Features, few_images, frechet_distance

PRECISION_NEIGHBOURS = 3  # k of Kynkäänniemi et al. 2019


class InterpolatedFID(Interpolated):
    """The interpolated FID (iFID, arXiv 2603.05630), as in its published code.

    It follows a diffusion model's FID where rFID does not. The ``value`` is the Fréchet distance
    between the set and the pictures of :class:`Interpolated`, in the features of rFID. Published
    values are of ImageNet's validation images with neighbours among the training images; here both
    are of one set.
    """

    name = "ifid"
    label = "iFID"

    def compare(self, images: Features, pictures: Features) -> Mapping[str, Any]:
        return {
            "value": frechet_distance(images, pictures),
            "warning": few_images(*pictures.shape),
        }

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        return {"iFID": number(entry["value"], 3)}


class NearestFID(InterpolatedFID):
    """An iFID of averages of each latent and the nearest one; not the published number."""

    name = "ifid_nearest"

    def __init__(self, weights_dir: str | Path | None = None) -> None:
        super().__init__(weights_dir, how="nearest")

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        return {"iFID nearest": number(entry["value"], 3)}


class InterpolatedPrecision(Interpolated):
    """The precision of the pictures between neighbouring latents, in Inception's features.

    The ``value`` is the share of pictures that are no farther from some image than the third
    nearest other image is from that one (Kynkäänniemi et al. 2019), by torch-fidelity's function.
    Higher is better. It decodes the pictures of :class:`InterpolatedFID` again.
    """

    name = "interpolated_precision"
    label = "precision"

    def compare(self, images: Features, pictures: Features) -> Mapping[str, Any]:
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, prc_features_to_metric

        if len(images) <= PRECISION_NEIGHBOURS:
            return {"value": None, "warning": f"it needs more than {PRECISION_NEIGHBOURS} images"}
        found = prc_features_to_metric(
            torch.from_numpy(pictures),
            torch.from_numpy(images),
            prc_neighborhood=PRECISION_NEIGHBOURS,
            save_cpu_ram=True,
            verbose=False,
        )
        return {"value": found[KEY_METRIC_PRECISION], "warning": None}

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        value = entry["value"]
        return {"precision": "skipped" if value is None else number(value, 3)}
