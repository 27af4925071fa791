"""Metrics of reconstructions, computed on uint8 images: all by name, and how to make them.

``metric`` has the contract and the metrics of pixels, ``features`` the metrics of networks. Imports
``olvae.modules`` and the foundations; validation and evaluation import it.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from olvae.metrics.features import (
    KID,
    RFID,
    DINOv2,
    Extract,
    FeatureFile,
    Inception,
    LPIPSDistance,
)
from olvae.metrics.metric import (
    Kind,
    Metric,
    MetricSet,
    PerImage,
    mean_absolute_error,
    ms_ssim,
    psnr,
    ssim,
    ssim_uniform,
)
from olvae.pretrained_networks import (
    ALEXNET,
    DINOV2,
    INCEPTION,
    VGG16,
    MissingWeights,
    WeightsFile,
    find_weights,
    provenance,
)

_KINDS = (
    Kind("psnr", "PSNR, dB", "higher"),
    Kind("ssim", "SSIM", "higher"),
    Kind("ssim_uniform", "SSIM, uniform window", "higher"),
    Kind("ms_ssim", "MS-SSIM", "higher"),
    Kind("l1", "L1", "lower", digits=4),
    Kind("lpips", "LPIPS", "lower", VGG16),
    Kind("lpips_alex", "LPIPS Alex", "lower", ALEXNET),
    Kind("rfid", "rFID", "lower", INCEPTION),
    Kind("kid", "KID", "lower", INCEPTION, digits=5),
    Kind("fdd", "FDD", "lower", DINOV2),
)
METRICS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}

# What computes them: a function of pixels; a distance of sets, and the network for its features.
PIXELS = {
    "psnr": psnr,
    "ssim": ssim,
    "ssim_uniform": ssim_uniform,
    "ms_ssim": ms_ssim,
    "l1": mean_absolute_error,
}
SETS: dict[str, type[RFID | KID]] = {"rfid": RFID, "kid": KID, "fdd": RFID}
EXTRACTORS: dict[WeightsFile, type[Inception | DINOv2]] = {INCEPTION: Inception, DINOV2: DINOv2}

# Makes one target's metrics; all that it makes share networks, and the images' features.
MakeMetrics = Callable[[], MetricSet]
_Files = dict[WeightsFile | None, FeatureFile]  # by network


def build_metrics(
    names: Sequence[str], weights_dir: str | Path | None = None, device: str | torch.device = "cpu"
) -> MakeMetrics:
    """Prepare metrics for any number of targets on the same images.

    ``weights_dir`` is searched first. Return a function that makes the metrics of one target, in
    the order of the names; metrics without their weights are skipped, with the remedy. Use one
    function per set of images: it keeps their features. Raise ValueError if a name is unknown, or a
    file of weights holds something else.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"no metric {', '.join(unknown)}: choose from {', '.join(METRICS)}")

    # The files of weights, each once: where they are, or why they are not there.
    kinds = [METRICS[name] for name in dict.fromkeys(names)]
    paths: dict[WeightsFile, Path] = {}
    missing: dict[WeightsFile, str] = {}
    for file in dict.fromkeys(kind.needs for kind in kinds if kind.needs):
        if file is DINOV2 and not find_spec("timm"):
            missing[file] = "DINOv2 needs timm: pip install timm"
            continue
        try:
            paths[file] = find_weights(file, weights_dir)
        except MissingWeights as error:
            missing[file] = str(error)

    # The metrics that have what they need.
    skipped = {kind.name: missing[kind.needs] for kind in kinds if kind.needs in missing}
    kinds = [kind for kind in kinds if kind.name not in skipped]
    weights = {file: provenance(path, file) for file, path in paths.items()}

    # Networks, which all targets share, and by network the images' features.
    compare: dict[str, Callable[[Tensor, Tensor], Tensor]] = {**PIXELS}
    if VGG16 in paths:
        compare["lpips"] = LPIPSDistance("vgg", paths[VGG16], device)
    if ALEXNET in paths:
        compare["lpips_alex"] = LPIPSDistance("alex", paths[ALEXNET], device)
    extract: dict[WeightsFile | None, Extract] = {
        file: network(paths[file], device) for file, network in EXTRACTORS.items() if file in paths
    }
    reference: _Files = {file: FeatureFile() for file in extract}

    def make() -> MetricSet:
        metrics: dict[str, Metric] = {}
        reconstructions: _Files = {file: FeatureFile() for file in extract}
        for kind in kinds:
            file = kind.needs
            if file in extract:
                metrics[kind.name] = SETS[kind.name](
                    kind, extract[file], reference[file], reconstructions[file]
                )
            else:
                metrics[kind.name] = PerImage(kind, compare[kind.name], device)
            if file:
                metrics[kind.name].details["weights"] = weights[file]
        return MetricSet(metrics, skipped)

    return make
