"""Run the study: train, evaluate and measure its rows, two at a time, one thread each.

    python -m study.run --corpus study/corpus-out --out study/out

Each row leaves OUT/rows/NAME.json; rows that have one are kept. A run that was stopped goes on from
its checkpoint.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import olvae.runs
from olvae.bench.measure import machine
from olvae.checkpoint import read_checkpoint
from olvae.cli.main import print_error
from olvae.files import check_folder, write_json
from olvae.runs import Run
from olvae.training.loggers import read_curves
from study.rows import BASELINE, RECIPE, Row, rows

THREADS = {"OMP_NUM_THREADS": "1"}
VALIDATED = 500
"""Steps between the points of a row's curve: PSNR of held-out photographs at the crops' size."""

CROP, CROPS = 64, 4000
"""Pixels and number of the crops that the diffusion models learn, and of others,
which samples are compared with."""


class StudyError(ValueError):
    """A command of the study failed, or was stopped, after so many seconds of processor time."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass
class Study:
    """The rows and their folder."""

    corpus: Path
    out: Path
    rows: Sequence[Row]

    def result(self, name: str) -> dict[str, Any]:
        """What a finished row found."""
        found: dict[str, Any] = json.loads(
            (self.out / "rows" / f"{name}.json").read_text(encoding="utf-8")
        )
        return found

    def is_done(self, name: str) -> bool:
        return (self.out / "rows" / f"{name}.json").is_file()

    def run(self, jobs: int) -> None:
        """Run all rows that are not done, in their order, some at a time.

        Raises:
            StudyError: a command failed; the rows beside it are finished first.
        """
        if not self._speeds.is_file():  # with nothing beside it
            self.command("speed", "-m", "study.speed", "--out", str(self._speeds))
        pending = [row for row in self.rows if not self.is_done(row.name)]
        count = len(self.rows) - len(pending)
        with ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(self.run_one, row): row for row in pending}
            try:
                for future in as_completed(running):
                    found = future.result()
                    count += 1
                    name = running[future].name
                    print(f"{count}/{len(self.rows)} {name}: {_said(found)}", flush=True)
            except StudyError:
                pool.shutdown(cancel_futures=True)
                raise

    def cut_crops(self, references: str, number: int) -> None:
        """Cut the crops that diffusion models learn, and others to compare samples with,
        unless they are there."""
        for seed, name, count in ((0, "crops", CROPS), (1, references, number)):
            folder = self.out / name
            if len(list(folder.glob("*.png"))) < count:
                flags = [
                    "--size",
                    str(CROP),
                    "--count",
                    str(count),
                    "--seed",
                    str(seed),
                    "--out",
                    str(folder),
                ]
                self.command(
                    "crops", "examples/random_crops.py", str(self.corpus / "train"), *flags
                )

    def run_one(self, row: Row) -> dict[str, Any]:
        """Run a row; returns what is in its file."""
        found = self.run_row(row)
        (self.out / "rows").mkdir(exist_ok=True)
        write_json(found, self.out / "rows" / f"{row.name}.json")
        return found

    def run_row(self, row: Row) -> dict[str, Any]:
        """Train and evaluate a row."""
        steps = self._steps(row)
        seconds = self._train(row, steps)
        run = self._folder(row.name)
        assert run is not None
        curve = read_curves(run)["val/psnr"]
        found: dict[str, Any] = {
            "name": row.name,
            "question": row.question,
            "overrides": row.overrides,
        }
        found |= {"steps": steps, "seed": row.seed, "processor_seconds": seconds, "sizes": {}}
        found["curve"] = [[int(step) for step in curve[0]], [round(psnr, 3) for psnr in curve[1]]]
        for size in row.sizes:
            found["sizes"][str(size)], *baselines = self._evaluate(row, run, size)
            for name, baseline in zip(("linear", "bicubic"), baselines, strict=False):
                found.setdefault(name, {})[str(size)] = baseline
        distance = self.out / "evaluations" / row.name / "frechet.json"
        tiles = self.corpus / "held_out_tiles"
        self.command(
            row.name,
            "-m",
            "study.measure",
            str(run.path),
            "--tiles",
            str(tiles),
            "--out",
            str(distance),
        )
        found |= json.loads(distance.read_text(encoding="utf-8"))
        found["machine"] = {**machine("cpu"), "threads": 1}
        return found

    def _train(self, row: Row, steps: int) -> float:
        """Train to the last step; returns the seconds of processor time of all pieces."""
        noted = self.out / "evaluations" / row.name / "seconds.json"
        noted.parent.mkdir(parents=True, exist_ok=True)
        run = self._folder(row.name)
        seconds: float = (
            json.loads(noted.read_text()) if run is not None and noted.is_file() else 0.0
        )
        if run is None:
            flags = ["--base", str(RECIPE), "--logdir", str(self.out / "runs"), "--name", row.name]
            flags += ["--seed", str(row.seed), "--gpus", "0", "--precision", row.precision]
            settings = [
                f"data.params.root={(self.corpus / 'train_tiles').resolve()}",
                f"data.params.val_root={(self.corpus / 'held_out').resolve()}",
                f"lightning.trainer.max_steps={steps}",
                f"lightning.trainer.val_check_interval={min(steps, VALIDATED)}",
            ]
            arguments = [*flags, *row.overrides, *settings]
        elif read_checkpoint(run.last_checkpoint)["global_step"] < steps:
            arguments = ["--resume", str(run.path)]
        else:
            return seconds
        try:
            seconds += self.command(row.name, "-m", "olvae.cli.main", "train", *arguments)
        except StudyError as error:
            seconds += error.seconds
            raise
        finally:
            write_json(seconds, noted)
        return seconds

    def _evaluate(self, row: Row, run: Run, size: int) -> list[dict[str, Any]]:
        """Metrics on the held-out photographs; with the baseline's after them for its row."""
        folder = self.out / "evaluations" / row.name / str(size)
        flags = [
            "--data",
            str(self.corpus / "held_out"),
            "--size",
            str(size),
            "--metrics",
            "psnr,ssim",
        ]
        flags += [
            "--observe",
            "colour",
            "--out",
            str(folder),
            *(["--baselines"] if row.name == BASELINE else []),
        ]
        self.command(row.name, "-m", "olvae.cli.main", "evaluate", str(run.path), *flags)
        results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["results"]
        return [
            {
                **result["metrics"],
                "intervals": result["intervals"],
                "images": result["n"],
                "bands": result["bands"],
                "colour": result["colour"],
                **{
                    key: result["cost"][key]
                    for key in ("parameters", "encode_macs", "decode_macs")
                    if result["cost"]
                },
            }
            for result in results
            if "untrained" not in result["target"]
        ]

    def command(self, name: str, *arguments: str) -> float:
        """Run Python with a log of its own; returns the seconds of processor time."""
        log = self.out / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            print("$ python", *arguments, file=file, flush=True)
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **THREADS, "CUDA_VISIBLE_DEVICES": ""},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = used.ru_utime + used.ru_stime
        if process.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1]
            failed = f"python {' '.join(arguments[:3])} exited with {process.returncode}"
            raise StudyError(f"{name}: {failed}: {last}: {log}", seconds)
        return seconds

    def _folder(self, name: str) -> Run | None:
        return find_run(self.out / "runs", name)

    def _steps(self, row: Row) -> int:
        if row.time_of is None:
            return row.steps
        seconds = json.loads(self._speeds.read_text(encoding="utf-8"))
        return round(row.steps * seconds[row.time_of] / seconds["litevae"])

    @property
    def _speeds(self) -> Path:
        return self.out / "speed.json"


def find_run(runs: Path, name: str) -> Run | None:
    """The newest run of a row that has saved something; None if there is none."""
    found = olvae.runs.find_run(name, runs)
    return Run(found) if isinstance(found, Path) else None


def _said(found: dict[str, Any]) -> str:
    psnr = ", ".join(f"{found['sizes'][size]['psnr']:.2f} dB at {size}" for size in found["sizes"])
    return f"{psnr}, {found['processor_seconds']:.0f} s"


def corpus_and_out(description: str | None, out: str) -> argparse.ArgumentParser:
    """Make a parser of the arguments that every part of the study has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, default=Path("study/corpus-out"), help="what study.corpus made"
    )
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = corpus_and_out(__doc__, "study/out")
    parser.add_argument("--quick", action="store_true", help="an eighth of the steps, one seed")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    options = parser.parse_args(arguments)
    try:
        check_folder(options.out)
        if not (options.corpus / "held_out_tiles").is_dir():
            raise FileNotFoundError(
                f"{options.corpus}: no corpus there: python -m study.corpus --out {options.corpus}"
            )
        every: list[Row] = rows(options.quick)
        every.sort(key=lambda row: row.seed)
        Study(options.corpus, options.out, every).run(options.jobs)
    except (OSError, ValueError) as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
