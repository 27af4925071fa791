"""``evaluate``: from a request (targets, images, protocols) to results."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from olvae.config import Config, ConfigError
from olvae.data.opening import open_test_source
from olvae.data.source import Batch, Source
from olvae.devices import gather, this_process
from olvae.evaluation.artefacts import Artefacts, Watched, find_artefacts, pattern_size
from olvae.evaluation.bands import BandErrors
from olvae.evaluation.cross import Crossed, LatentErrors, crossed
from olvae.evaluation.gallery import Gallery
from olvae.evaluation.precision import (
    FULL,
    Activations,
    InPrecision,
    PrecisionRoundTrip,
    in_precisions,
    judged,
    parse_precisions,
)
from olvae.evaluation.protocol import Protocol
from olvae.evaluation.results import Results, Row
from olvae.evaluation.roundtrip import AutoencoderRoundTrip, Cost, RoundTrip, bicubic_round_trip
from olvae.evaluation.statistics import confidence, difference, mean, pooled_psnr
from olvae.metrics.metric import MetricSet, Unavailable
from olvae.metrics.registry import METRICS, build_metrics
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.targets import Target

__all__ = [
    "DEFAULT_METRICS",
    "UNTRAINED",
    "Evaluated",
    "Observer",
    "Request",
    "evaluate",
    "fingerprint",
    "measure",
    "observe",
    "rows_under",
]

DEFAULT_METRICS = tuple(name for name in METRICS if name != "ssim_uniform")

UNTRAINED = "untrained"
"""A baseline's name, which no target may have."""

RANKED_BY_LPIPS = 32
"""From this many pixels a side on, galleries are ranked by LPIPS; below, by PSNR."""

T = TypeVar("T")

Key = tuple[str, int | None]
"""A target's name, and the seed of its samples: None for the posterior's mode, and for baselines."""


@dataclass(frozen=True)
class Request:
    """What to evaluate, on which images, and how.

    Args:
        targets: with distinct names.
        protocols: each gives results of its own; those that prepare images alike share a pass.
        metrics: names, in the order of the table.
        data: a SRC; by default the test images of the first target's config.
        size: of the images; by default the config's, otherwise the protocol's.
        images: use only the first N.
        batch_size: by default the config's, otherwise 8.
        weights_dir: a folder of pretrained networks, searched first.
        device: in torch's notation.
        baselines: add bicubic by the first target's factor, and the first target untrained.
        test_patterns: reconstruct test patterns as well.
        cross: of the two targets, teacher and student, also evaluate each encoder with the other's decoder, and compare
            the student's latents with the teacher's.
        precisions: 32 first, then fp16, bf16: :func:`~olvae.evaluation.precision.parse_precisions`. With several, each
            target has a row for each, and activations are measured.

    Raises:
        ConfigError: the parts do not fit together.
    """

    targets: Sequence[Target]
    protocols: Sequence[Protocol] = (Protocol(),)
    metrics: Sequence[str] = DEFAULT_METRICS
    data: str | None = None
    size: int | None = None
    images: int | None = None
    batch_size: int | None = None
    weights_dir: Path | None = None
    device: str = "cpu"
    baselines: bool = False
    test_patterns: bool = True
    cross: bool = False
    precisions: Sequence[str] = (FULL,)

    def __post_init__(self) -> None:
        if self.cross and len(self.targets) != 2:
            raise ConfigError(f"--cross takes two targets, TEACHER STUDENT, and got {len(self.targets)}")
        if tuple(self.precisions) != parse_precisions(",".join(self.precisions)):
            raise ConfigError(f"precisions {', '.join(self.precisions)}: {FULL} comes first, and each once")
        if self.cross and len(self.precisions) > 1:
            raise ConfigError("--cross and --precision are two evaluations: leave one of them out")
        if len(self.precisions) > 1 and "psnr" not in self.metrics:
            raise ConfigError("--precision is judged by PSNR: add psnr to --metrics")

    @property
    def config(self) -> Config:
        return self.targets[0].config


@dataclass(frozen=True)
class Evaluated:
    """The results under one protocol, and what the page shows besides, by target: galleries and test patterns.

    Protocols of one pass share the pictures. Galleries are ranked by the metric ``ranked_by``.
    """

    results: Results
    galleries: Mapping[str, Gallery]
    ranked_by: str
    test_patterns: Mapping[str, Artefacts]


