"""Put the study's tables and plots into its document, from the rows' files.

    python -m study.draw --rows study/results --document docs/results.md

A table replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`; plots go to the
document's images/, and with `--runs study/out/runs` so do photographs.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure

from olvae.cli.main import print_error
from olvae.data.dataset import SamplePhotographs
from olvae.data.pixels.size_and_range import from_uint8, to_uint8
from olvae.figures import labelled_grid
from olvae.models.autoencoder import LiteVAE
from study import maps_table
from study.differences import DIFFERENCES, differences
from study.measure import AXES
from study.rows import ALL_SIZES, BASELINE, ENCODERS, LONGER, RECIPES, RUNS, SEEDS, details
from study.run import find_run
from study.tables import Found, fill, read_rows, spread, table

SIZE = "256"

PICTURED = {
    "SD, no last norm": "sd_free_1e-3",
    "LiteVAE-S + norm": "litevae_norm_1e-3",
    "linear start": "litevae_linear_1e-3",
}


def _of_seeds(rows: Found, stem: str) -> list[Mapping[str, Any]]:
    """A row of each seed; the first one's name may be without it."""
    return [rows[name] for name in (stem, *(f"{stem}_{seed}" for seed in SEEDS)) if name in rows]


def _psnr(row: Mapping[str, Any], size: str = SIZE) -> float:
    return float(row["sizes"][size]["psnr"])


def _interval(row: Mapping[str, Any]) -> str:
    """PSNR with half of its 95 % bootstrap interval over the photographs."""
    low, high = row["sizes"][SIZE]["intervals"]["psnr"]
    return f"{_psnr(row):.2f} ± {(high - low) / 2:.2f}"


def _bands(row: Mapping[str, Any]) -> list[str]:
    """The mean squared error in the coarsest band, and in the details of each level."""
    bands = row["sizes"][SIZE]["bands"]
    details = (
        [bands[f"{kind}{level}"]["mse"] for kind in ("LH", "HL", "HH")] for level in (3, 2, 1)
    )
    return [f"{bands['LL3']['mse']:.1f}", *(f"{mean(values):.1f}" for values in details)]


def _encoders(rows: Found) -> str:
    """Each network at each of its learning rates.

    The one with the least error in details is marked.
    """
    lines = []
    for network, title in ENCODERS.items():
        at = {
            rate: found for rate in RUNS[network] if (found := _of_seeds(rows, f"{network}_{rate}"))
        }
        best = min(at, key=lambda rate: mean(map(details, at[rate])), default=None)
        lines += [
            _encoder(title, f"{rate} *" if rate == best else rate, found)
            for rate, found in at.items()
        ]
    if of_time := _of_seeds(rows, "litevae_time"):
        lines.append(_encoder("LiteVAE-S, SD's time", "1e-3", of_time))
    for title, name in (("linear code, no training", "linear"), ("bicubic", "bicubic")):
        for sizes in _baselines(rows, name):
            at_64, at_256, ssim = sizes["64"]["psnr"], sizes[SIZE]["psnr"], sizes[SIZE]["ssim"]
            lines.append(
                [title, *[""] * 4, f"{at_64:.2f}", f"{at_256:.2f}", "", "", f"{ssim:.3f}", ""]
            )
    costs = ["GMACs", "steps", "rate", "seeds"]
    return table(
        ["encoder", *costs, "dB at 64", "dB at 256", "LL3", "details", "SSIM", "Fréchet, Lite0"],
        lines,
    )


def _encoder(title: str, rate: str, of_seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        title,
        f"{of_seeds[0]['sizes'][SIZE]['encode_macs'] / 1e9:.1f}",
        str(of_seeds[0]["steps"]),
        rate,
        str(len(of_seeds)),
        spread([_psnr(row, "64") for row in of_seeds]),
        spread([_psnr(row) for row in of_seeds]),
        spread([row["sizes"][SIZE]["bands"]["LL3"]["mse"] for row in of_seeds], 0),
        spread([details(row) for row in of_seeds], 0),
        spread([row["sizes"][SIZE]["ssim"] for row in of_seeds], 3),
        spread([row["frechet_lite0"] for row in of_seeds], 1),
    ]


