"""From what a user asks for to results: targets, images, protocols, one pass for each way of making images."""

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.data.open import open_test_source
from olvae.data.source import Batch, Loader, Source
from olvae.devices import gather, this_process
from olvae.evaluation.artefacts import Artefacts, find_artefacts
from olvae.evaluation.bands import BandErrors
from olvae.evaluation.gallery import Gallery
from olvae.evaluation.protocol import Protocol
from olvae.evaluation.results import EQUAL, Evaluation, Result
from olvae.evaluation.roundtrip import AutoencoderRoundTrip, Cost, RoundTrip, bicubic_round_trip
from olvae.evaluation.statistics import confidence, mean, pooled_psnr
from olvae.metrics.metric import Metric, Unavailable
from olvae.metrics.registry import METRICS, MakeMetrics, build_metrics
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.targets import Target

__all__ = ["DEFAULT_METRICS", "UNTRAINED", "Assessment", "Images", "MetricSet", "Request", "assess", "evaluate"]


class Images:
    """Which images they were: a digest of the pixels by key, and one of all that depends on no order."""

    def __init__(self) -> None:
        self.digests: dict[str, bytes] = {}

    def add(self, keys: Sequence[str], x: Tensor) -> None:
        for key, image in zip(keys, x, strict=True):
            self.digests[key] = hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes()).digest()

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(sorted(self.digests.values()))).hexdigest()


UNTRAINED = "untrained"
"""A baseline's name, which no target may have."""

LPIPS_SIZE = 32
"""Below this, images are too small for LPIPS, and the gallery is ranked by PSNR."""

DEFAULT_METRICS = tuple(name for name in METRICS if name != "ssim_uniform")


@dataclass(frozen=True)
class Request:
    """What to evaluate, on what, how.

    Args:
        targets: with names apart.
        protocols: each gives a table; those that make images alike share a pass.
        metrics: names, in the order of the table.
        data: a SRC; by default the test images of the first target's config.
        size: of the images; by default the config's, else the protocol's.
        images: only the first so many.
        batch_size: by default the config's, else 8.
        weights_dir: of pretrained networks.
        device: as torch names it.
        baselines: add the first target untrained, and bicubic by its factor.
        artefacts: reconstruct test patterns as well, for the report.
    """

    targets: Sequence[Target]
    protocols: Sequence[Protocol]
    metrics: Sequence[str] = DEFAULT_METRICS
    data: str | None = None
    size: int | None = None
    images: int | None = None
    batch_size: int | None = None
    weights_dir: Path | None = None
    device: str = "cpu"
    baselines: bool = False
    artefacts: bool = True

    @property
    def config(self) -> Config:
        return self.targets[0].config


@dataclass
class Assessment:
    """One pass: the evaluations of its protocols, and what the report shows of each contender."""

    evaluations: list[Evaluation]
    galleries: dict[str, Gallery] = field(default_factory=dict)
    bands: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    artefacts: dict[str, Artefacts] = field(default_factory=dict)
    ranked_by: str = "psnr"


def assess(request: Request) -> list[Assessment] | None:
    """Evaluate; None in every process but the first.

    Raises:
        ConfigError: the request does not fit together.
        FileNotFoundError, ValueError: images or weights are not to be had.
    """
    models = {target.name: target.load() for target in request.targets}
    groups: dict[tuple[str, str], list[Protocol]] = {}
    for protocol in request.protocols:
        groups.setdefault((protocol.resize, protocol.resample), []).append(protocol)
    done = [_pass(request, protocols, models) for protocols in groups.values()]
    return [assessment for assessment in done if assessment is not None] or None


