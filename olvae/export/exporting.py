"""Export an autoencoder with a model card: write beside its place, load back, compare, move."""

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from olvae.checkpoint import read_checkpoint, tensors_sum
from olvae.config import ConfigError
from olvae.devices import DTYPES
from olvae.evaluation.results import Results
from olvae.export.factors import find_factors_file, set_factors
from olvae.export.formats import FACTORS, LAYOUTS, Layout, find_layout
from olvae.export.model_card import CARD_NAME, Provenance, model_card, own_card, read_card
from olvae.export.onnx import DECODER, ENCODER, export_onnx
from olvae.files import (
    folder_beside,
    nearest_folder,
    no_empty_folders,
    put_back,
    replace_folder,
)
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.families import drop_factors, family_of
from olvae.models.loading.loader import Target
from olvae.models.loading.targets import RAW
from olvae.models.spec import CLASS_NAME, CONFIG_NAME, WEIGHTS_NAME, check_factors, class_in
from olvae.models.target_names import DIFFUSERS, SHIPPED, shipped_folder
from olvae.models.weight_files import LOADER_NAME, locate_weights
from olvae.modules.base import device_of, dtype_of
from olvae.runs import settings_of

# Largest difference, relative to the largest value: folded and video networks reorder sums.
TOLERANCE = 1e-5

# Files that some export writes.
WRITTEN = {CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, LOADER_NAME, "metrics.json", ENCODER, DECODER}

