"""Commands that are killed at random moments and at every write, and continued: ``make soak``.

They end as a command that nobody killed. SOAK_KILLS is the number of kills of each training (25),
SOAK_SEED chooses them (0).
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from olvae.config import save
from olvae.export.formats import LAYOUTS
from tests.conftest import tiny, tiny_config
from tests.data.images import picture, write_shards
from tests.models.autoencoder_kl import autoencoder_kl
from tests.models.loading.classes import make
from tests.models.loading.test_targets import taesd
from tests.models.steps import PATCHGAN, against
from tests.soak.killed import PERCENTS, Write
from tests.training.origins import same, without_networks

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("SOAK_KILLS", "25"))
SEED = int(os.environ.get("SOAK_SEED", "0"))

Kill = tuple[Write, int] | float
"""Where a command is killed: at a write, with so many percent of it; or after so many seconds."""


@dataclass(frozen=True)
class Command:
    """A command that may be killed.

    Args:
        arguments: what to type, given its folder as the last kill has left it.
        result: what it has made there, by name.
    """

    arguments: Callable[[Path], list[object]]
    result: Callable[[Path], Mapping[str, Any]]

    def start(self, folder: Path, **settings: Any) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        words = [
            sys.executable,
            "-m",
            "tests.soak.killed",
            json.dumps({"root": str(folder), **settings}),
        ]
        with (folder.parent / "output.txt").open("w") as output:
            return subprocess.Popen(
                [*words, *map(str, self.arguments(folder))], stdout=output, stderr=output
            )

    def whole(self, folder: Path) -> tuple[Mapping[str, Any], list[Write], tuple[float, float]]:
        """The result, each write, and when the first and the last of them were."""
        log = folder.parent / "writes.txt"
        _check(self.start(folder, log=str(log)).wait(), folder)
        writes = [json.loads(line) for line in log.read_text().splitlines()]
        return (
            self.result(folder),
            [Write(*write) for _, *write in writes],
            (writes[0][0], writes[-1][0]),
        )

    def killed(self, folder: Path, kill: Kill) -> bool:
        """Start or continue it; whether it was killed rather than ending first."""
        if not isinstance(kill, float):
            code = self.start(folder, kill=kill).wait()
        else:
            process = self.start(folder)
            try:
                code = process.wait(kill)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
        if code != -signal.SIGKILL:
            _check(code, folder)
        return code == -signal.SIGKILL


def _check(code: int, folder: Path) -> None:
    assert code == 0, (folder.parent / "output.txt").read_text()


def soak(command: Command, tmp_path: Path, count: int, part: slice = slice(None)) -> None:
    """Kill a command so many times, up to two thirds of them at writes, and compare what it makes.

    A command that is killed is continued, and killed again. When it ends before that, its result is
    compared and the next one starts from nothing.

    Args:
        part: of the files, each with each percentage, at which to kill it.
    """
    expected, writes, (first, last) = command.whole(tmp_path / "whole")
    rng = random.Random(SEED)
    times = Counter(write[:2] for write in writes)
    places = [(*file, percent) for file in times for percent in PERCENTS[file[0]]]
    rng.shuffle(places)
    kills: list[Kill] = [
        (Write(kind, name, rng.randint(1, times[kind, name])), percent)
        for kind, name, percent in places[part][: 2 * count // 3]
    ]
    kills += [rng.uniform(first, last) for _ in range(count - len(kills))]
    rng.shuffle(kills)
    folder, history = tmp_path / "killed", list[Kill]()
    begun, done = time.monotonic(), 0
    for kill in kills:
        while True:
            history.append(kill)
            if command.killed(folder, kill):
                done += 1
                break
            _compare(command.result(folder), expected, history)
            shutil.rmtree(folder)
            whole = len(history) == 1
            history.clear()
            # its moment was after the end: less beside it than when it was timed
            if whole and isinstance(kill, float):
                kill *= 0.8
            elif whole:
                break
    _check(command.start(folder).wait(), folder)
    _compare(command.result(folder), expected, history)
    sys.stdout.write(
        f"{done} kills, {sum(times.values())} writes, {time.monotonic() - begun:.0f} s"
    )
    assert done >= 0.8 * count


def _compare(result: Mapping[str, Any], expected: Mapping[str, Any], history: list[Kill]) -> None:
    assert result.keys() == expected.keys(), history
    for name, value in expected.items():
        assert same(result[name], value), (name, history)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def photos(folder: Path, count: int) -> Path:
    for i in range(count):
        (folder / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"class{i % 3}" / f"{i}.png")
    return folder


def run_of(folder: Path) -> Path | None:
    return next(
        (
            path
            for path in (folder / "runs").glob("*")
            if (path / "checkpoints/last.ckpt").is_file()
        ),
        None,
    )


def trained(folder: Path) -> dict[str, Any]:
    """Everything of a run but its logs, its curves and what ran it.

    Its checkpoints as what is in them.
    """
    run = run_of(folder)
    assert run is not None
    found: dict[str, Any] = {
        name: content
        for name, content in files(run).items()
        if not re.match(
            r"tensorboard/|csv/|wandb/|images/curves.png|checkpoints/.*\.ckpt|hparams", name
        )
    }
    for path in (run / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        found |= {
            f"{path.name}: {part}": value for part, value in checkpoint.items() if part != "loops"
        }
    return found


@pytest.mark.parametrize(
    ("part", "data", "adversary"),
    [(0, "folder", False), (1, "folder", True), (2, "shards", False), (3, "shards", True)],
)
def test_killed_trainings_end_as_an_uninterrupted_one(tmp_path, part, data, adversary):
    """The four are killed at a quarter each of the files that all of them write."""
    model = {"adversary_config": against(PATCHGAN, lecam_weight=0.1)} if adversary else {}
    config = tiny_config(photos(tmp_path / "photos", 40), use_ema=True, **model)
    trainer = {"max_steps": 24, "val_check_interval": 6, "log_every_n_steps": 4}
    if data == "shards":
        write_shards(tmp_path / "shards", (9, 14, 5, 11, 7))
        config["data"] = {
            "target": "olvae.data.shards.webdataset.WebDatasetSource",
            "params": {
                "shards": str(tmp_path / "shards"),
                "size": 16,
                "batch_size": 2,
                "num_workers": 2,
                "shuffle": 4,
            },
        }
        trainer["accumulate_grad_batches"] = 2
    keep = {"target": "olvae.training.saving.KeepCheckpoints", "params": {"every_n_steps": 4}}
    config["lightning"] = {"trainer": trainer, "callbacks": {"keep": keep}}
    save(config, tmp_path / "tiny.yaml")
    soak(
        Command(begun_or_resumed(tmp_path / "tiny.yaml", "--gpus", 0), trained),
        tmp_path,
        KILLS,
        slice(part, None, 4),
    )


def begun_or_resumed(config: Path, *words: object) -> Callable[[Path], list[object]]:
    """Arguments of a training: continued from its last checkpoint.

    One without is begun again, with these words.
    """

    def arguments(folder: Path) -> list[object]:
        run = run_of(folder)
        if run is not None:
            return ["train", "--resume", run]
        shutil.rmtree(folder / "runs", ignore_errors=True)
        return ["train", "--base", config, "--logdir", folder / "runs", *words]

    return arguments


LOGGERS = {"csv": {"target": "lightning.pytorch.loggers.CSVLogger"}}
LOGGERS |= {
    "wandb": {"target": "lightning.pytorch.loggers.WandbLogger", "params": {"mode": "offline"}}
}


def training(tmp_path: Path, *more: object, **trainer: Any) -> Command:
    """A training of a small model as a command, with a CSV and a W&B logger.

    ``more`` is said when it begins.
    """
    config = (
        without_networks(photos(tmp_path / "photos", 40))
        if "--from" in more
        else tiny_config(tmp_path / "photos")
    )
    photos(tmp_path / "photos", 40)
    config["model"]["params"]["lossconfig"]["params"]["kl_weight"] = 0  # as a teacher wants it
    steps = {"max_steps": 16, "val_check_interval": 4, "log_every_n_steps": 2}
    keep = {"target": "olvae.training.saving.KeepCheckpoints", "params": {"every_n_steps": 4}}
    config["lightning"] = {
        "trainer": {**steps, **trainer},
        "callbacks": {"keep": keep},
        "logger": LOGGERS,
    }
    save(config, tmp_path / "cfg.yaml")
    words = more if "devices" in trainer else (*more, "--gpus", 0)
    return Command(begun_or_resumed(tmp_path / "cfg.yaml", *words), trained)


@pytest.mark.parametrize(("part", "flag"), [(0, "--from"), (1, "--teacher")])
def test_killed_trainings_from_an_autoencoder_end_as_an_uninterrupted_one(tmp_path, part, flag):
    tiny().save_pretrained(tmp_path / "vae")
    soak(training(tmp_path, flag, tmp_path / "vae"), tmp_path, KILLS // 3, slice(part, None, 2))


def test_killed_trainings_in_two_processes_end_as_an_uninterrupted_one(tmp_path):
    soak(training(tmp_path, accelerator="cpu", devices=2), tmp_path, KILLS // 4)


def numbers(folder: Path) -> dict[str, Any]:
    """What an evaluation made, but for its times and date."""
    found: dict[str, Any] = {
        name: content for name, content in files(folder).items() if "report" not in name
    }
    for name in [name for name in found if name.endswith(("metrics.json", "metrics.md"))]:
        content = found.pop(name)
        if name.endswith("json"):
            found |= {
                f"{name} {row['target']}": row["metrics"] for row in json.loads(content)["results"]
            }
    return found


def made(tmp_path: Path, what: str) -> Command:
    """A command that makes files of a small model: evaluate, latents, or a format of export."""
    target: object = tmp_path / "vae"
    if what in ("diffusers", "ldm"):
        autoencoder_kl((32, 32)).save_pretrained(tmp_path / "vae")
        target = f"diffusers:{target}"
    elif what == "taesd":
        taesd().save_pretrained(tmp_path / "vae")
        target = f"diffusers:{target}"
    elif what == "qwen2d":
        make("AutoencoderKLQwenImage").save_pretrained(tmp_path / "vae")
        target = f"diffusers:{target}"
    else:
        tiny().save_pretrained(tmp_path / "vae")
    if what in ("evaluate", "latents"):
        words = [what, target, "--data", photos(tmp_path / "photos", 12)]
        words += ["--size", 32, "--metrics", "psnr,ssim"] if what == "evaluate" else []
        return Command(lambda folder: [*words, "--out", folder / "out"], numbers)
    name = "out.safetensors" if what in ("ldm", "comfyui", "qwen2d") else "out"
    return Command(
        lambda folder: ["export", target, "--out", folder / name, "--format", what, "--force"],
        files,
    )


MADE = ["evaluate", "latents", *LAYOUTS]


@pytest.mark.parametrize("what", MADE)
def test_killed_evaluations_and_exports_leave_what_an_uninterrupted_one_leaves(tmp_path, what):
    soak(made(tmp_path, what), tmp_path, KILLS // 5)


@pytest.mark.parametrize("what", ["train", "pack", *MADE])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, what):
    """At half of each file of those that a command writes: an error without a traceback,
    and the same after it."""
    if what == "train":
        command = training(tmp_path)
    elif what == "pack":
        words = [
            "data",
            "pack",
            photos(tmp_path / "photos", 20),
            "--shard-size",
            6,
            "--workers",
            1,
            "--out",
        ]
        command = Command(lambda folder: [*words, folder / "out"], files)
    else:
        command = made(tmp_path, what)
    expected, *_ = command.whole(tmp_path / "whole")
    sizes = sorted(
        path.stat().st_size // 2 for path in (tmp_path / "whole").rglob("*") if path.is_file()
    )
    sizes = [size for size in sizes if size > 2**13] or sizes[-1:]  # what it prints has to fit
    folder, failed = tmp_path / "full", 0
    for limit in sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}):
        code = command.start(folder, limit=limit).wait()
        printed = (tmp_path / "output.txt").read_text()
        assert code in (0, 1), printed  # loggers and pictures are no reason to end a training
        assert "Traceback" not in printed, printed
        assert (f"\n{printed}".count("\nerror: ") == 1) == (code == 1), printed
        assert not [*folder.rglob("*.partial*"), *folder.rglob(".partial*")]
        failed += code
        _check(command.start(folder).wait(), folder)
        _compare(command.result(folder), expected, [])
        shutil.rmtree(folder)
    sys.stdout.write(f"{failed} full disks")
    assert failed


def test_a_clock_that_jumps_back_and_a_run_that_moves(tmp_path):
    """Resumed a day before it began, from another folder, it ends as one that nobody stopped."""
    command = training(tmp_path)
    expected, writes, _ = command.whole(tmp_path / "whole")
    middle = [write for write in writes if write.name.endswith("last.ckpt")][1]
    assert command.killed(tmp_path / "killed", (middle, 100))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "killed", tmp_path / "elsewhere" / "moved")
    folder = tmp_path / "elsewhere" / "moved"
    _check(command.start(folder, back=86400).wait(), folder)
    _compare(command.result(folder), expected, [])


def test_two_runs_in_one_second_and_data_that_changed(tmp_path):
    """Both have a folder of their own.

    With more pictures than before, a resumed run goes on, and says how many.
    """
    command = training(tmp_path)
    folder = tmp_path / "both"
    processes = [command.start(folder) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list((folder / "runs").iterdir())) == 2
    run = run_of(folder)
    photos(tmp_path / "photos", 60)
    words = ["train", "--resume", run, "lightning.trainer.max_steps=20"]
    _check(Command(lambda _: words, files).start(folder).wait(), folder)
    found = re.search(r"(\d+) training, (\d+) validation", (tmp_path / "output.txt").read_text())
    assert sum(map(int, found.groups())) == 60


def test_a_killed_pack_ends_as_an_uninterrupted_one(tmp_path):
    source = photos(tmp_path / "photos", 60)
    words = ["--shard-size", 6, "--resize", 24, "--workers", 2]
    soak(
        Command(lambda folder: ["data", "pack", source, "--out", folder / "out", *words], files),
        tmp_path,
        KILLS,
    )


def test_a_killed_encode_ends_as_an_uninterrupted_one(tmp_path):
    source = photos(tmp_path / "photos", 30)
    words = ["--data", source, "--size", 32, "--shard-size", 6, "--flip", "--classes"]
    target = "olvae:photos-f8c4"
    soak(
        Command(lambda folder: ["encode", target, "--out", folder / "out", *words], files),
        tmp_path,
        KILLS // 2,
    )


def test_a_killed_decode_ends_as_an_uninterrupted_one(tmp_path):
    source, target = photos(tmp_path / "photos", 12), "olvae:photos-f8c4"
    latents = Command(
        lambda folder: ["encode", target, "--data", source, "--size", 32, "--out", folder], files
    )
    _check(latents.start(tmp_path / "latents").wait(), tmp_path / "latents")
    command = Command(
        lambda folder: ["decode", target, tmp_path / "latents", "--out", folder / "out"], files
    )
    soak(command, tmp_path, KILLS // 2)