def _pass(request: Request, protocols: Sequence[Protocol], models: Mapping[str, Autoencoder]) -> Assessment | None:
    first = next(iter(models.values()))
    try:
        source = open_test_source(request.config, request.data, request.size, first.in_channels)
    except FileNotFoundError as error:
        if request.data is not None:
            raise
        raise FileNotFoundError(f"{error}; the config takes its images there: --data SRC names others") from error
    protocols = [_complete(protocol, source) for protocol in protocols]
    source.eval_transform = protocols[0].transform
    if request.images is not None:
        source.limit(request.images)
    _check(models, source.size)
    batch_size = request.batch_size or (request.config.get("data") or {}).get("params", {}).get("batch_size") or 8
    loader = source.test_loader(batch_size)

    # Metrics under all the names that the protocols have for them; contenders for each way to draw a latent.
    variants = [protocol.columns.get(name, name) for protocol in protocols for name in request.metrics]
    make, skipped = build_metrics(variants, request.weights_dir, request.device)
    seeds = list(dict.fromkeys(_seed(protocol) for protocol in protocols))
    contenders = _contenders(request, models, seeds)

    # The pass. The gallery and the bands are of the first way alone.
    shown = [name for name, seed in contenders if seed in (seeds[0], NONE)]
    rankings = ("lpips", "psnr") if source.size >= LPIPS_SIZE and first.in_channels == 3 else ("psnr",)
    ranked_by = next((name for name in rankings if name in variants and name not in skipped), None)
    galleries = {name: Gallery(METRICS[ranked_by].better) for name in shown} if ranked_by else {}
    bands = {name: BandErrors() for name in shown}
    labels = {f"{name}\0{seed}": (name, seed) for name, seed in contenders}

    def watch(label: str, keys: Sequence[str], x: Tensor, y: Tensor, tally: MetricSet) -> None:
        name, seed = labels[label]
        if seed not in (seeds[0], NONE):
            return
        if ranked_by in tally.metrics and name in galleries:
            values = tally.metrics[ranked_by].state()
            galleries[name].add(keys, [values[key] for key in keys], x, y)
        if name in bands:
            try:
                bands[name].add(keys, x, y)
            except Unavailable:
                del bands[name]

    with _progress(loader, source.val_images) as batches:
        found = evaluate({label: contenders[place] for label, place in labels.items()}, batches, make, watch)
    if this_process()[1] > 1:
        loader.read_errors.share()
    unreadable = gather((source.unreadable.reasons, source.unreadable.images, loader.enlarged))
    shows = gather(({n: g.state() for n, g in galleries.items()}, {n: b.state() for n, b in bands.items()}))
    if found is None or unreadable is None or shows is None:
        return None
    for gallery_states, band_states in shows:
        for name, state in gallery_states.items():
            galleries[name].merge(state)
        for name, state in band_states.items():
            if name in bands:
                bands[name].merge(state)

    images, tallies = found
    n = len(images.digests)
    about = _about(request, source, images, unreadable)
    costs = _costs(contenders, models, seeds[0], source.size)
    patterns: dict[str, Artefacts] = {}
    if request.artefacts:
        patterns = {
            name: find_artefacts(model, source.size, request.device, batch_size) for name, model in models.items()
        }
    computed = {name: errors.compute() for name, errors in bands.items()}
    extras: dict[str, dict[str, Any]] = {name: {"bands": errors} for name, errors in computed.items()}
    for name, artefacts in patterns.items():
        extras.setdefault(name, {})["test_patterns"] = artefacts.as_dict()

    evaluations = []
    for protocol in protocols:
        chosen = {labels[label][0]: t for label, t in tallies.items() if labels[label][1] in (_seed(protocol), NONE)}
        rows = results(chosen, protocol, request.metrics, skipped, n)
        statistic = pooled_psnr if protocol.psnr == "pooled" else mean
        intervals = {row.target: _intervals(row, statistic) for row in rows}
        evaluations.append(Evaluation(replace(protocol, n=n), about, rows, costs, intervals, extras))
    return Assessment(evaluations, galleries, computed, patterns, ranked_by or "psnr")


NONE = -1
"""In the place of a seed: a baseline, which draws nothing."""


def _seed(protocol: Protocol) -> int | None:
    return protocol.seed if protocol.posterior == "sample" else None


def _complete(protocol: Protocol, source: Source) -> Protocol:
    return replace(protocol, size=source.size, crops=source.crops)


def _check(models: Mapping[str, Autoencoder], size: int) -> None:
    channels = {model.in_channels for model in models.values()}
    if len(channels) > 1:
        counts = " and ".join(map(str, sorted(channels)))
        raise ConfigError(f"the targets take images of {counts} channels, which have no images in common")
    for name, model in models.items():
        if size % model.downscale:
            f = model.downscale
            raise ConfigError(
                f"{name}: its latent stands for {f}x{f} pixels each, and {size} is no multiple of that: add --size "
                f"{max(f, size // f * f)}"
            )


def _contenders(
    request: Request, models: Mapping[str, Autoencoder], seeds: Sequence[int | None]
) -> dict[tuple[str, int | None], RoundTrip]:
    found: dict[tuple[str, int | None], RoundTrip] = {}
    for seed in seeds:
        for name, model in models.items():
            found[name, seed] = AutoencoderRoundTrip(model, request.device, seed, name)
    if request.baselines:
        untrained = request.targets[0].untrained()
        factor = untrained.downscale
        found[f"bicubic, {factor}x smaller and back", NONE] = bicubic_round_trip(factor)
        found[UNTRAINED, NONE] = AutoencoderRoundTrip(untrained, request.device, name=UNTRAINED)
    return found


def _costs(
    contenders: Mapping[tuple[str, int | None], RoundTrip],
    models: Mapping[str, Autoencoder],
    seed: int | None,
    size: int,
) -> dict[str, Cost]:
    costs = {}
    for name, model in models.items():
        reconstruct = contenders[name, seed]
        assert isinstance(reconstruct, AutoencoderRoundTrip)
        costs[name] = reconstruct.meter.cost(model, size)
    return costs


