"""Evaluate a request: targets on the same images, in one pass for protocols that prepare alike."""

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
from olvae.data.opening import trains_on
from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides, Size
from olvae.data.places import place_of
from olvae.data.shards.shard_source import ShardSource
from olvae.data.source import Batch, BatchLoader, Source
from olvae.evaluation.observers.observer import Evaluated, Observation, Observer, Subject
from olvae.evaluation.protocol import Protocol
from olvae.evaluation.results import FIXED, Results, Row
from olvae.evaluation.round_trip import RoundTrip, open_images_for
from olvae.evaluation.statistics import confidence, difference
from olvae.files import first_line, warn_once
from olvae.launcher import check_others, gather, gather_parts
from olvae.metrics import METRICS, build_metrics
from olvae.metrics.metric import MetricSet
from olvae.models.loading.loader import Target
from olvae.runs import entry_of

DEFAULT_METRICS = tuple(name for name in METRICS if name not in ("ssim_uniform", "fdd"))

_T = TypeVar("_T")

# A subject's name, and the index of a sampling mode (0: the first protocol's). A sampling mode is
# the posterior's mode, or samples of one noise seed. Baselines draw nothing: they have only 0.
Key = tuple[str, int]

# Shows progress under a description: wraps batches, and gets the number of images over all
# processes, if it is known.
BatchProgress = Callable[[str, Iterable[Batch], int | None], Iterable[Batch]]

log = logging.getLogger("olvae")


@dataclass(frozen=True)
class Request:
    """What to evaluate, on which images, and how; ConfigError if the parts do not fit together."""

    targets: Sequence[Target]  # with distinct names
    # Each gives results. Protocols that prepare images alike share a pass.
    protocols: Sequence[Protocol] = (Protocol(),)
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
        lines: list[str] = []
        for observer in self.observers:
            lines.extend(observer.conflicts(targets, self.metrics, self.observers))

        # An observer's name is a key of its rows in metrics.json.
        names = [observer.name for observer in self.observers if observer.name]
        for name in dict.fromkeys(names):
            if name in FIXED or names.count(name) > 1:
                lines.append(f"`observe`: two entries of metrics.json would be called {name}")
        if lines:
            raise ConfigError(*lines)


def evaluate(
    request: Request, progress: BatchProgress = lambda _, batches, __: batches
) -> list[Evaluated] | None:
    """Evaluate targets on the same images, in all processes that :func:`olvae.launcher.join` found.

    Returns one result per protocol in the first process, None in the others. Raises
    FileNotFoundError or ValueError if images or weights are missing, unreadable, or do not fit the
    targets.
    """
    # Subjects: the targets, and what observers derive from them.
    observers = copy.deepcopy(list(request.observers))
    subjects = {target.name: Subject(target.load()) for target in request.targets}
    for observer in observers:
        subjects = observer.derive(subjects)

    # One pass for all protocols that prepare images alike.
    passes: dict[tuple[Sides, str, str], list[Protocol]] = {}
    for protocol in request.protocols:
        preparation = (Sides.of(protocol.size), protocol.resize, protocol.resample)
        passes.setdefault(preparation, []).append(protocol)
    evaluated = []
    for protocols in passes.values():
        evaluated.extend(_one_pass(request, protocols, subjects, observers, progress))
    return evaluated or None


