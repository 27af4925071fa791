"""Put the study's tables and plots into its document, from the rows' files.

    python -m study.draw --rows study/results --document docs/results.md

A table replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`; plots go to the document's images/, and
with `--runs study/out/runs` so do photographs.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure

from olvae.cli.main import print_error
from olvae.data.dataset import SamplePhotographs
from olvae.data.pixels.ranges import from_uint8, to_uint8
from olvae.figures import labelled_grid
from olvae.models.autoencoder import LiteVAE
from study.rows import SEEDS
from study.run import find_run

__all__ = ["TABLES", "fill", "main", "read_rows"]

Found = Mapping[str, Mapping[str, Any]]
"""The rows' files by name."""

SIZE = "256"

ENCODERS = {"LiteVAE-S": "litevae", "SD, 48 channels": "sd", "LiteVAE-S, SD's time": "litevae_time"}
"""The question of the encoders: its rows' names without their seeds, by title."""


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a folder by row.

    Raises:
        FileNotFoundError: it has none.
    """
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise FileNotFoundError(f"{folder}: no rows there: python -m study.run makes them")
    return found


def fill(document: str, rows: Found, tables: Mapping[str, Callable[[Found], str]] | None = None) -> str:
    """The document with its tables made again, by default the study's.

    Raises:
        ValueError: it names a table that does not exist.
    """

    known = TABLES if tables is None else tables

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in known:
            raise ValueError(f"no table is named {name}: choose from {', '.join(known)}")
        return f"<!-- table: {name} -->\n\n{known[name](rows)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", made, document, flags=re.DOTALL)


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("--:" for _ in headings[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines))


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def _of_seeds(rows: Found, stem: str) -> list[Mapping[str, Any]]:
    """A row of each seed; the first one's name may be without it."""
    return [rows[name] for name in (stem, *(f"{stem}_{seed}" for seed in SEEDS)) if name in rows]


