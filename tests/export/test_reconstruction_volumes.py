"""Volumes through a model that hardly changes them: back in their format, geometry and units."""

import copy
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from olvae import LiteVAE
from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import PixelRange
from olvae.data.volumes.volume_source import find_volumes, open_volume
from olvae.export import reconstruction
from olvae.export.reconstruction import (
    ReconstructOptions,
    plan_outputs,
    reconstruct_files,
    reconstruct_volume,
)
from tests.conftest import tiny_config
from tests.data.volumes.scans import WINDOW, hounsfield, nifti, nrrd_file, series, whole

CPU = ReconstructOptions(torch.device("cpu"), memory=2**30)


def grey() -> LiteVAE:
    params = copy.deepcopy(tiny_config()["model"]["params"])
    params["encoder_config"]["params"]["in_channels"] = 1
    params["decoder_config"]["params"]["out_channels"] = 1
    del params["lossconfig"]
    vae = LiteVAE.from_config(**params).eval()
    vae.pixel_range = PixelRange.from_node(WINDOW)
    return vae


@pytest.fixture
def model(monkeypatch):
    """Of this window, with an error of a level: the round trip has a test of its own."""

    def near(model, image, *_):
        levels = model.pixel_range.levels(image)
        y = (levels + 1.0).clamp(max=255.0)
        return reconstruction.Reconstruction(y, torch.zeros(1), y)

    vae = grey()
    monkeypatch.setattr(reconstruction, "reconstruct", near)
    return vae


def expected(values):
    """The window's values, and a level more."""
    return (values.clip(*WINDOW) + 400 / 255).clip(*WINDOW)


def run(model, given: list[Path], out: Path, options=CPU) -> list[str]:
    lines: list[str] = []
    reconstruct_files(model, plan_outputs(given, out), options, lines.append)
    return lines


@pytest.mark.parametrize("axis", ["acquired", "coronal"])
def test_volumes_of_a_folder_come_back_in_their_format(model, tmp_path, axis):
    scans = tmp_path / "scans"
    nifti(scans / "p1" / "ct.nii.gz")
    nrrd_file(scans / "p2" / "ct.nrrd")
    series(scans / "p3")
    out = tmp_path / "out"
    lines = run(model, [scans], out, replace(CPU, axis=axis))
    assert [line.split(" -> ")[1] for line in lines] == [
        f"{out}/p1/ct.nii.gz",
        f"{out}/p2/ct.nrrd",
        f"{out}/p3/1.2.826.7",
    ]
    for before, after in zip(find_volumes(scans), find_volumes(out), strict=True):
        # Rounded to the file's integers, at most half a unit away.
        np.testing.assert_allclose(whole(after), expected(hounsfield()), atol=0.5001)
        np.testing.assert_allclose(after.affine, before.affine)
    image = nibabel.load(out / "p1" / "ct.nii.gz")
    assert (image.dataobj.slope, image.get_data_dtype()) == (0.5, np.int16)
    assert Image.open(out / "p3" / "1.2.826.7_compare.png").size[0] > 0
    first = pydicom.dcmread(out / "p3" / "1.2.826.7" / "0000.dcm")
    assert first.ImageType[0] == "DERIVED"

    # Again, over the results; and not over other files.
    assert len(run(model, [scans], out)) == 3
    (out / "p1" / "ct_compare.png").unlink()
    with pytest.raises(ConfigError, match="earlier result"):
        plan_outputs([scans], out)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_middle_channel_is_the_slice(model, tmp_path, monkeypatch, channels):
    """And the middle slice is the picture; PSNR is over all values."""
    nifti(tmp_path / "ct.nii")
    model.in_channels = channels
    saved, done = [], []
    near = reconstruction.reconstruct

    def slowly(model, image, options, progress):
        progress(0.5)
        return near(model, image)

    monkeypatch.setattr(reconstruction, "reconstruct", slowly)
    monkeypatch.setattr(reconstruction, "save_comparison", lambda *given: saved.append(given))
    volume = open_volume(tmp_path / "ct.nii")
    place = tmp_path / "out" / "ct"
    value, path = reconstruct_volume(model, volume, place, CPU, done.append)
    after = whole(open_volume(tmp_path / "out" / "ct.nii"))
    np.testing.assert_allclose(after, expected(hounsfield()), atol=0.2501)

    # A level of error, but where the window ends.
    levels = (hounsfield().clip(*WINDOW) - WINDOW[0]) / (WINDOW[1] - WINDOW[0]) * 255
    errors = (levels + 1).clip(max=255) - levels
    assert value == pytest.approx(10 * np.log10(255**2 / np.mean(errors**2)), abs=1e-4)
    assert done == pytest.approx([(number + 0.5) / 7 for number in range(7)])
    ((where, title, psnr, shown),) = saved
    assert (where, title, psnr, path) == (place, "slice 3 of 7", value, tmp_path / "out/ct.nii")
    assert np.abs(shown[0][0].numpy() - levels[3]).max() <= 0.51


def test_a_slice_or_a_file_that_fails_names_the_volume(model, tmp_path, monkeypatch):
    volume = open_volume(nifti(tmp_path / "ct.nii"))

    def fail(*_):
        raise ValueError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(type(volume), "write", fail)
        with pytest.raises(ValueError, match=r"ct\.nii: no more$"):
            reconstruct_volume(model, volume, tmp_path / "out" / "ct", CPU)
    monkeypatch.setattr(reconstruction, "reconstruct", fail)
    with pytest.raises(ValueError, match=r"ct\.nii: slice 0: no more$"):
        reconstruct_volume(model, volume, tmp_path / "out" / "ct", CPU)


def test_what_is_no_volume_has_a_line(model, tmp_path):
    nifti(tmp_path / "scans" / "good.nii")
    (tmp_path / "scans" / "bad.nii").write_bytes(b"bad" * 200)
    lines = run(model, [tmp_path / "scans"], tmp_path / "out")
    assert lines[0].startswith(f"error: {tmp_path}/scans/bad.nii: not a readable image: ")
    assert lines[1].endswith("out/good.nii")
    model.pixel_range = PixelRange(eight_bits=True)
    (line,) = run(model, [tmp_path / "scans" / "good.nii"], tmp_path / "eight")
    assert "real units" in line
    assert not (tmp_path / "eight").exists()


def test_a_real_round_trip_keeps_units(tmp_path):
    vae = grey()
    (line,) = run(vae, [nifti(tmp_path / "ct.nii")], tmp_path / "out")
    assert " dB " in line
    after = whole(open_volume(tmp_path / "out" / "ct.nii"))
    assert after.shape == (7, 20, 24)
    assert after.min() >= WINDOW[0]
    assert after.max() <= WINDOW[1]
