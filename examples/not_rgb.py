"""Make small files that are not RGB out of the sample photographs, to try docs/not-rgb.md with.

Each kind gets a folder of its name in the working directory. All are stand-ins: grey photographs
for X-rays, mixtures of their colours for a satellite's bands, their brightness for depth and for
light far above white, drawn voices for spectrograms, a disc as alpha.

    python examples/not_rgb.py xray satellite depth hdr spectrogram rgba
    olvae train --base not_rgb/xray
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from olvae.cli.main import print_error
from olvae.data.dataset import HELD_OUT, PHOTOGRAPHS
from olvae.files import check_folder

PICTURES = (*PHOTOGRAPHS, *HELD_OUT)


def xray(folder: Path) -> None:
    """PNG of one channel of 16 bits: grey photographs, with noise below a step of 8 bits."""
    for number, path in enumerate(PICTURES):
        grey = np.asarray(Image.open(path).convert("L"), dtype=float)
        fine = np.random.default_rng(number).random(grey.shape)
        values = (257 * (grey + fine - 0.5).clip(0, 255)).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{path.stem}.png")


def satellite(folder: Path) -> None:
    """TIFF of 13 bands of 16 bits: each band sees another mixture of the colours."""
    mixed = np.random.default_rng(0).dirichlet(np.ones(3), 13)
    for number, path in enumerate(PICTURES):
        colours = (np.asarray(Image.open(path), dtype=float) / 255) ** 2.2
        noise = np.random.default_rng(number).normal(0, 10, (*colours.shape[:2], 13))
        bands = (4000 * colours @ mixed.T + 300 + noise).clip(0).astype(np.uint16)
        file = folder / f"{path.stem}.tif"
        tifffile.imwrite(file, bands, photometric="minisblack", planarconfig="contig")


def depth(folder: Path) -> None:
    """NumPy files of metres, float32, from 0.7 where a photograph is black to 70 where white."""
    for path in PICTURES:
        grey = np.asarray(Image.open(path).convert("L"), dtype=float) / 255
        np.save(folder / f"{path.stem}.npy", (0.7 * 100**grey).astype(np.float32))


def hdr(folder: Path) -> None:
    """EXR of scene-linear floats, in which 1 is a white sheet: lights reach 55."""
    import OpenEXR  # an extra, which the other kinds do without

    for path in PICTURES:
        sheet = (np.asarray(Image.open(path), dtype=float) / 255) ** 2.2
        brightness = sheet.mean(2, keepdims=True)
        light = (sheet * 1.1 ** (60 * brightness - 12)).astype(np.float32)
        OpenEXR.File({}, {"RGB": light}).write(f"{folder}/{path.stem}.exr")


def spectrogram(folder: Path) -> None:
    """NumPy files of 80 mel bands of power, float32, of voices that glide and hiss."""
    seconds = np.arange(128_000) / 16_000
    edges = 700 * (10 ** (np.linspace(0, 2840, 82) / 2595) - 1)  # of 80 mel bands up to 8 kHz
    frequencies = np.linspace(0, 8000, 513)
    mel = np.stack([np.interp(frequencies, edges[i : i + 3], [0, 1, 0]) for i in range(80)])
    for number in range(60):
        # What drifts: three frequencies in Hz, how loud the voice is, how much it hisses.
        rng = np.random.default_rng(number)
        pitch, low, high, loud, hiss = (
            np.interp(seconds, np.arange(33) / 4, rng.uniform(*ends, 33))
            for ends in ((90, 250), (300, 800), (900, 2500), (-1, 1), (-1, 1))
        )

        # The voice: 24 harmonics, louder near two formants, and noise.
        tones = (
            np.exp(-(((k * pitch - low) / 150) ** 2)) + np.exp(-(((k * pitch - high) / 250) ** 2))
            for k in range(1, 25)
        )
        phase = np.cumsum(2 * np.pi * pitch / 16_000)
        sound = loud.clip(0) * sum(tone * np.sin(k * phase) for k, tone in enumerate(tones, 1))
        sound += (0.003 + 0.1 * hiss.clip(0) ** 2) * rng.normal(size=seconds.size)

        # Its power in mel bands: (80, 497).
        frames = np.lib.stride_tricks.sliding_window_view(sound, 1024)[::256] * np.hanning(1024)
        power = mel @ np.abs(np.fft.rfft(frames)).T ** 2
        np.save(folder / f"{number}.npy", power.clip(1e-5).astype(np.float32))


def rgba(folder: Path) -> None:
    """PNG with alpha: a disc of each photograph, with a soft edge."""
    for path in PICTURES:
        colours = np.asarray(Image.open(path))
        rows, columns = np.indices(colours.shape[:2]) / max(colours.shape)
        disc = 255 * (1 - 20 * (np.hypot(rows - 0.4, columns - 0.5) - 0.3)).clip(0, 1)
        both = np.dstack((colours, disc.astype(np.uint8)))
        Image.fromarray(both).save(folder / f"{path.stem}.png")


KINDS = {make.__name__: make for make in (xray, satellite, depth, hdr, spectrogram, rgba)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="+", choices=KINDS, help="what to make, each in its folder")
    args = parser.parse_args(arguments)

    for kind in args.kinds:
        folder = check_folder(Path(kind))
        folder.mkdir(exist_ok=True)
        KINDS[kind](folder)
        print(f"{kind}: {len(list(folder.iterdir()))} files")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))
