"""An autoencoder as a folder that this package, the hub and diffusers load, with a model card; whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from olvae.export.autoencoder_kl import KL_CLASS, compare_autoencoder_kl, reflects, write_autoencoder_kl
from olvae.export.compare import as_exported, check_equal, check_factors, check_tensors, distance
from olvae.export.diffusers_model import AutoencoderLiteVAE
from olvae.files import nearest
from olvae.metrics.registry import METRICS
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.stable_diffusion import is_stable_diffusion
from olvae.models.named import is_hub_id
from olvae.models.spec import CLASS_NAME, CONFIG_NAME, WEIGHTS_NAME, class_in
from olvae.modules.base import count_parameters

__all__ = ["Provenance", "check_empty", "export", "first_target", "model_card", "read_factors", "replace_folder"]


CARD_NAME = "README.md"

MADE_WITH = "made with open-LiteVAE"
"""In every model card: tells a stock folder of ours from one that somebody downloaded."""


@dataclass(frozen=True)
class Provenance:
    """Where exported weights are from, for the model card."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The training config, if there is one."""
    metrics: Path | None = None
    """The metrics.json to put beside the weights."""
    raw: bool = False
    licence: str | None = None
    """The weights' licence, by the hub's name for it."""
    factors_from: str | None = None


def check_empty(folder: Path, force: bool) -> None:
    """Raise FileExistsError if ``folder`` is not empty, unless it is an export that may be replaced, and if it can't be
    replaced in one step.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder}: this is a file")
    if not (place := nearest(folder.absolute().parent)).is_dir():
        raise FileExistsError(f"{folder}: {place} is a file")
    if folder.is_dir() and (folder.is_mount() or folder.samefile(Path.cwd())):
        raise FileExistsError(f"{folder}: the current folder, or a mount point: name a new folder in it")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not _is_export(folder):
        raise FileExistsError(f"{folder}: not empty, and not an export: --force replaces exports only")
    if not force:
        raise FileExistsError(f"{folder}: contains an export: --force replaces it")


def _is_export(folder: Path) -> bool:
    if class_in(folder) == KL_CLASS:
        card = folder / CARD_NAME
        return card.is_file() and MADE_WITH in card.read_text(encoding="utf-8", errors="replace")
    return class_in(folder) == CLASS_NAME


def export(
    model: LiteVAE,
    folder: str | Path,
    provenance: Provenance,
    dtype: torch.dtype = torch.float32,
    fold: bool = False,
    onnx: bool = False,
    force: bool = False,
    stock: bool = False,
) -> dict[str, float]:
    """Write config.json, the weights, a model card and the metrics; load it all back and compare; then move the folder.

    Tensors are compared bit for bit, outputs by this package and by diffusers to ``compare.TOLERANCE``.

    Args:
        model: in float32, with its scaling and shift factors.
        dtype: the dtype to round the weights to.
        fold: write the self-modulated convolutions as ordinary ones.
        onnx: also write encoder.onnx and decoder.onnx.
        force: replace the export in ``folder``.
        stock: write diffusers' own AutoencoderKL, for networks of Stable Diffusion's kind, not AutoencoderLiteVAE.

    Returns:
        The relative differences, by what was compared.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: a network is not of this package, AutoencoderKL can't express it, weights are non-finite, also after
            rounding, or a comparison fails.
        ModuleNotFoundError: ``onnx`` without the extra.
    """
    title = Path(folder).absolute().name
    folder = Path(folder).resolve()  # of a link, the folder that it leads to is replaced
    check_empty(folder, force)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=nearest(folder.parent)) as beside:
        partial = Path(beside) / folder.name
        out, differences = as_exported(model, dtype, fold)
        if stock:
            write_autoencoder_kl(out, partial)
        else:
            out.save_pretrained(partial)
        if onnx:
            from olvae.export.onnx import export_onnx  # needs an extra

            differences |= export_onnx(out, partial)
        if provenance.metrics is not None:
            shutil.copyfile(provenance.metrics, partial / "metrics.json")
        (partial / CARD_NAME).write_text(model_card(out, title, provenance, onnx, stock))
        differences |= compare_autoencoder_kl(out, partial) if stock else _compare(out, partial)
        replace_folder(partial, folder)
    return differences


def first_target(metrics: Path) -> str:
    """The first target of a metrics.json; in a run folder, the run.

    Raises:
        ValueError: it is not a metrics.json.
    """
    try:
        return str(json.loads(metrics.read_text())["results"][0]["target"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{metrics}: not a metrics.json of olvae evaluate: {type(error).__name__}: {error}") from error


def read_factors(path: str | Path, target: str, weights: str | None = None) -> tuple[float, float]:
    """The scaling and shift factors of a target in latents.json of ``olvae latents`` or stats.json of ``olvae encode``.

    Args:
        weights: the target's checksum, which stats.json has too.

    Raises:
        ValueError: it is something else, or has no factors of this target.
        OSError: it can't be read.
    """
    try:
        content = json.loads(Path(path).read_text())
        one = {"target": content.get("target"), "diffusion": content}
        factors = {
            result["target"]: (float(result["diffusion"]["scaling_factor"]), float(result["diffusion"]["shift_factor"]))
            for result in content.get("results", [one])
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: neither a latents.json of olvae latents nor a stats.json of olvae encode: "
            f"{type(error).__name__}: {error}"
        ) from error
    if weights is not None and content.get("weights", weights) != weights:
        raise ValueError(f"{path}: of latents that {content.get('target')} made, with other weights than {target}'s")
    if target in factors:
        return factors[target]
    if len(factors) == 1:
        return next(iter(factors.values()))
    raise ValueError(f"{path}: has no factors of {target}, but of {', '.join(factors) or 'nothing'}")


def _compare(model: LiteVAE, folder: Path) -> dict[str, float]:
    check_tensors(folder / WEIGHTS_NAME, model.state_dict())
    ours = LiteVAE.from_pretrained(folder)
    theirs = AutoencoderLiteVAE.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).autoencoder
    check_factors(folder / CONFIG_NAME, ours.for_diffusion, model.for_diffusion)
    check_factors(folder / CONFIG_NAME, theirs.for_diffusion, model.for_diffusion)
    return {
        "loaded back": check_equal("loading it back", distance(model, ours.moments, ours.decode)),
        "in diffusers": check_equal("loading it with diffusers", distance(model, theirs.moments, theirs.decode)),
    }


def replace_folder(partial: Path, folder: Path) -> None:
    """Move a folder to its place; the old one is only removed once the new one is there."""
    old = partial.with_name(f"{partial.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
    except (OSError, KeyboardInterrupt):
        if old.exists() and not folder.exists():
            old.replace(folder)
        raise


def model_card(model: LiteVAE, title: str, provenance: Provenance, onnx: bool, stock: bool = False) -> str:
    """Markdown, with the hub's metadata in front.

    Args:
        onnx: the folder has ONNX files.
        stock: it is diffusers' AutoencoderKL, not AutoencoderLiteVAE.
    """
    encoder, decoder = (count_parameters(half) / 1e6 for half in (model.encoder, model.decoder))
    f, n_z = model.downscale, model.latent_channels
    licence = "Not stated; the training data may restrict it."
    if provenance.licence is not None:
        licence = f"Weights: {provenance.licence}."
    facts = [
        f"| images to latents | ({model.in_channels}, H, W) to ({n_z}, H/{f}, W/{f}) |",
        f"| encoder | {type(model.encoder).__name__}, {encoder:.2f} M parameters |",
        f"| decoder | {type(model.decoder).__name__}, {decoder:.2f} M parameters |",
        f"| weights | {_weights(model, provenance)} |",
        *_factors(model, provenance),
        *_latents(provenance.config),
        *_padding(model, stock),
        f"| made from | {provenance.name} |",
    ]
    kind, tags = "A [LiteVAE](https://arxiv.org/abs/2405.14477)", "autoencoder, vae, litevae"
    if is_stable_diffusion(model):
        kind, tags = "An autoencoder with the networks of diffusers' AutoencoderKL", "autoencoder, vae"
    parts = [
        f"---\nlibrary_name: diffusers\npipeline_tag: image-to-image\ntags: [{tags}]\n"
        f"license: {provenance.licence or 'unknown'}\n---\n",
        f"# {title}\n",
        f"{kind}, f{f} with {n_z} channels, {MADE_WITH}.\n",
        "\n".join(["| | |", "|---|---|", *facts]) + "\n",
        "## Quality\n\n" + _quality(provenance.metrics) + "\n",
        "## Training data\n\n" + _data(provenance.config) + "\n",
        f"## Licence\n\n{licence} open-LiteVAE, the code, is under Apache-2.0.\n",
        "## Use\n\n" + (_use_stock(model) if stock else _use(onnx)),
    ]
    return "\n".join(parts)


def _factors(model: LiteVAE, provenance: Provenance) -> list[str]:
    known, means, stds = provenance.factors_from, model.latents_mean, model.latents_std
    if means is None or stds is None:
        how = "(not measured: `olvae latents` does)"
        if known is not None:
            how = f"({known}); a diffusion model takes (z - shift) * scaling"
        return [f"| scaling factor, shift factor | {model.scaling_factor:g}, {model.shift_factor:g} {how} |"]
    numbers = [", ".join(f"{value:g}" for value in values) for values in (means, stds)]
    origin = "" if known is None else f" ({known})"
    return [
        f"| scaling factor | {model.scaling_factor:g}{origin}; a diffusion model takes "
        "(z - latents_mean) * scaling / latents_std |",
        *(f"| {name} | {text} |" for name, text in zip(("latents_mean", "latents_std"), numbers, strict=True)),
    ]


def _latents(config: Mapping[str, Any]) -> list[str]:
    """Whose latents they are, if the training had a teacher; a folder of the user's is named without its path."""
    params = (config.get("model") or {}).get("params") or {}
    teacher = ((params.get("teacher_config") or {}).get("params") or {}).get("autoencoder")
    if not teacher:
        return []
    plain = str(teacher).removeprefix("diffusers:")
    name = plain if is_hub_id(plain) else Path(plain).name
    return [f"| latents | distilled from {name}: latents are those of {name} |"]


