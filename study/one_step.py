"""Decoders of the same latents side by side: PSNR, Fréchet distance in Lite0's features, time.

    python -m study.one_step plain=olvae:photos-f8c12 sharp=olvae:photos-f8c12-sharp \
        one_step=RUN --tiles study/corpus-out/held_out_tiles --out one_step.json

Two 128-pixel parts of each tile, halved, and the middle 64 pixels of each. A decoder that generates
also has a row of its first picture, and one of four steps from the same noise.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from olvae.bench.measure import measure_case
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.figures import labelled_grid
from olvae.files import write_json
from olvae.metrics.metric import psnr
from olvae.models.autoencoder import LiteVAE
from olvae.models.loading.targets import find_target
from olvae.modules.litevae.one_step import OneStepDecoder
from study.features import Lite0, frechet_lite0
from study.measure import SIDE, parts

SIDES = (64, 128)
ROUNDS = 9
TOGETHER = 16  # crops
STEPS = 4
SHOWN = (3, 21, 43, 58)  # crops in the picture, of photographs that are CC0

Decode = Callable[[Tensor], Tensor]


def crops(folder: Path, side: int) -> Tensor:
    """Two parts of each tile, upper left and lower right, cut to their middle: uint8 (N, 3, S, S).

    They show other places of the photograph.
    """
    start = (SIDE - side) // 2
    inside = slice(start, start + side)
    return torch.cat([four[[0, 3]][..., inside, inside] for four in parts(folder)])


def decoders(models: Mapping[str, LiteVAE]) -> dict[str, Decode]:
    """What decodes, by name; of a decoder that generates also its first picture and more steps."""
    found: dict[str, Decode] = {}
    for name, model in models.items():
        found[name] = model.decode
        if isinstance(model.decoder, OneStepDecoder):
            found[f"{name}_first"] = model.decoder.first_picture
            found[f"{name}_{STEPS}_steps"] = partial(several_steps, model.decoder)
    return found


def several_steps(decoder: OneStepDecoder, z: Tensor, steps: int = STEPS) -> Tensor:
    """Decode in several steps, from the noise that one step has."""
    noise = decoder.with_noise(z)[:, z.shape[1] :]
    return decoder.sample(z, decoder.unfold(noise), steps)


@torch.inference_mode()
def measure(model: LiteVAE, by_name: Mapping[str, Decode], folder: Path) -> dict[str, dict]:
    """Mean PSNR in dB and Fréchet distance of each decoder, by size; ``model`` encodes."""
    network = Lite0()
    found: dict[str, dict] = {name: {} for name in by_name}
    for side in SIDES:
        x = crops(folder, side)
        real = network.of(x.split(TOGETHER))
        z = [model.encode(from_uint8(part)).mode() for part in x.split(TOGETHER)]
        for name, decode in by_name.items():
            y = torch.cat([to_uint8(decode(part)) for part in z])
            found[name][f"psnr_{side}"] = psnr(x, y).mean().item()
            fake = network.of(y.split(TOGETHER))
            found[name][f"frechet_lite0_{side}"] = frechet_lite0(real, fake)
        found_images = len(x)
        for values in found.values():
            values["images"] = found_images
    return found


def timed(decode: Decode, z: Tensor) -> list[float]:
    began = perf_counter()
    decode(z)
    return [perf_counter() - began]


@torch.inference_mode()
def picture(model: LiteVAE, by_name: Mapping[str, Decode], folder: Path, path: Path) -> None:
    """Draw a row of crops for the original and each decoder."""
    x = crops(folder, SIDES[1])[list(SHOWN)]
    z = model.encode(from_uint8(x)).mode()
    rows = {"original": x}
    for name, decode in by_name.items():
        rows[name.replace("_", " ")] = to_uint8(decode(z))
    labelled_grid(rows).save(path, quality=80)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", help="NAME=TARGET, all of the same latents")
    parser.add_argument("--tiles", type=Path, required=True, help="a folder of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--picture", type=Path, help="a picture of some crops")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    models = {}
    for text in options.targets:
        name, _, target = text.partition("=")
        models[name] = find_target(target).load().as_litevae(target)
    first = next(iter(models.values()))
    by_name = decoders(models)
    found = measure(first, by_name, options.tiles)

    # Times in turns, of 256 pixels.
    z = torch.randn(1, first.latent_channels, 256 // first.downscale, 256 // first.downscale)
    with torch.inference_mode():
        work = {name: partial(timed, decode, z) for name, decode in by_name.items()}
        times = measure_case(work, "cpu", ROUNDS)
    for name, measured in times.items():
        found[name]["seconds_256"] = measured.median
    write_json(found, options.out)
    if options.picture is not None:
        picture(first, by_name, options.tiles, options.picture)


if __name__ == "__main__":
    main()
