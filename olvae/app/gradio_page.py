"""Serve a Gradio page that compares the reconstructions of a dropped image."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from olvae.app.comparison import Result, compare, crop_around, enlarged, latent_pictures, load, read_image
from olvae.data.dataset import HELD_OUT
from olvae.figures import rgb
from olvae.models.autoencoder import Autoencoder
from olvae.models.loading.targets import find_target, name_apart

COLUMNS = ["model", "latent", "PSNR, dB", "SSIM", "seconds"]

DETAIL_SIDES = (16, 32, 64, 128)
"""Pixels along a side of the enlarged detail."""

GALLERY: Mapping[str, Any] = {"format": "png", "object_fit": "contain", "height": "max-content"}

DELETE_AFTER_S = 3600
"""Seconds after which a visitor's pictures are deleted."""

Picture = NDArray[np.uint8]

Captioned = tuple[Picture, str]


class Shown(NamedTuple):
    """A visitor's image, and the models' results."""

    x: Tensor
    results: Mapping[str, Result]


def page(targets: Sequence[str], device: str = "cpu") -> gr.Blocks:
    """Load TARGETs, and build their page."""
    return build(load(name_apart([find_target(target) for target in targets]), device), device)


def build(models: Mapping[str, Autoencoder], device: str = "cpu") -> gr.Blocks:
    """Build the page of loaded models, by name."""
    names, channels = list(models), next(iter(models.values())).in_channels

    def look(path: str | None, name: str, side: int) -> tuple[Any, ...]:
        if path is None:
            return None, None, None, None, None, None, None
        try:
            x = read_image(path, channels)
            shown = Shown(x, compare(models, x, device))
        except ValueError as error:
            raise gr.Error(str(error), duration=None) from None
        errors = [(_array(result.error), model) for model, result in shown.results.items()]
        slider, latent = _choose(shown, name)
        return shown, _table(models, shown), slider, errors, latent, _array(x), _detail(shown, side)

    deleting = (DELETE_AFTER_S, DELETE_AFTER_S)
    with gr.Blocks(title="open-LiteVAE", analytics_enabled=False, delete_cache=deleting) as blocks:
        gr.Markdown("# What an autoencoder keeps of an image")
        state = gr.State(time_to_live=DELETE_AFTER_S)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                file = gr.File(label="Drop an image", type="filepath", elem_id="file")
                gr.Examples([[str(photograph.path)] for photograph in HELD_OUT[:4]], file, label="or take one of these")
                name = gr.Radio(names, value=names[0], label="Shown beside the original", visible=len(names) > 1)
            with gr.Column(scale=2, min_width=360):
                slider = gr.ImageSlider(label="original | reconstruction", format="png", elem_id="slider")
                table = gr.Dataframe(headers=COLUMNS, wrap=True, label="Numbers", interactive=False, elem_id="numbers")
        with gr.Tab("Error", render_children=True):
            gr.Markdown("Absolute error, mean of the channels: black is 0, white 64 of 255 and above.")
            errors = gr.Gallery(label="Error", elem_id="errors", columns=min(3, len(names)), **GALLERY)
        with gr.Tab("Latent", render_children=True):
            gr.Markdown("Each channel of the latent on its own scale, from its smallest value (black) to its largest.")
            latent = gr.Gallery(label="Latent channels", elem_id="latent", columns=4, **GALLERY)
        with gr.Tab("Pixels", render_children=True):
            gr.Markdown("Click on the original: beside it is that place with every model, pixel by pixel.")
            side = gr.Radio(list(DETAIL_SIDES), value=DETAIL_SIDES[2], label="Pixels along a side")
            with gr.Row():
                whole = gr.Image(label="Original", interactive=False, format="png", elem_id="whole")
                near = gr.Gallery(label="Detail", elem_id="detail", columns=2, **GALLERY)
        file.change(look, [file, name, side], [state, table, slider, errors, latent, whole, near])
        name.change(_choose, [state, name], [slider, latent])
        whole.select(_detail_at, [state, side], near)
        side.change(_detail, [state, side], near)
    return blocks


def _choose(shown: Shown | None, name: str) -> tuple[Any, Any]:
    if shown is None:
        return None, None
    result = shown.results[name]
    latent = [(_array(channel), f"channel {i + 1}") for i, channel in enumerate(latent_pictures(result.latent))]
    return (_array(shown.x), _array(result.y)), latent


def _detail(shown: Shown | None, side: int, place: tuple[int, int] | None = None) -> list[Captioned] | None:
    if shown is None:
        return None
    height, width = shown.x.shape[-2:]
    place = place or (width // 2, height // 2)
    images = {"original": shown.x, **{name: result.y for name, result in shown.results.items()}}
    return [(_array(enlarged(crop_around(image, place, side))), name) for name, image in images.items()]


def _detail_at(shown: Shown | None, side: int, event: gr.SelectData) -> list[Captioned] | None:
    return _detail(shown, side, (int(event.index[0]), int(event.index[1])))


def _table(models: Mapping[str, Autoencoder], shown: Shown) -> list[list[str]]:
    rows = []
    for name, result in shown.results.items():
        psnr = "∞" if math.isinf(result.psnr) else f"{result.psnr:.2f}"
        ssim = "\N{EN DASH}" if result.ssim is None else f"{result.ssim:.4f}"
        channels, height, width = result.latent.shape
        latent = f"f{models[name].downscale}, {channels}x{height}x{width}"
        rows.append([name, latent, psnr, ssim, f"{result.seconds:.2f}"])
    return rows


def _array(image: Tensor) -> Picture:
    return np.asarray(rgb(image))
