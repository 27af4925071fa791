"""Draw docs/images/model.svg: LiteVAE and its discriminator, with the sizes of a recipe's networks.

python scripts/draw_model.py
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olvae.config import instantiate
from olvae.data.places import load

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "model.svg"
SIDE = 256  # of the drawn image, in pixels
WIDTH, HEIGHT = 960, 420

# Readable on a light and on a dark page: the picture has a background of its own.
STYLE = """
  .paper { fill: #fbfbf8; stroke: #c9c9c2; }
  .data { fill: #ffffff; stroke: #33332f; }
  .fixed { fill: #dbe9f4; stroke: #0b5f94; }
  .learned { fill: #fde3cf; stroke: #b85200; }
  .adversary { fill: #efe1ec; stroke: #8a3a76; stroke-dasharray: 5 3; }
  .arrow { fill: none; stroke: #33332f; stroke-width: 1.4; marker-end: url(#head); }
  .dashed { stroke: #8a3a76; stroke-dasharray: 5 3; }
  text { font: 13px system-ui, sans-serif; fill: #1c1c1a; text-anchor: middle; }
  .small { font-size: 11px; fill: #4a4a45; }
  .left { text-anchor: start; }
"""


def millions(*modules: nn.Module) -> str:
    count = sum(weight.numel() for module in modules for weight in module.parameters())
    return f"{count / 1e6:.1f} M"


def box(kind: str, x: int, y: int, width: int, height: int, *lines: str) -> str:
    """A rectangle with lines of text in its middle, the first one large."""
    first = y + height / 2 + 4 - 8 * (len(lines) - 1)
    texts = [
        f'<text class="{"small" if number else "title"}" x="{x + width / 2:g}" '
        f'y="{first + 16 * number:g}">{line}</text>'
        for number, line in enumerate(lines)
    ]
    shape = f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
    return "\n".join([shape, *texts])


def arrow(*points: tuple[int, int], kind: str = "") -> str:
    path = " L".join(f"{x} {y}" for x, y in points)
    return f'<path class="arrow {kind}" d="M{path}"/>'


def note(x: int, y: int, text: str) -> str:
    return f'<text class="small left" x="{x}" y="{y}">{text}</text>'


def encoder_row(encoder: Any, moments: int) -> list[str]:
    """The image, its wavelet levels, an extractor for each, the aggregator."""
    parts = [
        box("data", 20, 96, 96, 96, "image", f"3 x {SIDE} x {SIDE}"),
        box("fixed", 150, 104, 88, 80, "wavelet", "transform", "(Haar)"),
        arrow((116, 144), (148, 144)),
        box("learned", 660, 84, 130, 120, "aggregator", "a UNet", millions(encoder.aggregator)),
    ]
    for level, extractor in enumerate(encoder.extractors, start=1):
        y = 44 + 76 * (level - 1)
        side = SIDE >> level
        parts += [
            box("fixed", 272, y, 118, 48, f"level {level}", f"12 x {side} x {side}"),
            box("learned", 424, y, 110, 48, "extractor", millions(extractor)),
            arrow((238, 144), (255, 144), (255, y + 24), (270, y + 24)),
            arrow((390, y + 24), (422, y + 24)),
            arrow((534, y + 24), (600, y + 24), (600, 144), (658, 144)),
        ]
    smallest = SIDE // encoder.downscale
    parts.append(note(542, 236, f"averaged to {smallest} x {smallest}, concatenated"))
    return [*parts, arrow((790, 144), (824, 144)), *latent(moments, smallest)]


def latent(channels: int, side: int) -> list[str]:
    return [
        box("data", 826, 96, 114, 96, "latent z", f"{channels} x {side} x {side}", "mean + noise"),
        note(826, 84, "KL to N(0, 1)"),
    ]


def decoder_row(decoder: Any, discriminator: nn.Module) -> list[str]:
    """The levels of the decoder from the latent's size to the image's, from right to left."""
    smallest = SIDE >> (len(decoder.up) - 1)
    widths = [level["block"][-1].conv1.conv.weight.shape[0] for level in reversed(decoder.up)]
    parts = [arrow((883, 192), (883, 300), (852, 300))]
    places = [(742 - 122 * number) for number in range(len(widths))]
    for number, (x, width) in enumerate(zip(places, widths, strict=True)):
        side = smallest << number
        parts.append(box("learned", x, 268, 108, 64, "SMC blocks", f"{width} x {side} x {side}"))
    parts += [arrow((left, 300), (right + 110, 300)) for left, right in pairwise(places)]
    parts += [
        box("data", 238, 252, 112, 96, "reconstruction", f"3 x {SIDE} x {SIDE}"),
        arrow((376, 300), (352, 300)),
        note(376, 356, f"decoder: {millions(decoder)}; from box to box height and width double"),
        note(238, 366, "L1, LPIPS, details"),
        box("adversary", 90, 262, 112, 76, "discriminator", millions(discriminator), "phase B"),
        arrow((238, 300), (204, 300), kind="dashed"),
        arrow((55, 192), (55, 300), (88, 300), kind="dashed"),
    ]
    return parts


def draw() -> str:
    params = load(["phase_b"])["model"]["params"]
    with torch.device("meta"):
        encoder, decoder, discriminator = (
            instantiate(node)
            for node in (
                params["encoder_config"],
                params["decoder_config"],
                params["adversary_config"]["params"]["discriminator_config"],
            )
        )
    colours = {"data": "images and latents", "fixed": "fixed", "learned": "learned"}
    legend = [
        box(kind, 20 + 190 * number, 384, 22, 16) + note(50 + 190 * number, 397, text)
        for number, (kind, text) in enumerate({**colours, "adversary": "phase B only"}.items())
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>LiteVAE: wavelet levels, extractors, aggregator, latent, decoder</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#33332f"/></marker>'
            "</defs>",
            f'<rect class="paper" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="8"/>',
            *encoder_row(encoder, params["embed_dim"]),
            *decoder_row(decoder, discriminator),
            *legend,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE)
