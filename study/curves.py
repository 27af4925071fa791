"""Draw training curves for docs/troubleshooting.md: a healthy one, a rate that is too high,
a KL weight that is too large.

    python -m study.curves --out study/out  # ten minutes on one thread

Each training leaves its values in study/results/curves/NAME.json; those that are there are kept.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from olvae.cli.main import print_error
from olvae.figures import running_mean
from olvae.files import check_folder
from olvae.training.loggers import read_curves
from study.run import Study, find_run

STEPS = 400


class Case(NamedTuple):
    """A training that is the demo but for one setting, and the curve that shows what is wrong."""

    title: str
    override: str
    tag: str


CURVES = {
    "healthy": Case("Healthy", "", "train/loss"),
    "rate": Case(
        "The learning rate is ten times too high",
        "model.base_learning_rate=0.01",
        "train/grad_norm",
    ),
    "kl": Case(
        "The KL weight is far too large", "model.params.lossconfig.params.kl_weight=30", "train/kl"
    ),
}


def train(name: str, out: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Train phase A of the demo with Adam and the case's override.

    Returns steps and values of its two curves.
    """
    settings = ["model.params.optimizer=adam", f"lightning.trainer.max_steps={STEPS}"]
    settings += ["lightning.trainer.val_check_interval=50", "lightning.trainer.log_every_n_steps=4"]
    settings += filter(None, [CURVES[name].override])
    flags = [
        "--base",
        "demo",
        "--name",
        f"curves_{name}",
        "--logdir",
        str(out / "runs"),
        "--gpus",
        "0",
        "--seed",
        "0",
    ]
    Study(Path(), out, []).command(
        f"curves_{name}", "-m", "olvae.cli.main", "train", *flags, *settings
    )
    run = find_run(out / "runs", f"curves_{name}")
    assert run is not None
    found = read_curves(run)
    return {
        tag: (found[tag][0], [float(f"{v:.4g}") for v in found[tag][1]])
        for tag in (CURVES[name].tag, "val/psnr")
    }


def draw(folder: Path, path: Path) -> None:
    """Draw the curves of a folder's files, a row for each training: what tells, and PSNR."""
    figure = Figure(figsize=(7.2, 8.4), layout="constrained")
    for part, (name, case) in zip(figure.subfigures(len(CURVES), 1), CURVES.items(), strict=True):
        curves = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        part.suptitle(case.title, fontsize=17, fontweight="bold")
        left, right = part.subplots(1, 2)
        steps, values = curves[case.tag]
        left.plot(steps, values, "C0", alpha=0.3)
        left.plot(steps, running_mean(values, 5), "C0", linewidth=2.5)
        if case.tag == "train/grad_norm":
            left.set_yscale("log")
            _line(left, 1, "clip")
        else:
            left.set_ylim(0)
        right.plot(*curves["val/psnr"], "C0", linewidth=2.5, marker="o")
        _line(right, curves["val/psnr"][1][0], "linear code")
        for panel, title in ((left, case.tag), (right, "val/psnr, dB")):
            panel.set_title(title, fontsize=15)
            panel.tick_params(labelsize=13)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    part.supxlabel("step", fontsize=13)
    figure.savefig(path, dpi=100)


def _line(panel: Axes, value: float, name: str) -> None:
    """A named level, above which there is room for its name."""
    panel.margins(y=0.2)
    panel.axhline(value, color="0.3", linestyle="--")
    panel.annotate(
        name,
        (STEPS, value),
        (0, 2),
        textcoords="offset points",
        ha="right",
        fontsize=13,
        color="0.3",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("study/out"), help="folder for runs and logs"
    )
    parser.add_argument("--results", type=Path, default=Path("study/results/curves"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/curves.png"))
    options = parser.parse_args(arguments)
    try:
        check_folder(options.out)
        options.results.mkdir(parents=True, exist_ok=True)
        for name in CURVES:
            if not (file := options.results / f"{name}.json").is_file():
                file.write_text(json.dumps(train(name, options.out)) + "\n", encoding="utf-8")
        draw(options.results, options.picture)
    except (OSError, ValueError) as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
