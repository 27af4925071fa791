"""What only a GPU can show, in one resumable run that fills the tables of docs/gpu.md.

    python -m study.gpu --minutes 40

Steps run in the order of their use, each in a process of its own, and leave OUT/rows/NAME.json.
Those that have one are kept, those that failed are tried again. The page is filled after each. On a
CPU, or with ``--quick``, which tries everything at tiny sizes, a copy of the page in OUT is filled.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import nn

from olvae.bench.cases import DECODERS, ENCODERS, F8, N_Z, network_cases, read_step, time_steps
from olvae.bench.measure import Setting, machine, rows_of
from olvae.cli.main import print_error
from olvae.data.places import load
from olvae.devices import PRECISIONS, peak_tflops, resolve_device
from olvae.files import check_folder, write_json
from olvae.models.footprint import MARGIN, footprint
from olvae.models.large.tiling import GIB
from olvae.models.liteautoencoder import LiteAutoencoderKL
from study.draw import Found, fill, read_rows, table
from study.rows import LONG, NETWORKS, RECIPE

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
CORPUS = Path(__file__).parent / "corpus-out"
RECIPES = ("A2", "B5")
NO_LPIPS = (
    "model.params.lossconfig.params.lpips_weight=0",
    "model.params.val_metrics=[]",
    "lightning.callbacks=null",
)
"""Without LPIPS, whose network is a download, in the loss, validation and
the choice of the best checkpoint."""


@dataclass
class Bench:
    """Where and how large: ``out`` has rows, logs and runs; ``quick`` takes tiny sizes."""

    out: Path
    device: str = "cuda"
    quick: bool = False

    @property
    def recipes(self) -> dict[str, str]:
        """The recipes that A2 and B5 stand for."""
        return (
            {"A2": "demo", "B5": "demo_b"}
            if self.quick
            else {"A2": "imagenet/A2", "B5": "imagenet/B5"}
        )

    @property
    def precision(self) -> str:
        """Of trainings."""
        return "32" if self.device == "cpu" else "bf16"

    def train(self, name: str, recipe: str, *arguments: str) -> str:
        """Run olvae train on the device."""
        gpus = ["--gpus", "0" if self.device == "cpu" else "1", "--precision", self.precision]
        flags = ["--base", recipe, *gpus, "--logdir", str(self.out / "runs"), "--name", name]
        return self.command(name, "-m", "olvae.cli.main", "train", *flags, *arguments)

    def command(self, name: str, *arguments: str, limit_s: float | None = None) -> str:
        """Run Python with a log of its own, and return that.

        RuntimeError with its last line if it fails.
        """
        log = self.out / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=limit_s is not None,
            )
            try:
                process.wait(limit_s)
            except BaseException as error:
                if limit_s is not None:  # with what it has started
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise RuntimeError(f"not finished after {limit_s:.0f} s: {log}") from None
                raise
        text = log.read_text(errors="replace")
        if process.returncode:
            last = (text.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"{last[:200]} (exit code {process.returncode}): {log}")
        return text


def _machine(bench: Bench) -> dict[str, Any]:
    found = {**machine(bench.device), "date": datetime.now(timezone.utc).date().isoformat()}
    if bench.device != "cpu":
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {"memory_gib": properties.total_memory / GIB, "cuda": torch.version.cuda}
    return found


def _tests(bench: Bench) -> dict[str, Any]:
    """The tests that need a GPU; on a CPU some others, to try the reading of their report."""
    report = bench.out / "tests.xml"
    report.unlink(missing_ok=True)
    chosen = ["tests/bench/test_measure.py"] if bench.device == "cpu" else ["-m", "gpu"]
    try:
        bench.command(
            "pytest", "-m", "pytest", *chosen, "-p", "no:cacheprovider", f"--junitxml={report}"
        )
    except RuntimeError:
        if not report.is_file():
            raise
    (suite,) = ElementTree.parse(report).getroot()
    failed = [
        f"{c.get('classname')}.{c.get('name')}"
        for c in suite
        if {e.tag for e in c} & {"failure", "error"}
    ]
    return {
        "tests": int(suite.get("tests", 0)),
        "skipped": int(suite.get("skipped", 0)),
        "failed": failed,
    }


def _step(recipe: str, precision: str, options: Mapping[str, bool], bench: Bench) -> dict[str, Any]:
    """A training step on random images: time, TFLOP/s, and the memory beside what was counted."""
    params, size, images = read_step(
        bench.recipes[recipe], 64 if bench.quick else 0, 2 if bench.quick else 0
    )
    params |= {"channels_last": False, "checkpoint": False, "compile": False, **options}
    model = LiteAutoencoderKL(**params)
    counted, on_gpu = footprint(model, size, precision), bench.device != "cpu"
    while (
        on_gpu
        and images > 1
        and MARGIN * counted.total(images) > torch.cuda.mem_get_info(bench.device)[0]
    ):
        images //= 2
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    lightning, steps = PRECISIONS[precision].lightning, 1 if bench.quick else 20
    torch.backends.cudnn.benchmark = True  # as training has it
    seconds = median(time_steps(model, size, images, steps, bench.device, lightning))
    found = {
        "recipe": recipe,
        "precision": precision,
        "options": list(options),
        "size": size,
        "images": images,
    }
    found |= {
        "ms": 1e3 * seconds,
        "images_per_s": images / seconds,
        "counted_gib": counted.total(images) / GIB,
    }
    found["tflops"] = counted.flop * images / seconds / 1e12
    if on_gpu:
        found["memory_gib"] = torch.cuda.max_memory_allocated(bench.device) / GIB
        found["peak"] = peak_tflops(torch.cuda.get_device_name(bench.device), precision)
    return found


def _kl() -> nn.Module:
    """diffusers' AutoencoderKL as in Stable Diffusion, with our latent's channels."""
    from diffusers import AutoencoderKL

    widths, kinds = (128, 256, 512, 512), ("DownEncoderBlock2D", "UpDecoderBlock2D")
    down, up = ((kind,) * len(widths) for kind in kinds)
    return AutoencoderKL(3, 3, down, up, widths, layers_per_block=2, latent_channels=N_Z)


def _tiny() -> nn.Module:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(latent_channels=N_Z)


def _networks(half: str, bench: Bench) -> dict[str, Any]:
    """Encoders or decoders beside those of diffusers, random weights, no gradients."""
    size, images, rounds = (64, 1, 1) if bench.quick else (256, 16, 10)
    ours = {**ENCODERS, **DECODERS}
    names = {"encoder": ("S", "B", "M", "L"), "decoder": ("open_litevae", "open_litevae, folded")}[
        half
    ]
    builders: dict[str, Callable[[], nn.Module]] = {
        "AutoencoderKL": lambda: getattr(_kl(), half),
        "AutoencoderTiny": lambda: getattr(_tiny(), half),
        **{name: ours[name] for name in (names[:1] if bench.quick else names)},
    }
    channels, side = (3, size) if half == "encoder" else (N_Z, size // F8)
    cases = network_cases(builders, channels, side, Setting(bench.device, size, images))
    return {"half": half, "rows": rows_of(half, cases, bench.device, rounds, True)}


def _trained(recipe: str, bench: Bench) -> dict[str, Any]:
    """The real command on the package's photographs, traced; kernels of a step."""
    images, size = ("2", ["data.params.size=64"]) if bench.quick else ("4", [])
    settings = [f"data.params.batch_size={images}", *size, *NO_LPIPS]
    settings += ["lightning.trainer.max_steps=8", "lightning.trainer.val_check_interval=8"]
    text = bench.train(
        f"{recipe}_training",
        bench.recipes[recipe],
        "--profile",
        "2",
        "--data",
        "samples",
        *settings,
    )
    kernels = re.search(r"(\d+)\s+kernels\s+a\s+step", text)
    return {"recipe": recipe, "images": int(images), "kernels": kernels and int(kernels[1])}


