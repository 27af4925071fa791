"""Runs that are continued after a kill, by another process, or with other settings,
through the command."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from olvae.cli.main import main
from olvae.config import save
from olvae.data.places import load
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.runs import Run
from olvae.training import run as training
from tests.conftest import plain_config, trained_in
from tests.soak.killed import killed_before
from tests.training.events import scalars
from tests.training.origins import assert_same_checkpoint, checkpoint

KEEP = {"target": "olvae.training.saving.KeepCheckpoints", "params": {"every_n_steps": 2}}


@pytest.fixture
def olvae_train(capfd, monkeypatch, tmp_path, quick_training) -> Callable[..., tuple[int, str]]:
    """Run ``olvae train`` on the CPU; returns exit code and standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.delenv(training.RUN_ENV, raising=False)
        with pytest.raises(SystemExit) as leaving:
            main(["train", "--logdir", str(tmp_path / "runs"), "--gpus", "0", *map(str, arguments)])
        return leaving.value.code, capfd.readouterr().err

    return run


@pytest.fixture(scope="module")
def begun(tmp_path_factory, quick_training) -> Iterator[Path]:
    """A run of two steps; not to be changed."""
    with trained_in(tmp_path_factory.mktemp("begun"), plain_config) as run:
        yield run


@pytest.fixture
def run(begun, tmp_path) -> Run:
    """A copy of the run of two steps."""
    return Run(shutil.copytree(begun, tmp_path / "runs" / begun.name))


def steps(run: Run) -> int:
    return checkpoint(run)["global_step"]


def test_resume_reads_the_checkpoint_once(olvae_train, run, monkeypatch):
    monkeypatch.setattr(
        TorchCheckpointIO, "load_checkpoint", lambda *_, **__: pytest.fail("read again")
    )
    code, err = olvae_train("--resume", run.path, "lightning.trainer.max_steps=3")
    assert code == 0, err
    assert steps(run) == 3


def test_the_last_run_is_the_newest_whatever_the_time_zone(
    olvae_train, tmp_path, image_folder, run, monkeypatch
):
    """A resumed run writes its config anew, and is no newer by that; so one of an older version."""
    shutil.rmtree(run.path)
    cfg = tmp_path / "cfg.yaml"
    config = plain_config(image_folder)
    config["lightning"]["trainer"]["limit_val_batches"] = 0
    save(config, cfg)
    runs = []
    with monkeypatch.context() as patch:
        for zone, name in (("Asia/Tokyo", "older"), ("UTC", "newer")):
            patch.setenv("TZ", zone)
            time.tzset()
            code, err = olvae_train("--base", cfg, "--name", name, "lightning.trainer.max_steps=1")
            assert code == 0, err
            runs += [Run(path) for path in (tmp_path / "runs").glob(f"*_{name}_32")]
    time.tzset()
    older, newer = runs
    lines = older.config.read_text().splitlines(keepends=True)
    begun = older.config.stat()
    older.config.write_text("".join(line for line in lines if "  begun: " not in line))
    os.utime(older.config, ns=(begun.st_atime_ns, begun.st_mtime_ns))
    for word, resumed in (("older", older), ("last", newer), ("latest", newer)):
        more = steps(resumed) + 1
        code, err = olvae_train("--resume", word, f"lightning.trainer.max_steps={more}")
        assert code == 0, err
        assert steps(resumed) == more
    for each in runs:
        assert "begun" in load([each.config])["run"]


def test_a_run_without_its_last_checkpoint_continues_from_the_best(train_with, image_folder, capfd):
    """As after a full disk, bit for bit."""
    config = plain_config(image_folder)
    whole = train_with("lightning.trainer.max_steps=3", config=config)
    begun = train_with("lightning.trainer.max_steps=2", config=config)
    begun.last_checkpoint.unlink()
    capfd.readouterr()
    train_with("lightning.trainer.max_steps=3", resume=begun.path)
    line = f"{begun.last_checkpoint}: is missing: continuing from best.ckpt, at step 2\n"
    assert line in capfd.readouterr().err
    assert_same_checkpoint(begun, whole)


def test_a_lock_that_can_not_be_opened_is_one_line(olvae_train, run):
    """As in a read-only place, without Python's number of the error."""
    run.lock.unlink(missing_ok=True)
    run.lock.mkdir()
    code, err = olvae_train("--resume", run.path, "lightning.trainer.max_steps=3")
    assert (code, err) == (2, f"error: {run.lock}: Is a directory\n")


