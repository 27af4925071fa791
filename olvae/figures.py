"""Files of pictures: images, labelled grids, error maps, curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from olvae.files import atomic_write

__all__ = ["ERROR_RANGE", "comparison", "error_map", "labelled_grid", "plot_curves", "plot_panels", "rgb", "save_image"]

ERROR_RANGE = 64
"""The error, in 8-bit steps, that error maps show as white."""


def save_image(image: Tensor, path: Path, **options: Any) -> None:
    """Write a uint8 (C, H, W) image atomically, in the format of the extension; ``.npy`` is an array (H, W, C).

    Args:
        options: of Pillow's writer.

    Raises:
        ValueError: the format can't store this number of channels.
    """
    channels = image.shape[0]
    array = image.permute(1, 2, 0).contiguous().cpu().numpy()
    if path.suffix != ".npy" and (channels not in (1, 3, 4) or (channels == 4 and path.suffix == ".jpg")):
        raise ValueError(f"an image of {channels} channels can't be written as {path.suffix}")
    with atomic_write(path) as partial:
        if path.suffix == ".npy":
            np.save(partial, array)
        else:
            Image.fromarray(array[..., 0] if channels == 1 else array).save(partial, **options)


def error_map(x: Tensor, y: Tensor) -> Tensor:
    """Absolute error averaged over channels, black at 0 to white at 64 of 255: uint8 (B, C, H, W) -> (B, 3, H, W)."""
    error = (x.float() - y.float()).abs().mean(1) / ERROR_RANGE  # (B, H, W)
    colours = mpl.colormaps["magma"](error.clamp(0, 1).cpu().numpy(), bytes=True)[..., :3]  # (B, H, W, 3)
    return torch.from_numpy(np.ascontiguousarray(colours)).permute(0, 3, 1, 2)


def labelled_grid(rows: Mapping[str, Tensor]) -> Image.Image:
    """A row of pictures per entry, below its name, which is never cut off.

    Args:
        rows: names to uint8 (N, C, H, W), all of one size; N may differ; see :func:`rgb` for C. Below 128 pixels they
            are enlarged by a whole factor, pixel by pixel.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    factor = max(1, -(-128 // min(height, width)))
    height, width = height * factor, width * factor
    columns = max(images.shape[0] for images in rows.values())
    font = ImageFont.load_default(size=18)
    label, gap = 28, 4
    names = 2 * gap + max(int(font.getlength(name)) + 1 for name in rows)
    size = max(names, gap + columns * (width + gap)), gap + len(rows) * (label + height + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for r, (name, images) in enumerate(rows.items()):
        top = gap + r * (label + height + gap)
        draw.text((gap, top + 2), name, fill="black", font=font)
        for c, image in enumerate(images):
            picture = rgb(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (gap + c * (width + gap), top + label))
    return canvas


def comparison(pictures: Mapping[str, Tensor]) -> Image.Image:
    """Pictures of one size, uint8 (C, H, W), each below its name: side by side, or stacked if they are wide.

    A side of more than 1200 pixels is shrunk to that; small pictures are enlarged by a whole factor, pixel by pixel.
    """
    longest, gap = 1200, 8
    height, width = next(iter(pictures.values())).shape[-2:]
    short, long = min(height, width), max(height, width)
    factor = max(1, 256 // long, min(-(-16 // short), longest // long))  # at least 256 long, or 16 wide
    scale = min(1.0, longest / long)
    size = max(1, round(width * factor * scale)), max(1, round(height * factor * scale))
    resample = Image.Resampling.NEAREST if scale == 1.0 else Image.Resampling.LANCZOS

    text = max(18, size[0] // 40)
    font = ImageFont.load_default(size=text)
    label = text + 10
    cell = max(size[0], *(int(font.getlength(name)) + 1 for name in pictures))
    stacked = width > 2 * height
    columns, rows = (1, len(pictures)) if stacked else (len(pictures), 1)
    step = cell + gap, label + size[1] + gap
    canvas = Image.new("RGB", (gap + columns * step[0], gap + rows * step[1]), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (name, picture) in enumerate(pictures.items()):
        left = gap + (0 if stacked else index * step[0])
        top = gap + (index * step[1] if stacked else 0)
        draw.text((left, top), name, fill="black", font=font)
        canvas.paste(rgb(picture).resize(size, resample), (left, top + label))
    return canvas


def rgb(image: Tensor) -> Image.Image:
    """uint8 (C, H, W) -> a picture: one channel is shown as grey, two as red and green, of more the first three."""
    if image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    elif image.shape[0] == 2:
        image = torch.cat((image, torch.zeros_like(image[:1])))
    return Image.fromarray(image[:3].permute(1, 2, 0).contiguous().cpu().numpy())


FEW = 5
"""Points below which a curve is no curve yet."""

Curve = tuple[Sequence[float], Sequence[float]]
"""What lies along the horizontal axis, and values over it."""


def plot_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Plot values over steps, one panel per entry, into a PNG."""
    plot_panels({name: {"": curve} for name, curve in curves.items()}, path, "step")


def plot_panels(panels: Mapping[str, Mapping[str, Curve]], path: Path, along: str, from_zero: bool = False) -> None:
    """Plot panels of curves by name into a PNG; ``along`` names the horizontal axis, the vertical may begin at 0.

    A panel's title says how many points its curves have if that is fewer than five.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (name, curves) in zip(axes, panels.items(), strict=False):
        for label, (steps, values) in curves.items():
            panel.plot(steps, values, linewidth=1.2, marker="o" if len(steps) < 20 else "", markersize=3, label=label)
        if any(curves):
            panel.legend(fontsize=8)
        points = max((len(steps) for steps, _ in curves.values()), default=0)
        panel.set_title(f"{name} ({points} point{'s' * (points != 1)})" if points < FEW else name, fontsize=10)
        panel.set_xlabel(along, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        if from_zero:
            panel.set_ylim(bottom=0)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