def _padding(model: LiteVAE, stock: bool) -> list[str]:
    halves = reflects(model)
    if not halves:
        return []
    how = "; loaders have to set it, otherwise borders differ, see Use" if stock else ""
    return [f"| padding | reflect, in the {' and the '.join(halves)}{how} |"]


def _weights(model: LiteVAE, provenance: Provenance) -> str:
    kinds = [str(next(model.parameters()).dtype).removeprefix("torch.")]
    params = (provenance.config.get("model") or {}).get("params") or {}
    if provenance.raw or params.get("use_ema") is False:
        kinds.append("as trained")
    elif params.get("use_ema"):
        kinds.append("averaged over training (EMA)")
    if model.folded:
        kinds.append("self-modulated convolutions folded into ordinary ones")
    return ", ".join(kinds)


def _quality(metrics: Path | None) -> str:
    if metrics is None:
        return "Not measured: `olvae evaluate` does."
    try:
        content = json.loads(metrics.read_text())
        results = content["results"]
        names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
        rows = [
            f"| {result['target']} | {result['n']} | "
            + " | ".join(f"{result['metrics'][n]:.4g}" if n in result["metrics"] else "-" for n in names)
            + " |"
            for result in results
        ]
        protocol = content["protocol"]
        titles = " | ".join(METRICS[name].label if name in METRICS else name for name in names)
        return (
            f"| | images | {titles} |\n|---|--:|{'--:|' * len(names)}\n" + "\n".join(rows) + "\n\n"
            f"Protocol `{protocol['name']}`, version {protocol['version']}, {content['protocol_hash']}: in "
            f"`metrics.json`. Measured before the export.\n\n{_precision(content['results'], protocol)}"
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{metrics}: not a metrics.json of olvae evaluate: {type(error).__name__}: {error}") from error


def _precision(results: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any]) -> str:
    """Which precisions are safe for the first target, by its rows of a metrics.json and its protocol."""
    first, n = results[0]["target"], results[0]["n"]
    measured = [(result["target"], result["precision"]) for result in results if result.get("precision")]
    rows = [found for target, found in measured if target == f"{first}, {found['dtype']}"]
    if not rows:
        return "Precision: not measured: `olvae evaluate --precision fp16,bf16,32` does."
    safe, sentences = [row["dtype"] for row in rows if row["safe"]], []
    if safe:
        top = max((row for row in rows if row["safe"]), key=lambda row: row["largest_value"])
        where = f"largest activation {top['largest_value']:.4g} at `{top['largest_name']}`"
        sentences.append(f"{' and '.join(safe)} {'are' if len(safe) > 1 else 'is'} safe ({where})")
    for row in rows:
        if not row["safe"]:
            first_at, lost = row["non_finite"]["first"], row["psnr_lost"]
            change = "changes PSNR" if lost is None else f"changes PSNR by {-lost:+.2f} dB"
            what = f"overflows at `{first_at}`" if first_at else change
            sentences.append(f"{row['dtype']} {what}: use {' or '.join([*safe, 'float32'])}")
    images = f"{n} image{'' if n == 1 else 's'} of {protocol['size']} px"
    return f"Precision, measured on {images}: {'; '.join(sentences)}."