def _pair(network: str, bench: Bench) -> dict[str, Any]:
    """Train one of the study's two encoders, with a linear start, for as long as the other one."""
    minutes, images = (0.01, 2) if bench.quick else (6.0, 32)
    linear = f"{network}_linear"
    overrides = [*NETWORKS[linear], f"model.base_learning_rate={LONG[linear][0]}"]
    params = load([RECIPE], overrides)["model"]["params"]
    lightning = PRECISIONS[bench.precision].lightning
    seconds = time_steps(
        LiteAutoencoderKL(**params), 64, images, 2 if bench.quick else 20, bench.device, lightning
    )
    steps = max(2, round(60 * minutes / median(seconds)))
    overrides += [
        f"lightning.trainer.max_steps={steps}",
        f"lightning.trainer.val_check_interval={steps}",
    ]
    overrides += [
        f"data.params.batch_size={images}",
        f"data.params.num_workers={0 if bench.quick else 8}",
    ]
    tiles, held_out = CORPUS / "train_tiles", ["--data", str(CORPUS / "held_out")]
    if tiles.is_dir():
        data = [f"data.params.root={tiles}", f"data.params.val_root={CORPUS / 'held_out'}"]
    else:
        data, held_out = ["--data", "samples"], []
    start, name = time.monotonic(), f"pair_{network}"
    bench.train(f"{name}_training", str(RECIPE), *data, *overrides)
    found: dict[str, Any] = {
        "network": network,
        "steps": steps,
        "seconds": time.monotonic() - start,
    }
    found["data"] = "the study's corpus" if held_out else "the package's 52 photographs"
    run = sorted((bench.out / "runs").glob(f"*_{name}_training_*"))[-1]
    folder = bench.out / "evaluations" / name
    flags = [
        "--size",
        "64" if bench.quick else "256",
        "--metrics",
        "psnr,ssim",
        "--baselines",
        "--out",
        str(folder),
    ]
    bench.command(
        f"{name}_evaluation", "-m", "olvae.cli.main", "evaluate", str(run), *held_out, *flags
    )
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["results"]
    trained, code = [
        result["metrics"] for result in results if "untrained" not in result["target"]
    ][:2]
    return {**found, "linear_psnr": code["psnr"], "psnr": trained["psnr"], "ssim": trained["ssim"]}


