"""Export an autoencoder with a model card: write it beside its place, load it back, compare, and then move it there."""

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors import SafetensorError
from torch import Tensor

from olvae.checkpoint import tensors_sum
from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import Sides
from olvae.devices import DTYPES
from olvae.evaluation.observers.half_precision import HalfPrecision
from olvae.evaluation.results import Results, scores
from olvae.export.formats import FACTORS, LAYOUTS, Layout, find_layout
from olvae.export.onnx import DECODER, ENCODER, export_onnx
from olvae.files import folder_beside, nearest_folder, no_empty_folders, plain
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.families import family_of
from olvae.models.loading.loader import Target
from olvae.models.loading.targets import RAW
from olvae.models.spec import (
    CLASS_NAME,
    CONFIG_NAME,
    DIFFUSERS,
    SHIPPED,
    WEIGHTS_NAME,
    check_factors,
    class_in,
    is_hub_id,
    place_in,
    shipped_folder,
)
from olvae.models.weight_files import LOADER_NAME
from olvae.modules.base import count_parameters, device_of, dtype_of
from olvae.modules.scaling_factors import FEW_IMAGES
from olvae.runs import TEACHER, Run, config_of, entry_of, find_run, run_of, settings_of

TOLERANCE = 1e-5  # of differences over the largest value: a folded or a video network computes in another order

CARD_NAME = "README.md"
WRITTEN = {
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    LOADER_NAME,
    "metrics.json",
    ENCODER,
    DECODER,
}  # by some export
MADE_WITH = "made with open-LiteVAE"  # in every card: tells what an export may replace from what was downloaded

HALF = HalfPrecision()  # has the words for what an evaluation found in half precision

ONE_FILE = {
    "onnx": "ONNX files are written by `format` litevae",
    "license": "one file has no model card",
}


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export; by default the format is diffusers for networks of its classes, else litevae."""

    format: str | None = (
        None  # a name of olvae.export.formats.LAYOUTS, or the path of a Layout of your own
    )
    dtype: str = "float32"  # to round the weights to, a name of olvae.devices.DTYPES
    fold: bool = False  # write the self-modulated convolutions as ordinary ones
    onnx: bool = False  # also write encoder.onnx and decoder.onnx
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents: Path | None = (
        None  # both factors: what olvae latents or olvae encode wrote, a file or its folder
    )
    license: str | None = None  # of the weights, by the hub's name for it
    force: bool = False  # replace the export that is there

    def __post_init__(self) -> None:
        given = {name: value for name in FACTORS[1:] if (value := getattr(self, name)) is not None}
        if self.latents is not None and given:
            raise ConfigError(
                "`latents` has both factors: leave out `scaling_factor` and `shift_factor`"
            )
        for mistake in check_factors(given, 0):
            raise ConfigError(mistake)
        if self.onnx and self.dtype != "float32":
            raise ConfigError(f"`onnx` writes float32: leave out `dtype` {self.dtype}, or `onnx`")

    def layout(self, name: str) -> Layout:
        """Find a format; raise ConfigError if there is none, or a setting means nothing in it."""
        layout = find_layout(name)
        for setting, why in {**layout.refused, **(ONE_FILE if layout.suffix else {})}.items():
            if getattr(self, setting) not in (None, False):
                raise ConfigError(f"`{setting}` does not go with `format` {name}: {why}")
        return layout

    def check(self, place: Path) -> None:
        """Check what can be checked before the model is loaded."""
        suffix = "" if self.format is None else self.layout(self.format).suffix
        if self.latents is not None:
            _factors_file(self.latents)
        check_place(place, suffix, self.force)


@dataclass(frozen=True)
class Provenance:
    """Where weights are from: the target's name, training config, metrics.json and licence."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Path | None = None
    raw: bool = False  # not averaged
    licence: str | None = None
    factors_from: str | None = (
        None  # where the scaling and shift factors are from; None if they were not measured
    )
    data: str | None = None  # the training data in words, where the config does not say
    terms: str | None = None  # what a card said of the licence, word for word


