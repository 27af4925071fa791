"""The report on latents: one pass over the images for several models, latents.json, tables, figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from olvae.data.image import from_uint8
from olvae.data.source import Batch
from olvae.evaluation.latents.accumulator import LatentAccumulator, image_key
from olvae.evaluation.latents.summary import ACTIVE_VARIANCE, EDGES, NO_DISTRIBUTION, SIGMAS, LatentSummary
from olvae.models.autoencoder import Autoencoder

__all__ = ["draw_channels", "draw_distribution", "encode_latents", "print_latents", "report_content"]


@torch.inference_mode()
def encode_latents(
    models: Mapping[str, Autoencoder], batches: Iterable[Batch], device: str = "cpu"
) -> dict[str, LatentAccumulator]:
    """Encode the same images with every model, in one pass.

    Args:
        models: by name; their latent channels and downscale factors may differ.
        batches: uint8 images; may be empty.

    Raises:
        ValueError: the images do not fit a model, or latents are not finite.
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
            f"{name}: images of {height}x{width} pixels, but a latent position stands for {factor}x{factor} pixels: "
            f"use a size that is a multiple of {factor}"
        )
    if channels != model.in_channels:
        raise ValueError(f"{name}: takes images of {model.in_channels} channels, these have {channels}")


def report_content(summaries: Mapping[str, LatentSummary], data: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of latents.json; ``data`` describes the images."""
    return {
        "data": dict(data),
        "active_variance": ACTIVE_VARIANCE,
        "results": [{"target": name, **summary.as_dict()} for name, summary in summaries.items()],
    }


def print_latents(summaries: Mapping[str, LatentSummary], data: Mapping[str, Any]) -> None:
    """Print two tables to standard error: moments, and MMD^2 per bandwidth."""
    console = Console(stderr=True)
    moments = Table(
        title=f"latents of {data['n']} images of {data['size']}x{data['size']}; shift is the mean; sigma is the "
        "posterior's; KL in nats per position, over all channels"
    )
    moments.add_column("target", overflow="fold")
    for name in ("latent", "shift", "std", "scaling", "sigma", "KL", "active"):
        moments.add_column(name, justify="right", no_wrap=True)
    for name, summary in summaries.items():
        channels, h, w = summary.shape
        moments.add_row(
            escape(name),
            f"{channels}x{h}x{w}",
            f"{summary.shift_factor:.4f}",
            f"{1.0 / summary.scaling_factor:.4f}",
            f"{summary.scaling_factor:.4f}",
            "skipped" if summary.sigma is None else f"{summary.sigma:.3g}",
            "skipped" if summary.kl_per_position is None else f"{summary.kl_per_position:.1f}",
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
    for sigma in SIGMAS:
        table.add_column(f"{sigma:g}", justify="right", no_wrap=True)
    for name, mmd in with_mmd.items():
        rows = (("latents", mmd.raw), ("scaled", mmd.scaled), ("error", mmd.null_std))
        for i, (kind, values) in enumerate(rows):
            table.add_row("" if i else escape(name), kind, *(f"{1000 * value:.3g}" for value in values))
        table.add_section()
    console.print(table)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can distinguish."""

DASHES = ("-", "--", "-.", ":")

GREY = "0.35"

Array = NDArray[np.float64]


def draw_distribution(summaries: Mapping[str, LatentSummary], path: Path) -> None:
    """Draw the densities of several models' latents over that of N(0, 1), as a PNG.

    Left: as they are. Right: after each model's shift and scaling, on a logarithmic axis for the tails.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.4 + 0.22 * len(summaries)), layout="constrained")
    raw, scaled = figure.subplots(1, 2)
    edges = EDGES.numpy()
    x: Array = np.linspace(-40.0, 40.0, 8001)
    normal = np.exp(-(x**2) / 2.0) / np.sqrt(2.0 * np.pi)
    for panel in (raw, scaled):
        panel.fill_between(x, normal, color="0.85", zorder=0)
        panel.plot(x, normal, color=GREY, linewidth=1.0, zorder=1, label="N(0, 1)")
    reach, top = 3.5, float(normal.max())
    for i, (name, summary) in enumerate(summaries.items()):
        density = summary.mass.mean(0).numpy()[1:-1] / np.diff(edges)
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.8}
        centres = (edges[1:] + edges[:-1]) / 2.0
        std = 1.0 / summary.scaling_factor
        label = f"{name}: mean {summary.shift_factor:.3g}, std {std:.3g}"
        raw.plot(centres, density, label=label, **style)
        scaled.plot((centres - summary.shift_factor) / std, density * std, **style)
        reach = max(reach, abs(summary.shift_factor) + 3.5 * std)
        top = max(top, float(density.max()))
    raw.set_xlim(-min(reach, 35.0), min(reach, 35.0))
    raw.set_ylim(0.0, 1.06 * top)
    raw.set_title("as they are", fontsize=11)
    raw.set_xlabel("value of the latent")
    raw.set_ylabel("density")
    scaled.set_xlim(-8.0, 8.0)
    scaled.set_yscale("log")
    scaled.set_ylim(1e-5, 2.0)
    scaled.set_title("as a diffusion model sees them: (z - shift) x scaling", fontsize=11)
    scaled.set_xlabel("value of the latent, shifted and scaled")
    scaled.set_ylabel("density, logarithmic")
    for panel in (raw, scaled):
        _tidy(panel)
    handles, labels = raw.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, frameon=False, ncols=1)
    figure.savefig(path, dpi=130)


def draw_channels(summaries: Mapping[str, LatentSummary], path: Path) -> None:
    """Draw a row per model, as a PNG: mean and standard deviation, KL, correlation and spectrum of the channels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 3.5 * len(summaries)), layout="constrained")
    rows = figure.subfigures(len(summaries), 1, squeeze=False)[:, 0]
    for i, (row, (name, summary)) in enumerate(zip(rows, summaries.items(), strict=True)):
        row.suptitle(f"{name}   {summary.shape[0]} channels of {summary.shape[1]}x{summary.shape[2]}", fontsize=11)
        panels = row.subplots(1, 4, width_ratios=(1.3, 1.1, 0.9, 1.2))
        colour = COLOURS[i % len(COLOURS)]
        _draw_moments(panels[0], summary, colour)
        _draw_kl(panels[1], summary, colour)
        image = _draw_correlation(panels[2], summary)
        row.colorbar(image, ax=panels[2], ticks=[-1, 0, 1], shrink=0.85)
        _draw_spectrum(panels[3], summary, colour)
    figure.savefig(path, dpi=110)