class Step(NamedTuple):
    """Something to measure, and the seconds after which it is ended."""

    run: Callable[[Bench], dict[str, Any]]
    limit_s: float


def _steps() -> Iterator[tuple[str, Step]]:
    yield "machine", Step(_machine, 60)
    yield "tests", Step(_tests, 420)
    for precision in ("32", "bf16"):
        yield from _of_both("step", precision)
    for half in ("encoder", "decoder"):
        yield f"networks_{half}", Step(partial(_networks, half), 180)
    for recipe in RECIPES:
        yield f"trained_{recipe}", Step(partial(_trained, recipe), 240)
    for option in ("channels_last", "checkpoint", "compile"):
        yield from _of_both("step", "bf16", option)
    for network in ("litevae", "sd"):
        yield f"pair_{network}", Step(partial(_pair, network), 600)


def _of_both(kind: str, precision: str, *options: str) -> Iterator[tuple[str, Step]]:
    for recipe in RECIPES:
        step = partial(_step, recipe, precision, dict.fromkeys(options, True))
        yield (
            "_".join((kind, recipe, precision, *options)),
            Step(step, 480 if "compile" in options else 180),
        )


STEPS: Mapping[str, Step] = dict(_steps())
"""All steps by name, what matters first first; the study's long pair is the last."""


