"""What Windows does otherwise, as tests for it: ``pytest tests/windows/on_windows.py`` there.

Elsewhere test_emulated.py runs this file under sitecustomize.py, which plays Windows.
"""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pytest
import torch

from olvae import files
from olvae.checkpoint import read_checkpoint
from olvae.config import save
from olvae.config.reading import expand_braces
from olvae.data.picture_folder import Files, find_images
from olvae.files import (
    ON_WINDOWS,
    SIGNALS,
    atomic_write,
    folder_beside,
    is_running,
    lock_file,
    put_back,
    replace_folder,
    safe_path,
)
from olvae.runs import Run
from tests.cli.conftest import run_once
from tests.conftest import smooth_pictures, tiny_config

pytestmark = pytest.mark.skipif(not ON_WINDOWS, reason="needs Windows, or sitecustomize.py")


@contextmanager
def other_process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another Python that has printed a line; killed at the end."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_signals_are_the_ones_of_windows():
    assert sorted(SIGNALS.values()) == ["Ctrl-C", "SIGBREAK", "SIGTERM"]


def test_a_lock_leaves_its_text_readable_and_ends_with_its_process(tmp_path):
    hold = """
        import sys, time
        from olvae.files import lock_file
        with open(sys.argv[1], "a+", encoding="utf-8") as file:
            lock_file(file)
            file.truncate(0)
            file.write("the holder")
            file.flush()
            print("ready", flush=True)
            time.sleep(100)
    """
    path = tmp_path / "lock"
    with other_process(hold, path) as holder, path.open("a+", encoding="utf-8") as file:
        with pytest.raises(BlockingIOError):
            lock_file(file)
        file.seek(0)
        assert file.read() == "the holder"
        holder.kill()
        lock_file(file, patience=30)
        with path.open("a", encoding="utf-8") as again, pytest.raises(BlockingIOError):
            lock_file(again)


def test_a_process_is_looked_for_without_a_signal():
    with other_process("import time; print('ready', flush=True); time.sleep(100)") as process:
        assert is_running(process.pid)
    assert not is_running(process.pid)