def test_a_broken_best_json_is_replaced(olvae_train, run, caplog):
    note = run.checkpoints / "best.json"
    note.write_text("")
    code, err = olvae_train("--resume", run.path, "lightning.trainer.max_steps=3")
    assert code == 0, err
    (warning,) = caplog.messages
    assert warning.startswith(f"{note}: not readable")
    assert json.loads(note.read_text())["step"] == 3


def test_resume_of_a_broken_config_is_one_line_that_says_what_to_do(olvae_train, run):
    whole = run.config.read_text()
    remedy = (
        "start a new run from its weights with --base CFG and --actual_resume "
        f"{run.last_checkpoint}"
    )
    for content in (
        "",
        whole[: len(whole) // 2],
        whole[: whole.index("\nrun:")],
        "model: [",
        "\0\0\0",
    ):
        run.config.write_text(content)
        code, err = olvae_train("--resume", run.path, "lightning.trainer.max_steps=3")
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith(f"error: {run.config}: ")
        assert line.endswith(remedy)
    run.config.unlink()
    code, err = olvae_train("--resume", run.path)
    assert code == 1
    assert err.endswith(f"config.yaml is missing: put a copy of that file back, or {remedy}\n")
    assert steps(run) == 2


def test_every_file_of_a_run_is_written_whole(olvae_train, tmp_path, image_folder, monkeypatch):
    """Each is renamed into its place, from a file beside it that was flushed before.

    TensorBoard's own are not.
    """
    placed, flushed = set(), []
    replace, fsync = Path.replace, os.fsync

    def move(self: Path, target: Path) -> Path:
        assert self.parent == Path(target).parent
        assert self.stat().st_ino in flushed
        placed.add(Path(target))
        return replace(self, target)

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(Path, "replace", move)
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    save(plain_config(image_folder), tmp_path / "tiny.yaml")
    code, err = olvae_train("--base", tmp_path / "tiny.yaml", "lightning.trainer.max_steps=1")
    assert code == 0, err
    (path,) = (tmp_path / "runs").iterdir()
    files = {file for file in path.rglob("*") if file.is_file() and "tfevents" not in file.name}
    whole = {file for file in placed if path in file.parents}
    assert {file.name for file in whole} >= {
        "config.yaml",
        "best.json",
        "best.ckpt",
        "last.ckpt",
        "step=00000001.png",
    }
    others = {".lock", "hparams.yaml", "curves.png"}  # empty; TensorBoard's; a stub's
    assert {file.name for file in files - whole} <= others


def psnr_at(run: Run) -> dict[int, float]:
    return scalars(run.path)["val/psnr"]


def test_a_kill_in_a_validation_does_not_leave_that_validation_out(
    olvae_train, tmp_path, image_folder
):
    """Its step is saved after it: validation, picture,
    best weights and curves are those of a run nobody killed."""
    config = plain_config(image_folder, use_ema=True, ema_decay=0.5)
    config["lightning"]["trainer"]["val_check_interval"] = 3  # and the last step is 4
    config["lightning"]["callbacks"] = {"keep": KEEP}
    save(config, tmp_path / "tiny.yaml")
    begin = partial(olvae_train, "--base", tmp_path / "tiny.yaml")
    killed_before(tmp_path / "runs", "tiny_32/images/step=00000004.png", begin)
    killed, whole = Run(next((tmp_path / "runs").iterdir())), Run(tmp_path / "whole")
    assert begin()[0] == 0
    next(path for path in (tmp_path / "runs").iterdir() if path != killed.path).rename(whole.path)
    assert steps(killed) == 2
    code, err = olvae_train("--resume", killed.path)
    assert code == 0, err
    assert "4 steps" in err
    assert psnr_at(killed) == psnr_at(whole)
    for name in (f"step={step:08d}.png" for step in (3, 4)):
        assert (killed.images / name).read_bytes() == (whole.images / name).read_bytes()
    notes = [json.loads((run.checkpoints / "best.json").read_text()) for run in (killed, whole)]
    assert notes[0] == notes[1]
    assert notes[0]["step"] == max(psnr_at(whole), key=psnr_at(whole).__getitem__)
    for file in ("best.ckpt", "last.ckpt"):
        assert_same_checkpoint(killed, whole, file)
    assert not list(killed.path.rglob(".partial-*"))

    (killed.images / "curves.png").unlink()
    before = killed.last_checkpoint.read_bytes()
    code, err = olvae_train("--resume", killed.path)
    assert code == 0, err
    assert err.startswith("this run is done, after 4 steps: set more to continue\n")
    assert (killed.images / "curves.png").is_file()
    code, err = olvae_train("--resume", killed.path, "lightning.trainer.max_steps=3")
    assert code == 2
    assert killed.last_checkpoint.read_bytes() == before
    assert "step 4, after the last of max_steps 3" in err


def test_a_run_has_one_training_at_a_time(olvae_train, tmp_path, image_folder, monkeypatch):
    """A --resume beside it is refused; after a kill the next one has the run, until Ctrl-C."""
    step = LiteAutoencoderKL.training_step

    def wait_after_two(self, batch, batch_idx):
        if self.global_step == 2:
            time.sleep(60)
        return step(self, batch, batch_idx)

    save(plain_config(image_folder), tmp_path / "tiny.yaml")
    often = f"lightning.callbacks.keep={json.dumps(KEEP)}"
    arguments = ("--base", tmp_path / "tiny.yaml", "lightning.trainer.max_steps=100000", often)
    first = multiprocessing.get_context("fork").Process(target=olvae_train, args=arguments)
    with monkeypatch.context() as patch:
        patch.setattr(LiteAutoencoderKL, "training_step", wait_after_two)
        first.start()
    try:
        deadline = time.monotonic() + 60
        while (
            not (saved := [*tmp_path.glob("runs/*/checkpoints/last.ckpt")])
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        run = Run(saved[0].parent.parent)
        assert f"process {first.pid} on" in run.lock.read_text()
        code, err = olvae_train("--resume", run.path)
    finally:
        first.kill()
        first.join()
    assert code == 2
    last = err.splitlines()[-1]  # after those of the first one
    assert last.startswith(
        f"error: {run.path}: is being trained by process {first.pid} on {socket.gethostname()}, "
        "since"
    )

    def interrupt(self, batch, batch_idx):
        assert f"process {os.getpid()} on" in run.lock.read_text()
        signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LiteAutoencoderKL, "training_step", interrupt)
    before = steps(run)
    code, err = olvae_train("--resume", run.path)
    assert code == 130
    assert steps(run) == before + 1
    assert not run.lock.read_text()


def test_resume_prints_settings_that_differ_from_the_runs_own(olvae_train, run, tmp_path):
    """By the flags, a config file and overrides; the config then is the new one.

    The checkpoint names the run.
    """
    save(
        {"model": {"base_learning_rate": 1e-3, "params": {"use_ema": False}}},
        tmp_path / "more.yaml",
    )
    before = load([run.config])
    overrides = (
        "lightning.trainer.max_steps=3",
        "model.base_learning_rate=0.002",
        "data.params.num_workers=1",
    )
    code, err = olvae_train(
        "--resume", run.last_checkpoint, "--base", tmp_path / "more.yaml", "--seed", 3, *overrides
    )
    assert code == 0, err
    assert err.splitlines()[:6] == [
        "settings that differ from the run's own:",
        "  model.base_learning_rate: 0.001 -> 0.002",
        "  data.params.num_workers: 0 -> 1",
        "  lightning.trainer.max_steps: 2 -> 3",
        "  run.seed: 0 -> 3",
        "  model.params.use_ema: not set -> false",
    ]
    after = load([run.config])
    assert after["model"]["base_learning_rate"] == 0.002
    assert after["run"] == {**before["run"], "seed": 3}
    found = checkpoint(run)
    assert found["global_step"] == 3
    (group,) = found["optimizer_states"][0]["param_groups"]
    assert group["lr"] == group["initial_lr"] == found["lr_schedulers"][0]["base_lrs"][0] == 0.002


def test_resume_takes_another_schedule_from_the_first_step_on(olvae_train, run):
    rates = (
        "model.params.warmup_steps=10",
        "model.base_learning_rate=0.002",
        "lightning.trainer.log_every_n_steps=1",
    )
    more = ("lightning.trainer.max_steps=4", "lightning.trainer.accumulate_grad_batches=2")
    code, err = olvae_train("--resume", run.path, *rates, *more)
    assert code == 0, err
    logged = scalars(run.path)["train/lr"]
    assert [logged[step] for step in (3, 4)] == pytest.approx([0.002 * 0.3, 0.002 * 0.4])
    assert "rate is 0.0006 from this step on, and would have been 0.001\n" in err
    images = checkpoint(run)["images_seen"]
    assert f"4: {images} images, " in err  # two steps of a batch, two of twice as many


def test_a_cosine_that_ends_later_is_told(olvae_train, tmp_path, image_folder):
    """More steps raise the rate; with the same end there is nothing to tell."""
    config = plain_config(image_folder, scheduler="cosine", min_lr_factor=0.1)
    config["lightning"]["trainer"] |= {"max_steps": 2, "limit_val_batches": 0}
    save(config, tmp_path / "c.yaml")
    code, err = olvae_train("--base", tmp_path / "c.yaml")
    assert code == 0, err
    assert "the learning rate is" not in err
    (run,) = map(Run, (tmp_path / "runs").iterdir())
    code, err = olvae_train("--resume", run.path, "lightning.trainer.max_steps=4")
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "the learning rate is" in line]
    assert line == (
        "warning: the learning rate is 0.00055 from this step on, and would have been 0.0001: its "
        "cosine ends at step 4 instead of 2; model.params.decay_steps=2 leaves it as it was"
    )
    assert scalars(run.path)["train/lr"][3] == pytest.approx(0.00055)
    same = ("model.params.decay_steps=4", "lightning.trainer.max_steps=5")
    code, err = olvae_train("--resume", run.path, *same)
    assert code == 0, err
    assert "the learning rate is" not in err


