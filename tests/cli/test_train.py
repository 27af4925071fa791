"""``olvae train`` as a user types it."""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from olvae.runs import Run
from olvae.training.run import TrainingStopped


def test_train_evaluate_and_resume(olvae, done, config, tmp_path):
    """A run whose learning rate is next to 0 has the metrics of its untrained row."""
    train = ("train", "--base", config, "--logdir", tmp_path / "runs", "--gpus", "0", "--name", "a")
    code, out, err = olvae(*train, "--seed", 7, "model.base_learning_rate=1e-12")
    assert (code, out) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    batches = "4 = 4 x 1 accumulated x 1 process"
    facts = ("parameters", "GMACs", "16x16 -> 2x2", batches, "1e-12, constant", "CPU", str(run))
    assert [text for text in facts if text not in err] == []
    code, out, err = olvae("evaluate", "--baselines", "-B", "3", run)
    assert (code, out) == (0, "")
    assert "untrained" in err
    content = json.loads((run / "metrics.json").read_text())
    assert content["protocol"]["size"] == 16
    assert len(content["protocol_hash"]) == 16
    trained, linear, bicubic, untrained = content["results"]
    assert trained["target"] == run.name
    assert trained["n"] == linear["n"] == bicubic["n"] == untrained["n"] > 0
    assert trained["metrics"].keys() == {"psnr", "ssim", "l1"}
    assert trained["metrics"] == pytest.approx(untrained["metrics"], rel=1e-4)
    assert (run / "reconstructions.png").is_file()
    err = done("train", "--resume", run, "lightning.trainer.max_steps=5")
    assert "5 steps" in err


def test_train_warns_of_a_rising_rate_few_cores_and_few_held_out_images(
    olvae, config, tmp_path, monkeypatch
):
    """Of a rate that only rises, more processes than cores, and few held-out images."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    train = (
        "train",
        "--base",
        config,
        "--logdir",
        tmp_path / "runs",
        "--gpus",
        "0",
        "lightning.trainer.max_steps=2",
    )
    _, _, err = olvae(*train, "model.params.warmup_steps=2", "data.params.num_workers=2")
    assert "step 2: shorten model.params.warmup_steps" in err
    assert "1 cores: lower data.params.num_workers\n" in err
    assert "only 3 held-out images" in err
    for i in range(20):
        Image.new("RGB", (20, 20), (i, 3 * i, 99)).save(tmp_path / f"{i}.png")
    _, _, err = olvae(
        *train, "model.params.warmup_steps=1", f"data.params.val_root={tmp_path}/*.png"
    )
    assert not [
        text
        for text in ("the learning rate rises", "loader processes on", "held-out")
        if text in err
    ]


def test_sigterm_before_the_first_step_leaves_no_run(olvae, trained, tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        assert any((tmp_path / "runs").iterdir())
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr("olvae.training.run.print_summary", killed)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    command = [
        "train",
        "--base",
        trained.parent.parent / "tiny.yaml",
        "--gpus",
        0,
        "--logdir",
        tmp_path / "runs",
    ]
    code, _, err = olvae(*command)
    assert code == 75
    assert err.endswith("_tiny_32: removed: nothing was saved yet\nstopped\n")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def stopped(olvae, trained, monkeypatch) -> Callable[[], int]:
    """Run a training that is stopped before its first step; returns the exit code."""

    def stop(_: object) -> None:
        raise TrainingStopped(Run(trained), preempted=True)

    monkeypatch.setattr("olvae.training.run.train", stop)
    return lambda: olvae("train", "--base", trained.parent.parent / "tiny.yaml", "--gpus", 0)[0]


def test_a_signal_after_a_stop_counts_again_after_a_second(stopped, monkeypatch):
    """An echo does not change the exit code, but a process that does not end can be ended."""
    now = [100.0]
    ended: list[int] = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert stopped() == 75
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    assert ended == []
    now[0] += 1.1
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.raise_signal(number)
    assert ended == [75, 75]


def test_a_training_in_a_thread_can_be_stopped(stopped):
    """Where no handlers can be set."""
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(stopped).result() == 75