def export_target(
    target: Target, place: Path, settings: ExportSettings
) -> tuple[dict[str, float], list[str]]:
    """Load an autoencoder and :func:`export` it, with its factors and its run's numbers in the card; also return notes.

    Raises ConfigError where the format or a setting does not suit the model.
    """
    settings.check(place)
    if half := settings_of(target.config).untrained:
        raise ConfigError(
            f"{target.given}: its {half} has never been trained: train it first, by distil/{half}"
        )
    loaded = target.load()
    model = loaded.as_litevae(target.given)
    layout = settings.layout(
        settings.format or ("litevae" if family_of(model) is None else "diffusers")
    )
    if reason := layout.misfit(model):
        raise ConfigError(f"{target.given}: {reason}")
    notes = list(layout.notes(model))
    kept = "latents" not in layout.refused
    factors_from = (
        _set_factors(model, loaded, target, settings, layout.in_units(model), notes)
        if kept
        else None
    )
    metrics = None if layout.suffix else _metrics_of(target, loaded, notes)
    stated = (None,) * 3 if layout.suffix else _stated(_own_card(_folder_of(target)))
    licence, data, terms = (settings.license, stated[1], None) if settings.license else stated
    provenance = Provenance(
        target.name, target.config, metrics, target.raw, licence, factors_from, data, terms
    )
    return export(model, place, layout, settings, provenance), notes


def export(
    model: LiteVAE,
    place: str | Path,
    layout: Layout | None = None,
    settings: ExportSettings | None = None,
    provenance: Provenance | None = None,
) -> dict[str, float]:
    """Write an export beside its place, load it back, compare, and move it there; leave nothing behind on failure.

    Tensors are compared bit for bit, outputs of the format's loaders to :data:`TOLERANCE`. A link stays a link. Folders
    get a model card, and the metrics.json that it cites. The model is in float32, with its factors; of the settings
    only ``dtype``, ``fold``, ``onnx`` and ``force`` are used; the default layout is litevae.

    Return the differences, relative to the largest value, by what was compared. Raise FileExistsError as
    :func:`check_place`, and ValueError if the format can't hold the model, weights are not finite, also after rounding,
    or a comparison fails.
    """
    layout, settings = layout or LAYOUTS["litevae"](), settings or ExportSettings()
    title = Path(place).absolute().name
    check_place(Path(place), layout.suffix, settings.force)
    place = Path(place).resolve()  # the goal of a link is replaced, not the link
    if reason := layout.misfit(model):
        raise ValueError(reason)
    out, differences = _as_exported(model, DTYPES[settings.dtype], settings.fold)
    with no_empty_folders(place.parent), folder_beside(place) as beside:
        partial = beside / place.name
        try:
            layout.write(out, partial)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{place}: not written: {error}") from error
        if settings.onnx:
            differences |= export_onnx(out, partial)
        if not layout.suffix:
            provenance = provenance or Provenance(title)
            if provenance.metrics is not None:
                shutil.copyfile(provenance.metrics, partial / "metrics.json")
            card = model_card(out, layout, title, provenance, settings.onnx)
            (partial / CARD_NAME).write_text(card, encoding="utf-8")
        differences |= _compare(out, layout, partial)
        if place.is_dir() and (others := _names(place) - _names(partial) - WRITTEN):
            raise FileExistsError(
                f"{place}: `force` would delete {', '.join(sorted(others))}, no part of an export"
            )
        _replace(partial, place)
    return differences


def check_place(place: Path, suffix: str = "", force: bool = False) -> None:
    """Check that an export can be written to a place: one file of this suffix, or a folder if it is empty.

    Raise FileExistsError for what may not be replaced, and ValueError for a name that does not suit the format.
    """
    parent, holds_something = (
        nearest_folder(place.absolute().parent),
        place.is_dir() and any(place.iterdir()),
    )
    if suffix and (place.is_dir() or place.suffix != suffix):
        raise ValueError(f"{place}: this format is one file: name it, as in vae{suffix}")
    if not suffix and place.suffix in {layout.suffix for layout in LAYOUTS.values()} - {""}:
        raise ConfigError(
            f"{place}: names a file, but this format is a folder; `format` ldm is one file"
        )
    if not parent.is_dir() or (place.is_file() and not suffix):
        raise FileExistsError(f"{place}: {place if parent.is_dir() else parent} is a file")
    if place.is_dir() and place.samefile(Path.cwd()):
        raise FileExistsError(f"{place}: the current folder: name a new folder in it")
    if place.resolve().is_mount():
        raise FileExistsError(
            f"{place}: a mount point, which can't be replaced: name a new folder in it"
        )
    if holds_something and not _is_export(place):
        raise FileExistsError(
            f"{place}: not empty, and not an export: `force` replaces exports only, which hold no folder"
        )
    if (holds_something or place.is_file()) and not force:
        raise FileExistsError(f"{place}: exists: `force` replaces it")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _is_export(folder: Path) -> bool:
    """Recognise our exports, which have no folders; in a format of others by the card, which a download lacks."""
    if any(path.is_dir() for path in folder.iterdir()):
        return False
    return bool(_own_card(folder)) or class_in(folder) == CLASS_NAME