def test_resume_may_change_the_configs_precision(olvae_train, run):
    for steps, precision in ((3, "bf16"), (4, "bf16"), (5, "32")):
        settings = (
            f"lightning.trainer.max_steps={steps}",
            f"lightning.trainer.precision={precision}",
            "lightning.trainer.limit_val_batches=0",
        )
        code, err = olvae_train(
            "--resume", run.path, *settings, *(["--precision", "32"] if steps == 4 else ())
        )
        assert code == 0, err
        used = "32" if steps == 4 else precision
        assert f"precision {used}" in err
        assert load([run.config])["run"]["precision"] == used


def test_validations_stay_between_updates_of_another_size(olvae_train, run):
    """One within an update would delete its gradients."""
    for trainer in (
        {"max_steps": 3},
        {"max_steps": 7, "accumulate_grad_batches": 2, "val_check_interval": 2},
    ):
        trainer["log_every_n_steps"] = 2
        code, err = olvae_train(
            "--resume", run.path, *(f"lightning.trainer.{k}={v}" for k, v in trainer.items())
        )
        assert code == 0, err
    assert [step for step in scalars(run.path)["val/psnr"] if step > 3] == [4, 6, 7]
    assert [step for step in scalars(run.path)["train/loss"] if step > 3] == [4, 6]


