"""Compare autoencoders on a dropped image in a browser: reconstruction, error, latent, PSNR, SSIM and time of each."""

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

if TYPE_CHECKING:  # an extra; imported where the page is built
    import gradio as gr

MAX_PIXELS = (
    4_000_000  # limit of an image on the page; one thread reconstructs it in about a minute
)
SHOWN_SIDE = 256  # pixels that the longer side of a picture has at least on the page
DETAIL_SIDES = (16, 32, 64, 128)  # pixels along a side of the enlarged detail
DELETE_AFTER_S = 3600  # seconds after which a visitor's pictures are deleted

Captioned = tuple[NDArray[np.uint8], str]


class Result(NamedTuple):
    """One model's reconstruction of one image, and the seconds that encoding and decoding took together."""

    y: Tensor  # uint8 (C, H, W)
    error: Tensor  # uint8 (3, H, W), of olvae.figures.error_map
    latent: Tensor  # what was decoded, (n_z, h, w)
    psnr: float  # in dB, infinite for an equal image
    ssim: float | None  # None if the image is too small for it
    seconds: float


class Shown(NamedTuple):
    """A visitor's image, and the models' results."""

    x: Tensor
    results: Mapping[str, Result]


def load(targets: Sequence[Target], device: str) -> dict[str, Autoencoder]:
    """Load models by name, folded for inference; raise ValueError if they take images of different channels."""
    models = {target.name: target.load().fold().to(device).eval() for target in targets}
    if len(channels := {model.in_channels for model in models.values()}) > 1:
        raise ValueError(
            f"the targets take images of {' and '.join(map(str, sorted(channels)))} channels"
        )
    for name, model in models.items():
        if not model.pixel_range.eight_bits:
            raise ValueError(f"{name}: takes values of {model.pixel_range}: olvae reconstruct does")
    return models


def read_image(path: str | Path, channels: int) -> Tensor:
    """Read an image as uint8 (C, H, W); raise ValueError if it is none, or has more than :data:`MAX_PIXELS`."""
    photo = Photo(Path(path), Path(path).name, channels)
    width, height = photo.size  # the header's: nothing is decoded yet
    if width * height > MAX_PIXELS:
        limit = f"{MAX_PIXELS / 1e6:.0f} million: olvae reconstruct takes any size"
        raise ValueError(f"{width}x{height} pixels are too many for this page, which takes {limit}")
    return image_to_tensor(photo.read())


