"""What an evaluation's page shows, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from olvae.evaluation.artefacts import Artefacts
from olvae.evaluation.gallery import Example

__all__ = ["Column", "Cost", "Page", "Row", "Score", "Shown", "UsedWeights"]


@dataclass(frozen=True)
class Column:
    """A metric: its name, its heading with the unit, which direction is better, and the decimals shown."""

    name: str
    label: str
    better: Literal["higher", "lower"]
    digits: int = 3


@dataclass(frozen=True)
class Score:
    """A metric of one target.

    Args:
        value: may be infinite; None if it was skipped.
        interval: the ends of the confidence interval, where there is one.
        reason: why there is no value, or no interval; a sentence for the reader.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """A target, how many images it was evaluated on, and its scores by the metric's name."""

    target: str
    images: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Cost:
    """What a target costs; None where it is not known.

    Args:
        parameters: of encoder and decoder.
        macs: multiply-accumulates of encoding and decoding one image.
        encode, decode: images per second.
        memory: peak, in bytes.
        device: where speed and memory were measured.
    """

    target: str
    parameters: int | None = None
    macs: int | None = None
    encode: float | None = None
    decode: float | None = None
    memory: int | None = None
    device: str = ""


@dataclass(frozen=True)
class Shown:
    """The gallery of a target: images by group ("worst", "median", "best"), and the metric that ranked them."""

    target: str
    metric: str
    groups: Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class UsedWeights:
    """A file of weights that the numbers rest on: what it is for, its name, its whole checksum.

    Args:
        published: whether the checksum is the published one; None where none was published.
    """

    what: str
    file: str
    sha256: str
    published: bool | None = None


@dataclass(frozen=True)
class Page:
    """All that the page shows. What is empty is left out; texts may hold anything, and are escaped.

    Args:
        title: of the page.
        when: the evaluation was made; with its time zone.
        command: that was run.
        data: which images, in a few words.
        protocol: its fields.
        protocol_hash: of all of them.
        columns: the metrics, in order.
        rows: the targets' results, in the order in which they keep everywhere.
        level: of the confidence intervals.
        reference: the target that ``differences`` are taken from.
        differences: other targets' values minus the reference's, on the same images.
        costs: may be of fewer targets.
        cost_note: a sentence on how they were measured.
        galleries: one per target.
        bands: by target, what :meth:`BandErrors.compute` gives.
        artefacts: by target.
        weights: of metrics and targets.
        warnings: sentences for the reader.
        environment: versions and the like, by name.
    """

    title: str
    when: datetime
    command: str
    protocol: Mapping[str, object]
    protocol_hash: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    data: str = ""
    level: float = 0.95
    reference: str = ""
    differences: Sequence[Row] = ()
    costs: Sequence[Cost] = ()
    cost_note: str = ""
    galleries: Sequence[Shown] = ()
    bands: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    artefacts: Mapping[str, Artefacts] = field(default_factory=dict)
    weights: Sequence[UsedWeights] = ()
    warnings: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
