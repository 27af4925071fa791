"""Compare autoencoders on a dropped image in a browser.

The page shows each model's reconstruction, error, latent, PSNR, SSIM and time.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from olvae.data.dataset import HELD_OUT
from olvae.data.image import Photo, image_to_tensor
from olvae.export.reconstruction import ReconstructOptions, reconstruct
from olvae.figures import error_map, rgb
from olvae.metrics.metric import SSIM_WINDOW, psnr, ssim
from olvae.models.autoencoder import Autoencoder
from olvae.models.large.tiling import default_memory
from olvae.models.loading.loader import Target
from olvae.models.loading.targets import find_target, name_apart

# An extra, which is imported where the page is built.
if TYPE_CHECKING:
    import gradio as gr

# The largest image on the page; one thread reconstructs it in about a minute.
PAGE_MAX_PIXELS = 4_000_000

# The least number of pixels along the longer side of a picture on the page.
SHOWN_SIDE = 256

# Pixels along a side of the enlarged detail.
DETAIL_SIDES = (16, 32, 64, 128)

# Seconds after which a visitor's pictures are deleted.
DELETE_AFTER_S = 3600
DELETING = (DELETE_AFTER_S, DELETE_AFTER_S)  # how often Gradio looks, and from which age

# Columns of the table; on a phone the first ones show.
_COLUMNS = ["model", "PSNR, dB", "SSIM", "seconds", "latent"]

Captioned = tuple[NDArray[np.uint8], str]


class Result(NamedTuple):
    """One model's reconstruction of one image."""

    # uint8 (C, H, W).
    y: Tensor
    # uint8 (3, H, W), from olvae.figures.error_map.
    error: Tensor
    # The latent that was decoded, (n_z, h, w).
    latent: Tensor
    # In dB; infinite for an equal image.
    psnr: float
    # None if the image is too small for it.
    ssim: float | None
    # Of encoding and decoding together.
    seconds: float


class Shown(NamedTuple):
    """A visitor's image, and the models' results."""

    x: Tensor
    results: Mapping[str, Result]


def load_choice(targets: Sequence[Target], device: str) -> dict[str, Autoencoder]:
    """Load models by name, folded for inference; ValueError if their images can't be compared."""
    models = {target.name: target.load().fold().to(device).eval() for target in targets}
    channels = {model.in_channels for model in models.values()}
    if len(channels) > 1:
        raise ValueError(
            f"the targets take images of {' and '.join(map(str, sorted(channels)))} channels"
        )
    for name, model in models.items():
        if not model.pixel_range.eight_bits:
            raise ValueError(f"{name}: takes values of {model.pixel_range}: olvae reconstruct does")
    return models


def read_image(path: str | Path, channels: int) -> Tensor:
    """Read an image as uint8 (C, H, W).

    ValueError if it is not an image, or has more than :data:`PAGE_MAX_PIXELS`.
    """
    photo = Photo(Path(path), Path(path).name, channels)
    # The size is in the header: nothing is decoded yet.
    width, height = photo.size
    if width * height > PAGE_MAX_PIXELS:
        raise ValueError(
            f"{width}x{height} pixels are too many for this page, which takes "
            f"{PAGE_MAX_PIXELS / 1e6:.0f} million: olvae reconstruct takes any size"
        )
    return image_to_tensor(photo.read())


def read_and_compare(models: Mapping[str, Autoencoder], path: str, device: str) -> Shown:
    """Read an image and reconstruct it with every model; ValueError where either is impossible."""
    x = read_image(path, next(iter(models.values())).in_channels)
    return Shown(x, compare(models, x, device))


