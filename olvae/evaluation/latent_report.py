"""Report on latents: encode images with several models in one pass; tables, and a figure of the distributions."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from olvae.data.pixels.size_and_range import EIGHT_BITS, PixelRange, Sides
from olvae.data.source import Batch
from olvae.devices import gather
from olvae.evaluation.latent_statistics import ACTIVE_VARIANCE, EDGES, NO_DISTRIBUTION, LatentAccumulator, image_key
from olvae.evaluation.observers.observer import Observation, Observer
from olvae.evaluation.report import print_grid
from olvae.evaluation.results import Row, texts
from olvae.files import atomic_write
from olvae.models.autoencoder import Autoencoder

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for the colour-blind
DASHES = ("-", "--", "-.", ":")


@torch.inference_mode()
def encode_latents(
    models: Mapping[str, Autoencoder],
    batches: Iterable[Batch],
    device: str = "cpu",
    pixel_range: PixelRange = EIGHT_BITS,
    observer: Observer | None = None,
) -> dict[str, LatentAccumulator] | None:
    """Encode the same images with every model, by name, in one pass; ValueError for latents not finite.

    An observer sees the images in place of reconstructions, which are not made. None in all processes but the first.
    """
    observer = observer or Observer()
    accumulators = {name: LatentAccumulator() for name in models}
    for model in models.values():
        model.to(device)
    for batch in batches:
        keys, levels = [image_key(image) for image in batch["image"]], pixel_range.levels(batch["image"])
        x = pixel_range.normalise(batch["image"].to(device))
        for name, model in models.items():
            posterior = model.encode(x)
            names = [str(key) for key in keys]
            observer.update(Observation(name, 0, names, levels, levels, posterior.mean, {}, pixel_range))
            try:
                accumulators[name].update(posterior, keys, x)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    parts = gather((accumulators, observer.state()))
    for others, state in (parts or ())[1:]:
        observer.merge(state)
        for name, accumulator in accumulators.items():
            accumulator.merge(others[name])
    return accumulators if parts else None


def report_latents(
    accumulators: Mapping[str, LatentAccumulator],
    observer: Observer,
    data: Mapping[str, Any],
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Make the content of latents.json, with the observer's entries; ``advance`` is called after each model."""
    results = []
    for name, accumulator in accumulators.items():
        entry = observer.result(name, 0)
        results.append({"target": name, **accumulator.compute(), **({observer.name: entry} if entry else {})})
        advance()
    return {"data": {**data, "n": results[0]["n"]}, "active_variance": ACTIVE_VARIANCE, "results": results}


def print_latents(content: Mapping[str, Any], observer: Observer) -> None:
    """Print two tables to standard error, by target: moments, and MMD^2 per bandwidth; then the observer's lines."""
    console, data, rows = Console(stderr=True), content["data"], {row["target"]: row for row in content["results"]}
    title = (
        f"latents of {data['n']} images of {Sides.of(data['size'])}; shift is the mean; sigma is the posterior's; "
        "KL in nats per position, over all channels"
    )
    observed = {name: row[observer.name] for name, row in rows.items() if observer.name in row}
    columns = {name: observer.columns(entry) for name, entry in observed.items()}
    print_grid(console, title, texts({name: _moments(row, columns.get(name, {})) for name, row in rows.items()}))
    mmds: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        if row["deterministic"]:
            console.print(f"{escape(name)}: KL and active channels skipped: {NO_DISTRIBUTION}")
        if "high_frequencies_of_images" in row:
            shares = (f"{100 * row[f'high_frequencies{of}']:.0f} %" for of in ("", "_of_images"))
            console.print("{}: high frequencies have {} of the energy, the images' {}".format(escape(name), *shares))
        if mmd := row.get("mmd"):
            kinds = {"": "mmd2", ", scaled": "mmd2_scaled", ", error": "standard_error_under_normal"}
            for suffix, kind in kinds.items():
                found = zip(mmd["sigmas"], mmd[kind], strict=True)
                mmds[name + suffix] = {f"{sigma:g}": f"{1000 * value:.3g}" for sigma, value in found}
    if mmds:
        title = (
            "1000 MMD^2 to N(0, I) by the kernel's bandwidth: of the latents, of (z - shift) x scaling, and the error "
            "that N(0, I) itself would have"
        )
        print_grid(console, title, texts(mmds))
    else:
        console.print("MMD: skipped, it needs at least two different images")
    for line in observer.lines([Row(n, data["n"], {}, observed={observer.name: e}) for n, e in observed.items()]):
        console.print(escape(line))


def _moments(row: Mapping[str, Any], others: Mapping[str, str]) -> dict[str, str]:
    cells = {
        "latent": "x".join(map(str, row["latent_shape"])),
        "shift": f"{row['mean']:.4f}",
        "std": f"{row['std']:.4f}",
        "scaling": f"{1.0 / row['std']:.4f}",
        **others,
    }
    if row["deterministic"]:
        return cells | dict.fromkeys(("sigma", "KL", "active"), "skipped")
    return cells | {
        "sigma": f"{row['posterior_std']:.3g}",
        "KL": f"{row['kl_per_position']:.1f}",
        "active": f"{row['active_channels']}/{row['latent_shape'][0]}",
    }


def draw_distribution(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the densities of several models' latents over that of N(0, 1), as a PNG.

    Left: as they are. Right: after each model's shift and scaling, on a logarithmic axis for the tails.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.4 + 0.22 * len(rows)), layout="constrained")
    raw, scaled = figure.subplots(1, 2)
    edges = EDGES.numpy()
    centres = (edges[1:] + edges[:-1]) / 2.0
    x = np.linspace(-40.0, 40.0, 8001)
    normal = np.exp(-(x**2) / 2.0) / np.sqrt(2.0 * np.pi)
    for panel in (raw, scaled):
        panel.fill_between(x, normal, color="0.85", zorder=0)
        panel.plot(x, normal, color="0.35", linewidth=1.0, zorder=1, label="N(0, 1)")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    reach, top = 3.5, float(normal.max())
    for i, (name, row) in enumerate(rows.items()):
        density = np.array(row["histogram"]["share"]) / np.diff(edges)
        shift, std = row["mean"], row["std"]
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.8}
        raw.plot(centres, density, label=f"{name}: mean {shift:.3g}, std {std:.3g}", **style)
        scaled.plot((centres - shift) / std, density * std, **style)
        reach = max(reach, abs(shift) + 3.5 * std)
        top = max(top, float(density.max()))
    reach = min(reach, 35.0)
    raw.set(title="as they are", xlabel="value of the latent", ylabel="density")
    raw.set(xlim=(-reach, reach), ylim=(0.0, 1.06 * top))
    scaled.set(title="as a diffusion model sees them: (z - shift) x scaling", yscale="log")
    scaled.set(xlabel="value of the latent, shifted and scaled", ylabel="density, logarithmic")
    scaled.set(xlim=(-8.0, 8.0), ylim=(1e-5, 2.0))
    handles, labels = raw.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, frameon=False, ncols=1)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)