def _draw_moments(panel: Any, summary: LatentSummary, colour: str) -> None:
    channels = np.arange(summary.shape[0])
    mean, std, mean_std = (_array(values) for values in (summary.mean, summary.std, summary.mean_std))
    panel.axhspan(-1.0, 1.0, color="0.9", zorder=0, label="N(0, 1)")
    panel.axhline(0.0, color=GREY, linewidth=0.8, zorder=1)
    outer = "latents" if summary.deterministic else "sampled"
    panel.bar(channels, 2 * std, 0.8, bottom=mean - std, color=colour, alpha=0.35, zorder=2, label=outer)
    if not summary.deterministic:
        panel.bar(channels, 2 * mean_std, 0.4, bottom=mean - mean_std, color=colour, zorder=3, label="posterior means")
    panel.plot(channels, mean, "_", color="white", markersize=6, zorder=4)
    low, high = min(-1.0, float((mean - std).min())), max(1.0, float((mean + std).max()))
    panel.set_ylim(low - 0.08 * (high - low), high + 0.42 * (high - low))  # room for the legend
    panel.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", columnspacing=1.0, handlelength=1.2)
    panel.set_title("mean ± standard deviation", fontsize=10)
    _channel_axis(panel, summary)


def _draw_kl(panel: Any, summary: LatentSummary, colour: str) -> None:
    if summary.kl is None or summary.active is None:
        panel.set_title("KL: skipped", fontsize=10)
        panel.text(0.5, 0.5, fill(NO_DISTRIBUTION, 28), ha="center", va="center", fontsize=9, color=GREY)
        panel.set_axis_off()
        return
    kl = _array(summary.kl)
    active = _array(summary.active).astype(bool)
    channels = np.arange(len(kl))
    panel.bar(channels[active], kl[active], 0.8, color=colour)
    if not active.all():
        panel.bar(channels[~active], kl[~active], 0.8, color="white", edgecolor=colour, hatch="////", label="inactive")
        panel.plot(channels[~active], np.zeros((~active).sum()), "x", color=GREY, markersize=5, clip_on=False)
        panel.set_ylim(0.0, 1.2 * max(float(kl.max()), 1e-3))  # room for the legend
        panel.legend(fontsize=8, frameon=False, loc="upper right")
    panel.set_title(f"KL, nats per position; {summary.kl_per_image:.0f} nats per image", fontsize=10)
    _channel_axis(panel, summary)


def _draw_correlation(panel: Any, summary: LatentSummary) -> Any:
    image = panel.imshow(_array(summary.correlation), cmap="RdBu_r", vmin=-1.0, vmax=1.0, interpolation="nearest")
    panel.set_title("correlation of channels", fontsize=10)
    ticks = _ticks(summary.shape[0])
    panel.set_xticks(ticks)
    panel.set_yticks(ticks)
    panel.tick_params(labelsize=8)
    return image


def _draw_spectrum(panel: Any, summary: LatentSummary, colour: str) -> None:
    frequency, spectrum = _array(summary.frequency), _array(summary.spectrum)
    panel.axhline(1.0, color=GREY, linewidth=1.0, linestyle="--", label="N(0, 1)")
    for j, channel in enumerate(spectrum):
        panel.plot(frequency, channel, color=colour, alpha=0.35, linewidth=0.9, label="a channel" if j == 0 else None)
    panel.plot(frequency, spectrum.mean(0), color=colour, linewidth=2.2, label="mean of channels")
    panel.set_yscale("log")
    panel.set_title("power spectrum", fontsize=10)
    panel.set_xlabel("cycles per latent position", fontsize=8)
    panel.legend(fontsize=8, frameon=False)
    _tidy(panel)


def _channel_axis(panel: Any, summary: LatentSummary) -> None:
    panel.set_xticks(_ticks(summary.shape[0]))
    panel.set_xlabel("channel", fontsize=8)
    _tidy(panel)


def _tidy(panel: Any) -> None:
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _ticks(channels: int) -> Sequence[int]:
    """Every channel, or every n-th if there are too many to read."""
    return range(0, channels, max(1, -(-channels // 12)))


def _array(values: Tensor) -> Array:
    return values.double().numpy()