def _range(values: Sequence[float]) -> str:
    """Machines differ in speed, so that a mean of seconds says nothing."""
    low, high = (f"{bound(values):.0f}" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


def _psnr(row: Mapping[str, Any], size: str = SIZE) -> float:
    return float(row["sizes"][size]["psnr"])


def _interval(row: Mapping[str, Any]) -> str:
    """PSNR with half of its 95 % bootstrap interval over the photographs."""
    low, high = row["sizes"][SIZE]["intervals"]["psnr"]
    return f"{_psnr(row):.2f} ± {(high - low) / 2:.2f}"


def _bands(row: Mapping[str, Any]) -> list[str]:
    """The mean squared error in the coarsest band, and in the details of each level."""
    bands = row["sizes"][SIZE]["bands"]
    details = ([bands[f"{kind}{level}"]["mse"] for kind in ("LH", "HL", "HH")] for level in (3, 2, 1))
    return [f"{bands['LL3']['mse']:.0f}", *(f"{mean(values):.1f}" for values in details)]


def _rates(rows: Found) -> str:
    grid = {tuple(name.split("_")[1:]): row for name, row in rows.items() if name.startswith("rate_")}
    rates = sorted({rate for _, rate in grid}, key=float)
    lines = [
        [network, *(f"{_psnr(grid[network, rate]):.2f}" if (network, rate) in grid else "" for rate in rates)]
        for network in sorted({network for network, _ in grid})
    ]
    return _table(["encoder", *rates], lines)


def _encoders(rows: Found) -> str:
    lines = []
    for title, stem in ENCODERS.items():
        of_seeds = _of_seeds(rows, stem)
        if not of_seeds:
            continue
        first = of_seeds[0]["sizes"][SIZE]
        lines.append(
            [
                title,
                f"{first['encode_macs'] / 1e9:.1f}",
                of_seeds[0]["rate"],
                str(of_seeds[0]["steps"]),
                _range([row["processor_seconds"] for row in of_seeds]),
                _spread([_psnr(row, "64") for row in of_seeds]),
                _spread([_psnr(row) for row in of_seeds]),
                _spread([row["sizes"][SIZE]["ssim"] for row in of_seeds], 3),
                *(
                    _spread([row["sizes"][SIZE]["bands"][band]["mse"] for row in of_seeds], 0)
                    for band in ("LL3", "LH3")
                ),
                _spread([row["frechet_lite0"] for row in of_seeds], 1),
            ]
        )
    bicubic = rows["litevae_0"].get("bicubic", {}) if "litevae_0" in rows else {}
    if bicubic:
        at_64, at_256 = (f"{bicubic[size]['psnr']:.2f}" for size in ("64", SIZE))
        lines.append(["bicubic", "", "", "", "", at_64, at_256, f"{bicubic[SIZE]['ssim']:.3f}", "", "", ""])
    headings = ["encoder", "GMACs", "rate", "steps", "seconds", "dB at 64", "dB at 256", "SSIM", "LL3", "LH3"]
    return _table([*headings, "Fréchet, Lite0"], lines)


def _compared(title: str, names: Mapping[str, str]) -> Callable[[Found], str]:
    """A table of rows by name, with a title each; their Fréchet distance is that of all seeds."""

    def table(rows: Found) -> str:
        lines = [
            [
                text,
                _interval(rows[name]),
                f"{rows[name]['sizes'][SIZE]['ssim']:.3f}",
                *_bands(rows[name]),
                _spread([row["frechet_lite0"] for row in _of_seeds(rows, name.removesuffix("_0"))], 1),
            ]
            for name, text in names.items()
            if name in rows
        ]
        return _table([title, "dB at 256", "SSIM", "LL3", "level 3", "level 2", "level 1", "Fréchet, Lite0"], lines)

    return table


def _scales(rows: Found) -> str:
    networks = {"SMC": "litevae_0", "GroupNorm": "group_norm"}
    sizes = list(rows["litevae_0"]["sizes"])
    lines = [
        [title, *(f"{_psnr(rows[name], size):.2f}" for size in sizes)]
        for title, name in networks.items()
        if name in rows
    ]
    bicubic = rows["litevae_0"].get("bicubic", {})
    lines += [["bicubic", *(f"{bicubic[size]['psnr']:.2f}" for size in sizes)]] if bicubic else []
    return _table(["decoder", *(f"{size} px" for size in sizes)], lines)


def _diffusion(rows: Found) -> str:
    lines = [
        [
            name.removeprefix("diffusion_"),
            f"{row['frechet_lite0']['reconstructions']:.1f}",
            f"{row['frechet_lite0']['decoded_latents']:.1f}",
            _spread([seed["frechet_lite0"] for seed in row["seeds"]], 1),
            f"{row['frechet_lite0']['mean'] - row['frechet_lite0']['decoded_latents']:.1f}",
        ]
        for name, row in rows.items()
        if name.startswith("diffusion_")
    ]
    return _table(["autoencoder", "reconstructions", "decoded latents", "samples", "what diffusion adds"], lines)


TABLES: Mapping[str, Callable[[Found], str]] = {
    "rates": _rates,
    "encoders": _encoders,
    "objective": _compared(
        "objective",
        {
            "litevae_0": "the recipe's",
            "no_wavelet": "without the wavelet term",
            "no_gaussian": "without the Gaussian term",
            "kl_x10": "KL x 10",
            "l2": "squared error for absolute",
        },
    ),
    "discriminators": _compared(
        "discriminator",
        {
            "b_none": "none",
            "b_patchgan": "PatchGAN",
            "b_gigagan": "GigaGAN",
            "b_unetgan_8": "UNetGAN, 8 channels",
            "b_unetgan_16": "UNetGAN, 16 channels",
            "b_unetgan_32": "UNetGAN, 32 channels",
        },
    ),
    "latents": _compared(
        "latent", {"channels_4": "4 channels", "channels_8": "8", "litevae_0": "12", "channels_16": "16"}
    ),
    "scales": _scales,
    "diffusion": _diffusion,
}


def _plot(rows: Found, path: Path) -> None:
    """PSNR above the bicubic round trip by size, for both decoders; PSNR by processor time, for both encoders."""
    bicubic = rows["litevae_0"]["bicubic"]
    by_size = {
        title: (
            [float(size) for size in bicubic],
            [_psnr(rows[name], size) - bicubic[size]["psnr"] for size in bicubic],
        )
        for title, name in (("SMC", "litevae_0"), ("GroupNorm", "group_norm"))
        if name in rows
    }
    by_time: dict[str, tuple[list[float], list[float]]] = {}
    for title, network in (("LiteVAE-S", "litevae"), ("SD", "sd")):
        rate = rows[f"{network}_0"]["rate"] if f"{network}_0" in rows else ""
        pattern = rf"{network}_(time_)?0|rate_{network}_{re.escape(rate)}"  # one seed, one machine
        of_network = [row for name, row in rows.items() if re.fullmatch(pattern, name)]
        of_network.sort(key=lambda row: row["processor_seconds"])
        by_time[title] = [row["processor_seconds"] for row in of_network], [_psnr(row) for row in of_network]
    _draw(by_size, path / "study_scales.png", "dB above bicubic, by pixels", "pixels along a side")
    _draw(by_time, path / "study_encoders.png", "dB at 256 pixels", "seconds of processor time")


def _draw(curves: Mapping[str, tuple[list[float], list[float]]], path: Path, title: str, along: str) -> None:
    """Draw curves by name into one PNG."""
    figure = Figure(figsize=(3.2, 2.4), layout="constrained")
    axes = figure.subplots()
    for label, (x, y) in curves.items():
        axes.plot(x, y, linewidth=1.2, marker="o", markersize=3, label=label)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(along, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _photographs(runs: Path, path: Path) -> None:
    """Photographs of the package, which no row has seen, through the encoders' rows of the first seed that has all."""
    of_seeds = ({title: find_run(runs, f"{stem}_{seed}") for title, stem in ENCODERS.items()} for seed in SEEDS)
    found = next((found for found in of_seeds if all(found.values())), None)
    if found is None:
        raise FileNotFoundError(f"{runs}: the runs of no seed are there")
    x = next(iter(SamplePhotographs(int(SIZE), batch_size=8).test_loader()))["image"]
    rows = {"photographs": x}
    for title, run in found.items():
        assert run is not None
        with torch.inference_mode():
            rows[title] = to_uint8(LiteVAE.from_pretrained(run.path)(from_uint8(x))[0])
    labelled_grid(rows).save(path / "study_photographs.jpg", quality=90)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("study/results"), help="a folder of rows' files")
    parser.add_argument("--document", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--runs", type=Path, help="the rows' runs, to draw photographs too")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.rows)
        options.document.write_text(fill(options.document.read_text(encoding="utf-8"), rows), encoding="utf-8")
        images = options.document.parent / "images"
        images.mkdir(exist_ok=True)
        _plot(rows, images)
        if options.runs is not None:
            _photographs(options.runs, images)
    except (OSError, ValueError) as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
