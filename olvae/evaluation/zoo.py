"""Evaluate the autoencoders that people use under one protocol: a list of them, one at a time, and one table of all."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from olvae.config import ConfigError
from olvae.devices import this_process
from olvae.evaluation.observers.observer import Observer, Subject
from olvae.evaluation.report import write_files
from olvae.evaluation.results import Results, Row
from olvae.evaluation.runner import Evaluated, Progress, Request, evaluate
from olvae.files import first_line
from olvae.models.loading.loader import Target

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
    return [Entry(name, *entry.values()) for name, entry in content.items() if not names or name in names]


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
        for name, target, *facts in (entry for entry in read_zoo() if entry.name in self.missing):
            yield "not here: {} ({}, {}, f{}, {} channels, {}): {}".format(name, target, *facts, self.missing[name])


def evaluate_zoo(
    entries: Sequence[Entry],
    find: Callable[[str], Target],
    request: Request,
    folder: Path,
    command: str | None,
    progress: Progress,
) -> list[Evaluated] | None:
    """Evaluate each autoencoder on the request's images, into the folder of its name, unless it has results there.

    Returns the table of all that is there, in the first process. What can't be evaluated is left out, with its reason.
    ValueError if there is nothing, or new results are not comparable with those that are there; MissingWeights.
    """
    if this_process()[1] > 1:  # an error in one alone would leave the others with another autoencoder
        raise ConfigError("`zoo` runs in one process: start it without torchrun or srun")
    for observer in request.observers:
        observer.derive({})  # raises if its network is missing, before any autoencoder is downloaded
    missing: dict[str, str] = {}
    for entry in (entry for entry in entries if not (folder / entry.name / "metrics.json").is_file()):
        try:
            target = replace(find(entry.here(request.weights_dir)), name=entry.name, config={})
            one = replace(request, targets=[target], observers=[Listed(entry), *request.observers])
            results = evaluate(one, progress)
        except (ValueError, ArithmeticError, OSError, torch.OutOfMemoryError) as error:
            missing[entry.name] = first_line(error)
            log.warning("%s: %s", entry.name, missing[entry.name])
            continue
        for evaluated in results or ():
            write_files(evaluated, folder / entry.name, command=command)
            _collect(folder)
    shown = [Listed(None, missing), *request.observers]
    return [Evaluated(_collect(folder, missing), shown)]


def _collect(folder: Path, missing: Mapping[str, str] | None = None) -> Results:
    """The results in the list's folders as one; ValueError if there are none, or they are not comparable."""
    places = [folder / entry.name / "metrics.json" for entry in read_zoo()]
    found = {place: Results.read(place) for place in places if place.is_file()}
    if not found:
        raise ValueError(next(iter((missing or {}).values())))
    whole = found.pop(next(iter(found))).beside(found)
    return replace(whole, rows=whole.table, earlier=())
