"""Draw pictures and write them to files: images, labelled grids, error maps, curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from olvae.config import import_extra
from olvae.files import atomic_write

# Extensions of files that hold real values of any number of channels.
ARRAYS = (".npy", ".tif", ".exr")

# The error, in 8-bit steps, that error maps show as white.
ERROR_RANGE = 64

# The colour map magma, from black to white: red, green and blue of 256 steps. It is CC0 by its
# authors, and the same as matplotlib's, which using a model does not need.
MAGMA = (
    "00000300000400000601000701010901010b02020d02020f03031104031304041505041706051907051b"
    "08061d09071f0a07220b08240c09260d0a280e0a2a0f0b2c100c2f110c31120d33140d35150e38160e3a"
    "170f3c180f3f1a10411b10441c10461e10491f114b20114d2211502311522511552611572811592a115c"
    "2b115e2d10602f1062301065321067341068350f6a370f6c390f6e3b0f6f3c0f713e0f72400f73420f74"
    "430f75450f76470f774810784a10794b10794d117a4f117b50127b52127c53137c55137d57147d58157e"
    "5a157e5b167e5d177e5e177f60187f61187f63197f651a80661a80681b80691c806b1c806c1d806e1e81"
    "6f1e81711f81731f817420817621817721817922817a22817c23817e24817f2481812581822581842681"
    "8526818727818928818a28818c29808d29808f2a80912a80922b80942b80952c80972c7f992d7f9a2d7f"
    "9c2e7f9e2e7e9f2f7ea12f7ea3307ea4307da6317da7317da9327cab337cac337bae347bb0347bb1357a"
    "b3357ab53679b63679b83778b93778bb3877bd3977be3976c03a75c23a75c33b74c53c74c63c73c83d72"
    "ca3e72cb3e71cd3f70ce4070d0416fd1426ed3426dd4436dd6446cd7456bd9466ada4769dc4869dd4968"
    "de4a67e04b66e14c66e24d65e44e64e55063e65162e75262e85461ea5560eb5660ec585fed595fee5b5e"
    "ee5d5def5e5df0605df1615cf2635cf3655cf3675bf4685bf56a5bf56c5bf66e5bf6705bf7715bf7735c"
    "f8755cf8775cf9795cf97b5df97d5dfa7f5efa805efa825ffb8460fb8660fb8861fb8a62fc8c63fc8e63"
    "fc9064fc9265fc9366fd9567fd9768fd9969fd9b6afd9d6bfd9f6cfda16efda26ffda470fea671fea873"
    "feaa74feac75feae76feaf78feb179feb37bfeb57cfeb77dfeb97ffebb80febc82febe83fec085fec286"
    "fec488fec689fec78bfec98dfecb8efdcd90fdcf92fdd193fdd295fdd497fdd698fdd89afdda9cfddc9d"
    "fddd9ffddfa1fde1a3fce3a5fce5a6fce6a8fce8aafceaacfcecaefceeb0fcf0b1fcf1b3fcf3b5fcf5b7"
    "fbf7b9fbf9bbfbfabdfbfcbf"
)


def can_store(suffix: str, channels: int) -> bool:
    """Whether files of this extension hold images of this number of channels."""
    return suffix in ARRAYS or channels in (1, 3) or (channels == 4 and suffix != ".jpg")


def save_image(image: Tensor, path: Path, **options: Any) -> None:
    """Write an image (C, H, W) atomically, in the format of the extension.

    Its values are uint8, or float32 for a file of :data:`ARRAYS`. Pillow's writer gets ``options``;
    of a TIFF, they are ``extratags``. ValueError if the format can't store this number of channels.
    """
    channels = image.shape[0]
    array = image.permute(1, 2, 0).contiguous().cpu().numpy()
    if not can_store(path.suffix, channels):
        raise ValueError(f"an image of {channels} channels can't be written as {path.suffix}")
    # TIFF and Pillow store grey images as (H, W).
    flat = array[..., 0] if channels == 1 else array
    with atomic_write(path) as partial:
        if path.suffix == ".npy":
            np.save(partial, array)
        elif path.suffix == ".tif":
            import tifffile

            layout = tiff_layout(channels, array.dtype, options.get("extratags", ()))
            tifffile.imwrite(partial, flat, **layout)
        elif path.suffix == ".exr":
            exr = import_extra("OpenEXR", "OpenEXR", "writing .exr")
            # Y, R G B, R G B A or numbered channels.
            numbered = [f"B{number:03d}" for number in range(channels)]
            names = {1: "Y", 3: "RGB", 4: "RGBA"}.get(channels, numbered)
            planes = {}
            for i, name in enumerate(names):
                planes[name] = np.ascontiguousarray(array[..., i], dtype=np.float32)
            header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}
            exr.File(header, planes).write(str(partial))
        else:
            Image.fromarray(flat).save(partial, **options)


def tiff_layout(channels: int, dtype: Any, tags: Sequence[Any]) -> dict[str, Any]:
    """Tell tifffile how channels lie, what they are, and the ``tags`` of a scene, if it is one.

    A scene's bands are colours only if they have 8 bits: else a fourth one would become alpha.
    """
    colours = channels in (3, 4) and (dtype == np.uint8 or not tags)
    return {
        "photometric": "rgb" if colours else "minisblack",
        "planarconfig": "contig" if channels > 1 else None,
        "extratags": tags,
    }


def error_map(x: Tensor, y: Tensor) -> Tensor:
    """Colour the mean absolute error of channels: (B, C, H, W) -> uint8 (B, 3, H, W).

    White is an error of 64 of 255 and above.
    """
    error = (x.float() - y.float()).abs().mean(1) / ERROR_RANGE  # (B, H, W)
    colours = torch.tensor(list(bytes.fromhex(MAGMA)), dtype=torch.uint8).view(256, 3)
    step = (256 * error.nan_to_num(0)).clamp(0, 255).long().cpu()
    return colours[step].permute(0, 3, 1, 2)


def labelled_grid(rows: Mapping[str, Tensor]) -> Image.Image:
    """Draw a row of pictures per entry, uint8 (N, C, H, W) of one size, below its full name.

    N may differ; see :func:`rgb` for C. Pictures of fewer than 128 pixels are enlarged by a whole
    factor, pixel by pixel.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    factor = max(1, -(-128 // min(height, width)))
    size = width * factor, height * factor
    strips = {}
    for name, row in rows.items():
        strips[name] = [rgb(image).resize(size, Image.Resampling.NEAREST) for image in row]
    return _arrange(strips, 1, text=18, gap=4)


def comparison(pictures: Mapping[str, Tensor]) -> Image.Image:
    """Draw pictures of one size, uint8 (C, H, W), each below its name.

    They stand side by side, or above each other if they are wide. A side of more than 1200 pixels
    is shrunk to 1200; small pictures are enlarged by a whole factor, pixel by pixel.
    """
    longest = 1200
    height, width = next(iter(pictures.values())).shape[-2:]
    short = min(height, width)
    long = max(height, width)
    # Enlarge to some 256 pixels along the longer side, or, while that fits, 16 along the shorter.
    factor = max(1, 256 // long, min(-(-16 // short), longest // long))
    scale = min(1.0, longest / long)
    size = max(1, round(width * factor * scale)), max(1, round(height * factor * scale))
    resample = Image.Resampling.NEAREST if scale == 1.0 else Image.Resampling.LANCZOS
    strips = {name: [rgb(picture).resize(size, resample)] for name, picture in pictures.items()}
    columns = 1 if width > 2 * height else len(pictures)
    return _arrange(strips, columns, text=max(18, size[0] // 40), gap=8)


def _arrange(
    strips: Mapping[str, Sequence[Image.Image]], columns: int, text: int, gap: int
) -> Image.Image:
    """Draw strips of pictures of one size, each below its name, in a number of columns."""
    # Sizes in pixels: a cell holds the longest strip, or a longer name; text stands 10 apart.
    width, height = next(iter(strips.values()))[0].size
    font = ImageFont.load_default(size=text)
    label = text + 10
    longest = max(len(strip) for strip in strips.values())
    cell = max(longest * (width + gap) - gap, *(int(font.getlength(name)) + 1 for name in strips))
    across = cell + gap
    down = label + height + gap
    rows = -(-len(strips) // columns)
    canvas = Image.new("RGB", (gap + columns * across, gap + rows * down), "white")

    draw = ImageDraw.Draw(canvas)
    for index, (name, strip) in enumerate(strips.items()):
        left = gap + index % columns * across
        top = gap + index // columns * down
        draw.text((left, top + 2), name, fill="black", font=font)
        for number, picture in enumerate(strip):
            canvas.paste(picture, (left + number * (width + gap), top + label))
    return canvas


def rgb(image: Tensor) -> Image.Image:
    """Turn uint8 (C, H, W) into a picture.

    One channel is grey, two are red and green, four are RGB and alpha, laid over white. Of other
    numbers, the first three are shown.
    """
    if image.shape[0] == 4:
        whole = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    if image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    elif image.shape[0] == 2:
        image = torch.cat((image, torch.zeros_like(image[:1])))
    return Image.fromarray(image[:3].permute(1, 2, 0).contiguous().cpu().numpy())


def running_mean(values: Sequence[float], window: int) -> NDArray[np.float64]:
    """Average each value with those before it in the window, fewer at the start.

    NaN while one of them is NaN.
    """
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    return np.asarray(np.convolve(values, np.ones(window))[: len(values)] / counts)


def plot_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path) -> None:
    """Plot steps and values into a PNG, one panel per entry.

    From 50 points on a curve is pale, below its :func:`running_mean` over the last 4 % of all
    points. Titles count the points of curves with fewer than five.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (name, (steps, values)) in zip(axes, curves.items(), strict=False):
        # The values, and their running mean.
        points = len(steps)
        window = max(1, points // 25)
        opacity = 1.0 if window == 1 else 0.3
        line = {"linewidth": 1.2, "markersize": 3, "alpha": opacity}
        panel.plot(steps, values, "C0", marker="o" if points < 20 else "", **line)
        panel.plot(steps, running_mean(values, window), "C0", linewidth=1.2)

        title = name
        if points < 5:
            title = f"{name} ({points} point{'s' * (points != 1)})"
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    # Panels of the last row that are left over.
    for panel in axes[len(curves) :]:
        panel.set_axis_off()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
