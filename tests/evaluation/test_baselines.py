"""The rows beside an evaluation's targets that say what its numbers are worth."""

import numpy as np
import pytest
import torch

from olvae.config import ConfigError, save
from olvae.data.dataset import SamplePhotographs
from olvae.data.picture_folder import FolderSource
from olvae.data.pixels.size_and_range import PixelRange, to_uint8
from olvae.data.source import LoaderProcess
from olvae.evaluation import baselines
from olvae.evaluation.baselines import Baselines, Bicubic
from olvae.evaluation.observers.observer import UNTRAINED, Subject
from olvae.metrics.metric import psnr
from olvae.models import linear_code
from olvae.models.autoencoder import LiteVAE
from olvae.models.linear_code import LinearDecoder, LinearEncoder, crops_and_means, start_linearly
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.loading.loader import Target
from tests.conftest import tiny_config
from tests.data.images import write_shards


@pytest.fixture(autouse=True)
def _few_crops(monkeypatch) -> None:
    monkeypatch.setattr(linear_code, "CROPS", (256, 512))


LINEAR = "linear, 4 numbers for 8x8 pixels"
BICUBIC = "bicubic, 8x smaller and back"


def target_of(config: dict) -> Target:
    model = LiteAutoencoderKL(**config["model"]["params"]).autoencoder
    return Target(lambda: model, lambda: model, config, name="run")


def rows(config: dict, fit: str | None = None) -> dict[str, Subject]:
    target = target_of(config)
    return Baselines(target, fit).derive({"run": Subject(target.load())})


def test_the_linear_code_beats_bicubic_with_as_many_numbers_as_the_target():
    """On photographs: four numbers a position, of which bicubic has three."""
    config = tiny_config()
    config["data"]["params"]["size"] = 64
    found = rows(config)
    assert list(found) == ["run", LINEAR, BICUBIC, UNTRAINED]
    assert [subject.baseline for subject in found.values()] == [False, True, True, True]
    code = found[LINEAR].model
    assert (code.downscale, code.latent_channels, code.training) == (8, 4, False)
    images = torch.stack(
        [s.image for s in SamplePhotographs(64, 4).once(LoaderProcess()) if s.image is not None]
    )
    quality = {}
    for name in (LINEAR, BICUBIC):
        with torch.no_grad():
            quality[name] = psnr(images, to_uint8(found[name].model(images / 127.5 - 1)[0])).mean()
    assert quality[LINEAR] > quality[BICUBIC]


def test_linear_code_is_fitted_on_the_training_images_or_on_others(image_folder, tmp_path):
    """On the run's crops of its seed: not on its validation images."""
    config = tiny_config(image_folder)
    code = rows(config)[LINEAR].model
    crops = crops_and_means(FolderSource(str(image_folder), 16, 4, val_fraction=0.2), 0, 8)[0]
    x = crops.double().numpy() / 127.5 - 1
    patches = x.reshape(-1, 3, 2, 8, 2, 8).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 192)
    largest = np.linalg.eigh(np.cov(patches, rowvar=False))[1][:, -1]
    first = code.encoder.linear.weight[0, :, 4:-4, 4:-4].flatten().detach().numpy()
    assert abs(first @ largest) == pytest.approx(np.linalg.norm(first), rel=1e-3)
    other = rows(config, fit="samples")[LINEAR].model
    assert not other.encoder.linear.weight.equal(code.encoder.linear.weight)
    save({"data": config["data"]}, tmp_path / "data.yaml")
    named = rows(tiny_config(), fit=str(tmp_path / "data.yaml"))[LINEAR].model
    torch.testing.assert_close(named.encoder.linear.weight, code.encoder.linear.weight)


