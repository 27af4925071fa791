"""What only a GPU can show, in one resumable run that fills the tables of docs/gpu.md.

    python -m study.gpu --minutes 40

Steps run in the order of their use, each in a process of its own, and leave a row in OUT/rows.json,
one small file to copy off the machine. Rows that are there are kept, steps that failed are tried
again, and what stopped half-way continues. The page is filled after each. On a CPU, or with
``--quick``, which tries everything at tiny sizes, a copy of the page in OUT is filled. ``--only``
without a name runs nothing and fills the page from the rows.

Each step imports what it needs, so that a package that is missing fails the steps that need it.
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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from study.rows import LONG, NETWORKS, RECIPE
from study.tables import Found, fill, table

if TYPE_CHECKING:
    from torch import nn

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

GIB = 1 << 30
PRECISIONS = ("fp16", "bf16", "32")
CARD = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
"""What each row has of the card, by nvidia-smi's names."""

TIME_LIMIT = 75
"""The exit code of a training that its --time-limit has stopped."""

EVALUATION_S = 60
"""Left for the end of a training and its evaluation."""


class StepError(RuntimeError):
    """A command failed, with this exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Bench:
    """Where and how large: ``out`` has rows, logs and runs; ``quick`` takes tiny sizes.

    ``rows_file``: by default rows.json in ``out``. ``seconds``: of this process, from its start.
    """

    out: Path
    device: str = "cuda"
    quick: bool = False
    rows_file: Path | None = None
    seconds: float = 3600
    begun: float = field(default_factory=time.monotonic)

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

    @property
    def left(self) -> float:
        """Seconds until this process is ended."""
        return self.begun + self.seconds - time.monotonic()

    @property
    def file(self) -> Path:
        """All rows, in one file."""
        return self.rows_file or self.out / "rows.json"

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows by step, with those that say what failed or stopped half-way."""
        if not self.file.is_file():
            return {}
        found: dict[str, dict[str, Any]] = json.loads(self.file.read_text(encoding="utf-8"))
        return found

    def keep(self, name: str, row: Mapping[str, Any]) -> None:
        """Put a row into the file, which is whole at any time."""
        whole = json.dumps({**self.rows(), name: row}, indent=1) + "\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(whole, encoding="utf-8")
        new.replace(self.file)

    def train(self, name: str, recipe: str, *arguments: str) -> str:
        """Run olvae train on the device."""
        gpus = ["--gpus", "0" if self.device == "cpu" else "1", "--precision", self.precision]
        flags = ["--base", recipe, *gpus, "--logdir", str(self.out / "runs"), "--name", name]
        return self.olvae(name, "train", *flags, *arguments)

    def olvae(self, name: str, *arguments: str) -> str:
        """Run a command of the package."""
        return self.command(name, "-m", "olvae.cli.main", *arguments)

    def command(self, name: str, *arguments: str, limit_s: float | None = None) -> str:
        """Run Python with a log of its own, and return that.

        StepError with its last line if it fails.
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
                    message = f"not finished after {limit_s:.0f} s: {log}"
                    raise StepError(message, -signal.SIGKILL) from None
                raise
        text = log.read_text(errors="replace")
        code = process.returncode
        if code:
            last = (text.strip().splitlines() or ["no output"])[-1]
            raise StepError(f"{last[:200]} (exit code {code}): {log}", code)
        return text


def card(uuid: str, pid: int | None = None) -> dict[str, str | list[str]]:
    """What nvidia-smi says of a card now, right after its work, and of other processes there.

    Nothing where there is no nvidia-smi, as with ROCm.
    """
    if not shutil.which("nvidia-smi"):
        return {}

    def ask(query: str) -> list[str]:
        words = ["nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader"]
        asked = subprocess.run(words, capture_output=True, text=True, timeout=20)
        return asked.stdout.splitlines() if asked.returncode == 0 else []

    values = next(iter(ask(f"--query-gpu={','.join(CARD)}")), "").split(", ")
    found: dict[str, str | list[str]] = dict(zip(CARD, values, strict=False)) if values[0] else {}
    lines = ask("--query-compute-apps=pid,used_memory")
    mine = str(os.getpid() if pid is None else pid)
    found["other_processes"] = [line for line in lines if line.split(",")[0] != mine]
    return found


def _machine(bench: Bench) -> dict[str, Any]:
    import torch

    from olvae.bench.measure import machine

    found = {**machine(bench.device), "date": datetime.now(UTC).date().isoformat()}
    if bench.device != "cpu":
        memory = torch.cuda.get_device_properties(bench.device).total_memory / GIB
        found |= {"memory_gib": memory, "cuda": torch.version.cuda, "rocm": torch.version.hip}
    return found


def _tests(bench: Bench) -> dict[str, Any]:
    """The tests that need a GPU; on a CPU some others, to try the reading of their report."""
    report = bench.out / "tests.xml"
    report.unlink(missing_ok=True)
    chosen = ["tests/bench/test_measure.py"] if bench.device == "cpu" else ["-m", "gpu"]
    try:
        bench.command(
            "pytest",
            "-m",
            "pytest",
            *chosen,
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            f"--junitxml={report}",
        )
    except StepError:
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
    import torch

    from olvae.bench.cases import read_step
    from olvae.devices import PRECISIONS, peak_tflops
    from olvae.models.footprint import MARGIN, footprint
    from olvae.models.liteautoencoder import LiteAutoencoderKL

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
    torch.backends.cudnn.benchmark = True  # as training has it
    found = {
        "recipe": recipe,
        "precision": precision,
        "options": list(options),
        "size": size,
        "images": images,
    }
    found |= time_and_memory(
        model, size, images, 1 if bench.quick else 20, bench.device, PRECISIONS[precision].lightning
    )
    seconds = found["ms"] / 1e3
    found |= {
        "images_per_s": images / seconds,
        "counted_gib": counted.total(images) / GIB,
        "tflops": counted.flop * images / seconds / 1e12,
    }
    if on_gpu:
        found["peak"] = peak_tflops(torch.cuda.get_device_name(bench.device), precision)
    return found


def time_and_memory(
    model: Any, size: int, images: int, steps: int, device: str, lightning: str
) -> dict[str, Any]:
    """Train on random images: a step that warms up, ``steps`` one by one, and as many at once.

    ``ms``: of a step among those at once, as training runs them. ``alone_ms``: of one that the
    device is waited for before and after, an upper bound. Memory of the first step has the
    workspaces in which cuDNN tries its algorithms.
    """
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from olvae.bench.cases import train_on_noise
    from olvae.devices import now

    found: dict[str, Any] = {}
    alone: list[float] = []
    at = [0.0]  # the clock when the step, or those at once, began

    def begin(*given: Any) -> None:
        number = given[-1]
        if number <= steps + 1:
            at[0] = now(device)

    def end(*given: Any) -> None:
        number = given[-1]
        if 0 < number <= steps:
            alone.append(now(device) - at[0])
        elif number == 2 * steps:
            found["ms"] = 1e3 * (now(device) - at[0]) / steps
        if device != "cpu" and number in (0, 2 * steps):
            column = "memory_gib" if number else "first_memory_gib"
            found[column] = torch.cuda.max_memory_allocated(device) / GIB
            torch.cuda.reset_peak_memory_stats(device)

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    watch = LambdaCallback(on_train_batch_start=begin, on_train_batch_end=end)
    train_on_noise(model, size, images, 1 + 2 * steps, device, lightning, watch)
    return {**found, "alone_ms": 1e3 * median(alone)}


def _kl() -> "nn.Module":
    """diffusers' AutoencoderKL as in Stable Diffusion, with our latent's channels."""
    from diffusers import AutoencoderKL

    from olvae.bench.cases import N_Z

    widths, kinds = (128, 256, 512, 512), ("DownEncoderBlock2D", "UpDecoderBlock2D")
    down, up = ((kind,) * len(widths) for kind in kinds)
    return AutoencoderKL(3, 3, down, up, widths, layers_per_block=2, latent_channels=N_Z)


def _tiny() -> "nn.Module":
    from diffusers import AutoencoderTiny

    from olvae.bench.cases import N_Z

    return AutoencoderTiny(latent_channels=N_Z)


def _networks(half: str, bench: Bench) -> dict[str, Any]:
    """Encoders or decoders beside those of diffusers, random weights, no gradients."""
    import torch

    from olvae.bench.cases import DECODERS, ENCODERS, F8, N_Z, network_cases
    from olvae.bench.measure import Setting, rows_of

    torch.backends.cudnn.benchmark = True  # for both sides
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
    """Train one of the study's two encoders, with a linear start, for as long as the other one.

    In pieces, if the time is short: a row with ``unfinished`` has what is done.
    """
    name = f"pair_{network}"
    found = bench.rows().get(name, {})
    runs = [path.parent.parent for path in bench.out.glob(f"runs/*_{name}_*/checkpoints/last.ckpt")]
    if "steps" not in found or not runs:
        found = {"network": network, "steps": _steps_of_pair(network, bench), "seconds": 0.0}
    tiles, held_out = CORPUS / "train_tiles", ["--data", str(CORPUS / "held_out")]
    if tiles.is_dir():
        data = [f"data.params.root={tiles}", f"data.params.val_root={CORPUS / 'held_out'}"]
    else:
        data, held_out = ["--data", "samples"], []
    found |= {"data": "the study's corpus" if held_out else "the package's 52 photographs"}
    found.pop("error", None)

    # Train, or continue, until it is finished or the time is over.
    start = time.monotonic()
    if not found.get("trained"):
        limit = ["--time-limit", f"{max(1, round(bench.left - EVALUATION_S))}s"]
        try:
            if runs:
                bench.olvae(f"{name}_training", "train", "--resume", str(max(runs)), *limit)
            else:
                settings = _settings_of_pair(network, bench, found["steps"])
                bench.train(f"{name}_training", str(RECIPE), *data, *settings, *limit)
        except StepError as error:
            if error.code != TIME_LIMIT:
                raise
        else:
            found["trained"] = True
        found["seconds"] += time.monotonic() - start
    if not found.get("trained") or bench.left < EVALUATION_S / 2:
        return {**found, "unfinished": f"{found['seconds']:.0f} s of training are done"}

    # Evaluate.
    run = max(bench.out.glob(f"runs/*_{name}_training_*"))
    folder = bench.out / "evaluations" / name
    size = "64" if bench.quick else "256"
    flags = ["--size", size, "--metrics", "psnr,ssim", "--baselines", "--out", str(folder)]
    bench.olvae(f"{name}_evaluation", "evaluate", str(run), *held_out, *flags)
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["results"]
    trained, code = [
        result["metrics"] for result in results if "untrained" not in result["target"]
    ][:2]
    found.pop("unfinished", None)
    return {**found, "linear_psnr": code["psnr"], "psnr": trained["psnr"], "ssim": trained["ssim"]}


def _settings_of_pair(network: str, bench: Bench, steps: int) -> list[str]:
    linear = f"{network}_linear"
    return [
        *NETWORKS[linear],
        f"model.base_learning_rate={LONG[linear][0]}",
        f"lightning.trainer.max_steps={steps}",
        f"lightning.trainer.val_check_interval={steps}",
        f"data.params.batch_size={2 if bench.quick else 32}",
        f"data.params.num_workers={0 if bench.quick else 8}",
    ]


def _steps_of_pair(network: str, bench: Bench) -> int:
    """How many steps the network's training takes for six minutes."""
    from olvae.bench.cases import time_steps
    from olvae.data.places import load
    from olvae.devices import PRECISIONS
    from olvae.models.liteautoencoder import LiteAutoencoderKL

    minutes, images, timed = (0.01, 2, 2) if bench.quick else (6.0, 32, 20)
    params = load([RECIPE], _settings_of_pair(network, bench, timed))["model"]["params"]
    lightning = PRECISIONS[bench.precision].lightning
    seconds = time_steps(LiteAutoencoderKL(**params), 64, images, timed, bench.device, lightning)
    return max(2, round(60 * minutes / median(seconds)))