ONE_FILE = {"license": "one file has no model card"}


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export."""

    # A name of olvae.export.formats.LAYOUTS, or the path of a Layout of your own; by default
    # diffusers for networks of its classes, else litevae.
    format: str | None = None
    # To round the weights to, a name of olvae.devices.DTYPES.
    dtype: str = "float32"
    # Write the self-modulated convolutions as ordinary ones.
    fold: bool = False
    # Also write encoder.onnx and decoder.onnx, in the folder or, named after it, beside the file.
    onnx: bool = False
    scaling_factor: float | None = None
    shift_factor: float | None = None
    # Both factors: what olvae latents or olvae encode wrote, a file or its folder.
    latents: Path | None = None
    # Of the latents, take a mean and a deviation for each channel in place of both factors.
    per_channel: bool = False
    # The weights' licence, by the hub's name for it.
    license: str | None = None
    # Replace the export that is there.
    force: bool = False

    def __post_init__(self) -> None:
        given = self.given_factors()
        latents = given.pop("latents", None)
        if latents is not None and given:
            raise ConfigError(
                "`latents` has both factors: leave out `scaling_factor` and `shift_factor`"
            )
        if self.per_channel and latents is None:
            raise ConfigError("`per_channel` takes its numbers from `latents`: give both")
        for mistake in check_factors(given, 0):
            raise ConfigError(mistake)
        if self.onnx and self.dtype == "bfloat16":
            raise ConfigError(
                "`onnx` writes float32, or float16: leave out `dtype` bfloat16, or `onnx`"
            )

    def given_factors(self) -> dict[str, Any]:
        """Collect the settings of :data:`FACTORS` that are given, by name."""
        values = {name: getattr(self, name) for name in FACTORS}
        return {name: value for name, value in values.items() if value is not None}

    def layout(self, name: str) -> Layout:
        """Find a format; raise ConfigError if there is none, or a setting means nothing in it."""
        layout = find_layout(name)
        refused = dict(layout.refused)
        if layout.suffix:
            refused |= ONE_FILE
        for setting, why in refused.items():
            if getattr(self, setting) not in (None, False):
                raise ConfigError(f"`{setting}` does not go with `format` {name}: {why}")
        return layout

    def check(self, place: Path) -> None:
        """Check what can be checked before the model is loaded."""
        suffix = ""
        if self.format is not None:
            suffix = self.layout(self.format).suffix
        if self.latents is not None:
            find_factors_file(self.latents)
        check_place(place, suffix, self.force)


def export_target(
    target: Target, place: Path, settings: ExportSettings
) -> tuple[dict[str, float], list[str]]:
    """Load an autoencoder and :func:`export` it with its factors, and its numbers in the card.

    Also return notes for the user. Raise ConfigError where the format or a setting does not suit
    the model.
    """
    # Before loading, which takes time: the place, the settings, and whether there is a result yet.
    put_back(place.resolve())
    settings.check(place)
    half = settings_of(target.config).untrained
    if half:
        raise ConfigError(
            f"{target.given}: its {half} has never been trained: train it first, by distil/{half}"
        )

    # The model, and a format that can hold it.
    loaded = target.load()
    model = loaded.as_litevae(target.given)
    # Diffusers' classes can't hold a decoder at 2x.
    usual = "litevae" if family_of(model) is None or model.enlarge > 1 else "diffusers"
    layout = settings.layout(settings.format or usual)
    reason = layout.misfit(model)
    if reason:
        raise ConfigError(f"{target.given}: {reason}")
    if target.factors_outdated and not layout.in_units(model):
        drop_factors(model)

    # Its factors, unless the format has no place for them; then what the format says of them.
    notes: list[str] = []
    factors_from = None
    if "latents" not in layout.refused:
        factors_from = set_factors(
            model, loaded, target, settings.given_factors(), layout, notes, settings.per_channel
        )
    notes += layout.notes(model)

    # The card cites the target's numbers and what its own card states, but for a new licence.
    metrics = None
    licence, data, terms = None, None, None
    if not layout.suffix:
        metrics = _find_metrics(target, loaded, notes)
        licence, data, terms = read_card(own_card(_folder_of(target)))
    if settings.license:
        licence, terms = settings.license, None

    # The steps after which a run's weights were saved; the tensors stay in the file.
    steps = None
    if target.run is not None:
        weights = locate_weights(target.given.removesuffix(RAW))
        noted = read_checkpoint(weights, check=False).get("global_step")
        steps = noted if isinstance(noted, int) else None
    provenance = Provenance(
        target.name,
        target.config,
        metrics,
        target.raw,
        licence,
        factors_from,
        data,
        terms,
        steps,
    )
    return export(model, place, layout, settings, provenance), notes


def export(
    model: LiteVAE,
    place: str | Path,
    layout: Layout | None = None,
    settings: ExportSettings | None = None,
    provenance: Provenance | None = None,
) -> dict[str, float]:
    """Write an export beside its place, load it back, compare, move it; on failure leave nothing.

    Tensors are compared bit for bit, outputs of the format's loaders to :data:`TOLERANCE`. A link
    stays a link. Folders get a model card, and the metrics.json that it cites. The model is in
    float32, with its factors; of the settings only ``dtype``, ``fold``, ``onnx`` and ``force`` are
    used; the default layout is litevae.

    Return the differences, relative to the largest value, by what was compared. Raise
    FileExistsError as :func:`check_place`, and ValueError if the format can't hold the model,
    weights are not finite, also after rounding, or a comparison fails.
    """
    layout = layout or LAYOUTS["litevae"]()
    settings = settings or ExportSettings()
    title = Path(place).absolute().name
    put_back(Path(place).resolve())
    check_place(Path(place), layout.suffix, settings.force)
    place = Path(place).resolve()  # the goal of a link is replaced, not the link

    prefix = f"{place.stem}_" if layout.suffix else ""
    graphs = _graphs_beside(place, prefix, settings) if prefix else []
    reason = layout.misfit(model)
    if reason:
        raise ValueError(reason)
    out, differences = _as_exported(model, DTYPES[settings.dtype], settings.fold)

    with no_empty_folders(place.parent), folder_beside(place) as beside:
        # Write the weights and what belongs to them.
        partial = beside / place.name
        try:
            layout.write(out, partial)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{place}: not written: {error}") from error
        if settings.onnx:
            traced = in_diffusion_units(out) if layout.in_units(out) else out
            differences |= export_onnx(traced, beside if prefix else partial, prefix)
        if not layout.suffix:
            provenance = provenance or Provenance(title)
            if provenance.metrics is not None:
                shutil.copyfile(provenance.metrics, partial / "metrics.json")
            card = model_card(out, layout, title, provenance, settings.onnx)
            (partial / CARD_NAME).write_text(card, encoding="utf-8")

        # Load it back, and only then replace what is there, if nothing else would be lost.
        differences |= _compare(out, layout, partial)
        if place.is_dir():
            others = _names(place) - _names(partial) - WRITTEN
            if others:
                raise FileExistsError(
                    f"{place}: `force` would delete {', '.join(sorted(others))}, no part of an "
                    "export"
                )
        replace_folder(partial, place)
        for graph in graphs:
            (beside / graph.name).replace(graph)
    return differences


def check_place(place: Path, suffix: str = "", force: bool = False) -> None:
    """Check that an export can be written to a place: a file of this suffix, or an empty folder.

    Raise FileExistsError for what may not be replaced, and ValueError for a name that does not suit
    the format.
    """
    parent = nearest_folder(place.absolute().parent)
    holds_something = place.is_dir() and any(place.iterdir())

    # The name has to suit the format.
    if suffix and (place.is_dir() or place.suffix != suffix):
        raise ValueError(f"{place}: this format is one file: name it, as in vae{suffix}")
    if not suffix and place.suffix in {layout.suffix for layout in LAYOUTS.values()} - {""}:
        raise ConfigError(
            f"{place}: names a file, but this format is a folder; `format` ldm is one file"
        )

    # An export is moved to its place as a whole, which some places do not allow.
    if not parent.is_dir():
        raise FileExistsError(f"{place}: {parent} is a file")
    if place.is_file() and not suffix:
        raise FileExistsError(f"{place}: {place} is a file")
    if place.is_dir() and place.samefile(Path.cwd()):
        raise FileExistsError(f"{place}: the current folder: name a new folder in it")
    if place.resolve().is_mount():
        raise FileExistsError(
            f"{place}: a mount point, which can't be replaced: name a new folder in it"
        )

    # What is there is replaced only if it is an export, and the user wants it. An export holds no
    # folder, and our class or, in another format, our card, which a download of that format lacks.
    if holds_something:
        holds_folder = any(path.is_dir() for path in place.iterdir())
        if holds_folder or not (own_card(place) or class_in(place) == CLASS_NAME):
            raise FileExistsError(
                f"{place}: not empty, and not an export: `force` replaces exports only, which hold "
                "no folder"
            )
    if (holds_something or place.is_file()) and not force:
        raise FileExistsError(f"{place}: exists: `force` replaces it")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _as_exported(
    model: LiteVAE, dtype: torch.dtype, fold: bool
) -> tuple[LiteVAE, dict[str, float]]:
    """Fold and round a model in float32; also return by how much folding changed it."""
    differences: dict[str, float] = {}
    out = model.eval()
    if fold and not model.folded:
        out = model.fold().eval()
        differences["folded"] = _difference("folded", model, out.moments, out.decode)

    # Round all but FLUX.2's factors, which are buffers of a norm.
    rounded = out if dtype == torch.float32 else copy.deepcopy(out).to(dtype)
    exact = {name: buffer for name, buffer in out.named_buffers() if "running_" in name}
    rounded.load_state_dict(exact, strict=False, assign=True)

    for one, kind in ((out, torch.float32), (rounded, dtype)):
        weights = one.state_dict()
        broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(
                f"{len(broken)} tensors have values that are not finite in {kind}: {broken[0]}, ..."
            )
    return rounded, differences


def _graphs_beside(place: Path, prefix: str, settings: ExportSettings) -> list[Path]:
    """The ONNX files beside an export that is one file; FileExistsError if one may not go there."""
    graphs = [place.with_name(f"{prefix}{name}") for name in (ENCODER, DECODER)]
    for graph in graphs:
        if graph.exists() and not settings.onnx:
            warnings.warn(
                f"{graph}: of an earlier export, and not replaced: add `onnx`, or delete it",
                stacklevel=2,
            )
        elif graph.exists() and not settings.force:
            raise FileExistsError(f"{graph}: exists: `force` replaces it")
    return graphs if settings.onnx else []


def in_diffusion_units(model: LiteVAE) -> LiteVAE:
    """Copy a tiny autoencoder, with latents in a diffusion model's units."""
    traced = copy.deepcopy(model)
    n_z = traced.latent_channels
    for half in (traced.encoder, traced.decoder):
        half.use_latents(torch.zeros(n_z), torch.ones(n_z))
    return traced


