"""Write an export's model card: weights, teacher, data, metrics, licence."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import Sides
from olvae.evaluation.cells import scores
from olvae.evaluation.observers.half_precision import HalfPrecision
from olvae.evaluation.results import Results
from olvae.export.formats import Layout
from olvae.files import counted, plain
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.families import family_of
from olvae.models.target_names import DIFFUSERS, is_hub_id, place_in
from olvae.modules.base import HALVES, dtype_of
from olvae.modules.counting import count_parameters
from olvae.runs import TEACHER, Run, config_of, entry_of, run_of, settings_of

CARD_NAME = "README.md"

# In every card: tells an export, which may be replaced, from a folder that was downloaded.
MADE_WITH = "made with open-LiteVAE"

# Has the words for what an evaluation found in half precision.
HALF = HalfPrecision()


@dataclass(frozen=True)
class Provenance:
    """Where weights are from: the target's name, training config, metrics.json and licence."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Path | None = None
    # Whether the weights are as trained, not averaged.
    raw: bool = False
    licence: str | None = None
    # Where the scaling and shift factors are from; None if they were not measured.
    factors_from: str | None = None
    # The training data in words, where the config does not say.
    data: str | None = None
    # What an earlier card has about the licence, word for word.
    terms: str | None = None
    # The steps after which the weights were saved, where their file says.
    steps: int | None = None


def model_card(
    model: LiteVAE, layout: Layout, title: str, provenance: Provenance, onnx: bool
) -> str:
    """Write a model card: Markdown, with the hub's metadata in front."""
    cards = PackageLoader("olvae.export", ".")
    environment = Environment(
        loader=cards,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain

    # Networks: their class in diffusers, if it has them, and the size of each half.
    classes = family_of(model)
    kind = None if classes is None else classes.kind(model)
    halves = {}
    for name in HALVES:
        half = getattr(model, name)
        halves[name] = (type(half).__name__, f"{count_parameters(half) / 1e6:.2f}")

    # Training: a teacher in the user's own folder is named without its path.
    config = provenance.config
    given = str(entry_of(config, TEACHER) or "")
    teacher = _hub_id(given, config) or Path(given.removeprefix(DIFFUSERS)).name or None

    # Quality: half precision has rows of its own, named after the first one.
    results = None if provenance.metrics is None else Results.read(provenance.metrics, [HALF])
    rows = results.rows if results else []
    family = []
    for row in rows:
        first = rows[0].target
        if row.target == first or row.target.startswith(f"{first}, "):
            family.append(row)

    return environment.get_template("card.md.jinja").render(
        model=model,
        usage=layout.usage(model),
        notes=list(layout.notes(model)),
        in_units=layout.in_units(model),
        title=title,
        made_with=MADE_WITH,
        provenance=provenance,
        kind=kind,
        halves=halves,
        weights=_weights(model, provenance),
        teacher=teacher,
        base_models=_base_models(config),
        results=results,
        scores=scores(results) if results else {},
        protocol=results.protocol if results else {},
        precisions=list(HALF.lines(family)),
        data=_data(provenance),
        onnx=onnx,
    )


def _weights(model: LiteVAE, provenance: Provenance) -> str:
    """Describe the weights: dtype, averaged or as trained, folded."""
    kinds = [str(dtype_of(model)).removeprefix("torch.")]
    averaged = entry_of(provenance.config, "model.params.use_ema")
    if averaged and not provenance.raw:
        kinds.append("averaged over training (EMA)")
    elif provenance.raw or averaged is not None:
        kinds.append("as trained")
    if model.folded:
        kinds.append("self-modulated convolutions folded into ordinary ones")
    return ", ".join(kinds)


def _hub_id(target: str, config: Mapping[str, Any]) -> str | None:
    """Return the hub's repository that a run's TARGET names; None for a path, even one now gone."""
    place = place_in(target)
    here = Path(place).exists() or place in settings_of(config).paths.values()
    return place if is_hub_id(place) and not here else None


def _base_models(config: Mapping[str, Any]) -> list[str]:
    """List the hub's models that a run, or the runs before it, started from or learned from."""
    weights = settings_of(config).weights or ""
    found: dict[str, None] = {}
    for target in (weights, str(entry_of(config, TEACHER))):
        repository = _hub_id(target, config)
        if repository:
            found[repository] = None
    if weights:
        path = Path(weights).resolve()
        before = run_of(path) if path.is_file() else Run(path)
        # An earlier run may be gone, or have a config that can't be read.
        with contextlib.suppress(ConfigError):
            if before:
                found |= dict.fromkeys(_base_models(config_of(before)))
    return list(found)


def _data(provenance: Provenance) -> str:
    """Describe the training data: source, folder, crops, steps, and earlier weights."""
    config = provenance.config
    target = entry_of(config, "data.target")
    if not target:
        return provenance.data or "Unknown."
    text = [f"`{plain(str(target))}`"]
    root = entry_of(config, "data.params.root")
    if root:
        text.append(plain(Path(str(root)).name))
    size = entry_of(config, "data.params.size")
    if size:
        text.append(f"crops of {Sides.of(size)}")
    most = entry_of(config, "lightning.trainer.max_steps")
    if provenance.steps is not None:
        text.append(counted(provenance.steps, "step"))
    elif most:
        text.append(plain(f"up to {counted(most, 'step')}"))  # it may have been stopped
    before = settings_of(config).weights
    if before:
        file = Path(before)
        if file.parent.name == "checkpoints":
            file = file.parents[1]
        text.append(f"from the weights of {plain(file.name)}")
    return f"{', '.join(text)}."


def own_card(folder: Path) -> str:
    """Return the text of the model card in one of our exports; empty for any other folder."""
    card = folder / CARD_NAME
    if not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    return text if MADE_WITH in text else ""


def read_card(card: str) -> tuple[str | None, str | None, str | None]:
    """Read the licence, the training data and the terms of the weights in a card."""
    licence = re.search(r"^license: (?!unknown)(.+)$", card, re.MULTILINE)
    data = re.search(r"^## Training data\n+(.+?)\s*(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    words = f"Weights: {re.escape(licence[1])}" if licence else "Weights"
    terms = re.search(
        rf"^## Licence\s+({words}\b.+?)\s+open-LiteVAE, the code", card, re.MULTILINE | re.DOTALL
    )
    return licence and licence[1], data and data[1], terms and terms[1]