def _longer(rows: Found) -> str:
    """Each network after more steps, with the coarsest band's error in two: the image's mean,
    and the rest."""
    lines = []
    for network, (rate, _) in LONGER.items():
        if found := _of_seeds(rows, f"{network}_longer"):
            at_256 = [row["sizes"][SIZE] for row in found]
            shifts = [
                mean(value**2 for value in size["colour"]["shift_of_images"]) for size in at_256
            ]
            rest = [
                size["bands"]["LL3"]["mse"] - shift
                for size, shift in zip(at_256, shifts, strict=True)
            ]
            minutes = found[0]["processor_seconds"] / 60  # other seeds ran beside other work
            axes = [spread([100 * row["unexplained"][axis] for row in found], 1) for axis in AXES]
            cells = [spread([_psnr(row, size) for row in found]) for size in ("64", SIZE)]
            cells += [
                spread(shifts, 1),
                spread(rest, 1),
                spread([details(row) for row in found], 0),
                *axes,
            ]
            cells += [
                spread([size["ssim"] for size in at_256], 3),
                spread([row["frechet_lite0"] for row in found], 1),
            ]
            lines.append([ENCODERS[network], rate, str(len(found)), f"{minutes:.0f}", *cells])
    errors = [
        "image's mean",
        "rest of LL3",
        "details",
        *(f"{axis.replace('_', '-')}, %" for axis in AXES),
    ]
    headings = [
        "encoder",
        "rate",
        "seeds",
        "minutes",
        "dB at 64",
        "dB at 256",
        *errors,
        "SSIM",
        "Fréchet, Lite0",
    ]
    return table(headings, lines)


def _long(rows: Found) -> str:
    """The long pair beside the linear code: PSNR by size, and the error in each level's details."""
    lines = [
        _by_size("linear code, no training", {"sizes": sizes}, "", "", "")
        for sizes in _baselines(rows, "linear")
    ]
    for network, title in ENCODERS.items():
        for row in _of_seeds(rows, f"{network}_long"):
            minutes, frechet = f"{row['processor_seconds'] / 60:.0f}", f"{row['frechet_lite0']:.1f}"
            lines.append(_by_size(title, row, str(row["steps"]), minutes, frechet))
    sizes = [f"dB at {size}" for size in ALL_SIZES]
    bands = ["LL3", "level 3", "level 2", "level 1"]
    return table(["encoder", "steps", "minutes", *sizes, "SSIM", *bands, "Fréchet, Lite0"], lines)


def _by_size(
    title: str, row: Mapping[str, Any], steps: str, minutes: str, frechet: str
) -> list[str]:
    psnr = [f"{_psnr(row, str(size)):.2f}" for size in ALL_SIZES]
    return [
        title,
        steps,
        minutes,
        *psnr,
        f"{row['sizes'][SIZE]['ssim']:.3f}",
        *_bands(row),
        frechet,
    ]


def _baselines(rows: Found, name: str) -> list[Mapping[str, Any]]:
    """The sizes of a baseline, from the row beside which it was evaluated.

    None if that row is not there.
    """
    return [rows[BASELINE][name]] if name in rows.get(BASELINE, {}) else []


def _compared(title: str, stems: Mapping[str, str]) -> Callable[[Found], str]:
    """A table of rows by title, of their first seed; Fréchet distances are those of all seeds."""

    def made(rows: Found) -> str:
        of_seeds = {text: found for text, stem in stems.items() if (found := _of_seeds(rows, stem))}
        lines = [
            [
                text,
                _interval(found[0]),
                f"{found[0]['sizes'][SIZE]['ssim']:.3f}",
                *_bands(found[0]),
                spread([row["frechet_lite0"] for row in found], 1),
            ]
            for text, found in of_seeds.items()
        ]
        return table(
            [title, "dB at 256", "SSIM", "LL3", "level 3", "level 2", "level 1", "Fréchet, Lite0"],
            lines,
        )

    return made


