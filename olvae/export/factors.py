"""Scaling factors of an export: read from measured latents, set on the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from olvae.checkpoint import tensors_sum
from olvae.config import ConfigError
from olvae.data.shards.latent_files import STATS
from olvae.export.formats import FACTORS, Layout
from olvae.files import counted
from olvae.models.autoencoder import Autoencoder, LiteVAE
from olvae.models.loading.from_diffusers import PER_CHANNEL
from olvae.models.loading.loader import Target
from olvae.models.spec import UNMEASURED, check_factors
from olvae.modules.moments import FEW_IMAGES
from olvae.modules.others.tiny import TinyEncoder
from olvae.runs import find_run


class Factors(NamedTuple):
    """Factors that ``olvae latents`` or ``olvae encode`` measured, on this many images if known."""

    scaling: float
    shift: float
    images: int | None = None
    # Of each channel; None where the file has none.
    mean: list[float] | None = None
    std: list[float] | None = None


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
            numbers = result["diffusion"]
            pair = [float(numbers[key]) for key in FACTORS[1:]]
            channels = []
            for key in PER_CHANNEL:
                several = numbers.get(key)
                channels.append(several and [float(number) for number in several])
            found[result["target"]] = (pair, channels)
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
    (scaling, shift), (mean, std) = found[name]
    for mistake in check_factors({"scaling_factor": scaling, "shift_factor": shift}, 0):
        raise ValueError(f"{path}: {mistake}")
    return Factors(scaling, shift, images, mean, std)


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
    layout: Layout,
    notes: list[str],
    by_channel: bool = False,
) -> str | None:
    """Set the factors of an export, from the settings in FACTORS that are ``given``.

    ``by_channel`` takes ``latents_mean`` and ``latents_std`` of the file in place of the pair. A
    layout whose latents are in a diffusion model's units has no factors. Return where they are
    from, None if they are not measured; then add a note.
    """
    # Latents that are scaled already, or per channel, take no pair of factors.
    in_units = layout.in_units(model)
    per_channel = model.latents_mean is not None
    if given and (in_units or (per_channel and not by_channel)):
        has = "latents_mean and latents_std per channel"
        if in_units:
            has = "latents in a diffusion model's units"
        settings = ", ".join(f"`{name}`" for name in given)
        remedy = f"leave out {settings}"
        if "latents" in given and not in_units:
            remedy += ", or add `per_channel`"
        raise ConfigError(f"{target.given}: has {has}: {remedy}")
    if in_units:
        return None

    # Given: measured in a file, or numbers.
    if "latents" in given:
        file = find_factors_file(given["latents"])
        measured = read_factors(file, target.name, tensors_sum(loaded.state_dict()))
        if by_channel:
            _set_per_channel(model, layout, measured, file)
        else:
            model.scaling_factor = measured.scaling
            model.shift_factor = measured.shift

        # What a user has to know about them.
        if measured.std is not None and file.name == STATS and not by_channel:
            notes.append(
                "one factor for all channels: a diffusion model that was trained on these shards "
                "by LatentSource(per_channel=True) needs `per_channel`"
            )
        if measured.images is not None and measured.images < FEW_IMAGES:
            notes.append(
                f"the factors are measured on {counted(measured.images, 'image')}: with fewer than "
                f"{FEW_IMAGES}, other images give noticeably other factors"
            )
        command = "latents" if file.name == "latents.json" else "encode"
        return f"measured by olvae {command}"
    if given:
        model.set_for_diffusion(given)
        return "given to olvae export"

    # Not given: what the model has.
    origin, note = _own_factors(model, loaded, target)
    notes.extend(note)
    return origin


def _own_factors(
    model: LiteVAE, loaded: Autoencoder, target: Target
) -> tuple[str | None, list[str]]:
    """Find where a model's own factors are from, None if they are not measured; and a note."""
    # The config's are of the weights that training started from.
    per_channel = model.latents_mean is not None
    moved = f"{target.given}: training has moved the latents since its factors were measured"
    if target.factors_outdated and per_channel:
        return "of the weights that it started from", [
            f"{moved}: latents_mean and latents_std are of the weights that it started from; "
            "olvae latents measures new ones, then export with `latents` and `per_channel`"
        ]
    if target.factors_outdated:
        return None, [
            f"{moved}: they are left out; olvae latents measures new ones, then export with "
            "`latents`"
        ]

    # 1 and 0 stand for no measurement.
    if not loaded.factors_known:
        return "diffusers' default, the file holds none", [
            f"{target.given} holds no factors: {model.scaling_factor:g} and {model.shift_factor:g} "
            "are diffusers' defaults, Stable Diffusion 1's; others need `scaling_factor` and "
            "`shift_factor`"
        ]
    if (model.scaling_factor, model.shift_factor) != (1.0, 0.0) or per_channel:
        return f"from {target.name}", []
    if isinstance(model.encoder, TinyEncoder):
        return None, [
            "scaling factor 1 and shift factor 0: right for latents that started from TAESD's or "
            "TAEF2's, which are in a diffusion model's units; others have to be measured: olvae "
            "latents does, then export with `latents`"
        ]
    return None, [
        "scaling factor 1 and shift factor 0 are not measured: olvae latents does, then export "
        "with `latents`"
    ]


def _set_per_channel(model: LiteVAE, layout: Layout, measured: Factors, file: Path) -> None:
    """Give each channel mean 0 and deviation 1, as LatentSource does with ``per_channel``.

    ConfigError if the format has no place for that, ValueError if the file has no such numbers.
    """
    config = layout.config(model)
    if config is not None and PER_CHANNEL[0] not in config:
        raise ConfigError(
            f"`per_channel`: {config.get('_class_name', 'this format')} has no place for "
            f"{' and '.join(PER_CHANNEL)}: `format` litevae has"
        )
    if measured.mean is None or measured.std is None:
        raise ValueError(f"{file}: has no {' and '.join(PER_CHANNEL)}: measure again")
    units = {**UNMEASURED, **dict(zip(PER_CHANNEL, (measured.mean, measured.std), strict=True))}
    for mistake in check_factors(units, model.latent_channels):
        raise ValueError(f"{file}: {mistake}")
    model.set_for_diffusion(units)