def _one_pass(
    request: Request,
    protocols: Sequence[Protocol],
    subjects: Mapping[str, Subject],
    observers: Sequence[Observer],
    progress: BatchProgress,
) -> list[Evaluated]:
    """Evaluate under protocols that prepare images alike; empty in every process but the first."""
    # Images. A source may have its own size and crops: the protocols take them over.
    source = _open(request, protocols[0], subjects)
    pixels = source.pixel_range
    prepared: dict[str, Any] = {
        "size": source.size.node,
        "resample": source.eval_transform.resample,
        "crops": source.crops,
        "range": None if pixels.eight_bits else str(pixels),
    }
    protocols = [replace(protocol, **prepared) for protocol in protocols]
    batch_size = request.batch_size or entry_of(request.targets[0].config, "data.params.batch_size")
    loader = source.test_loader(batch_size or 8)

    # Round trips: each target in every sampling mode, each baseline once.
    observers = copy.deepcopy(observers)
    seeds = list(dict.fromkeys(protocol.noise_seed for protocol in protocols))
    trips = {}
    for draw, seed in enumerate(seeds):
        for name, subject in subjects.items():
            if draw == 0 or not subject.baseline:
                noise = None if subject.baseline else seed
                trips[name, draw] = RoundTrip(subject.model, request.device, noise, name, pixels)

    # Metrics: for each round trip, every variant that a protocol uses.
    variants = []
    for protocol in protocols:
        for name in request.metrics:
            variants.append(protocol.columns.get(name, name))
    make = build_metrics(variants, request.weights_dir, request.device)
    metrics = {key: make() for key in trips}

    # The pass over the images. All processes take part; the first one gets everything.
    batches = progress("evaluating", loader, source.val_images)
    shards = isinstance(source, ShardSource)
    groups: dict[str, str] = {}
    digests = observe(batches, subjects, trips, metrics, observers, pixels, shards, groups)
    images = _describe_images(request, source, loader, digests or {}, groups)
    if digests is None:
        return []
    n = len(digests)
    measured = _measure_subjects(subjects, trips, metrics, observers, source, request.device, n)

    # Results: each protocol takes the rows of its sampling mode, and selects its metric variants.
    evaluated = []
    for protocol in protocols:
        complete = replace(protocol, n=n)
        draw = seeds.index(protocol.noise_seed)
        found = []
        for name, subject in subjects.items():
            index = 0 if subject.baseline else draw
            found.append(measured[name, index])
        rows = rows_under(complete, found, request.metrics, groups or None)
        for observer in observers:
            by_name = {row.target: row for row in rows}
            rows = [observer.complete(row, by_name) for row in rows]
        results = Results(complete.as_dict(), complete.hash(), images, rows)
        evaluated.append(Evaluated(results, observers))
    return evaluated


def _open(request: Request, protocol: Protocol, subjects: Mapping[str, Subject]) -> Source:
    """Open the images that a protocol prepares; warn if a target trains on them."""
    models = {name: subject.model for name, subject in subjects.items()}
    config = request.targets[0].config
    try:
        source = open_images_for(models, config, request.data, request.size, protocol.size)
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
    shards: bool = False,
    groups: dict[str, str] | None = None,
) -> dict[str, bytes] | None:
    """Reconstruct this process's images with every subject; feed metrics and observers.

    With ``shards``, keys begin with the names of shards. ``groups`` gets the groups of images by
    key, of those that are not their own.
    Returns, in the first process, a digest of each image's pixels by key; metrics and observers
    there are merged over all processes. None in the others. Raises ValueError if there are no
    images.
    """
    # Batches: every round trip sees the same images.
    digests: dict[str, bytes] = {}
    groups = {} if groups is None else groups
    read = 0
    for batch in batches:
        check_others()
        keys = batch["key"]
        x = batch["image"]
        read += len(keys)
        groups.update(zip(keys, batch.get("group", []), strict=False))
        for key, image in zip(keys, x, strict=True):
            pixels = repr(tuple(image.shape)).encode() + image.numpy().tobytes()
            digests[key] = hashlib.sha256(pixels).digest()
        levels = pixel_range.levels(x)
        for (name, draw), trip in trips.items():
            with ExitStack() as stack:
                for observer in observers:
                    stack.enter_context(observer.watch(name, draw, subjects[name], keys))
                latents, y = trip(keys, x)
            found = metrics[name, draw]
            found.update(keys, levels, y)
            values = found.per_image()
            seen = Observation(name, draw, keys, levels, y, latents, values, pixel_range, shards)
            for observer in observers:
                observer.update(seen)

    # Merge metrics in the first process, in parts, because networks' features are large.
    states = ((trip, state) for trip, found in metrics.items() for state in found.states())
    for subject_and_draw, state in gather_parts(states):
        metrics[subject_and_draw].merge(state)

    # Merge the rest: the first process gets everything of all, its own among them.
    parts = gather((digests, [observer.state() for observer in observers], read, groups))
    if parts is None:
        return None
    for part, observed, _, theirs in parts:
        digests.update(part)
        groups.update(theirs)
        for observer, state in zip(observers, observed, strict=True):
            observer.merge(state)
    if not digests:
        raise ValueError("the test set has no images that can be read")

    # A list may name a file twice: its key is read again.
    read = sum(count for _, _, count, _ in parts)
    if read > len(digests):
        warn_once(
            f"{read} images were read, {len(digests)} are measured: the others repeat a key, such "
            "as a line of a list, and count once"
        )
    return digests


def fingerprint(digests: Mapping[str, bytes]) -> str:
    """Return one digest of a set of images, whatever their order."""
    return hashlib.sha256(b"".join(sorted(digests.values()))).hexdigest()


