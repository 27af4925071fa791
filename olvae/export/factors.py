"""Scaling factors of an export: read from measured latents, set on the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from olvae.checkpoint import tensors_sum
from olvae.config import ConfigError
from olvae.export.formats import FACTORS
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.loader import Target
from olvae.modules.moments import FEW_IMAGES
from olvae.runs import find_run


class Factors(NamedTuple):
    """Factors that ``olvae latents`` or ``olvae encode`` measured, on this many images if known."""

    scaling: float
    shift: float
    images: int | None = None


def read_factors(path: Path, target: str, weights: str | None = None) -> Factors:
    """Read a target's factors from latents.json of olvae latents or stats.json of olvae encode.

    Raise ValueError if the file has no factors of this target, or they are of other weights, by the
    weights' checksum.
    """
    # latents.json has a result for each target; stats.json is about one.
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = content.get("results", [{**content, "diffusion": content}])
        found = {}
        for result in results:
            found[result["target"]] = [float(result["diffusion"][key]) for key in FACTORS[1:]]
        sums = {result["target"]: result.get("weights") for result in results}
        images = content.get("count", (content.get("data") or {}).get("n"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not written by olvae latents or olvae encode: {error!r}"
        ) from error

    # A file about one target serves under any name, if its weights are the same.
    if target not in found and len(found) != 1:
        raise ValueError(
            f"{path}: has no factors of {target}, but of {', '.join(found) or 'nothing'}"
        )
    name = target if target in found else next(iter(found))
    if weights is not None and sums[name] not in (None, weights):
        raise ValueError(f"{path}: of latents that {name} made, with other weights than {target}'s")
    scaling, shift = found[name]
    return Factors(scaling, shift, images)


def find_factors_file(given: Path) -> Path:
    """Find the file with the factors: ``given`` itself, or in a run or a folder of latents."""
    given = Path(find_run(given))
    for file in (given, given / "latents.json", given / "stats.json"):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"`latents` {given}: not what olvae latents or olvae encode wrote, nor its folder"
    )


def set_factors(
    model: LiteVAE,
    loaded: Autoencoder,
    target: Target,
    given: Mapping[str, Any],
    in_units: bool,
    notes: list[str],
) -> str | None:
    """Set the factors of an export, from the settings in FACTORS that are ``given``.

    ``in_units`` says that latents are in a diffusion model's units, so that there are none. Return
    where the factors are from, None if they are not measured; then add a note.
    """
    # Latents that are scaled already, or per channel, take no pair of factors.
    per_channel = model.latents_mean is not None
    if given and (in_units or per_channel):
        has = "latents_mean and latents_std per channel"
        if in_units:
            has = "latents in a diffusion model's units"
        settings = ", ".join(f"`{name}`" for name in given)
        raise ConfigError(f"{target.given}: has {has}: leave out {settings}")
    if in_units:
        return None

    # Given: measured in a file, or numbers.
    if "latents" in given:
        file = find_factors_file(given["latents"])
        measured = read_factors(file, target.name, tensors_sum(loaded.state_dict()))
        model.scaling_factor = measured.scaling
        model.shift_factor = measured.shift
        if measured.images is not None and measured.images < FEW_IMAGES:
            notes.append(
                f"the factors are measured on {measured.images} images: with fewer than "
                f"{FEW_IMAGES}, other images give noticeably other factors"
            )
        if file.name == "latents.json":
            return "measured by olvae latents"
        return "measured by olvae encode"
    if given:
        model.set_for_diffusion(given)
        return "given to olvae export"

    # Not given: what the model has; 1 and 0 stand for no measurement.
    if not loaded.factors_known:
        notes.append(
            f"{target.given} holds no factors: {model.scaling_factor:g} and {model.shift_factor:g} "
            "are diffusers' defaults, Stable Diffusion 1's; others need `scaling_factor` and "
            "`shift_factor`"
        )
        return "diffusers' default, the file holds none"
    if (model.scaling_factor, model.shift_factor) != (1.0, 0.0) or per_channel:
        return f"from {target.name}"
    notes.append(
        "scaling factor 1 and shift factor 0 are not measured: olvae latents does, then export "
        "with `latents`"
    )
    return None