def test_linear_code_without_training_images_has_no_row_and_a_reason(
    image_folder, tmp_path, caplog
):
    config = tiny_config("/gone")
    assert list(rows(config)) == ["run", BICUBIC, UNTRAINED]
    assert "linear code has no row" in caplog.text
    assert "/gone: " in caplog.text
    with pytest.raises(FileNotFoundError, match="/missing"):
        rows(config, fit="/missing")
    config["data"]["params"] |= {"root": str(image_folder), "size": 20}
    assert LINEAR not in rows(config)
    assert "20 is not a multiple of 8" in caplog.text
    save({"data": config["data"]}, tmp_path / "data.yaml")
    with pytest.raises(ConfigError, match=r"8x8 .*20"):
        rows(config, fit=str(tmp_path / "data.yaml"))
    config["data"]["params"] |= {"size": 16, "channels": 1}
    save({"data": config["data"]}, tmp_path / "gray.yaml")
    with pytest.raises(ConfigError, match=r"1 channel, .*takes 3"):
        rows(config, fit=str(tmp_path / "gray.yaml"))


@pytest.mark.parametrize("halves", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_linear_start_has_no_untrained_row_beside_the_linear_code(image_folder, halves):
    """Before training these networks are the linear code."""
    config = tiny_config(image_folder)
    for half in halves:
        config["model"]["params"][f"{half}_config"]["params"]["linear"] = True
    assert list(rows(config)) == ["run", LINEAR, BICUBIC]


def test_linear_code_of_too_large_patches_has_no_row(image_folder, caplog, monkeypatch):
    monkeypatch.setattr(baselines, "LARGEST_PATCH", 191)
    assert list(rows(tiny_config(image_folder))) == ["run", BICUBIC, UNTRAINED]
    assert "too large" in caplog.text
    monkeypatch.setattr(baselines, "LARGEST_PATCH", 192)
    assert LINEAR in rows(tiny_config(image_folder))


def test_linear_code_reads_remote_training_shards_with_a_line(image_folder, tmp_path, caplog):
    """Once, before the first is read; local ones without."""
    shards = write_shards(tmp_path / "s", [8, 8])
    config = tiny_config(image_folder)
    config["data"] = {
        "target": "olvae.data.shards.webdataset.WebDatasetSource",
        "params": {"shards": [f"pipe:cat {file}" for file in shards], "size": 16, "batch_size": 4},
    }
    assert LINEAR in rows(config)
    assert (
        caplog.text.count("is fitted on remote training shards (`fit` names others): pipe:cat") == 1
    )
    assert f"pipe:cat {shards[0]}, ..." in caplog.text
    caplog.clear()
    config["data"]["params"]["shards"] = [str(file) for file in shards]
    assert LINEAR in rows(config)
    assert "remote" not in caplog.text


def test_images_with_a_range_train_and_fit_the_linear_code_in_it(tmp_path):
    """In sixteen bits; the linear start, and the linear code as a baseline."""
    for i in range(8):
        np.save(
            tmp_path / f"{i}.npy",
            np.random.default_rng(i).integers(0, 65536, (32, 32, 3), dtype=np.uint16),
        )
    params = {
        "root": str(tmp_path),
        "val_root": str(tmp_path),
        "size": 16,
        "batch_size": 2,
        "range": [0, 65535],
    }
    source = FolderSource(**params)
    stated = PixelRange.from_node([0, 65535])
    module = LiteAutoencoderKL(**tiny_config()["model"]["params"])
    batch = next(iter(source.train_loader()))
    module.check(source)
    assert torch.equal(module.images(batch), stated.normalise(batch["image"]))
    started = LiteVAE(LinearEncoder(8, 3, 8), LinearDecoder(4, 3, 8))
    start_linearly(started, source, 0, torch.device("cpu"))
    node = {"target": "olvae.data.picture_folder.FolderSource", "params": params}
    fitted = Baselines(Target(None, None, {"data": node}, name="run"))._linear_code(
        Bicubic(8, 3, stated)
    )
    for code in (started, fitted):
        with torch.no_grad():
            z = code.encode(stated.normalise(crops_and_means(source, 0, 8)[0])).mean
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(z.shape[1]), atol=1e-2, rtol=0)
        torch.testing.assert_close(
            z.var((0, 2, 3), correction=0), torch.ones(z.shape[1]), atol=1e-2, rtol=0
        )