def test_resume_with_other_data_networks_or_losses_needs_allow_changes(olvae_train, run, tmp_path):
    """Refused without it, nothing changes.

    With it, the config changes with the first checkpoint, not before.
    """
    photos, others = Path(load([run.config])["data"]["params"]["root"]), tmp_path / "others"
    shutil.copytree(photos, others)
    before, more = run.config.read_bytes(), "lightning.trainer.max_steps=3"
    for override, line in (
        (f"data.params.root={others}", f"  data.params.root: {photos} -> {others}"),
        ("model.params.embed_dim=8", "  model.params.embed_dim: 4 -> 8"),
        ("model.params.parts.x=null", "  model.params.parts.x: not set -> null"),
    ):
        code, err = olvae_train("--resume", run.path, more, override)
        assert code == 2
        assert line in err.splitlines()
        key = override.partition("=")[0]
        assert err.splitlines()[-1].startswith(
            f"error: --resume: {key}: this would continue the run with other data, "
        )
        assert err.splitlines()[-1].endswith("add --allow-changes")
    assert run.config.read_bytes() == before

    changed = ("--resume", run.path, "--allow-changes", f"data.params.root={others}")
    code, err = olvae_train(*changed)
    assert code == 0
    assert "after 2 steps" in err
    assert run.config.read_bytes() == before
    for name in ("0.png", "3.png", "6.png", "9.png"):
        (others / name).unlink()
    (others / "1.png").write_bytes(b"")
    strict = "data.params.max_unreadable=0"
    code, err = olvae_train(*changed, strict, "lightning.trainer.max_steps=9")
    assert code == 1
    assert (run.config.read_bytes() == before) == (steps(run) == 2), err

    code, err = olvae_train(*changed, "data.params.max_unreadable=0.5", more)
    assert code == 0, err
    assert load([run.config])["data"]["params"]["root"] == str(others)
    assert steps(run) == 3
    code, err = olvae_train("--base", tmp_path / "tiny.yaml", "--allow-changes")
    assert (code, err) == (2, "error: --allow-changes is for --resume: leave it out\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("model.params.parts.x.target=olvae.models.parts.anchor.Anchor",),
            "these weights are of another model: ",
        ),
        (("model.params.freeze_decoder=true",), "train other weights"),
        (
            ("model.params.optimizer=muon",),
            "model.params.optimizer: muon, but the run has another: ",
        ),
        (
            (f"lightning.callbacks.k={{target: {KEEP['target']}, params: {{best: val/x}}}}",),
            "val/x can't choose the best weights",
        ),
    ],
)
def test_resume_that_fails_before_the_first_step_leaves_the_run_as_it_was(
    olvae_train, run, changes, message
):
    before = run.last_checkpoint.read_bytes(), run.config.read_bytes()
    code, err = olvae_train(
        "--resume", run.path, "--allow-changes", "lightning.trainer.max_steps=3", *changes
    )
    assert code > 0
    assert message in err.splitlines()[-1]
    assert (run.last_checkpoint.read_bytes(), run.config.read_bytes()) == before