def _data(config: Mapping[str, Any]) -> str:
    node = config.get("data")
    if not isinstance(node, Mapping) or "target" not in node:
        return "Unknown."
    params = node.get("params") or {}
    root = f", {Path(str(params['root'])).name}" if "root" in params else ""
    size = f", crops of {params['size']}x{params['size']}" if "size" in params else ""
    steps = ((config.get("lightning") or {}).get("trainer") or {}).get("max_steps")
    begun = ""
    if before := (config.get("run") or {}).get("weights"):
        file = Path(before)
        begun = f", from the weights of {file.parents[1].name if file.parent.name == 'checkpoints' else file.name}"
    return f"`{node['target']}`{root}{size}{f', {steps} steps' if steps else ''}{begun}."


def _use_stock(model: LiteVAE) -> str:
    set_padding = "".join(
        f"""for conv in vae.{half}.modules():
    if isinstance(conv, torch.nn.Conv2d) and conv.padding != (0, 0):
        conv.padding_mode = "reflect"
"""
        for half in reflects(model)
    )
    return f"""```python
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("FOLDER_OR_ID")
{set_padding}z = vae.encode(images).latent_dist.sample()  # images in [-1, 1], (B, 3, H, W)
images = vae.decode(z).sample
```
"""


def _use(onnx: bool) -> str:
    text = """```python
from olvae import AutoencoderLiteVAE, LiteVAE

vae = LiteVAE.from_pretrained("FOLDER_OR_ID")  # a plain torch module
z = vae.encode(images).sample()  # images in [-1, 1], (B, 3, H, W)
images = vae.decode(z)

vae = AutoencoderLiteVAE.from_pretrained("FOLDER_OR_ID")  # in diffusers, in place of AutoencoderKL
```
"""
    if onnx:
        text += (
            "\n`encoder.onnx` takes `image` to `moments` (means, then log-variances), `decoder.onnx` takes `latent` to "
            "`image`, for any batch and size.\n"
        )
    return text