def evaluate(
    request: Request,
    watched: Watched = lambda batches, _: batches,
    watched_patterns: Watched = lambda batches, _: batches,
) -> list[Evaluated] | None:
    """Evaluate targets on the same images, in one process or in all that :func:`olvae.devices.join` found.

    Args:
        watched: wraps the batches of a pass, to show progress.
        watched_patterns: wraps the batches of each target's test patterns, in the first process.

    Returns:
        One result per protocol, in the first process; None in the others.

    Raises:
        ConfigError: the request's parts do not fit together.
        FileNotFoundError, ValueError: images or weights are missing or unreadable.
    """
    models: dict[str, Autoencoder] = {target.name: target.load() for target in request.targets}
    if request.cross:
        models = crossed(models)
    elif len(request.precisions) > 1:
        models = in_precisions(models, request.precisions)
    passes: dict[tuple[str, str], list[Protocol]] = {}
    for protocol in request.protocols:
        passes.setdefault((protocol.resize, protocol.resample), []).append(protocol)
    done = [_one_pass(request, protocols, models, watched, watched_patterns) for protocols in passes.values()]
    return [evaluated for part in done if part is not None for evaluated in part] or None


def _one_pass(
    request: Request,
    protocols: Sequence[Protocol],
    models: Mapping[str, Autoencoder],
    watched: Watched,
    watched_patterns: Watched,
) -> list[Evaluated] | None:
    """Results under protocols that prepare images alike; None in every process but the first."""
    # The images.
    source = _source(request, next(iter(models.values())).in_channels)
    protocols = [replace(protocol, size=source.size, crops=source.crops) for protocol in protocols]
    source.eval_transform = protocols[0].transform
    if request.images is not None:
        source.limit(request.images)
    _check(models, source.size)
    batch_size = request.batch_size or (request.config.get("data") or {}).get("params", {}).get("batch_size") or 8
    loader = source.test_loader(batch_size)

    # Metrics in all the variants that the protocols use; round trips for all their ways to draw a latent.
    variants = [protocol.columns.get(name, name) for protocol in protocols for name in request.metrics]
    make, missing = build_metrics(variants, request.weights_dir, request.device)
    seeds = list(dict.fromkeys(map(_seed, protocols)))
    trips = _round_trips(request, models, seeds)
    names = list(dict.fromkeys(name for name, _ in trips))

    # One pass over the images. Galleries and bands are those of the first protocol.
    lpips = source.size >= RANKED_BY_LPIPS and source.channels == 3
    rankings = [n for n in ("lpips", "psnr") if n in variants and n not in missing and (lpips or n != "lpips")]
    ranked_by = rankings[0] if rankings else None
    shown = {_key(trips, name, seeds[0]) for name in names}
    observers = {key: Observer(make(), key in shown, ranked_by if key[0] != UNTRAINED else None) for key in trips}
    for key, trip in trips.items():
        if isinstance(trip, PrecisionRoundTrip):
            observers[key].activations = trip.activations
    if request.cross:
        teacher, student = (target.name for target in request.targets)
        errors = observers[student, seeds[0]].latents = LatentErrors(teacher)
        for name, take in ((teacher, errors.teacher), (student, errors.student)):
            trip = trips[name, seeds[0]]
            assert isinstance(trip, AutoencoderRoundTrip)
            trip.on_latents = take
    digests = observe(trips, observers, watched(loader, source.val_images))
    if this_process()[1] > 1:
        loader.read_errors.share()
    parts = gather((source.unreadable.reasons, source.unreadable.images, loader.enlarged))
    if digests is None or parts is None:
        return None

    # The numbers: for every way to draw a latent, then for every protocol.
    n = len(digests)
    costs: dict[str, Cost] = {}
    patterns: dict[str, Artefacts] = {}
    side = pattern_size((model.downscale for model in models.values()), source.size)
    for name, model in models.items():
        trip = trips[name, seeds[0]]
        assert isinstance(trip, AutoencoderRoundTrip)
        costs[name] = trip.cost(source.size)
        if isinstance(model, Crossed):
            encoder, decoder = (_of(half, models, costs) for half in (model.encoder_of, model.decoder_of))
            costs[name] = replace(
                costs[name],
                parameters=model.used_parameters(),
                encode_images_per_s=encoder.encode_images_per_s,  # the same half has one speed in all rows
                decode_images_per_s=decoder.decode_images_per_s,
            )
        if request.test_patterns and not (isinstance(model, InPrecision) and model.precision != FULL):
            patterns[name] = find_artefacts(model, side, request.device, batch_size, watched_patterns)
    bands = {name: observer.bands.compute() for (name, _), observer in observers.items() if observer.bands}
    latents = {name: observer.latents.compute() for (name, _), observer in observers.items() if observer.latents}
    precisions = {name: model.precision for name, model in models.items() if isinstance(model, InPrecision)}
    measured = {
        (name, seed): replace(
            measure(name, observer.metrics, n),
            cost=costs.get(name),
            bands=bands.get(name),
            test_patterns=patterns[name].as_dict() if name in patterns else None,
            latents=latents.get(name),
            precision=observer.activations.compute(precisions[name]) if observer.activations else None,
            baseline=name not in models,
        )
        for (name, seed), observer in observers.items()
    }
    about = {
        "source": request.data or (request.config.get("data") or {}).get("target", type(source).__name__),
        "n": n,
        "sha256": fingerprint(digests),
        "unreadable": len({place for _, places, _ in parts for place in places}),
        "unreadable_files": {name: reason for reasons, _, _ in parts for name, reason in reasons.items()},
        "enlarged": sum(enlarged for _, _, enlarged in parts),
    }
    galleries = {name: observer.gallery for (name, _), observer in observers.items() if observer.gallery}
    evaluated = []
    for protocol in protocols:
        keys = [_key(measured, name, _seed(protocol)) for name in names]
        complete = replace(protocol, n=n)
        rows = _judged(rows_under(complete, [measured[key] for key in keys], request.metrics))
        results = Results(complete.as_dict(), complete.hash(), about, rows)
        evaluated.append(Evaluated(results, galleries, ranked_by or "psnr", patterns))
    return evaluated


