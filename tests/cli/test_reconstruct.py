"""``olvae reconstruct`` and ``olvae app`` as a user types them.

tests/test_app*.py have the page.
"""

import importlib.util
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import olvae
from olvae.config import save
from tests.conftest import one_width, tiny, tiny_config


@pytest.fixture
def target(tmp_path):
    """The arguments that name a model: a checkpoint and its config."""
    save(tiny_config(encoder_config=one_width()), tmp_path / "tiny.yaml")
    torch.save(tiny(encoder_config=one_width()).state_dict(), tmp_path / "tiny.ckpt")
    return [tmp_path / "tiny.ckpt", "--config", tmp_path / "tiny.yaml"]


def picture(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(array).save(path)
    return path


def test_reconstruct_takes_every_size_and_names_the_unreadable(olvae, target, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    sizes = {
        "dot.png": (1, 1),
        "a/line.png": (9, 1),
        "b/line.png": (1, 9),
        "odd.bmp": (31, 17),
        "wide.png": (200, 13),
    }
    for name, size in sizes.items():
        picture(photos / name, size)
    (photos / "broken.jpg").write_bytes(b"no picture")
    code, stdout, err = olvae("reconstruct", *target, photos, "--out", out)
    assert (code, stdout) == (1, "")
    assert f"error: {photos / 'broken.jpg'}: " in err
    assert err.count("error:") == 1
    assert err.count(" dB  ") == 5
    assert f"5 of 6 reconstructed by {target[0]}: {out}" in err
    written = {name.partition(".")[0]: size for name, size in sizes.items()}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert found == {f"{n}{s}.png" for n in written for s in ("", "_compare")}
    for name, size in written.items():
        assert Image.open(out / f"{name}.png").size == size
        assert max(Image.open(out / f"{name}_compare.png").size) >= 256


def test_a_full_disk_is_one_line_with_the_file(olvae, target, tmp_path, full_disk):
    photo = picture(tmp_path / "photo.png", (64, 64))
    with full_disk(1000):
        code, _, err = olvae("reconstruct", *target, photo, "--out", tmp_path / "out")
    assert code == 1
    assert "[Errno" not in err
    place = tmp_path / "out"
    assert err.startswith(f"error: {place}")
    assert err.endswith(": File too large\n")
    assert err.count("\n") == 1


def test_reconstruct_takes_samples_and_precision(done, target, tmp_path):
    image = picture(tmp_path / "x.png", (8, 8))
    results, notes = [], []
    for options in ("", "--sample", "--sample --seed 0", "--sample --seed 1", "--precision bf16"):
        err = done("reconstruct", *target, image, "--out", tmp_path / "out", *options.split())
        notes.append(
            f"note: {tmp_path / 'out'}: earlier results of these images are replaced" in err
        )
        results.append((tmp_path / "out" / "x.png").read_bytes())
    assert results[1] == results[2]
    assert len(set(results)) == 4
    assert notes == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--memory", "nan"], 2, "--memory nan: give a number of GiB"),
        (["--memory", "-1"], 2, "--memory -1.0: give a number of GiB"),
        (["--precision", "8"], 2, "--precision 8: choose from fp16, bf16, tf32, 32"),
        (["missing.png"], 1, "missing.png: no such image or folder"),
        (["--memory", "0.000001"], 1, "the smallest tile takes"),
        (["--out", __file__], 1, "results need a folder"),
    ],
)
def test_reconstruct_mistakes_leave_nothing(refused, target, tmp_path, options, code, text):
    image = picture(tmp_path / "x.png", (8, 8))
    assert text in refused(code, "reconstruct", *target, image, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_memory_is_refused_for_networks_of_others(refused, tmp_path):
    teacher = f"diffusers:{Path(olvae.__file__).parent}/recipes/distil/teacher"
    image = picture(tmp_path / "x.png", (8, 8))
    assert "computed whole" in refused(2, "reconstruct", teacher, image, "--memory", 1)


def test_app_refuses_an_address_in_use(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused(2, "app", "olvae:photos-f8c4", "--port", port)
    assert (
        line
        == f"error: --host 127.0.0.1 --port {port}: can't be served on: Address already in use\n"
    )


def test_app_without_gradio_says_what_to_install(olvae, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    code, _, err = olvae("app", "olvae:photos-f8c4")
    assert code == 2
    assert "Gradio: pip install gradio" in err