def _own_card(folder: Path) -> str:
    """The text of the model card in one of our exports; empty for any other folder."""
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return text if MADE_WITH in text else ""


def _as_exported(
    model: LiteVAE, dtype: torch.dtype, fold: bool
) -> tuple[LiteVAE, dict[str, float]]:
    """Fold and round a model in float32; also return by how much folding changed it."""
    differences: dict[str, float] = {}
    out = model.eval()
    if fold and not model.folded:
        out = model.fold().eval()
        differences["folded"] = _difference("folded", model, out.moments, out.decode)
    rounded = out if dtype == torch.float32 else copy.deepcopy(out).to(dtype)
    exact = {
        name: buffer for name, buffer in out.named_buffers() if "running_" in name
    }  # FLUX.2's factors
    rounded.load_state_dict(exact, strict=False, assign=True)
    for one, kind in ((out, torch.float32), (rounded, dtype)):
        if broken := [
            name for name, tensor in one.state_dict().items() if not tensor.isfinite().all()
        ]:
            raise ValueError(
                f"{len(broken)} tensors have values that are not finite in {kind}: {broken[0]}, ..."
            )
    return rounded, differences


def _compare(model: LiteVAE, layout: Layout, path: Path) -> dict[str, float]:
    """Compare what was written with the model: tensors, what a diffusion model has to know, and outputs."""
    written, expected = layout.read(path), layout.tensors(model)
    for name in {*written, *expected}:
        a, b = written.get(name), expected.get(name)
        if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b.cpu()):
            raise ValueError(
                f"{path}: {name} differs from what was written: is the disk full, or broken?"
            )
    differences: dict[str, float] = {}
    for loader, moments, decode, for_diffusion in layout.load(path, model):
        known = model.for_diffusion if for_diffusion is None else for_diffusion
        if wrong := [name for name, value in model.for_diffusion.items() if known[name] != value]:
            raise ValueError(f"{path}: {', '.join(wrong)} differs from what was written")
        differences[loader] = _difference(loader, model, moments, decode)
    return differences


Function = Callable[[Tensor], Tensor]


@torch.no_grad()
def _difference(what: str, model: LiteVAE, moments: Function, decode: Function) -> float:
    """Compare moments and reconstructions of an image of noise, in float32: half precision would hide differences."""
    whole = model if dtype_of(model) == torch.float32 else copy.deepcopy(model).float()
    shape = (1, model.in_channels, 4 * model.downscale, 4 * model.downscale)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device_of(model)) * 2 - 1
    own = whole.moments(x)
    z = own.chunk(2, dim=1)[0]
    compared = (
        z.shape[1] if whole.deterministic else None
    )  # log-variances of -30 would hide what the means are
    pairs = ((own[:, :compared], moments(x)[:, :compared]), (whole.decode(z), decode(z)))
    difference = float(torch.stack([(m - n).abs().max() / m.abs().max() for m, n in pairs]).max())
    if not difference <= TOLERANCE:  # also where it is not a number
        raise ValueError(
            f"{what}, the result differs by {difference:.1e} of the largest value: nothing is written"
        )
    return difference


def _replace(partial: Path, place: Path) -> None:
    """Move an export to its place; an old folder is removed only after that."""
    old = partial.with_name(f"{partial.name}.old")
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        if place.is_dir():
            place.replace(old)
        partial.replace(place)
    except (OSError, KeyboardInterrupt):
        if old.exists() and not place.exists():
            old.replace(place)
        raise


