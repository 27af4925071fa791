"""Commands on images with a stated range of values: real values go in and come out."""

import json

import numpy as np
import pytest
import torch

from olvae import LiteVAE
from olvae.config import instantiate, save
from olvae.data.pixels.arrays import read_array
from olvae.data.places import load
from olvae.data.shards.latent_source import LatentSource
from olvae.data.source import LoaderProcess
from tests.conftest import plain_networks, tiny_config
from tests.data.pixels.files import tiff

BANDS = {
    "range": {"pairs": [[0, 3000], [0, 40]], "outside": "clip"},
    "channels": 2,
    "size": [16, 24],
}


@pytest.fixture(scope="session")
def deep_run(tmp_path_factory, quick_training):
    """A run on oblong crops of arrays of two bands of 16 bits; its images are beside it."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        smooth = np.kron(rng.random((5, 6, 2)), np.ones((5, 5, 1)))
        np.save(folder / "images" / f"{number}.npy", (smooth * [3000, 40]).astype(np.uint16))
    config = tiny_config(folder / "images")
    config["data"]["params"] |= BANDS
    config["lightning"]["trainer"]["max_steps"] = 2
    params = config["model"]["params"]
    params["encoder_config"] = plain_networks()["encoder_config"]
    for half, name in (("encoder", "in_channels"), ("decoder", "out_channels")):
        params[f"{half}_config"]["params"] |= {name: 2, "linear": True}
    save(config, folder / "tiny.yaml")
    return folder


@pytest.fixture
def run(deep_run, done):
    """It, trained by the first test that wants it."""
    runs = deep_run / "runs"
    if not runs.exists():
        done("train", "--base", deep_run / "tiny.yaml", "--logdir", runs, "--gpus", 0)
    return next(runs.iterdir())


def test_reconstruct_and_decode_give_real_values_back(olvae, done, run, deep_run, tmp_path):
    images = deep_run / "images"
    assert (run / "images" / "step=00000002.png").is_file()
    done("export", run, "--out", tmp_path / "vae")
    card = (tmp_path / "vae" / "README.md").read_text()
    assert "| values of images | 0 to 3000, 0 to 40, linear" in card
    assert "crops of 16x24" in card
    model = LiteVAE.from_pretrained(tmp_path / "vae")
    assert model.pixel_range == LiteVAE.from_pretrained(run).pixel_range
    x = np.load(images / "0.npy")
    unit = model.pixel_range.normalise(torch.from_numpy(x.astype(np.float32)).movedim(-1, 0)[None])
    with torch.inference_mode():
        padded = torch.nn.functional.pad(unit, (0, 2, 0, 7), mode="reflect")
        expected = model.pixel_range.restore(model.decode(model.encode(padded).mode()))[
            0, :, :25, :30
        ].movedim(0, -1)
    (tmp_path / "a.tiff").write_bytes(tiff(x, planarconfig="contig"))
    done("reconstruct", tmp_path / "vae", tmp_path / "a.tiff", "--out", tmp_path / "out")
    np.testing.assert_allclose(read_array(tmp_path / "out" / "a.tif", 2).array, expected, atol=0.05)
    encode = [
        "encode",
        tmp_path / "vae",
        "--data",
        images,
        "--native",
        "--dtype",
        "float32",
        "--flip",
    ]
    assert olvae(*encode, "--out", tmp_path / "latents")[0] == 0
    for suffix in ("npy", "tif", "exr"):
        decode = ["decode", tmp_path / "vae", tmp_path / "latents", "--format", suffix]
        done(*decode, "--out", tmp_path / suffix)
        np.testing.assert_allclose(
            read_array(tmp_path / suffix / f"0.{suffix}", 2).array, expected, atol=0.05
        )
    code, _, err = olvae(*decode[:3], "--format", "png", "--out", tmp_path / "png")
    assert (code, err) == (
        2,
        (
            "error: --format png: 8 bits can't hold values of 0 to 3000, 0 to 40, linear: choose "
            "npy, tif or exr\n"
        ),
    )


def test_evaluate_in_the_stated_range(done, run, tmp_path):
    metrics = ["--metrics", "psnr", "--baselines", "--out", tmp_path / "results"]
    err = done("evaluate", run, *metrics)
    content = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert content["protocol"]["size"] == [16, 24]
    assert "open-litevae" in err
    assert ", 16x24, 2 images" in err
    assert content["protocol"]["pixels"].startswith("clamped to 0 to 3000, 0 to 40, linear")
    row = content["results"][0]
    low, high = np.array(BANDS["range"]["pairs"], dtype=float).T[:, :, None, None]
    model, psnrs, squares, absolute, relative = LiteVAE.from_pretrained(run), [], [], [], []
    for sample in instantiate(load([run / "config.yaml"])["data"]).once(LoaderProcess()):
        # bicubic overshoots
        unit = (2 * (sample.image.double().numpy() - low) / (high - low) - 1).clip(-1, 1)
        with torch.inference_mode():
            y = model(torch.from_numpy(unit).float()[None])[0][0].clamp(-1, 1).double().numpy()
        psnrs.append(10 * np.log10(4 / np.square(unit - y).mean()))
        x = low + (unit + 1) / 2 * (high - low)
        error = low + (y + 1) / 2 * (high - low) - x
        squares.append(np.square(error).mean((1, 2)))
        absolute.append(np.abs(error).mean((1, 2)))
        relative += (np.abs(error)[x > 0] / x[x > 0]).tolist()
    assert row["n"] == len(psnrs) == 2
    assert row["metrics"]["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-3)
    entry = row["real_values"]
    np.testing.assert_allclose(entry["rmse"], np.sqrt(np.mean(squares, axis=0)), rtol=1e-4)
    np.testing.assert_allclose(entry["mae"], np.mean(absolute, axis=0), rtol=1e-4)
    assert entry["relative"] == pytest.approx(np.mean(relative), rel=1e-3)
    assert "RMSE per channel" in err
    assert "real_values" not in content["results"][0]["metrics"]


def test_latents_of_oblong_images(olvae, done, run, deep_run, tmp_path):
    data = ["--data", deep_run / "images"]
    for size, shape in (((), [16, 24]), (("--size", "24x8"), [24, 8])):
        folder = tmp_path / "x".join(map(str, shape))
        err = done("encode", run, *data, *size, "--out", folder)
        assert f"12 images of {folder.name} px" in err
        source = LatentSource(folder, 4)
        assert source.stats["size"] == shape
        assert next(iter(source.train_loader()))["latent"].shape[2:] == (
            shape[0] // 8,
            shape[1] // 8,
        )
    code, _, err = olvae("encode", run, *data, "--size", "20x8", "--out", tmp_path / "none")
    assert (code, err.splitlines()[-1][:26]) == (1, "error: --size 20x8: choose")
    code, out, err = olvae("latents", run, *data, "--out", tmp_path / "report", "--json")
    assert code == 0, err
    assert json.loads(out)["data"]["size"] == [16, 24]
    code, _, err = olvae(
        "data",
        "check",
        deep_run / "images",
        "--size",
        "16x31",
        "--channels",
        2,
        "--range",
        "[0, 3000]",
    )
    assert "12 images would be enlarged, being smaller than 16x31 pixels" in " ".join(err.split())


def test_data_of_another_range_are_refused(olvae, run, tmp_path):
    config = load([run / "config.yaml"])
    config["data"]["params"]["range"] = [0, 65535]
    save(config, tmp_path / "other.yaml")
    for command in ("encode", "latents"):
        arguments = [command, run, "--out", tmp_path / "out", "--data"]
        wanted = (
            "error: --data: its values are 0 to 65535, linear, the targets take 0 to 3000, "
            "0 to 40, linear\n"
        )
        assert olvae(*arguments, tmp_path / "other.yaml") == (2, "", wanted)
        assert olvae(*arguments, "samples") == (
            2,
            "",
            wanted.replace("0 to 65535, linear", "8 bits, 0 to 255"),
        )
        assert not (tmp_path / "out").exists()
