"""The report on latents: one pass over the images for several models, ``latents.json``, a table."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from olvae.data.pixels import from_uint8
from olvae.data.source import Batch
from olvae.evaluation.latent_summary import ACTIVE_VARIANCE, NO_DISTRIBUTION, LatentSummary
from olvae.evaluation.latents import LatentAccumulator, image_key
from olvae.files import write_json
from olvae.models.autoencoder import Autoencoder

__all__ = ["encode_latents", "print_latents", "report_content", "write_report"]


@torch.inference_mode()
def encode_latents(
    models: Mapping[str, Autoencoder], batches: Iterable[Batch], device: str = "cpu"
) -> dict[str, LatentAccumulator]:
    """Encode the same images with every model, in one pass.

    Args:
        models: names to autoencoders; their channels and factors may differ.
        batches: of the images, uint8; none, if this is a process without a share.

    Raises:
        ValueError: the images do not suit a model, or latents are not finite.
    """
    accumulators = {name: LatentAccumulator() for name in models}
    for model in models.values():
        model.to(device)
    for batch in batches:
        x = batch["image"]
        keys = [image_key(image) for image in x]
        for name, model in models.items():
            _check(name, model, x)
            try:
                accumulators[name].update(model.encode(from_uint8(x.to(device))), keys)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return accumulators


def _check(name: str, model: Autoencoder, x: Tensor) -> None:
    channels, height, width = x.shape[1:]
    factor = model.downscale
    if height % factor or width % factor:
        raise ValueError(
            f"{name}: images of {height}x{width} pixels, but its latent stands for {factor}x{factor} pixels each: "
            f"use a size that is a multiple of {factor}"
        )
    if channels != model.in_channels:
        raise ValueError(f"{name}: takes images of {model.in_channels} channels, these have {channels}")


def report_content(summaries: Mapping[str, LatentSummary], data: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into latents.json: ``data`` says which images they were."""
    return {
        "data": dict(data),
        "active_variance": ACTIVE_VARIANCE,
        "results": [{"target": name, **summary.as_dict()} for name, summary in summaries.items()],
    }


def write_report(content: Mapping[str, Any], path: Path) -> None:
    """latents.json, whole or not at all."""
    write_json(content, path)


def print_latents(summaries: Mapping[str, LatentSummary], data: Mapping[str, Any]) -> None:
    """Two tables to standard error: moments, and MMD^2 for every bandwidth."""
    console = Console(stderr=True)
    moments = Table(title=f"latents of {data['n']} images of {data['size']}x{data['size']}")
    moments.add_column("target", overflow="fold")
    for name in ("latent", "mean, shift", "std", "scaling", "KL, nats", "active"):
        moments.add_column(name, justify="right", no_wrap=True)
    for name, summary in summaries.items():
        channels, h, w = summary.shape
        moments.add_row(
            escape(name),
            f"{channels}x{h}x{w}",
            f"{summary.shift_factor:.4f}",
            f"{1.0 / summary.scaling_factor:.4f}",
            f"{summary.scaling_factor:.4f}",
            "skipped" if summary.kl_per_image is None else f"{summary.kl_per_image:.1f}",
            "skipped" if summary.active is None else f"{int(summary.active.sum())}/{channels}",
        )
    console.print(moments)
    for name, summary in summaries.items():
        if summary.deterministic:
            console.print(f"{escape(name)}: KL and active channels skipped: {NO_DISTRIBUTION}")
    with_mmd = {name: summary.mmd for name, summary in summaries.items() if summary.mmd is not None}
    if not with_mmd:
        console.print("MMD: skipped, it needs at least two different images")
        return
    table = Table(
        title="1000 MMD^2 to N(0, I) by the kernel's bandwidth: of the latents, of (z - shift) x scaling, "
        "and the error that N(0, I) itself would have"
    )
    table.add_column("target", overflow="fold")
    table.add_column("of", no_wrap=True)
    for sigma in next(iter(with_mmd.values())).sigmas:
        table.add_column(f"{sigma:g}", justify="right", no_wrap=True)
    for name, mmd in with_mmd.items():
        rows = (("latents", mmd.raw), ("scaled", mmd.scaled), ("error", mmd.null_std))
        for i, (kind, values) in enumerate(rows):
            table.add_row("" if i else escape(name), kind, *(f"{1000 * value:.3g}" for value in values))
        table.add_section()
    console.print(table)
