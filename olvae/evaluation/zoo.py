"""Evaluate a list of published autoencoders under one protocol, one at a time, into one table."""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from olvae.config import ConfigError
from olvae.data.places import is_image_file, is_shard
from olvae.evaluation.observers.observer import Evaluated, Observer, Subject
from olvae.evaluation.report import write_files
from olvae.evaluation.results import Results, Row
from olvae.evaluation.runner import BatchProgress, Request, evaluate
from olvae.files import first_line, lines_sha256, write_json
from olvae.launcher import FailedProcessError, this_process
from olvae.metrics import METRICS
from olvae.models.loading.loader import Target
from olvae.models.spec import read_config
from olvae.models.target_names import place_in
from olvae.pretrained_networks import MissingWeights, find_weights

ZOO_METRICS = ("psnr", "ssim", "lpips", "rfid")

log = logging.getLogger("olvae")


class Listing(NamedTuple):
    """An autoencoder of the list."""

    name: str
    target: str  # a TARGET
    kind: str  # its class
    factor: int  # pixels per latent position
    channels: int  # of the latent
    licence: str  # as the hub names it

    def here(self, folder: Path | None) -> str:
        """Return the TARGET of a copy in the folder, if there is one; otherwise the entry's own.

        A copy is a folder or a .safetensors file of the entry's name.
        """
        if folder is not None:
            for copy in (folder / self.name, folder / f"{self.name}.safetensors"):
                if copy.exists():
                    return str(copy)
        return self.target


def read_zoo(names: Sequence[str] = ()) -> list[Listing]:
    """Read the list, ``zoo.yaml``, or its entries of these names; ConfigError for unknown ones."""
    content = yaml.safe_load(Path(__file__).with_name("zoo.yaml").read_text(encoding="utf-8"))
    unknown = [name for name in names if name not in content]
    if unknown:
        raise ConfigError(f"`zoo` {unknown[0]}: not in the list, which has {', '.join(content)}")
    entries = []
    for name, entry in content.items():
        if not names or name in names:
            entries.append(Listing(name, *entry.values()))
    return entries


@dataclass
class Listed(Observer):
    """Show what the list says about an autoencoder, with its latent as measured.

    For the table of all: why autoencoders of the list have no row.
    """

    entry: Listing | None = None
    missing: Mapping[str, str] = field(default_factory=dict)  # reasons by name
    name = "zoo"

    def derive(self, subjects: Mapping[str, Subject]) -> dict[str, Subject]:
        for subject in subjects.values():
            model = subject.model
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
        # By the reason: without the autoencoder's place, which it may begin with, many are alike.
        alike = defaultdict[str, list[str]](list)
        for entry in read_zoo():
            if entry.name in self.missing:
                name, target, *facts = entry
                reason = self.missing[name].removeprefix(f"{place_in(target)}: ")
                words = "{} ({}, {}, f{}, {} channels, {})".format(name, target, *facts)
                alike[reason].append(words)
        for reason, entries in alike.items():
            yield f"not here: {'; '.join(entries)}: {reason}"


def evaluate_zoo(
    entries: Sequence[Listing],
    find: Callable[[str], Target],
    request: Request,
    folder: Path,
    command: str | None,
    progress: BatchProgress,
) -> list[Evaluated] | None:
    """Evaluate each autoencoder on the request's images, into the folder of its name.

    One that has results there is skipped, unless they lack a metric whose network is here now.
    Returns the table of all results in the folder. What can't be evaluated is left out, with its
    reason. ConfigError if the folder is of another request; ValueError if there is nothing, or new
    results are not comparable with earlier ones; MissingWeights.
    """
    # In several processes, an error in one would leave the others with another autoencoder.
    if this_process()[1] > 1:
        raise ConfigError("`zoo` runs in one process: start it without torchrun or srun")

    # The folder: of the same request, or new.
    asked = _asked(request)
    known = folder / "request.json"
    there = _results(folder)
    before = read_config(known) if known.is_file() else {}
    others = [f"`{name}`" for name in {**asked, **before} if before.get(name) != asked.get(name)]
    if there and others:
        raise ConfigError(
            f"`out` {folder}: has results of other {', '.join(others)}: name another folder"
        )

    # An observer whose network is missing raises here, before any autoencoder is downloaded.
    for observer in request.observers:
        observer.derive({})

    # Each on its own: the folder is complete after each, so an interrupted command continues.
    missing = {}
    done = there.keys() - _outdated(there, request.weights_dir)
    for entry in entries:
        if entry.name in done:
            continue
        # A copy may be wrong in many ways: it must not end the evaluation of the others.
        try:
            target = replace(find(entry.here(request.weights_dir)), name=entry.name, config={})
            one = replace(request, targets=[target], observers=[Listed(entry), *request.observers])
            [evaluated] = evaluate(one, progress) or []
        except FailedProcessError:
            raise
        except Exception as error:
            missing[entry.name] = first_line(error)
            log.warning("%s: %s", entry.name, missing[entry.name])
            continue
        for name, earlier in there.items():
            what = evaluated.results.not_comparable(earlier)
            if what:
                raise ValueError(
                    f"`out` {folder}: {name} there has results of {what}: name another folder"
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(asked, known)
        write_files(evaluated, folder / entry.name, command=command)
        there[entry.name] = evaluated.results

    # The table of all, in the list's order, as the rows of one evaluation.
    if not there:
        raise ValueError(next(iter(missing.values())))
    (_, first), *more = _results(folder).items()
    whole = first.beside({folder / name: results for name, results in more}, mix=True)
    rows = replace(whole, rows=whole.table, earlier=())
    return [Evaluated(rows, [Listed(None, missing), *request.observers])]


def _results(folder: Path) -> dict[str, Results]:
    """Read the results in the folder, by name, in the list's order."""
    found = {}
    for entry in read_zoo():
        place = folder / entry.name / "metrics.json"
        if place.is_file():
            found[entry.name] = Results.read(place)
    return found


def _asked(request: Request) -> dict[str, str]:
    """Describe what all results in a folder share, by setting."""
    # Files by name and size: another number, name or size of a file makes another set of images.
    data = Path(str(request.data)).expanduser().resolve()
    paths = sorted(data.rglob("*")) if data.is_dir() else [data]
    files = []
    for path in paths:
        reads = path == data or is_image_file(path.name) or is_shard(path.name)
        if reads and path.is_file():
            files.append(f"{path} {path.stat().st_size}")

    # Observers by name, and what they choose.
    shown = [observer.name for observer in request.observers if observer.tells_apart]
    choices = {"precision": "[]"}  # without an observer of precisions
    for observer in request.observers:
        choices |= observer.choices()
    protocol = request.protocols[0]
    return {
        "data": str(data if data.exists() else request.data),
        "files of data": lines_sha256(files),
        "observe": ", ".join(sorted(shown)),
        "size": str(protocol.size),
        "protocol": protocol.name,
        "posterior": f"{protocol.posterior}, seed {protocol.noise_seed}",
        "metrics": ", ".join(sorted(request.metrics)),
        "images": str(request.images),
        **choices,
    }


def _outdated(found: Mapping[str, Results], weights_dir: Path | None) -> set[str]:
    """Return names of results that lack a metric whose network is here by now."""
    outdated = set()
    for file in {kind.needs for kind in METRICS.values() if kind.needs}:
        lacking = set()
        for name, results in found.items():
            if any(file.name in str(row.skipped) for row in results.rows):
                lacking.add(name)
        if lacking:
            with contextlib.suppress(MissingWeights):
                find_weights(file, weights_dir)
                outdated |= lacking
    return outdated