def _about(request: Request, source: Source, images: Images, parts: Sequence[tuple[Any, Any, int]]) -> dict[str, Any]:
    reasons = {name: reason for part, _, _ in parts for name, reason in part.items()}
    lost = {place for _, places, _ in parts for place in places}
    return {
        "source": request.data or (request.config.get("data") or {}).get("target", type(source).__name__),
        "n": len(images.digests),
        "sha256": images.fingerprint(),
        "unreadable": len(lost),
        "unreadable_files": reasons,
        "enlarged": sum(enlarged for _, _, enlarged in parts),
    }


def _intervals(row: Result, statistic: Any) -> dict[str, tuple[float, float]]:
    found = {}
    for name, values in row.per_image.items():
        if name in row.metrics:
            ends = confidence(values, statistic=statistic if name == "psnr" else mean)
            if ends is not None:
                found[name] = ends
    return found


@contextmanager
def _progress(loader: Loader, count: int | None) -> Iterator[Iterator[Batch]]:
    """The loader's batches under a bar, on a terminal and in the first process."""
    rank, world = this_process()
    console = Console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=rank > 0 or not sys.stderr.isatty()) as bar:
        task = bar.add_task("images", total=count)

        def batches() -> Iterator[Batch]:
            for batch in loader:
                yield batch
                bar.advance(task, len(batch["image"]) * world)

        yield batches()


class MetricSet:
    """What is known of one contender: its metrics, and why some of them are not to be had.

    Args:
        metrics: fresh ones, by the names of their variants.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = dict(metrics)
        self.skipped: dict[str, str] = {}

    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        for name, metric in list(self.metrics.items()):
            try:
                metric.update(keys, x, y)
            except Unavailable as reason:
                self._drop(name, reason)

    def state(self) -> Any:
        return {name: metric.state() for name, metric in self.metrics.items()}, self.skipped

    def merge(self, state: Any) -> None:
        states, skipped = state
        for name, reason in skipped.items():
            self._drop(name, reason)
        for name, part in states.items():
            if name in self.metrics:
                self.metrics[name].merge(part)

    def _drop(self, name: str, reason: object) -> None:
        self.metrics.pop(name, None)
        self.skipped[name] = str(reason)


def evaluate(
    contenders: Mapping[str, RoundTrip],
    batches: Iterable[Batch],
    make: MakeMetrics,
    watch: Callable[[str, Sequence[str], Tensor, Tensor, MetricSet], None] | None = None,
) -> tuple[Images, dict[str, MetricSet]] | None:
    """Compare images with their reconstructions, for several contenders in one pass, on one or many processes.

    Args:
        contenders: names to functions that reconstruct.
        batches: of this process's share of the test images; each image has a key of its own.
        make: makes the metrics of a contender.
        watch: called after each batch of each contender with its name, keys, images, reconstructions and tally.

    Returns:
        What was seen, and each contender's tally, in the first process; None in the others.

    Raises:
        ValueError: there are no images.
    """
    images = Images()
    tallies = {name: MetricSet(make()) for name in contenders}
    for batch in batches:
        keys, x = batch["key"], batch["image"]
        images.add(keys, x)
        for name, reconstruct in contenders.items():
            y = reconstruct(keys, x)
            tallies[name].update(keys, x, y)
            if watch is not None:
                watch(name, keys, x, y, tallies[name])
    parts = gather((images.digests, {name: tally.state() for name, tally in tallies.items()}))
    if parts is None:
        return None
    for digests, states in parts:
        images.digests.update(digests)
        for name, state in states.items():
            tallies[name].merge(state)
    if not images.digests:
        raise ValueError("the test set has no images that can be read")
    return images, tallies


def results(
    tallies: Mapping[str, MetricSet], protocol: Protocol, names: Sequence[str], skipped: Mapping[str, str], n: int
) -> list[Result]:
    """Each contender's numbers under a protocol.

    Args:
        names: of metrics, in the order of the table.
        skipped: metrics that could not be made, by the names of their variants, with the reason.
        n: how many images there were.
    """
    found = []
    for target, tally in tallies.items():
        result = Result(target, n, {}, {})
        for name in names:
            variant = protocol.columns.get(name, name)
            metric = tally.metrics.get(variant)
            if metric is None:
                result.skipped[name] = tally.skipped.get(variant) or skipped[variant]
                continue
            try:
                value, values = metric.compute(), metric.per_image()
            except Unavailable as reason:
                result.skipped[name] = str(reason)
                continue
            if name == "psnr" and protocol.psnr == "pooled":
                assert values is not None
                value = float(pooled_psnr(np.array(list(values.values()))))
            if math.isinf(value):
                result.skipped[name] = EQUAL
            elif math.isnan(value):
                result.skipped[name] = "not a number"
            else:
                result.metrics[name] = value
                result.details[name] = metric.details()
            if values is not None:
                result.per_image[name] = values
        found.append(result)
    return found