def _metrics_of(target: Target, model: Autoencoder, notes: list[str]) -> Path | None:
    """Find metrics.json beside a target; note if it is about other weights, as of a run's past, and so left out."""
    metrics = _folder_of(target) / "metrics.json"
    if not metrics.is_file():
        return None
    rows = [] if target.run is None else Results.read(metrics).rows
    about = None
    if rows and (RAW in rows[0].target) != target.raw:
        about = f"{rows[0].target}, not {target.name}"
    elif rows and rows[0].weights not in (None, tensors_sum(model.state_dict())):
        about = "earlier weights: evaluate again"
    if about is not None:
        notes.append(f"{metrics} is left out: it is about {about}")
    return metrics if about is None else None


def _folder_of(target: Target) -> Path:
    """The folder of a run, an export or a shipped model; of another target one that need not exist."""
    given = target.given.removesuffix(RAW).removeprefix(DIFFUSERS)
    return (
        target.run.path
        if target.run
        else shipped_folder(given)
        if given.startswith(SHIPPED)
        else Path(given)
    )


def _stated(card: str) -> tuple[str | None, str | None, str | None]:
    """The licence, the training data and the terms of the weights that a card states."""
    licence = re.search(r"^license: (?!unknown)(.+)$", card, re.MULTILINE)
    data = re.search(r"^## Training data\n+(.+?)\s*(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    words = f"Weights: {re.escape(licence[1])}" if licence else "Weights"
    terms = re.search(
        rf"^## Licence\s+({words}\b.+?)\s+open-LiteVAE, the code", card, re.MULTILINE | re.DOTALL
    )
    return licence and licence[1], data and data[1], terms and terms[1]


def _set_factors(
    model: LiteVAE,
    loaded: Autoencoder,
    target: Target,
    settings: ExportSettings,
    in_units: bool,
    notes: list[str],
) -> str | None:
    """Set the factors that the settings give; return where they are from, None if they are not measured."""
    per_channel = model.latents_mean is not None
    given = {name: value for name in FACTORS if (value := getattr(settings, name)) is not None}
    if given and (in_units or per_channel):
        has = (
            "latents in a diffusion model's units"
            if in_units
            else "latents_mean and latents_std per channel"
        )
        raise ConfigError(
            f"{target.given}: has {has}: leave out {', '.join(f'`{name}`' for name in given)}"
        )
    if in_units:
        return None
    if settings.latents is not None:
        file = _factors_file(settings.latents)
        measured = read_factors(file, target.name, tensors_sum(loaded.state_dict()))
        model.scaling_factor, model.shift_factor = measured[:2]
        if measured.images is not None and measured.images < FEW_IMAGES:
            notes.append(
                f"the factors are measured on {measured.images} images: {FEW_IMAGES} and more are certain"
            )
        return f"measured by olvae {'latents' if file.name == 'latents.json' else 'encode'}"
    if given:
        model.set_for_diffusion(given)
        return "given to olvae export"
    if not loaded.factors_known:
        defaults = f"{model.scaling_factor:g} and {model.shift_factor:g} are diffusers' defaults, Stable Diffusion 1's"
        notes.append(
            f"{target.given} holds no factors: {defaults}; others need `scaling_factor` and `shift_factor`"
        )
        return "diffusers' default, the file holds none"
    if (model.scaling_factor, model.shift_factor) != (1.0, 0.0) or per_channel:
        return f"from {target.name}"
    notes.append(
        "scaling factor 1 and shift factor 0 are not measured: olvae latents does, then export with `latents`"
    )
    return None


def _factors_file(given: Path) -> Path:
    given = Path(find_run(given))
    for file in (given, given / "latents.json", given / "stats.json"):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"`latents` {given}: not what olvae latents or olvae encode wrote, nor its folder"
    )


class Factors(NamedTuple):
    """Factors as ``olvae latents`` or ``olvae encode`` measured them, on so many images, if that is known."""

    scaling: float
    shift: float
    images: int | None = None


