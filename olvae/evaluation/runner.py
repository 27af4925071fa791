"""Evaluate a request (targets, images, protocols) in one pass over the images."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from olvae.checkpoint import tensors_sum
from olvae.config import ConfigError
from olvae.config.reading import place_of
from olvae.data.opening import trains_on
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides, Size
from olvae.data.source import Batch, Loader, Source
from olvae.devices import gather, this_process
from olvae.evaluation.observers.observer import Observation, Observer, Subject
from olvae.evaluation.protocol import Protocol, RoundTrip, open_images_for
from olvae.evaluation.results import FIXED, Evaluated, Results, Row, confidence, difference
from olvae.files import first_line, warn_once
from olvae.metrics import METRICS, build_metrics
from olvae.metrics.metric import MetricSet
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.loader import Target
from olvae.runs import entry_of

DEFAULT_METRICS = tuple(name for name in METRICS if name not in ("ssim_uniform", "fdd"))

T = TypeVar("T")

Key = tuple[str, int]  # a subject's name, and the way to draw latents; baselines have only 0

Progress = Callable[[str, Iterable[Batch], int | None], Iterable[Batch]]
"""Shows progress under a description: wraps batches, with the number of images over all processes if it is known."""

log = logging.getLogger("olvae")


@dataclass(frozen=True)
class Request:
    """What to evaluate, on which images, and how; ConfigError if the parts do not fit together."""

    targets: Sequence[Target]  # with distinct names
    protocols: Sequence[Protocol] = (
        Protocol(),
    )  # each gives results; those that prepare images alike share a pass
    metrics: Sequence[str] = DEFAULT_METRICS  # names
    data: str | None = None  # a SRC; by default the test images of the first target's config
    size: Size | None = None  # of the images; by default the config's, otherwise the protocol's
    images: int | None = None  # use only the first N
    batch_size: int | None = None  # by default the config's, otherwise 8
    weights_dir: Path | None = None  # a folder of pretrained networks, searched first
    device: str = "cpu"  # in torch's notation
    observers: Sequence[Observer] = ()  # in the order of the page

    def __post_init__(self) -> None:
        targets = [target.name for target in self.targets]
        lines = [
            line
            for o in self.observers
            for line in o.conflicts(targets, self.metrics, self.observers)
        ]
        names = [observer.name for observer in self.observers if observer.name]
        lines += [
            f"`observe`: two entries of metrics.json would be called {name}"
            for name in dict.fromkeys(names)
            if name in FIXED or names.count(name) > 1
        ]
        if lines:
            raise ConfigError(*lines)


def evaluate(
    request: Request, progress: Progress = lambda _, batches, __: batches
) -> list[Evaluated] | None:
    """Evaluate targets on the same images, in one process or in all that :func:`olvae.devices.join` found.

    Returns one result per protocol in the first process, None in the others. Raises FileNotFoundError or ValueError if
    images or weights are missing, unreadable, or do not fit the targets.
    """
    observers = copy.deepcopy(list(request.observers))
    subjects = {target.name: Subject(target.load()) for target in request.targets}
    for observer in observers:
        subjects = observer.derive(subjects)
    passes: dict[tuple[Sides, str, str], list[Protocol]] = {}
    for protocol in request.protocols:
        passes.setdefault((Sides.of(protocol.size), protocol.resize, protocol.resample), []).append(
            protocol
        )
    done = [
        _one_pass(request, protocols, subjects, observers, progress)
        for protocols in passes.values()
    ]
    return [evaluated for part in done for evaluated in part] or None


def _one_pass(
    request: Request,
    protocols: Sequence[Protocol],
    subjects: Mapping[str, Subject],
    observers: Sequence[Observer],
    progress: Progress,
) -> list[Evaluated]:
    """Results under protocols that prepare images alike; none in every process but the first."""
    source = _open(
        request, protocols[0], {name: subject.model for name, subject in subjects.items()}
    )
    pixels = source.pixel_range
    size, resample = source.size.node, source.eval_transform.resample
    stated = None if pixels.eight_bits else str(pixels)
    protocols = [
        replace(p, size=size, resample=resample, crops=source.crops, range=stated)
        for p in protocols
    ]
    batch_size = (
        request.batch_size or entry_of(request.targets[0].config, "data.params.batch_size") or 8
    )
    loader, observers = source.test_loader(batch_size), copy.deepcopy(observers)

    # One pass, with metrics in all the variants that the protocols use, and round trips for all ways to draw a latent.
    seeds = list(dict.fromkeys(protocol.noise_seed for protocol in protocols))
    trips = {
        (name, draw): RoundTrip(
            subject.model, request.device, None if subject.baseline else seed, name, pixels
        )
        for draw, seed in enumerate(seeds)
        for name, subject in subjects.items()
        if draw == 0 or not subject.baseline
    }
    variants = [
        protocol.columns.get(name, name) for protocol in protocols for name in request.metrics
    ]
    make = build_metrics(variants, request.weights_dir, request.device)
    metrics = {key: make() for key in trips}
    batches = progress("evaluating", loader, source.val_images)
    digests = observe(batches, subjects, trips, metrics, observers, pixels)
    images = _describe_images(request, source, loader, digests or {})
    if digests is None:
        return []

    # The numbers: for every way to draw a latent, then for every protocol.
    examined = [
        observer
        for observer in observers
        if is_examined(observer, subjects, source, request.device)
    ]
    costs = {
        name: trips[name, 0].cost(source.size)
        for name, subject in subjects.items()
        if not subject.baseline
    }
    weights = {
        name: tensors_sum(subject.model.state_dict())
        for name, subject in subjects.items()
        if name in costs
    }
    measured = {}
    for name, draw in trips:
        entries = {observer.name: found_by(observer, name, draw) for observer in examined}
        measured[name, draw] = measure(
            name,
            metrics[name, draw],
            len(digests),
            cost=costs.get(name),
            weights=weights.get(name),
            observed={entry: content for entry, content in entries.items() if content is not None},
            baseline=subjects[name].baseline,
        )
    evaluated = []
    for protocol in protocols:
        complete = replace(protocol, n=len(digests))
        draw = seeds.index(protocol.noise_seed)
        found = [measured.get((name, draw), measured[name, 0]) for name in subjects]
        rows = rows_under(complete, found, request.metrics)
        for observer in observers:
            by_name = {row.target: row for row in rows}
            rows = [observer.complete(row, by_name) for row in rows]
        evaluated.append(
            Evaluated(Results(complete.as_dict(), complete.hash(), images, rows), observers)
        )
    return evaluated


def _open(request: Request, protocol: Protocol, models: Mapping[str, Autoencoder]) -> Source:
    try:
        source = open_images_for(
            models, request.targets[0].config, request.data, request.size, protocol.size
        )
    except FileNotFoundError as error:
        if request.data is not None:
            raise
        raise FileNotFoundError(
            f"{error}; the config takes its images there: `data` names others"
        ) from error
    for target in request.targets:
        if request.data is not None and trains_on(target.config, request.data):
            warn_once(
                f"{target.name} trains on {request.data}: these numbers are not of held-out images"
            )
    source.evaluate_with(replace(protocol, size=source.size).transform)
    if request.images is not None:
        source.limit(request.images)
    return source


def observe(
    batches: Iterable[Batch],
    subjects: Mapping[str, Subject],
    trips: Mapping[Key, RoundTrip],
    metrics: Mapping[Key, MetricSet],
    observers: Sequence[Observer] = (),
    pixel_range: PixelRange = EIGHT_BITS,
) -> dict[str, bytes] | None:
    """Reconstruct this process's share of the images with every subject, for metrics and observers.

    Returns a digest of each image's pixels by key, in the first process, whose metrics and observers then hold those of
    all; None in the others. Raises ValueError if there are no images.
    """
    digests: dict[str, bytes] = {}
    for batch in batches:
        keys, x = batch["key"], batch["image"]
        for key, image in zip(keys, x, strict=True):
            digests[key] = hashlib.sha256(
                repr(tuple(image.shape)).encode() + image.numpy().tobytes()
            ).digest()
        levels = pixel_range.levels(x)
        for (name, draw), trip in trips.items():
            with ExitStack() as stack:
                for observer in observers:
                    stack.enter_context(observer.watch(name, draw, subjects[name], keys))
                latents, y = trip(keys, x)
            metrics[name, draw].update(keys, levels, y)
            seen = Observation(
                name, draw, keys, levels, y, latents, metrics[name, draw].per_image(), pixel_range
            )
            for observer in observers:
                observer.update(seen)
    states = {key: metric.state() for key, metric in metrics.items()}
    parts = gather((digests, states, [observer.state() for observer in observers]))
    if parts is None:
        return None
    for part, measured, observed in parts:
        digests.update(part)
        for subject_and_draw, state in measured.items():
            metrics[subject_and_draw].merge(state)
        for observer, state in zip(observers, observed, strict=True):
            observer.merge(state)
    if not digests:
        raise ValueError("the test set has no images that can be read")
    return digests


def fingerprint(digests: Mapping[str, bytes]) -> str:
    """One digest of a set of images, whatever their order."""
    return hashlib.sha256(b"".join(sorted(digests.values()))).hexdigest()


def is_examined(
    observer: Observer, subjects: Mapping[str, Subject], source: Source, device: str
) -> bool:
    """Let an observer look at the models alone; warn and return False after an error: the metrics are there already."""
    try:
        observer.examine(subjects, min(source.size), device)
    except Exception as error:  # of networks of any kind, and of observers of the user's own
        log.warning("%s: left out: %s", observer.name, first_line(error))
        return False
    return True


def found_by(observer: Observer, target: str, draw: int) -> Any:
    """What an observer found, for metrics.json; warn and return None after an error, or if JSON can't express it."""
    try:
        json.dumps(entry := observer.result(target, draw), allow_nan=False)
    except Exception as error:  # of observers of the user's own
        log.warning("%s: left out: %s", observer.name, first_line(error))
        return None
    return entry