def _describe_images(
    request: Request,
    source: Source,
    loader: BatchLoader,
    digests: Mapping[str, bytes],
    groups: Mapping[str, str],
) -> dict[str, Any]:
    """Describe the images' origin and groups, and how many were unreadable or enlarged.

    Called in all processes; the first one's answer covers all.
    """
    loader.read_errors.share()
    parts = gather((source.unreadable.reasons, loader.enlarged)) or []

    # Each process names the files that it met; they have counted all images together.
    files = {}
    enlarged = 0
    for reasons, count in parts:
        files.update(reasons)
        enlarged += count
    counts = {"n": len(digests)}
    if groups:
        counts["groups"] = len({groups.get(key, key) for key in digests})
    return {
        "source": request.data or place_of(request.targets[0].config["data"]),
        **counts,
        "sha256": fingerprint(digests),
        "unreadable": loader.read_errors.lost,
        "unreadable_files": files,
        "enlarged": enlarged,
    }


def _measure_subjects(
    subjects: Mapping[str, Subject],
    trips: Mapping[Key, RoundTrip],
    metrics: Mapping[Key, MetricSet],
    observers: Sequence[Observer],
    source: Source,
    device: str,
    n: int,
) -> dict[Key, Row]:
    """Make a row for each round trip: all metric variants, costs, and the observers' entries."""
    # Models alone. A target costs the same in every sampling mode.
    examined = [
        observer for observer in observers if is_examined(observer, subjects, source, device)
    ]
    costs = {}
    weights = {}
    for name, subject in subjects.items():
        if not subject.baseline:
            costs[name] = trips[name, 0].cost(source.size)
            weights[name] = tensors_sum(subject.model.state_dict())

    measured = {}
    for (name, draw), found in metrics.items():
        entries = {observer.name: found_by(observer, name, draw) for observer in examined}
        measured[name, draw] = measure(
            name,
            found,
            n,
            cost=costs.get(name),
            weights=weights.get(name),
            observed={entry: content for entry, content in entries.items() if content is not None},
            baseline=subjects[name].baseline,
        )
    return measured


def is_examined(
    observer: Observer, subjects: Mapping[str, Subject], source: Source, device: str
) -> bool:
    """Let an observer run models on its own; after an error, warn and return False."""
    # Networks and observers may be the user's own: their errors must not cost the metrics.
    try:
        observer.examine(subjects, min(source.size), device)
    except Exception as error:
        log.warning("%s: left out: %s", observer.name, first_line(error))
        return False
    return True


def found_by(observer: Observer, target: str, draw: int) -> Any:
    """Return an observer's entry for metrics.json; None, with a warning, if it fails."""
    # It must be expressible in JSON, without NaN and infinity.
    try:
        entry = observer.result(target, draw)
        json.dumps(entry, allow_nan=False)
    except Exception as error:
        log.warning("%s: left out: %s", observer.name, first_line(error))
        return None
    return entry


def measure(target: str, metrics: MetricSet, n: int, **more: Any) -> Row:
    """Make a row with all metric variants, from ``n`` images; ``more`` are further fields of it."""
    values = metrics.compute()
    details = {name: metric.details for name, metric in metrics.metrics.items()}
    return Row(
        target, n, values, metrics.skipped, details=details, per_image=metrics.per_image(), **more
    )


def rows_under(
    protocol: Protocol,
    measured: Iterable[Row],
    names: Sequence[str],
    groups: Mapping[str, str] | None = None,
) -> list[Row]:
    """Select the protocol's metric variants; add intervals, and differences from the first row.

    ``groups`` are the images', by key, if they have some.
    """
    columns = {name: protocol.columns.get(name, name) for name in names}
    rows: list[Row] = []
    for row in measured:
        per_image = _renamed(row.per_image, columns)
        first = rows[0].per_image if rows else {}
        intervals = {}
        differences = {}
        for name, values in per_image.items():
            interval = confidence(values, groups=groups)
            if interval:
                intervals[name] = interval
            if name in first:
                paired = difference(values, first[name], groups=groups)
                if paired:
                    differences[name] = paired
        rows.append(
            replace(
                row,
                metrics=_renamed(row.metrics, columns),
                skipped=_renamed(row.skipped, columns),
                details=_renamed(row.details, columns),
                per_image=per_image,
                intervals=intervals,
                differences=differences,
            )
        )
    return rows


def _renamed(values: Mapping[str, _T], columns: Mapping[str, str]) -> dict[str, _T]:
    """Select values by metric variant, and name them by column, in the order of the table."""
    return {name: values[variant] for name, variant in columns.items() if variant in values}