def test_a_file_that_is_read_is_replaced_a_little_later(tmp_path, monkeypatch):
    read = """
        import sys, time
        with open(sys.argv[1], "rb"):
            print("ready", flush=True)
            time.sleep(float(sys.argv[2]))
    """
    path = tmp_path / "a"
    path.write_text("old", encoding="utf-8")
    with other_process(read, path, 1), atomic_write(path) as partial:
        partial.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new"

    monkeypatch.setattr(files, "READER_S", 0.3)
    with (
        other_process(read, path, 100),
        pytest.raises(PermissionError),
        atomic_write(path) as partial,
    ):
        partial.write_text("newer", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_was_read_can_be_replaced(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    content = read_checkpoint(path)
    with atomic_write(path) as partial:
        torch.save({}, partial)
    assert read_checkpoint(path) == {}
    assert content["state_dict"]["a"].sum() == 1000


def test_folders_are_replaced_and_put_back(tmp_path):
    place = tmp_path / "vae"
    for text in ("first", "second"):
        with folder_beside(place) as beside:
            (beside / "new").mkdir()
            (beside / "new" / "a").write_text(text, encoding="utf-8")
            replace_folder(beside / "new", place)
        assert (place / "a").read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [place]

    # A process was killed between the two moves, and something made an empty folder there.
    with folder_beside(place) as beside:
        left = beside.with_name(re.sub(r"~\d+-", "~999999999-", beside.name))
    left.mkdir()
    place.rename(left / "vae.old")
    place.mkdir()
    put_back(place)
    assert (place / "a").read_text(encoding="utf-8") == "second"


KEYS = {
    "a/b.png": "a/b.png",
    "con.png": "%con.png",
    "x/NUL/b": "x/%NUL/b",
    "console.png": "console.png",
    "com1": "%com1",
    'a:b?*"<>|.png': "a%3ab%3f%2a%22%3c%3e%7c.png",
    "a. /b.": "a.%20/b%2e",
    "..\\..\\b.png": "..%5c..%5cb.png",
    "C:\\b.png": "C%3a%5cb.png",
    "\u4e2d \u00e9.png": "\u4e2d \u00e9.png",
}


@pytest.mark.parametrize(("key", "name"), KEYS.items())
def test_keys_become_names_that_files_can_have(tmp_path, key, name):
    assert safe_path(key) == PurePosixPath(name)
    path = tmp_path / safe_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(b"x")
    assert [found.relative_to(tmp_path) for found in tmp_path.rglob("*") if found.is_file()] == [
        Path(name)
    ]


def test_backslashes_separate_folders_in_patterns():
    assert expand_braces("D:\\shards\\{0..1}.tar") == ["D:/shards/0.tar", "D:/shards/1.tar"]
    assert expand_braces("https://a/{0..1}\\.tar") == ["https://a/0.tar", "https://a/1.tar"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve pictures whose names no code page has, and a config that trains on them."""
    folder = tmp_path_factory.mktemp("there")
    for i, picture in enumerate(smooth_pictures()):
        place = folder / "photos" / "class\u4e2d"[: 5 + i % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"\u4e2d\u00e9{i}.png")
    config = tiny_config(folder / "photos")
    save(config, folder / "tiny.yaml")
    return folder


def succeed(*arguments: object) -> str:
    code, out, err = run_once(*arguments)
    assert code == 0, err
    return out


def test_keys_have_slashes(folder):
    images = Files(find_images(folder / "photos"), root=folder / "photos")
    assert {re.sub(r"\d+", "", images.key(i)) for i in range(12)} == {
        "class/\u4e2d\u00e9.png",
        "class\u4e2d/\u4e2d\u00e9.png",
    }


@pytest.fixture(scope="module")
def run(folder, quick_training) -> Run:
    """A run of two steps, with a loader process, that was continued for another two."""
    settings = ["lightning.trainer.max_steps=2", "data.params.num_workers=1"]
    base = ["--base", folder / "tiny.yaml", "--logdir", folder / "runs", "--gpus", 0]
    succeed("train", *base, *settings)
    (path,) = (folder / "runs").iterdir()
    succeed("train", "--resume", path, "lightning.trainer.max_steps=4")
    return Run(path)


def test_a_run_goes_all_the_way(folder, run, monkeypatch):
    """Each command works on what the ones before it have made."""
    monkeypatch.chdir(folder)
    shards, latents = folder / "shards", folder / "latents"
    assert read_checkpoint(run.last_checkpoint)["global_step"] == 4
    succeed("data", "pack", "photos", "--out", shards, "--workers", 1)
    assert not (shards / ".packing").exists()
    succeed("data", "check", shards)
    succeed("encode", run.path, "--data", shards, "--size", 16, "--out", latents)
    succeed("decode", run.path, latents, "--out", "decoded")
    assert len(list((folder / "decoded").rglob("*.png"))) == 12
    succeed("evaluate", run.path, "--data", shards, "--size", 16, "--metrics", "psnr")
    assert json.loads(run.metrics.read_text(encoding="utf-8"))["images"]["n"] == 12
    succeed("latents", run.path, "--data", "photos", "--images", 4)
    for _ in range(2):
        succeed("export", run.path, "--out", "vae", "--force")
    loaded = ["vae", "--data", "photos", "--size", 16, "--metrics", "psnr"]
    succeed("evaluate", *loaded, "--out", "report")


def test_a_code_page_ends_no_command(folder, run):
    picture = next((folder / "photos" / "class").iterdir())
    arguments = ["reconstruct", run.path, picture, "--out", folder / "pictures"]
    command = [sys.executable, "-m", "olvae", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert b"\\u4e2d" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Ctrl-C", "SIGBREAK"])
def test_a_signal_stops_a_training_that_can_be_continued(folder, tmp_path, name, monkeypatch):
    from olvae.training.callbacks import GracefulStop

    number = next(number for number, text in SIGNALS.items() if text == name)
    batch_end: Callable[..., None] = GracefulStop.on_train_batch_end

    def interrupted(self, trainer, *rest) -> None:
        if trainer.global_step == 2 and self.reason is None:
            signal.raise_signal(number)
        batch_end(self, trainer, *rest)

    base = ["--base", folder / "tiny.yaml", "--logdir", tmp_path, "--gpus", 0]
    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "on_train_batch_end", interrupted)
        code, _, err = run_once("train", *base, "lightning.trainer.max_steps=3")
    assert code == (130 if name == "Ctrl-C" else 75), err
    (path,) = tmp_path.iterdir()
    assert f"--resume {path}" in err.replace('"', "")
    assert read_checkpoint(Run(path).last_checkpoint)["global_step"] == 2
    succeed("train", "--resume", path)
    assert read_checkpoint(Run(path).last_checkpoint)["global_step"] == 3


@pytest.mark.slow
def test_a_killed_training_leaves_no_process_and_can_be_continued(folder, tmp_path):
    """Its loader processes end, and let go of what they read, the lock too."""
    save(
        {
            "include": str(folder / "tiny.yaml"),
            "lightning": {"trainer": {"max_steps": 1_000_000, "val_check_interval": 2}},
        },
        tmp_path / "long.yaml",
    )
    arguments = ["--base", tmp_path / "long.yaml", "--logdir", tmp_path / "runs", "--gpus", 0]
    settings = ["data.params.num_workers=1"]
    command = [sys.executable, "-m", "olvae", "train", *map(str, arguments), *settings]
    training = subprocess.Popen(command)
    try:
        until = time.monotonic() + 200
        while not list(tmp_path.glob("runs/*/checkpoints/best.ckpt")):
            assert training.poll() is None
            assert time.monotonic() < until
            time.sleep(0.5)
    finally:
        training.terminate()
        training.wait()
    (path,) = (tmp_path / "runs").iterdir()
    step = read_checkpoint(Run(path).newest_checkpoint)["global_step"]
    succeed("train", "--resume", path, f"lightning.trainer.max_steps={step + 2}")
    assert read_checkpoint(Run(path).last_checkpoint)["global_step"] == step + 2
