"""The messages that a user meets most, word for word; nothing is written.

Other tests look for a setting, number or name alone: to say a message better, change it here.
"""

import shutil
from pathlib import Path

import pytest

from olvae.config import save
from tests.conftest import smooth_pictures, tiny_config
from tests.export.latents import tiny_vae

TRAIN = "train --base tiny.yaml --gpus 0 "

NO_IMAGES = (
    "no images in this folder (looked for .jpg, .jpeg, .jfif, .png, .webp, .avif, .bmp, .tif, "
    ".tiff, .ppm, .pgm, .gif, .npy, .npz, .exr)"
)

NO_TARGET = (
    "nowhere: not found; a target is a run folder, a run's name (the newest in runs/; last: of "
    "all), a .ckpt or .safetensors file, an exported folder, olvae:NAME (a model of this "
    "package), an id of the Hugging Face hub (OWNER/NAME), diffusers:ID_OR_FOLDER, "
    "timm:NAME[=FILE][::CHANNELS] (a vision encoder), or package.module.Class:ARGUMENT "
    "(a Loader of yours)"
)

WRONG_USAGE = {
    # A training's config.
    "train": "--base names the config to train, such as demo",
    "train --base nowhere": "nowhere: no such config file; `olvae recipes` lists all of them",
    TRAIN + "data.params.siez=64": "data.params.siez: unknown key; did you mean size?",
    TRAIN + "model.params.embed_dims=4": (
        "model.params.embed_dims: unknown key; did you mean embed_dim?"
    ),
    TRAIN + "steps": "steps: an override is key=value, as in model.params.embed_dim=8",
    TRAIN + "data.params.size=20": (
        "data.params.size: 20 is not a multiple of 8, the model's downscaling factor: use 16 or 24"
    ),
    TRAIN + "data.target=olvae.data.FolderSorce": (
        "data.target: target 'olvae.data.FolderSorce' does not import: olvae.data has no "
        "FolderSorce"
    ),
    # The machine.
    "train --base tiny.yaml --gpus 1": "--gpus 1: this machine has no GPU; 0 is the CPU",
    "train --base tiny.yaml --precision fp8": ("--precision fp8: choose from fp16, bf16, tf32, 32"),
    # What is read, and where results go.
    "evaluate vae": "--out DIR is missing: the first target is neither a run folder nor a file",
    "evaluate vae --data photos --metrics psnrr": (
        "--metrics psnrr: choose from all, psnr, ssim, ssim_uniform, ms_ssim, l1, lpips, "
        "lpips_alex, rfid, kid, fdd"
    ),
    "evaluate vae --data=": (
        "--data is empty: give a value, or leave it out; a variable of the shell is not set, "
        "perhaps"
    ),
    "encode vae --data photos --out photos": (
        "--out photos: has other files already: name a new or empty folder, or one that this "
        "command began"
    ),
    "latents vae --out x": "the first target has no data to take images from: set --data",
    "data pack photos --out photos": (
        "--out photos: is inside the images' folder photos, whose next use would take the "
        "results' pictures for images: choose one beside it"
    ),
    "bench nothing": (
        "GROUPS nothing: choose from all, dwt, encoder, decoder, train, data, encode"
    ),
}
"""Commands with exit code 2, and what they say after "error: "."""

FAILURES = {
    TRAIN + "data.params.batch_size=0": "batch_size must be at least 1, got 0",
    TRAIN + "data.params.root=nowhere": "nowhere: no such folder",
    TRAIN + "data.params.root=empty": f"HERE/empty: {NO_IMAGES}",
    "train --resume nowhere": "nowhere: no such run folder",
    "train --resume last": "last: no run in runs",
    "evaluate nowhere": NO_TARGET,
    "evaluate vae --data nowhere": "nowhere: no such folder",
    "encode vae --data photos --out lat --size 20": (
        "--size 20: choose a multiple of 8, the model's downscaling factor"
    ),
    "decode vae photos --out d": (
        "photos: no stats.json, so these are not latents, or not all of them yet: run `olvae "
        "encode` (again)"
    ),
    "export vae --out photos": (
        "photos: not empty, and not an export: --force replaces exports only, which hold no folder"
    ),
    "reconstruct vae nowhere.png --out r": "nowhere.png: no such image or folder",
    "reconstruct vae text.png --out r": "text.png: not a readable image: no known picture format",
    "reconstruct vae photos/0.png --out text.png": (
        "text.png: results need a folder, and HERE/text.png is a file"
    ),
    "data check empty": f"empty: {NO_IMAGES}",
    "data index photos": (
        "photos: no shards: name a folder of .tar files, a pattern such as "
        "data/{000000..000127}.tar, or URLs; `olvae data pack` makes shards of images"
    ),
}
"""Commands with exit code 1."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of pictures, an empty one, a config, an export, and a picture that is none."""
    folder: Path = tmp_path_factory.mktemp("messages")
    (folder / "photos").mkdir()
    (folder / "empty").mkdir()
    for number, picture in enumerate(smooth_pictures()):
        picture.save(folder / "photos" / f"{number}.png")
    (folder / "text.png").write_text("no picture")
    save(tiny_config("photos"), folder / "tiny.yaml")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, which is the current one."""
    folder = shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> dict[str, bytes | None]:
    found = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


@pytest.mark.parametrize(
    ("code", "command", "message"),
    [(2, *pair) for pair in WRONG_USAGE.items()] + [(1, *pair) for pair in FAILURES.items()],
    ids=[*WRONG_USAGE, *FAILURES],
)
def test_a_mistake_has_one_line_and_writes_nothing(olvae, here, code, command, message):
    before = files(here)
    message = message.replace("HERE", str(here))
    assert olvae(*command.split()) == (code, "", f"error: {message}\n")
    assert files(here) == before


def test_there_are_thirty():
    assert len(WRONG_USAGE) + len(FAILURES) >= 30