class Step(NamedTuple):
    """Something to measure: it begins with ``needs_s`` seconds left, and ends after ``limit_s``."""

    run: Callable[[Bench], dict[str, Any]]
    needs_s: float
    limit_s: float


def _steps() -> Iterator[tuple[str, Step]]:
    yield "machine", Step(_machine, 20, 60)
    yield "tests", Step(_tests, 240, 420)
    for precision in ("32", "bf16"):
        yield from _of_both("step", precision)
    for half in ("encoder", "decoder"):
        yield f"networks_{half}", Step(partial(_networks, half), 120, 180)
    for option in ("channels_last", "checkpoint", "compile"):
        yield from _of_both("step", "bf16", option)
    # These compile too, other sizes than the steps above.
    for recipe in RECIPES:
        yield f"trained_{recipe}", Step(partial(_trained, recipe), *COMPILING)
    # In pieces of any length.
    for network in ("litevae", "sd"):
        yield f"pair_{network}", Step(partial(_pair, network), 2.5 * EVALUATION_S, 600)


COMPILING = (270, 450)


def _of_both(kind: str, precision: str, *options: str) -> Iterator[tuple[str, Step]]:
    for recipe in RECIPES:
        step = partial(_step, recipe, precision, dict.fromkeys(options, True))
        times = COMPILING if "compile" in options else (90, 180)
        yield "_".join((kind, recipe, precision, *options)), Step(step, *times)


