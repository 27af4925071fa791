"""What every format of export keeps: exact, compared, whole or not at all;
and a format from outside the package.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.export import exporting as module
from olvae.export.exporting import ExportSettings, check_place, export, export_target
from olvae.export.formats import LAYOUTS, Layout, Loaded, find_layout
from olvae.models.loading.targets import find_target
from tests.export.tiny import ours, tiny_litevae
from tests.models.autoencoder_kl import autoencoder_kl


class NumpyLayout(Layout):
    """A format of one's own: the weights as arrays of NumPy, in one file."""

    suffix = ".npz"
    refused: ClassVar = {"fold": "the weights alone do not say it"}

    def write(self, model: LiteVAE, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in self.tensors(model).items()})

    def read(self, path: Path) -> Mapping[str, Tensor]:
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays}

    def load(self, path: Path, model: LiteVAE) -> Sequence[Loaded]:
        back = LiteVAE.from_config(**model.config).eval()
        back.load_state_dict(self.read(path))
        return [Loaded("loaded back", back.moments, back.decode)]


# They take tiny students, Qwen-Image's and Wan's autoencoders, or MONAI's, alone.
FORMATS = [
    *(name for name in LAYOUTS if name not in ("taesd", "qwen2d", "monai")),
    f"{__name__}.NumpyLayout",
]


FORCE = ExportSettings(force=True)


@pytest.fixture(params=FORMATS)
def layout(request) -> Layout:
    return find_layout(request.param)


@pytest.fixture
def model(layout) -> LiteVAE:
    model = tiny_litevae()
    if layout.misfit(model) is None:
        return model
    return ours(autoencoder_kl((32, 32), layers_per_block=1))


@pytest.fixture
def place(layout, tmp_path) -> Path:
    return tmp_path / f"vae{layout.suffix}"