PERCEPTUAL = {
    "LiteVAE-S, the recipe's": "litevae_1e-3_0",
    "SD, the recipe's": "sd_1e-3_0",
    "LiteVAE-S, Lite0's features and an adversary": "litevae_adversary_0",
    "SD, Lite0's features and an adversary": "sd_adversary_0",
}
"""Rows of one seed by what people train with."""

SHIPPED_ROWS = {
    "the recipe's": "litevae_linear_longer_0",
    "packets, Muon, its decoder and objective": "shipped_all_0",
}
"""Rows of one seed, by what of the shipped recipe they have."""


def _maps(autoencoder: str, rows: Found) -> str:  # noqa: ARG001
    return maps_table.table(maps_table.read().get(autoencoder, {}))


TABLES: Mapping[str, Callable[[Found], str]] = {
    "encoders": _encoders,
    "longer": _longer,
    "long": _long,
    "objective": _compared(
        "objective", {"the recipe's": RECIPES, "without the wavelet term": "no_wavelet"}
    ),
    "perceptual": _compared("encoder, objective", PERCEPTUAL),
    "shipped": _compared("LiteVAE-S, linear start", SHIPPED_ROWS),
    **{f"differences_{claim}": partial(differences, claim) for claim in DIFFERENCES},
    # of files in study/results/maps/, whatever the rows
    **{f"maps_{name}": partial(_maps, name) for name in maps_table.AUTOENCODERS},
}


LINE_STYLES = ("-", ":")


def _curves(rows: Found, suffix: str, path: Path) -> None:
    """PSNR at the crops' size in the trainings of that suffix,
    by steps and by a thread's minutes."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    by_steps, by_minutes = figure.subplots(1, 2, sharey=True)
    for i, (network, title) in enumerate(ENCODERS.items()):
        seeds = _of_seeds(rows, f"{network}_{suffix}")
        for number, row in enumerate(seeds):
            steps, psnr = row["curve"]
            minutes = [step / row["steps"] * seeds[0]["processor_seconds"] / 60 for step in steps]
            for axes, places in ((by_steps, steps), (by_minutes, minutes)):
                # There are ten colours.
                style = LINE_STYLES[i // 10]
                label = title if number == 0 else None
                axes.plot(
                    places,
                    psnr,
                    f"C{i % 10}",
                    linestyle=style,
                    linewidth=1.2,
                    marker="o",
                    markersize=2.5,
                    label=label,
                )
    for axes, unit in ((by_steps, "steps"), (by_minutes, "minutes of a thread")):
        for linear in _baselines(rows, "linear"):
            axes.axhline(
                linear["64"]["psnr"], color="0.3", linestyle="--", linewidth=1, label="linear code"
            )
        axes.set_xlabel(unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_steps.set_ylabel("PSNR at 64 pixels, dB", fontsize=9)
    handles, labels = by_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _photographs(runs: Path, path: Path) -> None:
    """Photographs of the package, which no row has seen,
    through the encoders' rows of the first seed that has all."""
    of_seeds = (
        {title: find_run(runs, f"{stem}_{seed}") for title, stem in PICTURED.items()}
        for seed in SEEDS
    )
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=Path, default=Path("study/results"), help="a folder of rows' files"
    )
    parser.add_argument("--document", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--runs", type=Path, help="the rows' runs, to draw photographs too")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.rows)
        options.document.write_text(
            fill(options.document.read_text(encoding="utf-8"), rows, TABLES), encoding="utf-8"
        )
        images = options.document.parent / "images"
        images.mkdir(exist_ok=True)
        _curves(rows, "longer", images / "study_curves.png")
        _curves(rows, "long", images / "study_long.png")
        if options.runs is not None:
            _photographs(options.runs, images)
    except (OSError, ValueError) as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