def read_factors(path: Path, target: str, weights: str | None = None) -> Factors:
    """Read a target's scaling and shift factor from latents.json of olvae latents or stats.json of olvae encode.

    Raise ValueError if the file has no factors of this target, or those of other weights by their checksum.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = content.get("results", [{**content, "diffusion": content}])
        found = {
            result["target"]: [float(result["diffusion"][key]) for key in FACTORS[1:]]
            for result in results
        }
        sums = {result["target"]: result.get("weights") for result in results}
        images = content.get("count", (content.get("data") or {}).get("n"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not written by olvae latents or olvae encode: {error!r}"
        ) from error
    if target not in found and len(found) != 1:
        raise ValueError(
            f"{path}: has no factors of {target}, but of {', '.join(found) or 'nothing'}"
        )
    name = target if target in found else next(iter(found))
    if weights is not None and sums[name] not in (None, weights):
        raise ValueError(f"{path}: of latents that {name} made, with other weights than {target}'s")
    scaling, shift = found[name]
    return Factors(scaling, shift, images)


# The model card


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
    results = None if provenance.metrics is None else Results.read(provenance.metrics, [HALF])
    rows = results.rows if results else []
    family = [
        row
        for row in rows
        if row.target == rows[0].target or row.target.startswith(f"{rows[0].target}, ")
    ]
    return environment.get_template("card.md.jinja").render(
        model=model,
        usage=layout.usage(model),
        notes=list(layout.notes(model)),
        in_units=layout.in_units(model),
        title=title,
        made_with=MADE_WITH,
        provenance=provenance,
        kind=None if (classes := family_of(model)) is None else classes.kind(model),
        halves={
            name: (type(half).__name__, f"{count_parameters(half) / 1e6:.2f}")
            for name, half in {"encoder": model.encoder, "decoder": model.decoder}.items()
        },
        weights=_weights(model, provenance),
        teacher=_teacher(provenance.config),
        base_models=_base_models(provenance.config),
        results=results,
        scores=scores(results) if results else {},
        protocol=results.protocol if results else {},
        precisions=list(HALF.lines(family)),
        data=_data(provenance),
        onnx=onnx,
    )


def _weights(model: LiteVAE, provenance: Provenance) -> str:
    kinds = [str(dtype_of(model)).removeprefix("torch.")]
    averaged = entry_of(provenance.config, "model.params.use_ema")
    if provenance.raw or averaged is not None:
        kinds.append(
            "averaged over training (EMA)" if averaged and not provenance.raw else "as trained"
        )
    if model.folded:
        kinds.append("self-modulated convolutions folded into ordinary ones")
    return ", ".join(kinds)


def _teacher(config: Mapping[str, Any]) -> str | None:
    """Name the teacher of a distilled model; a folder of the user's is named without its path."""
    teacher = str(entry_of(config, TEACHER) or "")
    return _hub_id(teacher, config) or Path(teacher.removeprefix(DIFFUSERS)).name or None


def _hub_id(target: str, config: Mapping[str, Any]) -> str | None:
    """The repository of the hub that a run's TARGET names; None for something else, which may be gone by now."""
    place = place_in(target)
    here = Path(place).exists() or place in settings_of(config).paths.values()
    return place if is_hub_id(place) and not here else None


def _base_models(config: Mapping[str, Any]) -> list[str]:
    """The hub's models that a run, or a run before it that is still here, started from or learned from."""
    weights = settings_of(config).weights or ""
    found = dict.fromkeys(
        filter(None, (_hub_id(each, config) for each in (weights, str(entry_of(config, TEACHER)))))
    )
    path = Path(weights).resolve()
    before = run_of(path) if path.is_file() else Run(path)
    with contextlib.suppress(ConfigError):  # of a run that can't be continued, either
        return list(
            found | dict.fromkeys(_base_models(config_of(before)) if weights and before else ())
        )
    return list(found)


def _data(provenance: Provenance) -> str:
    config = provenance.config
    if not (target := entry_of(config, "data.target")):
        return provenance.data or "Unknown."
    text = [f"`{plain(str(target))}`"]
    if root := entry_of(config, "data.params.root"):
        text.append(plain(Path(str(root)).name))
    if size := entry_of(config, "data.params.size"):
        text.append(f"crops of {Sides.of(size)}")
    if steps := entry_of(config, "lightning.trainer.max_steps"):
        text.append(plain(f"up to {steps} steps"))  # it may have been stopped
    if before := settings_of(config).weights:
        file = Path(before)
        name = file.parents[1].name if file.parent.name == "checkpoints" else file.name
        text.append(f"from the weights of {plain(name)}")
    return f"{', '.join(text)}."
