"""The README.md of an exported model: what it is, its metrics, its training data, how to load it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olvae.models.autoencoder import LiteVAE
from olvae.modules.base import count_parameters

__all__ = ["Provenance", "model_card"]


UNITS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID", "kid": "KID", "l1": "L1"}


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


def model_card(model: LiteVAE, title: str, provenance: Provenance, onnx: bool) -> str:
    """Markdown, with the hub's metadata in front."""
    encoder, decoder = (count_parameters(half) / 1e6 for half in (model.encoder, model.decoder))
    f, n_z = model.downscale, model.latent_channels
    facts = [
        f"| images to latents | ({model.in_channels}, H, W) to ({n_z}, H/{f}, W/{f}) |",
        f"| encoder | {type(model.encoder).__name__}, {encoder:.2f} M parameters |",
        f"| decoder | {type(model.decoder).__name__}, {decoder:.2f} M parameters |",
        f"| weights | {_weights(model, provenance)} |",
        f"| scaling factor, shift factor | {model.scaling_factor:g}, {model.shift_factor:g}{_factors(provenance)} |",
        f"| made from | {provenance.name} |",
    ]
    parts = [
        f"---\nlibrary_name: diffusers\npipeline_tag: image-to-image\ntags: [autoencoder, vae, litevae]\n"
        f"license: {provenance.licence or 'unknown'}\n---\n",
        f"# {title}\n",
        f"A [LiteVAE](https://arxiv.org/abs/2405.14477), f{f} with {n_z} channels, made with open-LiteVAE.\n",
        "\n".join(["| | |", "|---|---|", *facts]) + "\n",
        "## Quality\n\n" + _quality(provenance.metrics) + "\n",
        "## Training data\n\n" + _data(provenance.config) + "\n",
        "## Licence\n\n" + _licence(provenance.licence) + "\n",
        "## Use\n\n" + _use(onnx),
    ]
    return "\n".join(parts)


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


def _factors(provenance: Provenance) -> str:
    if provenance.factors_from is None:
        return " (not measured: `olvae latents` does)"
    return f" ({provenance.factors_from}); a diffusion model takes (z - shift) * scaling"


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
        titles = " | ".join(UNITS.get(name, name) for name in names)
        return (
            f"| | images | {titles} |\n|---|--:|{'--:|' * len(names)}\n" + "\n".join(rows) + "\n\n"
            f"Protocol `{protocol['name']}`, version {protocol['version']}, {content['protocol_hash']}: in "
            "`metrics.json`. Measured before the export."
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{metrics}: not a metrics.json of olvae evaluate: {type(error).__name__}: {error}") from error


def _data(config: Mapping[str, Any]) -> str:
    node = config.get("data")
    if not isinstance(node, Mapping) or "target" not in node:
        return "Unknown."
    params = node.get("params") or {}
    root = f", {Path(str(params['root'])).name}" if "root" in params else ""
    size = f", crops of {params['size']}x{params['size']}" if "size" in params else ""
    steps = ((config.get("lightning") or {}).get("trainer") or {}).get("max_steps")
    before = (config.get("run") or {}).get("weights")
    begun = f", from the weights of {_run_name(Path(str(before)))}" if before else ""
    return f"`{node['target']}`{root}{size}{f', {steps} steps' if steps else ''}{begun}."


def _run_name(weights: Path) -> str:
    """The name of the run that a checkpoint belongs to; else of the file or folder."""
    return weights.parent.parent.name if weights.parent.name == "checkpoints" else weights.name


def _licence(licence: str | None) -> str:
    if licence is None:
        return "Not stated; the training data may restrict it. open-LiteVAE, the code, is under Apache-2.0."
    return f"Weights: {licence}. open-LiteVAE, the code, is under Apache-2.0."


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