def _describe_images(
    request: Request, source: Source, loader: Loader, digests: Mapping[str, bytes]
) -> dict[str, Any]:
    """Where the images are from, and how many were unreadable or enlarged; whole in the first process."""
    if this_process()[1] > 1:
        loader.read_errors.share()
    parts = gather((source.unreadable.reasons, source.unreadable.images, loader.enlarged)) or []
    return {
        "source": request.data or place_of(request.targets[0].config["data"]),
        "n": len(digests),
        "sha256": fingerprint(digests),
        "unreadable": len({place for _, places, _ in parts for place in places}),
        "unreadable_files": {
            name: reason for reasons, _, _ in parts for name, reason in reasons.items()
        },
        "enlarged": sum(enlarged for _, _, enlarged in parts),
    }


def measure(target: str, metrics: MetricSet, n: int, **more: Any) -> Row:
    """A row with all variants of the metrics, from ``n`` images; ``more`` of it is known already."""
    values = metrics.compute()
    details = {name: metric.details for name, metric in metrics.metrics.items()}
    return Row(
        target, n, values, metrics.skipped, details=details, per_image=metrics.per_image(), **more
    )


def rows_under(protocol: Protocol, measured: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """Rows under a protocol: of each named metric its variant, intervals, and differences from the first row."""
    columns = {name: protocol.columns.get(name, name) for name in names}
    rows: list[Row] = []
    for row in measured:
        per_image = _renamed(row.per_image, columns)
        first = rows[0].per_image if rows else {}
        intervals = {name: confidence(values) for name, values in per_image.items()}
        differences = {
            name: difference(per_image[name], first[name]) for name in per_image if name in first
        }
        rows.append(
            replace(
                row,
                metrics=_renamed(row.metrics, columns),
                skipped=_renamed(row.skipped, columns),
                details=_renamed(row.details, columns),
                per_image=per_image,
                intervals={name: ends for name, ends in intervals.items() if ends},
                differences={name: found for name, found in differences.items() if found},
            )
        )
    return rows


def _renamed(values: Mapping[str, T], columns: Mapping[str, str]) -> dict[str, T]:
    """Values of metrics under the names of their columns, in the order of the table."""
    return {name: values[variant] for name, variant in columns.items() if variant in values}