def compare(models: Mapping[str, Autoencoder], x: Tensor, device: str) -> dict[str, Result]:
    """Reconstruct an image, uint8 (C, H, W), with every model; raise ValueError if a reconstruction is not finite."""
    where = torch.device(device)
    options = ReconstructOptions(where, default_memory(where))
    found = {}
    for name, model in models.items():
        start = time.perf_counter()
        try:
            y, z = reconstruct(model, x, options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        seconds = time.perf_counter() - start
        similarity = ssim(x[None], y[None]).item() if min(x.shape[-2:]) >= SSIM_WINDOW else None
        picture = error_map(x[None], y[None])[0]
        found[name] = Result(
            y, picture, z[0].float().cpu(), psnr(x[None], y[None]).item(), similarity, seconds
        )
    return found


def latent_pictures(latent: Tensor) -> Tensor:
    """Show the channels of a latent (n_z, h, w) as enlarged grey pictures, uint8 (n_z, 1, H, W).

    Black and white are the smallest and the largest value of each channel, and a constant channel is black.
    """
    low, high = latent.amin((1, 2), keepdim=True), latent.amax((1, 2), keepdim=True)  # (n_z, 1, 1)
    grey = (255.0 * (latent - low) / (high - low).clamp_min(1e-12)).round().to(torch.uint8)
    return enlarged(grey[:, None])


def enlarged(image: Tensor) -> Tensor:
    """Enlarge small pictures, uint8 (..., H, W), pixel by pixel: scaling in a browser would blur them."""
    factor = math.ceil(SHOWN_SIDE / max(image.shape[-2:]))
    return image.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def crop_around(image: Tensor, place: tuple[int, int], side: int) -> Tensor:
    """Crop a square of ``side`` pixels at most, with its centre as near to ``place`` (x, y) as fits the image."""
    height, width = image.shape[-2:]
    left, top = (
        min(max(at - side // 2, 0), max(length - side, 0))
        for at, length in zip(place, (width, height), strict=True)
    )
    return image[:, top : top + side, left : left + side]


def page(targets: Sequence[str], device: str = "cpu") -> "gr.Blocks":
    """Load TARGETs, and build their page in Gradio."""
    import gradio as gr

    gr.set_static_paths(
        [HELD_OUT[0].parent]
    )  # the examples, which Gradio serves from no other folder
    models = load(name_apart([find_target(target) for target in targets]), device)
    names, channels = list(models), next(iter(models.values())).in_channels
    pictures: Mapping[str, Any] = {
        "format": "png",
        "object_fit": "contain",
        "height": "max-content",
    }

    def look(path: str | None, name: str, side: int) -> tuple[Any, ...]:
        if path is None:
            return (None,) * 7
        try:
            x = read_image(path, channels)
            shown = Shown(x, compare(models, x, device))
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        errors = [(_array(result.error), model) for model, result in shown.results.items()]
        return (
            shown,
            _table(models, shown),
            *_choose(shown, name),
            errors,
            _array(x),
            _detail(shown, side),
        )

    def detail_at(shown: Shown | None, side: int, event: gr.SelectData) -> list[Captioned] | None:
        return _detail(shown, side, (int(event.index[0]), int(event.index[1])))

    deleting = (DELETE_AFTER_S, DELETE_AFTER_S)
    with gr.Blocks(title="open-LiteVAE", analytics_enabled=False, delete_cache=deleting) as blocks:
        gr.Markdown("# What an autoencoder keeps of an image")
        state = gr.State(time_to_live=DELETE_AFTER_S)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                file = gr.File(label="Drop an image", type="filepath", elem_id="file")
                thumbnail = gr.Image(type="filepath", visible=False)
                samples = [[str(path)] for path in HELD_OUT[:4]]
                examples = gr.Dataset(
                    components=[thumbnail],
                    samples=samples,
                    label="or take one of these",
                    elem_id="examples",
                )
                name = gr.Radio(
                    names, value=names[0], label="Shown beside the original", visible=len(names) > 1
                )
            with gr.Column(scale=2, min_width=360):
                slider = gr.ImageSlider(
                    label="original | reconstruction", format="png", elem_id="slider"
                )
                columns = [
                    "model",
                    "PSNR, dB",
                    "SSIM",
                    "seconds",
                    "latent",
                ]  # on a phone the first ones show
                table = gr.Dataframe(
                    headers=columns,
                    wrap=True,
                    label="Numbers",
                    interactive=False,
                    elem_id="numbers",
                )
        with gr.Tab("Error", render_children=True):
            gr.Markdown(
                "Absolute error, mean of the channels: black is 0, white 64 of 255 and above."
            )
            errors = gr.Gallery(
                label="Error", elem_id="errors", columns=min(3, len(names)), **pictures
            )
        with gr.Tab("Latent", render_children=True):
            gr.Markdown(
                "Each channel of the latent on its own scale, from its smallest value (black) to its largest."
            )
            latent = gr.Gallery(label="Latent channels", elem_id="latent", columns=4, **pictures)
        with gr.Tab("Pixels", render_children=True):
            gr.Markdown(
                "Click on the original: beside it is that place with every model, pixel by pixel."
            )
            side = gr.Radio(list(DETAIL_SIDES), value=DETAIL_SIDES[2], label="Pixels along a side")
            with gr.Row():
                whole = gr.Image(label="Original", interactive=False, format="png", elem_id="whole")
                near = gr.Gallery(label="Detail", elem_id="detail", columns=2, **pictures)
        examples.click(lambda sample: sample[0], examples, file)
        file.change(look, [file, name, side], [state, table, slider, latent, errors, whole, near])
        name.change(_choose, [state, name], [slider, latent])
        whole.select(detail_at, [state, side], near)
        side.change(_detail, [state, side], near)
    return blocks


def _choose(shown: Shown | None, name: str) -> tuple[Any, Any]:
    """Return the slider's two pictures, and those of the latent."""
    if shown is None:
        return None, None
    result = shown.results[name]
    latent = [
        (_array(channel), f"channel {i + 1}")
        for i, channel in enumerate(latent_pictures(result.latent))
    ]
    return (_array(shown.x), _array(result.y)), latent


def _detail(
    shown: Shown | None, side: int, place: tuple[int, int] | None = None
) -> list[Captioned] | None:
    if shown is None:
        return None
    height, width = shown.x.shape[-2:]
    place = place or (width // 2, height // 2)
    images = {"original": shown.x, **{name: result.y for name, result in shown.results.items()}}
    return [
        (_array(enlarged(crop_around(image, place, side))), name) for name, image in images.items()
    ]


def _table(models: Mapping[str, Autoencoder], shown: Shown) -> list[list[str]]:
    rows = []
    for name, result in shown.results.items():
        psnr = "∞" if math.isinf(result.psnr) else f"{result.psnr:.2f}"
        ssim = "\N{EN DASH}" if result.ssim is None else f"{result.ssim:.4f}"
        size = "x".join(map(str, result.latent.shape))
        rows.append(
            [name, psnr, ssim, f"{result.seconds:.2f}", f"f{models[name].downscale}, {size}"]
        )
    return rows


def _array(image: Tensor) -> NDArray[np.uint8]:
    return np.asarray(rgb(image))
