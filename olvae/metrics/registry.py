"""All metrics by name, and how they are made."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from olvae.metrics.inception import Features, Inception, PairFeatures
from olvae.metrics.lpips import LPIPSDistance
from olvae.metrics.metric import Kind, Metric, PerImage
from olvae.metrics.pixel import l1, psnr
from olvae.metrics.rfid import KID, RFID
from olvae.metrics.ssim import ms_ssim, ssim, ssim_uniform
from olvae.modules.lpips import TRUNKS, Trunk
from olvae.weights import ALEXNET, INCEPTION, VGG16, MissingWeights, WeightsFile, find_weights, provenance

__all__ = ["METRICS", "MakeMetrics", "build_metrics"]

METRICS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("psnr", "PSNR, dB", "higher"),
        Kind("ssim", "SSIM", "higher"),
        Kind("ssim_uniform", "SSIM, uniform window", "higher"),
        Kind("ms_ssim", "MS-SSIM", "higher"),
        Kind("l1", "L1", "lower", digits=4),
        Kind("lpips", "LPIPS", "lower", VGG16),
        Kind("lpips_alex", "LPIPS Alex", "lower", ALEXNET),
        Kind("rfid", "rFID", "lower", INCEPTION),
        Kind("kid", "KID", "lower", INCEPTION, digits=5),
    )
}

MakeMetrics = Callable[[], dict[str, Metric]]
"""Fresh metrics by name, for one contender. Networks, and features of the images, are shared by all that it makes."""

PIXELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "psnr": psnr,
    "ssim": ssim,
    "ssim_uniform": ssim_uniform,
    "ms_ssim": ms_ssim,
    "l1": l1,
}
LPIPS_TRUNKS: dict[str, Trunk] = {"lpips": "vgg", "lpips_alex": "alex"}
SETS = {"rfid": RFID, "kid": KID}


def build_metrics(
    names: Sequence[str], weights_dir: str | Path | None = None, device: str | torch.device = "cpu"
) -> tuple[MakeMetrics, dict[str, str]]:
    """The metrics of those names, for any number of contenders on the same images.

    Args:
        names: of :data:`METRICS`.
        weights_dir: a folder of pretrained weights, looked into first: :func:`find_weights`.
        device: where they are computed, in float32.

    Returns:
        What makes the metrics of a contender, in the order of the names, and for those whose weights are missing
        the reason and the remedy, by name. One such maker is for one set of images: it keeps their features by key.

    Raises:
        ValueError: a name is unknown, or a file of weights holds something else.
        NotADirectoryError: ``weights_dir`` is no folder.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"no metric {', '.join(unknown)}: choose from {', '.join(METRICS)}")
    paths, skipped = _find([METRICS[name] for name in names], weights_dir)
    names = [name for name in names if name not in skipped]
    weights = {file: provenance(path, file) for file, path in paths.items()}
    distances = {
        name: LPIPSDistance(trunk, paths[TRUNKS[trunk]], device)
        for name, trunk in LPIPS_TRUNKS.items()
        if name in names
    }
    inception = Inception(paths[INCEPTION], device) if INCEPTION in paths else None
    reference: dict[str, Features] = {}

    def make() -> dict[str, Metric]:
        features = PairFeatures(inception, reference) if inception else None
        return {name: one(METRICS[name], features) for name in names}

    def one(kind: Kind, features: PairFeatures | None) -> Metric:
        details = {"weights": weights[kind.needs]} if kind.needs else {}
        if kind.name in SETS:
            assert features is not None
            return SETS[kind.name](kind, features, details)
        compare = PIXELS[kind.name] if kind.name in PIXELS else distances[kind.name]
        return PerImage(kind, compare, device, details)

    return make, skipped


def _find(kinds: Sequence[Kind], weights_dir: str | Path | None) -> tuple[Mapping[WeightsFile, Path], dict[str, str]]:
    """The files that there are, and the names of the metrics that lack one, with the reason."""
    paths: dict[WeightsFile, Path] = {}
    missing: dict[WeightsFile, str] = {}
    for file in dict.fromkeys(kind.needs for kind in kinds if kind.needs):
        try:
            paths[file] = find_weights(file, weights_dir)
        except MissingWeights as error:
            missing[file] = str(error)
    return paths, {kind.name: missing[kind.needs] for kind in kinds if kind.needs in missing}