def run(bench: Bench, steps: Sequence[str], minutes: float, page: Path) -> None:
    """Run steps that have no result yet, and fill the page after each.

    None begins after ``minutes``.
    """
    begun, rows, slack = time.monotonic(), bench.out / "rows", 10 if bench.device == "cpu" else 1
    rows.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(steps, 1):
        flags = ["--out", str(bench.out), "--device", bench.device, "--only", name, "--here"]
        flags += ["--quick"] if bench.quick else []
        file = rows / f"{name}.json"
        if not file.is_file() or "error" in json.loads(file.read_text(encoding="utf-8")):
            if time.monotonic() - begun > 60 * minutes:
                print(
                    f"{minutes:g} minutes are over: {name} and what follows run in the next call",
                    flush=True,
                )
                return
            start = time.monotonic()
            try:
                bench.command(name, "-m", "study.gpu", *flags, limit_s=slack * STEPS[name].limit_s)
            except RuntimeError as error:
                write_json({"error": str(error)}, file)
            outcome = json.loads(file.read_text(encoding="utf-8")).get("error", "done")
            print(
                f"{number}/{len(steps)} {name}: {outcome}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
        page.write_text(
            fill(page.read_text(encoding="utf-8"), read_rows(rows), TABLES), encoding="utf-8"
        )


def _of(rows: Found, prefix: str) -> list[Mapping[str, Any]]:
    """Results of this kind in the order of the steps, without failed ones."""
    return [
        rows[name]
        for name in STEPS
        if name.startswith(prefix) and "error" not in rows.get(name, {"error": ""})
    ]


def _number(row: Mapping[str, Any], key: str, form: str = ".1f") -> str:
    """A value as text; nothing where there is none, as of a memory on a CPU."""
    return "" if row.get(key) is None else format(row[key], form)


def _run_table(rows: Found) -> str:
    """The machine, the tests, and the steps that failed."""
    found = [pair for row in _of(rows, "machine") for pair in row.items()]
    lines = [
        [key, f"{value:.4g}" if isinstance(value, float) else str(value)] for key, value in found
    ]
    for row in _of(rows, "tests"):
        passed = row["tests"] - row["skipped"] - len(row["failed"])
        lines.append(
            [
                "tests",
                "; failed: ".join([f"{passed} passed, {row['skipped']} skipped", *row["failed"]]),
            ]
        )
    return table(
        ["", "found"],
        [*lines, *([name, row["error"]] for name, row in rows.items() if "error" in row)],
    )


def _step_table(rows: Found) -> str:
    lines = []
    for row in _of(rows, "step_"):
        share = f"{row['tflops'] / row['peak']:.0%}" if row.get("peak") else ""
        kind = ", ".join([row["precision"], *row["options"]])
        cells = [
            f"{row['recipe']}, {kind}",
            str(row["size"]),
            str(row["images"]),
            _number(row, "ms"),
        ]
        cells += [_number(row, "images_per_s"), _number(row, "tflops", ".2f"), share]
        lines.append([*cells, _number(row, "memory_gib"), _number(row, "counted_gib")])
    memory = ["GiB measured", "GiB counted"]
    return table(
        ["step", "px", "images", "ms", "images/s", "TFLOP/s", "of the peak", *memory], lines
    )


def _launch_table(rows: Found) -> str:
    lines = [
        [row["recipe"], str(row["images"]), _number(row, "kernels", "d")]
        for row in _of(rows, "trained_")
    ]
    return table(["recipe, as olvae train runs it", "images", "kernels a step"], lines)


def _network_table(rows: Found) -> str:
    lines = []
    for found in _of(rows, "networks_"):
        cases = [row for row in found["rows"] if row["variant"] != "limit"]
        speeds: dict[str, dict[str, float]] = {}
        for row in cases:
            best = speeds.setdefault(row["name"], {})
            best[row["precision"]] = max(row["images_per_s"], best.get(row["precision"], 0.0))
        for name, best in speeds.items():
            lines.append(
                [f"{found['half']}, {name}", *(_number(best, key, ".4g") for key in PRECISIONS)]
            )
    return table(["half, images/s", *PRECISIONS], lines)


def _pair_table(rows: Found) -> str:
    forms = {"seconds": ".0f", "linear_psnr": ".2f", "psnr": ".2f", "ssim": ".3f"}
    lines = [
        [
            f"{row['network']}, linear start, on {row['data']}",
            str(row["steps"]),
            *(_number(row, key, form) for key, form in forms.items()),
        ]
        for row in _of(rows, "pair_")
    ]
    return table(["encoder", "steps", "seconds", "linear code, dB", "dB", "SSIM"], lines)


TABLES: Mapping[str, Callable[[Found], str]] = {
    "gpu-run": _run_table,
    "gpu-steps": _step_table,
    "gpu-launches": _launch_table,
    "gpu-networks": _network_table,
    "gpu-pair": _pair_table,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="of finished steps: study/gpu-out, or study/gpu-quick on a CPU"
    )
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda; cpu tries the way there, and fills a copy of the page",
    )
    parser.add_argument(
        "--minutes", type=float, default=40, help="after which no further step begins"
    )
    parser.add_argument(
        "--only", nargs="*", choices=STEPS, default=list(STEPS), metavar="STEP", help="by name"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    # one step, in this process
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    tried = options.quick or options.device == "cpu"
    bench = Bench(
        options.out or Path("study", "gpu-quick" if tried else "gpu-out"),
        options.device,
        options.quick,
    )
    try:
        if options.here:
            (name,) = options.only
            write_json(STEPS[name].run(bench), bench.out / "rows" / f"{name}.json")
            return
        check_folder(bench.out).mkdir(parents=True, exist_ok=True)
        resolve_device(bench.device)
        page = Path(shutil.copy(PAGE, bench.out / PAGE.name)) if tried else PAGE
        run(bench, options.only, options.minutes, page)
        print(f"{page}: filled")
    except (OSError, ValueError) as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
