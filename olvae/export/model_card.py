"""Model cards: where an export's weights are from, how good they are, and how to load them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from olvae.evaluation.observers.half_precision import HalfPrecision
from olvae.evaluation.page import scores
from olvae.evaluation.results import Results
from olvae.export.formats import Layout
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.diffusers_models import is_stable_diffusion
from olvae.models.spec import DIFFUSERS, is_hub_id
from olvae.modules.base import count_parameters
from olvae.runs import settings_of

CARD_NAME = "README.md"
MADE_WITH = "made with open-LiteVAE"  # in every card: tells what an export may replace from what was downloaded


@dataclass(frozen=True)
class Provenance:
    """Where weights are from: the target's name, training config, metrics.json and licence."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Path | None = None
    raw: bool = False  # not averaged
    licence: str | None = None
    factors_from: str | None = None  # where the scaling and shift factors are from; None if they were not measured


def model_card(model: LiteVAE, layout: Layout, title: str, provenance: Provenance, onnx: bool) -> str:
    """Write a model card: Markdown, with the hub's metadata in front."""
    cards = PackageLoader("olvae.export", ".")
    environment = Environment(
        loader=cards, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    results = None if provenance.metrics is None else Results.read(provenance.metrics)
    rows = results.rows if results else []
    family = [row for row in rows if row.target == rows[0].target or row.target.startswith(f"{rows[0].target}, ")]
    try:
        precisions = list(HalfPrecision().lines(family)) if family else []
        protocol = {name: results.protocol[name] for name in ("name", "version")} if results else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{provenance.metrics}: not a metrics.json: {type(error).__name__} {error}") from error
    return environment.get_template("card.md.jinja").render(
        model=model,
        usage=layout.usage,
        notes=list(layout.notes(model)),
        title=title,
        made_with=MADE_WITH,
        provenance=provenance,
        is_stable_diffusion=is_stable_diffusion(model),
        halves={
            name: (type(half).__name__, f"{count_parameters(half) / 1e6:.2f}")
            for name, half in {"encoder": model.encoder, "decoder": model.decoder}.items()
        },
        weights=_weights(model, provenance),
        teacher=_teacher(provenance.config),
        results=results,
        scores=scores(results) if results else {},
        protocol=protocol,
        precisions=precisions,
        data=_data(provenance.config),
        onnx=onnx,
    )


def _entry(config: Any, path: str) -> Any:
    """Look up a path of names in nested mappings; None if there is nothing."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _weights(model: LiteVAE, provenance: Provenance) -> str:
    kinds = [str(next(model.parameters()).dtype).removeprefix("torch.")]
    averaged = _entry(provenance.config, "model.params.use_ema")
    if provenance.raw or averaged is not None:
        kinds.append("averaged over training (EMA)" if averaged and not provenance.raw else "as trained")
    if model.folded:
        kinds.append("self-modulated convolutions folded into ordinary ones")
    return ", ".join(kinds)


def _teacher(config: Mapping[str, Any]) -> str | None:
    """Name the teacher of a distilled model; a folder of the user's is named without its path."""
    teacher = _entry(config, "model.params.parts.teacher.params.autoencoder")
    plain = str(teacher or "").removeprefix(DIFFUSERS)
    return (plain if is_hub_id(plain) else Path(plain).name) or None


def _data(config: Mapping[str, Any]) -> str:
    if not (target := _entry(config, "data.target")):
        return "Unknown."
    text = [f"`{target}`"]
    if root := _entry(config, "data.params.root"):
        text.append(Path(str(root)).name)
    if size := _entry(config, "data.params.size"):
        text.append(f"crops of {size}x{size}")
    if steps := _entry(config, "lightning.trainer.max_steps"):
        text.append(f"{steps} steps")
    if before := settings_of(config).weights:
        file = Path(before)
        text.append(f"from the weights of {file.parents[1].name if file.parent.name == 'checkpoints' else file.name}")
    return f"{', '.join(text)}."