def content(path: Path) -> dict[str, bytes]:
    """Every file's bytes; of a file, its own."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow), "bfloat16"]
)
def test_exported_weights_are_the_models_rounded(layout, model, tmp_path, dtype):
    if dtype == "bfloat16" and isinstance(layout, NumpyLayout):
        pytest.skip("NumPy has no bfloat16")
    place = tmp_path / "new" / f"vae{layout.suffix}"
    differences = export(model, place, layout, ExportSettings(dtype=dtype))
    assert differences
    assert not any(differences.values())
    written, expected = layout.read(place), layout.tensors(model)
    assert written.keys() == expected.keys()
    assert all(
        torch.equal(written[name], tensor.to(getattr(torch, dtype)))
        for name, tensor in expected.items()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    if isinstance(layout, NumpyLayout):
        return
    back = find_target(place).load().as_litevae("vae")  # an export is a target
    weights = model.state_dict()
    assert all(
        torch.equal(t, weights[n].to(getattr(torch, dtype)).float())
        for n, t in back.state_dict().items()
    )
    if "latents" not in layout.refused:
        assert back.for_diffusion == model.for_diffusion
    again = tmp_path / "new" / f"again{layout.suffix}"
    export(back, again, layout, ExportSettings(dtype=dtype))
    rewritten = layout.read(again)
    assert rewritten.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in rewritten.items())


def test_two_exports_are_equal_bytes(layout, model, tmp_path):
    for folder in ("first", "second"):
        export(model, tmp_path / folder / f"vae{layout.suffix}", layout)
    first, second = (
        content(tmp_path / folder / f"vae{layout.suffix}") for folder in ("first", "second")
    )
    assert first == second


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    place = tmp_path / "vae"
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name, process in (("vae", ended.pid), ("vae", os.getpid()), ("other", ended.pid)):
        (tmp_path / f".{name}.{socket.gethostname()}~{process}-x" / name).mkdir(parents=True)
    export(tiny_litevae(), place)
    here = f".vae.{socket.gethostname()}~{os.getpid()}-x"
    assert {path.name for path in tmp_path.iterdir()} == {
        "vae",
        here,
        f".other.{socket.gethostname()}~{ended.pid}-x",
    }


def killed_between_the_old_and_the_new(model: LiteVAE, place: Path) -> None:
    """Replace an export in a process that dies when the old one has been moved away."""
    move = Path.replace

    def work() -> None:
        def die(self: Path, target: Path) -> Path:
            if target == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return move(self, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", die)
            export(model, place, settings=FORCE)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not place.exists()


def test_a_kill_between_the_old_and_the_new_loses_neither(tmp_path, monkeypatch):
    """The next export finds the old one at its place: on a full disk, and without `force`."""
    model, place = tiny_litevae(), tmp_path / "vae"
    export(model, place)
    before = content(place)
    killed_between_the_old_and_the_new(model, place)
    with monkeypatch.context() as patch:
        patch.setattr(Layout, "write", lambda *_: full_disk(None))
        with pytest.raises(OSError, match="No space"):
            export(model, place, settings=FORCE)
    assert content(tmp_path) == {f"vae/{name}": data for name, data in before.items()}

    killed_between_the_old_and_the_new(model, place)
    with pytest.raises(FileExistsError, match="vae: exists: `force`"):
        export(model, place)
    assert content(place) == before
    export(model, place, settings=FORCE)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


@pytest.mark.parametrize("name", ["litevae", "comfyui"])
def test_onnx_files_are_in_a_folder_or_beside_a_file_with_its_name(name, tmp_path, monkeypatch):
    layout = find_layout(name)
    model = tiny_litevae()

    def write(traced: LiteVAE, folder: Path, prefix: str) -> dict[str, float]:
        assert traced is model  # whose latents are not in units
        for graph in ("encoder.onnx", "decoder.onnx"):
            (folder / f"{prefix}{graph}").write_text(prefix)
        return {"encoder.onnx": 0.25}

    monkeypatch.setattr(module, "export_onnx", write)
    place = tmp_path / "new" / f"vae{layout.suffix}"  # in a folder that is not there yet
    for settings in (ExportSettings(onnx=True), ExportSettings(onnx=True, force=True)):
        assert export(model, place, layout, settings)["encoder.onnx"] == 0.25
        found = {str(path.relative_to(place.parent)) for path in tmp_path.rglob("*.onnx")}
        graphs = {"encoder.onnx", "decoder.onnx"}
        if layout.suffix:
            assert found == {f"vae_{graph}" for graph in graphs}
        else:
            assert found == {f"vae/{graph}" for graph in graphs}
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match="`force`"):
        export(model, place, layout, ExportSettings(onnx=True))
    assert content(tmp_path) == before


def test_folded_export_has_ordinary_convolutions_or_is_refused(layout, model, place):
    if "fold" in layout.refused:
        name = next(name for name in FORMATS if type(find_layout(name)) is type(layout))
        with pytest.raises(ConfigError, match=rf"`fold` .*`format` {name}: \w+"):
            ExportSettings(fold=True).layout(name)
        return
    differences = export(model, place, layout, ExportSettings(fold=True))
    assert differences.pop("folded") < 1e-5
    assert not any(differences.values())
    assert layout.read(place).keys() == layout.tensors(model.fold()).keys()
    assert LiteVAE.from_pretrained(place).folded


def test_an_export_is_replaced_only_if_asked(layout, model, place):
    export(model, place, layout)
    before = content(place)
    with pytest.raises(FileExistsError, match=": exists: `force`"):
        export(model, place, layout)
    assert content(place) == before
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    export(model, place, layout, FORCE)
    assert content(place) != before


def test_exporting_to_a_symlink_keeps_the_symlink(layout, model, tmp_path):
    """A file or folder that stands for one on a larger disk:
    the export goes there, now and when it is replaced.
    """
    (tmp_path / "disk").mkdir()
    link, goal = tmp_path / f"vae{layout.suffix}", tmp_path / "disk" / f"vae{layout.suffix}"
    link.symlink_to(goal)
    for settings in (ExportSettings(), FORCE):
        export(model, link, layout, settings)
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == [goal.name]
    assert layout.read(goal)
    if not layout.suffix:
        assert f"# {link.name}\n" in (goal / "README.md").read_text()


def test_outputs_are_compared_for_noise_and_its_mean_latents(tmp_path, monkeypatch):
    """The same noise each time, in [-1, 1], of 4 x 4 positions."""
    layout = find_layout("litevae")
    model = tiny_litevae()
    load = layout.load
    seen = []

    def noting(path: Path, model: LiteVAE) -> Sequence[Loaded]:
        one = load(path, model)[0]

        def moments(x: Tensor) -> Tensor:
            seen.append(x)
            return one.moments(x)

        def decode(z: Tensor) -> Tensor:
            seen.append(z)
            return one.decode(z)

        return [one._replace(moments=moments, decode=decode)]

    monkeypatch.setattr(layout, "load", noting)
    assert export(model, tmp_path / "vae", layout) == {"loaded back": 0.0}
    x, z = seen
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, 2 * noise - 1)
    with torch.no_grad():
        assert torch.equal(z, model.moments(x)[:, :4])


def another_tensor(written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = [*written][-1]
    return {**written, last: written[last] + 1e-6}


def another_function(loaded: Sequence[Loaded]) -> list[Loaded]:
    """The same tensors: what only a comparison of outputs finds."""
    one = loaded[-1]
    return [one._replace(decode=lambda z: one.decode(z) * (1 + 4e-5))]


def other_factors(loaded: Sequence[Loaded]) -> list[Loaded]:
    return [loaded[-1]._replace(for_diffusion=defaultdict(lambda: 3.0))]


def full_disk(_: None) -> None:
    raise OSError("No space left")


def full_disk_of_safetensors(_: None) -> None:
    raise SafetensorError("I/O error: File too large")


FAILURES = [
    ("read", another_tensor, "is the disk full"),
    ("load", another_function, "differs by .* nothing is written"),
    ("load", other_factors, "scaling_factor, .* differs from what was written"),
    (None, None, "not finite in torch.float16"),
    ("write", full_disk, "No space left"),
    (
        "write",
        full_disk_of_safetensors,
        r"^.*/deep/down/vae\S*: not written: I/O error: File too large$",
    ),
]


@pytest.mark.parametrize(
    ("method", "spoil", "message", "force"),
    [
        *((*failure, False) for failure in FAILURES),
        *(
            pytest.param(*failure, True, marks=() if full_disk in failure else pytest.mark.slow)
            for failure in FAILURES
        ),
    ],
)
def test_failed_export_leaves_nothing_and_takes_nothing(
    layout, model, tmp_path, monkeypatch, method, spoil, message, force
):
    place = tmp_path / "deep" / "down" / f"vae{layout.suffix}"
    settings = ExportSettings(force=force)
    if force:
        export(model, place, layout)
    before = content(tmp_path)
    if spoil is None:
        settings = replace(settings, dtype="float16")
        next(model.decoder.parameters()).data.flatten()[0] = 1e6
    else:
        original = getattr(layout, method)
        monkeypatch.setattr(layout, method, lambda *given: spoil(original(*given)))
    with pytest.raises((ValueError, OSError), match=message):
        export(model, place, layout, settings)
    assert content(tmp_path) == before
    assert (tmp_path / "deep").exists() == force


@pytest.mark.parametrize("during", ["old", "new"])
def test_ctrl_c_while_an_export_is_replaced_keeps_the_old_one(
    layout, model, place, tmp_path, monkeypatch, during
):
    """Python tells of a signal after the call that it came in, when the old one has been moved."""
    export(model, place, layout)
    before = content(place)
    move = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if during == "old" and self == place:
            move(self, target)
            raise KeyboardInterrupt
        if target == place and self.name == place.name:
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(model, place, layout, FORCE)
    assert content(place) == before
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_export_refuses_places_that_hold_something_else(layout, model, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    (tmp_path / "empty").mkdir()
    if not layout.suffix:
        export(model, tmp_path / "cloned", layout)
        (tmp_path / "cloned" / ".git").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path / "empty")
    cases = [
        (
            f"photos/cat.png/vae{layout.suffix}",
            FileExistsError,
            "cat.png/vae.*: .*cat.png is a file",
        )
    ]
    if layout.suffix:
        instead = f"this format is one file: name it, as in vae{layout.suffix}"
        cases += [("photos", ValueError, instead), ("vae.ckpt", ValueError, instead)]
    else:
        cases += [
            (
                "photos",
                FileExistsError,
                "not empty, and not an export: `force` replaces exports only",
            ),
            (
                "cloned",
                FileExistsError,
                "not an export: `force` replaces exports only, which hold no folder",
            ),
            ("photos/cat.png", FileExistsError, "cat.png is a file"),
            ("vae.safetensors", ConfigError, "names a file, but this format is a folder"),
            (".", FileExistsError, "the current folder: name a new folder in it"),
        ]
    for name, kind, message in cases:
        with pytest.raises(kind, match=message):
            export(model, name if name == "." else tmp_path / name, layout, FORCE)
    assert sorted(tmp_path.rglob("*")) == before


def test_force_deletes_no_file_of_somebody_else(tmp_path):
    model = tiny_litevae()
    export(model, tmp_path / "vae")
    for name in ("LICENSE.txt", "encoder.onnx"):  # the second is of an earlier export
        (tmp_path / "vae" / name).touch()
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=r"vae: `force` .*LICENSE\.txt"):
        export(model, tmp_path / "vae", settings=FORCE)
    assert content(tmp_path) == before
    (tmp_path / "vae" / "LICENSE.txt").unlink()
    export(model, tmp_path / "vae", settings=FORCE)
    assert not (tmp_path / "vae" / "encoder.onnx").exists()


def test_export_refuses_a_mount_point_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(FileExistsError, match="mount point"):
        check_place(tmp_path)


def test_stock_folders_that_were_downloaded_are_not_replaced(tmp_path):
    """They look like ours but for the card."""
    autoencoder_kl((32, 32)).save_pretrained(tmp_path / "downloaded")
    (tmp_path / "downloaded" / "README.md").write_text("# A VAE\n")
    with pytest.raises(FileExistsError, match="not empty"):
        export(
            ours(autoencoder_kl((32, 32))), tmp_path / "downloaded", LAYOUTS["diffusers"](), FORCE
        )


def test_unknown_export_formats_are_refused():
    for name, message in (
        (
            "numpy",
            "`format` numpy: choose from litevae, diffusers, ldm, comfyui, taesd, qwen2d, monai",
        ),
        ("pathlib.Path", "pathlib.Path is not a kind of olvae.export.formats.Layout"),
        ("olvae.export.formats.Layouts", "has no Layouts"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_layout(name)


def test_export_settings_refuse_a_run_without_latents_json(tmp_path):
    run = tmp_path / "2026-01-02T03-04-05_photos_32"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    settings = ExportSettings(latents=tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match=r"`?olvae latents"):
        settings.check(tmp_path / "out")
    (run / "latents.json").touch()
    settings.check(tmp_path / "out")


def test_what_a_format_says_of_factors_per_channel_is_said_of_measured_ones(tmp_path):
    """They are in the model only after its notes were made."""
    model = tiny_litevae()
    channels = model.latent_channels
    export(model, tmp_path / "first")
    numbers = {"latents_mean": [0.5] * channels, "latents_std": [2.0] * channels}
    latents = tmp_path / "stats.json"
    pair = {"scaling_factor": 2.0, "shift_factor": 0.1}
    latents.write_text(json.dumps({"target": "vae", "count": 200, **pair, **numbers}))
    settings = ExportSettings(latents=latents, per_channel=True)
    _, notes = export_target(find_target(str(tmp_path / "first")), tmp_path / "second", settings)
    assert notes[-1].startswith("latents_mean, latents_std: pipelines of FLUX.2")