STEPS: Mapping[str, Step] = dict(_steps())
"""All steps by name, what matters first first; the study's long pair is the last."""


def run(bench: Bench, steps: Sequence[str], minutes: float, page: Path) -> None:
    """Run steps that have no result yet, and fill the page after each.

    All end within ``minutes``: what needs more than is left waits for the next call.
    """
    ends, waiting = time.monotonic() + 60 * minutes, []
    slack = 10 if bench.device == "cpu" else 1
    for number, name in enumerate(steps, 1):
        row, step = bench.rows().get(name), STEPS[name]
        if row is not None and not {"error", "unfinished"} & row.keys():
            continue
        left = ends - time.monotonic()
        if left < step.needs_s:
            waiting.append(f"{name} ({step.needs_s:.0f} s)")
            continue
        start, limit = time.monotonic(), min(left, slack * step.limit_s)
        flags = ["--out", str(bench.out), "--rows", str(bench.file), "--device", bench.device]
        flags += ["--only", name, "--here", f"{limit:.0f}", *(["--quick"] if bench.quick else [])]
        try:
            bench.command(name, "-m", "study.gpu", *flags, limit_s=limit)
        except StepError as error:
            bench.keep(name, {**(row or {}), "error": str(error)})
        row = bench.rows()[name]
        outcome = row.get("error") or row.get("unfinished") or "done"
        print(
            f"{number}/{len(steps)} {name}: {outcome}, {time.monotonic() - start:.0f} s", flush=True
        )
        _fill(page, bench.rows())
    if waiting:
        print(f"for the next call, with the seconds that each needs: {', '.join(waiting)}")
    _fill(page, bench.rows())


