"""Commands that are killed at random moments and at every write, and continued: ``make soak``.

They end as a command that nobody killed. SOAK_KILLS is the number of kills of each training (25), SOAK_SEED chooses
them (0).
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
from tests.conftest import tiny_config
from tests.data.images import picture, write_shards
from tests.models.steps import PATCHGAN, against
from tests.soak.killed import PERCENTS, Write
from tests.training.origins import same

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
        words = [sys.executable, "-m", "tests.soak.killed", json.dumps({"root": str(folder), **settings})]
        with (folder.parent / "output.txt").open("w") as output:
            return subprocess.Popen([*words, *map(str, self.arguments(folder))], stdout=output, stderr=output)

    def whole(self, folder: Path) -> tuple[Mapping[str, Any], list[Write], tuple[float, float]]:
        """The result, each write, and when the first and the last of them were."""
        log = folder.parent / "writes.txt"
        _check(self.start(folder, log=str(log)).wait(), folder)
        writes = [json.loads(line) for line in log.read_text().splitlines()]
        return self.result(folder), [Write(*write) for _, *write in writes], (writes[0][0], writes[-1][0])

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

    A command that is killed is continued, and killed again. When it ends before that, its result is compared and the
    next one starts from nothing.

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
            if whole and isinstance(kill, float):  # its moment was after the end: less beside it than when it was timed
                kill *= 0.8
            elif whole:
                break
    _check(command.start(folder).wait(), folder)
    _compare(command.result(folder), expected, history)
    sys.stdout.write(f"{done} kills, {sum(times.values())} writes, {time.monotonic() - begun:.0f} s")
    assert done >= 0.8 * count


def _compare(result: Mapping[str, Any], expected: Mapping[str, Any], history: list[Kill]) -> None:
    assert result.keys() == expected.keys(), history
    for name, value in expected.items():
        assert same(result[name], value), (name, history)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def photos(folder: Path, count: int) -> Path:
    for i in range(count):
        (folder / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"class{i % 3}" / f"{i}.png")
    return folder


def run_of(folder: Path) -> Path | None:
    return next((path for path in (folder / "runs").glob("*") if (path / "checkpoints/last.ckpt").is_file()), None)


def trained(folder: Path) -> dict[str, Any]:
    """Everything of a run but its logs, its curves and what ran it; its checkpoints as what is in them."""
    run = run_of(folder)
    assert run is not None
    found: dict[str, Any] = {
        name: content
        for name, content in files(run).items()
        if not re.match(r"tensorboard/|images/curves.png|checkpoints/.*\.ckpt|hparams", name)
    }
    for path in (run / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        found |= {f"{path.name}: {part}": value for part, value in checkpoint.items() if part != "loops"}
    return found


@pytest.mark.parametrize(
    ("part", "data", "adversary"),
    [(0, "folder", False), (1, "folder", True), (2, "shards", False), (3, "shards", True)],
)
def test_train(tmp_path, part, data, adversary):
    """The four are killed at a quarter each of the files that all of them write."""
    model = {"adversary_config": against(PATCHGAN, lecam_weight=0.1)} if adversary else {}
    config = tiny_config(photos(tmp_path / "photos", 40), use_ema=True, **model)
    trainer = {"max_steps": 24, "val_check_interval": 6, "log_every_n_steps": 4}
    if data == "shards":
        write_shards(tmp_path / "shards", (9, 14, 5, 11, 7))
        config["data"] = {
            "target": "olvae.data.shards.webdataset.WebDatasetSource",
            "params": {"shards": str(tmp_path / "shards"), "size": 16, "batch_size": 2, "num_workers": 2, "shuffle": 4},
        }
        trainer["accumulate_grad_batches"] = 2
    keep = {"target": "olvae.training.saving.KeepCheckpoints", "params": {"every_n_steps": 4}}
    config["lightning"] = {"trainer": trainer, "callbacks": {"keep": keep}}
    save(config, tmp_path / "tiny.yaml")

    def arguments(folder: Path) -> list[object]:
        """Continued from its last checkpoint; one without is begun again."""
        run = run_of(folder)
        if run is not None:
            return ["train", "--resume", run]
        shutil.rmtree(folder / "runs", ignore_errors=True)
        return ["train", "--base", tmp_path / "tiny.yaml", "--logdir", folder / "runs", "--gpus", 0]

    soak(Command(arguments, trained), tmp_path, KILLS, slice(part, None, 4))


def test_pack(tmp_path):
    source = photos(tmp_path / "photos", 60)
    words = ["--shard-size", 6, "--resize", 24, "--workers", 2]
    soak(Command(lambda folder: ["data", "pack", source, "--out", folder / "out", *words], files), tmp_path, KILLS)


def test_encode(tmp_path):
    source = photos(tmp_path / "photos", 30)
    words = ["--data", source, "--size", 32, "--shard-size", 6, "--flip", "--classes"]
    target = "olvae:photos-f8c4"
    soak(Command(lambda folder: ["encode", target, "--out", folder / "out", *words], files), tmp_path, KILLS // 2)


def test_decode(tmp_path):
    source, target = photos(tmp_path / "photos", 12), "olvae:photos-f8c4"
    latents = Command(lambda folder: ["encode", target, "--data", source, "--size", 32, "--out", folder], files)
    _check(latents.start(tmp_path / "latents").wait(), tmp_path / "latents")
    command = Command(lambda folder: ["decode", target, tmp_path / "latents", "--out", folder / "out"], files)
    soak(command, tmp_path, KILLS // 2)