@pytest.fixture
def started_here(olvae_train, tmp_path, image_folder, monkeypatch) -> Run:
    """A run of two steps whose data were given as ``photos``, in the current folder."""
    monkeypatch.chdir(tmp_path)
    save(plain_config(image_folder.name), tmp_path / "tiny.yaml")
    quick = ("lightning.trainer.max_steps=2", "lightning.trainer.limit_val_batches=0")
    code, err = olvae_train("--base", "tiny.yaml", *quick)
    assert code == 0, err
    (path,) = (tmp_path / "runs").iterdir()
    return Run(path)


def test_a_run_finds_its_relative_data_from_another_folder(
    olvae_train, started_here, tmp_path, monkeypatch
):
    """Its config has both, what was written and where that is.

    The same word there is other data.
    """
    photos = tmp_path / "photos"
    config = load([started_here.config])
    assert config["data"]["params"]["root"] == str(photos)
    assert config["run"]["paths"] == {str(photos): "photos"}
    code, err = olvae_train(
        "--resume", started_here.path, "data.params.root=photos", "lightning.trainer.max_steps=3"
    )
    assert code == 0, err
    assert "data.params.root" not in err  # the same place, written as before

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(photos, elsewhere / "photos")
    monkeypatch.chdir(elsewhere)
    code, err = olvae_train("--resume", started_here.path, "lightning.trainer.max_steps=4")
    assert code == 0, err
    assert load([started_here.config])["run"]["paths"] == {str(photos): "photos"}
    code, err = olvae_train(
        "--resume", started_here.path, "data.params.root=photos", "lightning.trainer.max_steps=5"
    )
    assert code == 2
    assert f"  data.params.root: {photos} -> {elsewhere / 'photos'}" in err.splitlines()
    with pytest.raises(SystemExit) as leaving:
        main(["evaluate", str(started_here.path), "--metrics", "psnr", "--no-report"])
    assert leaving.value.code == 0


def test_a_run_that_was_moved_with_its_data_goes_on(
    olvae_train, started_here, tmp_path, monkeypatch, caplog
):
    place = tmp_path / "copied"
    place.mkdir()
    for name in ("photos", "runs"):
        (tmp_path / name).rename(place / name)
    run = Run(place / "runs" / started_here.path.name)
    code, err = olvae_train("--resume", run.path, "lightning.trainer.max_steps=3")
    assert code == 1
    assert err.splitlines()[-1] == f"error: {tmp_path / 'photos'}: no such folder"
    monkeypatch.chdir(place)
    code, err = olvae_train("--resume", run.path, "lightning.trainer.max_steps=3")
    assert code == 0, err
    (line,) = caplog.messages
    assert line == (
        f"{tmp_path / 'photos'}: this run's data are not there any more: taken from "
        f"{place / 'photos'}"
    )
    config = load([run.config])
    assert config["data"]["params"]["root"] == str(place / "photos")
    assert config["run"]["paths"][str(place / "photos")] == "photos"


def test_the_config_is_replaced_after_the_checkpoint_of_its_settings(olvae_train, run, monkeypatch):
    placed, replace = [], Path.replace

    def move(self: Path, target: Path) -> Path:
        placed.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", move)
    code, err = olvae_train(
        "--resume", run.path, "lightning.trainer.max_steps=3", "model.base_learning_rate=0.002"
    )
    assert code == 0, err
    assert placed.count("config.yaml") == 1
    assert placed.index("config.yaml") == placed.index("last.ckpt") + 1
    assert load([run.config])["model"]["base_learning_rate"] == 0.002