def _of(model: Autoencoder, models: Mapping[str, Autoencoder], costs: Mapping[str, Cost]) -> Cost:
    return next(costs[name] for name, other in models.items() if other is model)


def _source(request: Request, channels: int) -> Source:
    try:
        return open_test_source(request.config, request.data, request.size, channels)
    except FileNotFoundError as error:
        if request.data is not None:
            raise
        raise FileNotFoundError(f"{error}; the config takes its images there: --data SRC names others") from error


def _check(models: Mapping[str, Autoencoder], size: int) -> None:
    channels = {model.in_channels for model in models.values()}
    if len(channels) > 1:
        counts = " and ".join(map(str, sorted(channels)))
        raise ConfigError(f"the targets take images of {counts} channels: evaluate them separately")
    for name, model in models.items():
        if size % model.downscale:
            f = model.downscale
            raise ConfigError(
                f"{name}: a latent position stands for {f}x{f} pixels, and {size} is not a multiple of {f}: add --size "
                f"{max(f, size // f * f)}"
            )


def _seed(protocol: Protocol) -> int | None:
    return protocol.seed if protocol.posterior == "sample" else None


def _key(known: Mapping[Key, Any], name: str, seed: int | None) -> Key:
    """A target's key for a seed; a baseline draws nothing, and has one key for all."""
    return (name, seed) if (name, seed) in known else (name, None)


def _round_trips(
    request: Request, models: Mapping[str, Autoencoder], seeds: Sequence[int | None]
) -> dict[Key, RoundTrip]:
    found: dict[Key, RoundTrip] = {}
    for seed in seeds:
        for name, model in models.items():
            if isinstance(model, InPrecision):
                found[name, seed] = PrecisionRoundTrip(model, request.device, seed, name)
            else:
                found[name, seed] = AutoencoderRoundTrip(model, request.device, seed, name)
    if request.baselines:
        untrained = request.targets[0].untrained()
        factor = untrained.downscale
        found[f"bicubic, {factor}x smaller and back", None] = bicubic_round_trip(factor)
        found[UNTRAINED, None] = AutoencoderRoundTrip(untrained, request.device, name=UNTRAINED)
    return found