def _compare(model: LiteVAE, layout: Layout, path: Path) -> dict[str, float]:
    """Compare what was written with the model: tensors, a diffusion model's numbers, outputs."""
    written = layout.read(path)
    expected = layout.tensors(model)
    for name in {*written, *expected}:
        a = written.get(name)
        b = expected.get(name)
        if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b.cpu()):
            raise ValueError(
                f"{path}: {name} differs from what was written: is the disk full, or broken?"
            )

    differences: dict[str, float] = {}
    own = model.for_diffusion
    for loader, moments, decode, for_diffusion in layout.load(path, model):
        known = own if for_diffusion is None else for_diffusion
        wrong = [name for name, value in own.items() if known[name] != value]
        if wrong:
            raise ValueError(f"{path}: {', '.join(wrong)} differs from what was written")
        differences[loader] = _difference(loader, model, moments, decode)
    return differences


NetworkFunction = Callable[[Tensor], Tensor]


@torch.no_grad()
def _difference(
    what: str, model: LiteVAE, moments: NetworkFunction, decode: NetworkFunction
) -> float:
    """Compare moments and reconstructions of an image of noise, relative to the largest value."""
    # In float32: half precision would hide differences.
    whole = model if dtype_of(model) == torch.float32 else copy.deepcopy(model).float()
    shape = (1, model.in_channels, 4 * model.downscale, 4 * model.downscale)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device_of(model)) * 2 - 1
    own = whole.moments(x)
    z = own.chunk(2, dim=1)[0]

    # Deterministic networks have log-variances of -30, the largest values: compare the means alone.
    compared = z.shape[1] if whole.deterministic else None
    pairs = ((own[:, :compared], moments(x)[:, :compared]), (whole.decode(z), decode(z)))
    difference = float(torch.stack([(m - n).abs().max() / m.abs().max() for m, n in pairs]).max())
    if not difference <= TOLERANCE:  # also where it is not a number
        raise ValueError(
            f"{what}, the result differs by {difference:.1e} of the largest value: nothing is "
            "written"
        )
    return difference


def _find_metrics(target: Target, model: Autoencoder, notes: list[str]) -> Path | None:
    """Return the target's metrics.json; add a note and return None if it is about other weights."""
    metrics = _folder_of(target) / "metrics.json"
    if not metrics.is_file():
        return None
    # Only a run's own file can be out of date: training goes on beside it.
    if target.run is None:
        return metrics
    rows = Results.read(metrics).rows
    if not rows:
        return metrics
    first = rows[0]
    if (RAW in first.target) != target.raw:
        about = f"{first.target}, not {target.name}"
    elif first.weights not in (None, tensors_sum(model.state_dict())):
        about = "earlier weights: evaluate again"
    else:
        return metrics
    notes.append(f"{metrics} is left out: it is about {about}")
    return None


def _folder_of(target: Target) -> Path:
    """Return the folder of a run, an export or a shipped model; of others, perhaps no folder."""
    if target.run:
        return target.run.path
    given = target.given.removesuffix(RAW).removeprefix(DIFFUSERS)
    if given.startswith(SHIPPED):
        return shipped_folder(given)
    return Path(given)