def compare(models: Mapping[str, Autoencoder], x: Tensor, device: str) -> dict[str, Result]:
    """Reconstruct an image, uint8 (C, H, W), with every model; ValueError if one is not finite."""
    where = torch.device(device)
    options = ReconstructOptions(where, default_memory(where))
    found = {}
    for name, model in models.items():
        start = time.perf_counter()
        try:
            # Of a decoder at 2x the shrunk image, which can be compared with the others.
            y, z, _ = reconstruct(model, x, options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        seconds = time.perf_counter() - start
        similarity = ssim(x[None], y[None]).item() if min(x.shape[-2:]) >= SSIM_WINDOW else None
        found[name] = Result(
            y=y,
            error=error_map(x[None], y[None])[0],
            latent=z[0].float().cpu(),
            psnr=psnr(x[None], y[None]).item(),
            ssim=similarity,
            seconds=seconds,
        )
    return found


def latent_pictures(latent: Tensor) -> Tensor:
    """Show the channels of a latent (n_z, h, w) as enlarged grey pictures, uint8 (n_z, 1, H, W).

    Black and white are the smallest and the largest value of each channel, and a constant channel
    is black.
    """
    low = latent.amin((1, 2), keepdim=True)  # (n_z, 1, 1)
    high = latent.amax((1, 2), keepdim=True)
    grey = (255.0 * (latent - low) / (high - low).clamp_min(1e-12)).round().to(torch.uint8)
    return enlarged(grey[:, None])


def enlarged(image: Tensor) -> Tensor:
    """Enlarge small pictures, uint8 (..., H, W), pixel by pixel: a browser would blur them."""
    factor = math.ceil(SHOWN_SIDE / max(image.shape[-2:]))
    return image.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def crop_around(image: Tensor, place: tuple[int, int], side: int) -> Tensor:
    """Crop a square of at most ``side`` pixels around ``place`` (x, y), moved into the image."""
    height, width = image.shape[-2:]
    x, y = place
    left = min(max(x - side // 2, 0), max(width - side, 0))
    top = min(max(y - side // 2, 0), max(height - side, 0))
    return image[:, top : top + side, left : left + side]


def page(targets: Sequence[str], device: str = "cpu") -> "gr.Blocks":
    """Load TARGETs, and build their page in Gradio."""
    import gradio as gr

    # The examples' folder: Gradio serves files from no other one.
    gr.set_static_paths([HELD_OUT[0].parent])
    models = load_choice(name_apart([find_target(target) for target in targets]), device)
    names = list(models)

    # What the page does when a user drops an image, and when one clicks on it.
    def look(path: str | None, name: str, side: int) -> tuple[Any, ...]:
        if path is None:
            return (None,) * 7
        try:
            shown = read_and_compare(models, path, device)
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        return _look(models, shown, name, side)

    def detail_at(shown: Shown | None, side: int, event: gr.SelectData) -> list[Captioned] | None:
        return _detail(shown, side, (int(event.index[0]), int(event.index[1])))

    pictures: dict[str, Any] = {"format": "png", "object_fit": "contain", "height": "max-content"}
    with gr.Blocks(title="open-LiteVAE", analytics_enabled=False, delete_cache=DELETING) as blocks:
        gr.Markdown("# What an autoencoder keeps of an image")
        state = gr.State(time_to_live=DELETE_AFTER_S)

        # Above: the image and the model on the left, the comparison and its numbers on the right.
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                file = gr.File(label="Drop an image", type="filepath", elem_id="file")
                examples = _examples()
                label = "Shown beside the original"
                name = gr.Radio(names, value=names[0], label=label, visible=len(names) > 1)
            with gr.Column(scale=2, min_width=360):
                label = "original | reconstruction"
                slider = gr.ImageSlider(label=label, format="png", elem_id="slider")
                numbers: dict[str, Any] = {"label": "Numbers", "elem_id": "numbers"}
                table = gr.Dataframe(headers=_COLUMNS, wrap=True, interactive=False, **numbers)

        # Below: a tab each for errors, latents and single pixels.
        with gr.Tab("Error", render_children=True):
            gr.Markdown("Absolute error, mean of channels: black is 0, white 64 of 255 and above.")
            columns = min(3, len(names))
            errors = gr.Gallery(label="Error", elem_id="errors", columns=columns, **pictures)
        with gr.Tab("Latent", render_children=True):
            gr.Markdown("Each channel by itself, from its smallest value (black) to its largest.")
            latent = gr.Gallery(label="Latent channels", elem_id="latent", columns=4, **pictures)
        with gr.Tab("Pixels", render_children=True):
            gr.Markdown("Click on the original to see that place with every model, enlarged.")
            side = gr.Radio(list(DETAIL_SIDES), value=DETAIL_SIDES[2], label="Pixels along a side")
            with gr.Row():
                whole = gr.Image(label="Original", interactive=False, format="png", elem_id="whole")
                near = gr.Gallery(label="Detail", elem_id="detail", columns=2, **pictures)

        # Events: an image, another model beside the original, another place or size of the detail.
        examples.click(lambda sample: sample[0], examples, file)
        file.change(look, [file, name, side], [state, table, slider, latent, errors, whole, near])
        name.change(_choose, [state, name], [slider, latent])
        whole.select(detail_at, [state, side], near)
        side.change(_detail, [state, side], near)
    return blocks


def _look(models: Mapping[str, Autoencoder], shown: Shown, name: str, side: int) -> tuple[Any, ...]:
    """Make what the page shows of an image and its reconstructions.

    In order: the state, the table, the slider, the latent, the errors, the original, the detail.
    """
    errors = [(_array(result.error), model) for model, result in shown.results.items()]
    slider, latent = _choose(shown, name)
    detail = _detail(shown, side)

    # The table: a row of :data:`_COLUMNS` per model.
    rows = []
    for model, result in shown.results.items():
        psnr_text = "∞" if math.isinf(result.psnr) else f"{result.psnr:.2f}"
        ssim_text = "\N{EN DASH}" if result.ssim is None else f"{result.ssim:.4f}"
        sides = "x".join(map(str, result.latent.shape))
        shape = f"f{models[model].downscale}, {sides}"
        rows.append([model, psnr_text, ssim_text, f"{result.seconds:.2f}", shape])
    return shown, rows, slider, latent, errors, _array(shown.x), detail


def _examples() -> "gr.Dataset":
    """Build the row of example images to click on."""
    import gradio as gr

    return gr.Dataset(
        components=[gr.Image(type="filepath", visible=False)],
        samples=[[str(path)] for path in HELD_OUT[:4]],
        label="or take one of these",
        elem_id="examples",
    )


def _choose(shown: Shown | None, name: str) -> tuple[Any, Any]:
    """Return the slider's two pictures, and the latent's pictures."""
    if shown is None:
        return None, None
    result = shown.results[name]
    latent = []
    for i, channel in enumerate(latent_pictures(result.latent)):
        latent.append((_array(channel), f"channel {i + 1}"))
    return (_array(shown.x), _array(result.y)), latent


def _detail(
    shown: Shown | None, side: int, place: tuple[int, int] | None = None
) -> list[Captioned] | None:
    """Return enlarged crops of the original and the reconstructions, by default of the middle."""
    if shown is None:
        return None
    height, width = shown.x.shape[-2:]
    place = place or (width // 2, height // 2)
    images = {"original": shown.x, **{name: result.y for name, result in shown.results.items()}}
    return [
        (_array(enlarged(crop_around(image, place, side))), name) for name, image in images.items()
    ]


def _array(image: Tensor) -> NDArray[np.uint8]:
    return np.asarray(rgb(image))