class Observer:
    """What is kept of one target's reconstructions: metrics, and for the page the error per band and a gallery.

    The gallery is ranked by a metric of single images, if ``ranked_by`` names one. Its round trip fills ``latents`` and
    ``activations``, where there are any.
    """

    def __init__(self, metrics: MetricSet, shown: bool = False, ranked_by: str | None = None) -> None:
        self.metrics = metrics
        self.bands = BandErrors() if shown else None
        self.gallery = Gallery(METRICS[ranked_by].better) if shown and ranked_by else None
        self.latents: LatentErrors | None = None
        self.activations: Activations | None = None
        self._ranked_by = ranked_by or ""

    def update(self, keys: Sequence[str], x: Tensor, y: Tensor) -> None:
        self.metrics.update(keys, x, y)
        if self.gallery is not None and self._ranked_by in self.metrics.metrics:
            values = self.metrics.metrics[self._ranked_by].state()
            self.gallery.add(keys, [values[key] for key in keys], x, y)
        if self.bands is not None:
            try:
                self.bands.add(keys, x, y)
            except Unavailable:
                self.bands = None

    def state(self) -> Any:
        return self.metrics.state(), self.gallery, self.bands, self.latents, self.activations

    def merge(self, state: Any) -> None:
        metrics, gallery, bands, latents, activations = state
        self.metrics.merge(metrics)
        if self.latents is not None:
            self.latents.merge(latents)
        if self.activations is not None:
            self.activations.merge(activations)
        if self.gallery is not None:
            self.gallery.merge(gallery)
        if bands is None:
            self.bands = None
        elif self.bands is not None:
            self.bands.merge(bands)


def observe(
    trips: Mapping[Key, RoundTrip], observers: Mapping[Key, Observer], batches: Iterable[Batch]
) -> dict[str, bytes] | None:
    """Reconstruct every image with every target, and let the observers see both. One pass, in one or many processes.

    Args:
        trips: what reconstructs, by key.
        observers: by the same keys; in the first process they hold the observations of all in the end.
        batches: this process's share of the test images, which have unique keys.

    Returns:
        A digest of each image's pixels by key, in the first process; None in the others.

    Raises:
        ValueError: there are no images.
    """
    digests: dict[str, bytes] = {}
    for batch in batches:
        keys, x = batch["key"], batch["image"]
        for key, image in zip(keys, x, strict=True):
            digests[key] = hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes()).digest()
        for name, reconstruct in trips.items():
            observers[name].update(keys, x, reconstruct(keys, x))
    parts = gather((digests, {name: observer.state() for name, observer in observers.items()}))
    if parts is None:
        return None
    for part, states in parts:
        digests.update(part)
        for name, state in states.items():
            observers[name].merge(state)
    if not digests:
        raise ValueError("the test set has no images that can be read")
    return digests


def fingerprint(digests: Mapping[str, bytes]) -> str:
    """One digest of a set of images, whatever their order."""
    return hashlib.sha256(b"".join(sorted(digests.values()))).hexdigest()


def measure(target: str, metrics: MetricSet, n: int) -> Row:
    """A target's values of all variants of the metrics, from ``n`` images."""
    values = metrics.compute()
    return Row(
        target,
        n,
        values,
        metrics.skipped,
        details={name: metrics.metrics[name].details() for name in values},
        per_image={name: found for name in values if (found := metrics.metrics[name].per_image()) is not None},
    )


def rows_under(protocol: Protocol, measured: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Rows under a protocol: of each metric its variant, intervals, and differences from the first row.

    Args:
        measured: rows of all variants: :func:`measure`.
        names: of metrics, in the order of the table.
    """
    columns = {name: protocol.columns.get(name, name) for name in names}
    rows: list[Row] = []
    for row in measured:
        metrics, per_image = _renamed(row.metrics, columns), _renamed(row.per_image, columns)
        if protocol.psnr == "pooled" and "psnr" in metrics:
            metrics["psnr"] = float(pooled_psnr(np.array(list(per_image["psnr"].values()))))
        intervals, differences = {}, {}
        for name, values in per_image.items():
            statistic = pooled_psnr if name == "psnr" and protocol.psnr == "pooled" else mean
            if ends := confidence(values, statistic=statistic):
                intervals[name] = ends
            if rows and name in rows[0].per_image:
                found = difference(values, rows[0].per_image[name], statistic=statistic)
                if found is not None:
                    differences[name] = found
        rows.append(
            replace(
                row,
                metrics=metrics,
                skipped=_renamed(row.skipped, columns),
                intervals=intervals,
                details=_renamed(row.details, columns),
                per_image=per_image,
                differences=differences,
            )
        )
    return rows


def _judged(rows: Sequence[Row]) -> list[Row]:
    """Rows with the verdict on their precisions; each follows its target's row in float32."""
    full, found = math.inf, []
    for row in rows:
        if row.precision is not None:
            full = row.metrics["psnr"] if row.precision.dtype == FULL else full
            row = replace(row, precision=judged(row.precision, row.metrics["psnr"], full))
        found.append(row)
    return found


def _renamed(values: Mapping[str, T], columns: Mapping[str, str]) -> dict[str, T]:
    """Values of metrics under the names of their columns, in the order of the table."""
    return {name: values[variant] for name, variant in columns.items() if variant in values}
