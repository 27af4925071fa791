"""Evaluate the autoencoders that people use under one protocol: a list of them, one at a time, and one table of all."""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from olvae.checkpoint import MissingWeights, find_weights
from olvae.config import ConfigError
from olvae.config.reading import is_image_file, is_shard
from olvae.devices import this_process
from olvae.evaluation.observers.flat_colours import FlatColours
from olvae.evaluation.observers.half_precision import HalfPrecision
from olvae.evaluation.observers.observer import Observer, Subject
from olvae.evaluation.report import write_files
from olvae.evaluation.results import Evaluated, Results, Row
from olvae.evaluation.runner import Progress, Request, evaluate
from olvae.files import first_line, lines_sha256, write_json
from olvae.metrics import METRICS
from olvae.models.loading.loader import Target
from olvae.models.spec import DIFFUSERS, read_config

ZOO_METRICS = ("psnr", "ssim", "lpips", "rfid")

log = logging.getLogger("olvae")


class Entry(NamedTuple):
    """An autoencoder of the list: TARGET, class, pixels per latent position, licence by the hub's name."""

    name: str
    target: str
    kind: str
    factor: int
    channels: int
    licence: str

    def here(self, folder: Path | None) -> str:
        """The TARGET: a copy in the folder, a folder or a .safetensors file of this name, if there is one."""
        places = [] if folder is None else [folder / self.name, folder / f"{self.name}.safetensors"]
        return next((str(place) for place in places if place.exists()), self.target)


def read_zoo(names: Sequence[str] = ()) -> list[Entry]:
    """Read the list, ``zoo.yaml``, or those of these names; ConfigError for a name that it lacks."""
    content = yaml.safe_load(Path(__file__).with_name("zoo.yaml").read_text(encoding="utf-8"))
    if unknown := [name for name in names if name not in content]:
        raise ConfigError(f"`zoo` {unknown[0]}: not in the list, which has {', '.join(content)}")
    return [
        Entry(name, *entry.values())
        for name, entry in content.items()
        if not names or name in names
    ]


@dataclass
class Listed(Observer):
    """What the list says of an autoencoder, with its latent as measured; and why others of it have no row."""

    entry: Entry | None = None
    missing: Mapping[str, str] = field(default_factory=dict)  # reasons by name
    name = "zoo"

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        for model in (subject.model for subject in subjects.values()):
            if model.in_channels != 3:
                raise ValueError(f"takes images of {model.in_channels} channels, the others 3")
            self.latent = f"f{model.downscale}, {model.latent_channels}"
        return dict(subjects)

    def result(self, target: str, draw: int) -> dict[str, str]:
        assert self.entry is not None
        return {"class": self.entry.kind, "latent": self.latent, "licence": self.entry.licence}

    def columns(self, entry: Mapping[str, Any]) -> Mapping[str, str]:
        return dict(entry)

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        alike = defaultdict[str, list[str]](
            list
        )  # by the reason, which may begin with the autoencoder's place
        for name, target, *facts in (entry for entry in read_zoo() if entry.name in self.missing):
            place = target.removeprefix(DIFFUSERS).partition("::")[0]
            reason = self.missing[name].removeprefix(f"{place}: ")
            alike[reason].append("{} ({}, {}, f{}, {} channels, {})".format(name, target, *facts))
        for reason, entries in alike.items():
            yield f"not here: {'; '.join(entries)}: {reason}"


def evaluate_zoo(
    entries: Sequence[Entry],
    find: Callable[[str], Target],
    request: Request,
    folder: Path,
    command: str | None,
    progress: Progress,
) -> list[Evaluated] | None:
    """Evaluate each autoencoder on the request's images, into the folder of its name, unless it has results there.

    Those that lack a metric are evaluated again once its network is here. Returns the table of all that is there. What
    can't be evaluated is left out, with its reason. ConfigError if the folder is of another request; ValueError if
    there is nothing, or new results are not comparable with those that are there; MissingWeights.
    """
    if (
        this_process()[1] > 1
    ):  # an error in one alone would leave the others with another autoencoder
        raise ConfigError("`zoo` runs in one process: start it without torchrun or srun")
    asked, known, there = _asked(request), folder / "request.json", _results(folder)
    before = read_config(known) if known.is_file() else {}
    if there and (
        others := [f"`{name}`" for name, value in asked.items() if before.get(name) != value]
    ):
        raise ConfigError(
            f"`out` {folder}: has results of other {', '.join(others)}: name another folder"
        )
    for observer in request.observers:
        observer.derive(
            {}
        )  # raises if its network is missing, before any autoencoder is downloaded
    missing: dict[str, str] = {}
    done = there.keys() - _outdated(there, request.weights_dir)
    for entry in (entry for entry in entries if entry.name not in done):
        try:
            target = replace(find(entry.here(request.weights_dir)), name=entry.name, config={})
            one = replace(request, targets=[target], observers=[Listed(entry), *request.observers])
            [evaluated] = evaluate(one, progress) or []
        except Exception as error:  # of many kinds, by what is wrong with a copy
            missing[entry.name] = first_line(error)
            log.warning("%s: %s", entry.name, missing[entry.name])
            continue
        for name, earlier in there.items():
            if what := evaluated.results.not_comparable(earlier):
                raise ValueError(
                    f"`out` {folder}: {name} there has results of {what}: name another folder"
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(asked, known)
        write_files(evaluated, folder / entry.name, command=command)
        there[entry.name] = evaluated.results
    if not there:
        raise ValueError(next(iter(missing.values())))
    there = _results(folder)  # in the list's order
    first = there.pop(next(iter(there)))
    whole = first.beside({folder / name: results for name, results in there.items()}, mix=True)
    return [
        Evaluated(
            replace(whole, rows=whole.table, earlier=()),
            [Listed(None, missing), *request.observers],
        )
    ]


def _results(folder: Path) -> dict[str, Results]:
    """The results in the folder, by the name in the list."""
    places = {entry.name: folder / entry.name / "metrics.json" for entry in read_zoo()}
    return {name: Results.read(place) for name, place in places.items() if place.is_file()}


def _asked(request: Request) -> dict[str, str]:
    """What all results in a folder share, by setting."""
    protocol, data = request.protocols[0], Path(str(request.data)).expanduser().resolve()
    paths = sorted(data.rglob("*")) if data.is_dir() else [data]
    read = [
        path for path in paths if path == data or is_image_file(path.name) or is_shard(path.name)
    ]
    shown = [o.name for o in request.observers if not isinstance(o, HalfPrecision | FlatColours)]
    return {
        "data": str(data if data.exists() else request.data),
        "files of data": lines_sha256(
            f"{path} {path.stat().st_size}" for path in read if path.is_file()
        ),
        "observe": ", ".join(sorted(shown)),
        "size": str(protocol.size),
        "protocol": protocol.name,
        "posterior": f"{protocol.posterior}, seed {protocol.noise_seed}",
        "metrics": ", ".join(sorted(request.metrics)),
        "images": str(request.images),
        "precision": str([o.precisions for o in request.observers if isinstance(o, HalfPrecision)]),
    }


def _outdated(found: Mapping[str, Results], weights_dir: Path | None) -> set[str]:
    """Names of results that lack a metric whose network is here by now."""
    outdated: set[str] = set()
    for file in {kind.needs for kind in METRICS.values() if kind.needs}:
        if lacking := {
            name for name in found for row in found[name].rows if file.name in str(row.skipped)
        }:
            with contextlib.suppress(MissingWeights):
                find_weights(file, weights_dir)
                outdated |= lacking
    return outdated