def _fill(page: Path, rows: Found) -> None:
    page.write_text(fill(page.read_text(encoding="utf-8"), rows, TABLES), encoding="utf-8")


def _of(rows: Found, prefix: str) -> list[Mapping[str, Any]]:
    """Results of this kind in the order of the steps, without failed and unfinished ones."""
    found = [rows[name] for name in STEPS if name.startswith(prefix) and name in rows]
    return [row for row in found if not {"error", "unfinished"} & row.keys()]


def _number(row: Mapping[str, Any], key: str, form: str = ".1f") -> str:
    """A value as text; nothing where there is none, as of a memory on a CPU."""
    return "" if row.get(key) is None else format(row[key], form)


def _run_table(rows: Found) -> str:
    """The machine, the card after its first step, the tests, and the steps that failed."""
    lines = []
    for row in _of(rows, "machine"):
        for key, value in {**row, **row.get("card", {})}.items():
            if key == "card" or value is None:
                continue
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append([key, "; ".join(value) or "none" if isinstance(value, list) else text])
    for row in _of(rows, "tests"):
        passed = row["tests"] - row["skipped"] - len(row["failed"])
        found = "; failed: ".join([f"{passed} passed, {row['skipped']} skipped", *row["failed"]])
        lines.append(["tests", found])
    for name, row in rows.items():
        if "error" in row or "unfinished" in row:
            lines.append([name, row.get("error") or row["unfinished"]])
    return table(["", "found"], lines)


def _step_table(rows: Found) -> str:
    lines = []
    for row in _of(rows, "step_"):
        share = f"{row['tflops'] / row['peak']:.0%}" if row.get("peak") else ""
        kind = ", ".join([row["precision"], *row["options"]])
        cells = [f"{row['recipe']}, {kind}", str(row["size"]), str(row["images"])]
        cells += [_number(row, "ms"), _number(row, "alone_ms")]
        cells += [_number(row, "images_per_s"), _number(row, "tflops", ".2f"), share]
        memory = ("memory_gib", "first_memory_gib", "counted_gib")
        lines.append([*cells, *(_number(row, key) for key in memory)])
    headings = ["step", "px", "images", "ms", "ms, alone", "images/s", "TFLOP/s", "of the peak"]
    return table([*headings, "GiB", "GiB, first step", "GiB counted"], lines)


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
        "--out",
        type=Path,
        help="of rows, logs and runs: study/gpu-out, or study/gpu-quick on a CPU",
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="all rows, in one file; by default OUT/rows.json"
    )
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda; cpu tries the way there, and fills a copy of the page",
    )
    parser.add_argument(
        "--minutes", type=float, default=40, help="after which all that has begun has ended"
    )
    parser.add_argument(
        "--only", nargs="*", choices=STEPS, default=list(STEPS), metavar="STEP", help="by name"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    # One step, in this process, which is ended after these seconds.
    parser.add_argument("--here", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    tried = options.quick or options.device == "cpu"
    out = options.out or Path("study", "gpu-quick" if tried else "gpu-out")
    bench = Bench(out, options.device, options.quick, options.rows)
    if options.here:
        bench.seconds = options.here
        (name,) = options.only
        run_here(name, bench)
        return
    try:
        if options.only and bench.device != "cpu":
            check_gpu()
        bench.out.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(PAGE, bench.out / PAGE.name)) if tried else PAGE
        run(bench, options.only, options.minutes, page)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{page}: filled from {bench.file}")


def run_here(name: str, bench: Bench) -> None:
    """Run one step in this process, and keep its row with the card's state after it."""
    row = STEPS[name].run(bench)
    if bench.device != "cpu":
        import torch

        row["card"] = card(str(torch.cuda.get_device_properties(bench.device).uuid))
    bench.keep(name, row)


def check_gpu() -> None:
    """ValueError if PyTorch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f"PyTorch {torch.__version__} finds no GPU here: --device cpu --quick tries the way"
        )


if __name__ == "__main__":
    main()
