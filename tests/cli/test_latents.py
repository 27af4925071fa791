"""``olvae latents`` as a user types it, on runs that were trained for two steps."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from olvae.cli.main import main
from olvae.config import save
from olvae.data.image import EvalTransform, image_to_tensor, read_picture
from olvae.data.picture_folder import find_images
from olvae.data.pixels.size_and_range import from_uint8
from olvae.data.places import load
from olvae.evaluation.latent_report import LatentAccumulator, draw_distribution
from olvae.models.loading.targets import find_target
from tests.conftest import tiny, tiny_config
from tests.evaluation.peers import numbers
from tests.forks import fork_ranks
from tests.metrics.test_features import extract
from tests.models.loading.test_targets import taesd


def test_latents_of_a_run_on_its_own_test_images(olvae, trained, monkeypatch):
    monkeypatch.setattr("olvae.evaluation.latent_report.draw_distribution", draw_distribution)
    code, out, err = olvae("latents", trained)
    assert (code, out) == (0, "")
    for text in (
        trained.name,
        "4x2x2",
        "1000 MMD^2",
        str(trained / "latents.json"),
        str(trained / "latents.png"),
    ):
        assert text in err, text
    content = json.loads((trained / "latents.json").read_text())
    (result,) = content["results"]
    assert content["data"]["source"] == str(trained.parent.parent / "photos")
    assert content["data"]["n"] == result["n"] > 0
    assert result["target"] == trained.name
    assert min(Image.open(trained / "latents.png").size) > 300


@pytest.mark.slow
def test_ifid_is_that_of_an_evaluation(
    olvae, done, trained, photos, tmp_path, weights_dir, monkeypatch
):
    # mean colours
    monkeypatch.setattr(
        "olvae.evaluation.observers.interpolated.Inception", lambda path, device: extract
    )
    given = (trained, "--data", photos, "--weights-dir", weights_dir)
    err = done("latents", *given, "--ifid", "--out", tmp_path)
    evaluated = ("--size", 16, "--metrics", "psnr", "--observe", "ifid", "--no-report")
    assert olvae("evaluate", *given, *evaluated, "--out", tmp_path)[0] == 0
    (row,), (other,) = (
        json.loads((tmp_path / f"{n}.json").read_text())["results"] for n in ("latents", "metrics")
    )
    assert row["ifid"].keys() == other["ifid"].keys()
    for key in ("value", "neighbours"):
        assert 0 < row["ifid"][key] == pytest.approx(other["ifid"][key], rel=1e-5)
    assert (row["ifid"]["wrong"], row["ifid"]["checked"]) == (0.0, 12)
    for text in (
        "iFID",
        f"{row['ifid']['value']:.3f}",
        "iFID: neighbours are at",
        "0.0% of 12",
    ):
        assert text in err


def test_latents_of_a_decoder_at_2x_need_multiples_of_the_encoders_factor(
    done, refused, tmp_path, photos
):
    """An f8, not the f16 of its larger images."""
    config = tiny_config(photos)
    config["model"]["params"]["decoder_config"]["params"]["enlarge"] = 2
    tiny(decoder_config=config["model"]["params"]["decoder_config"]).save_pretrained(
        tmp_path / "two"
    )
    for size in (24, 20):
        config["data"]["params"]["size"] = size
        save(config, tmp_path / f"{size}.yaml")
    given = ("latents", tmp_path / "two", "--out", tmp_path / "out", "--data")
    done(*given, tmp_path / "24.yaml")
    assert json.loads((tmp_path / "out/latents.json").read_text())["data"]["size"] == 24
    line = refused(2, *given, tmp_path / "20.yaml")
    assert "8x8 pixels, and 20 is not a multiple of 8: set `size` to 16" in line


def test_ifid_of_a_decoder_at_2x_compares_pictures_of_the_encoded_size(
    done, tmp_path, photos, weights_dir, monkeypatch
):
    decoder = copy.deepcopy(tiny_config()["model"]["params"]["decoder_config"])
    decoder["params"]["enlarge"] = 2
    tiny(decoder_config=decoder).save_pretrained(tmp_path / "two")
    sizes = []

    def seen(images):
        sizes.append(tuple(images.shape[-2:]))
        return extract(images)

    monkeypatch.setattr(
        "olvae.evaluation.observers.interpolated.Inception", lambda path, device: seen
    )
    given = ("--data", photos, "--images", 2, "--weights-dir", weights_dir)
    done("latents", tmp_path / "two", *given, "--ifid", "--out", tmp_path / "out")
    assert len(sizes) > 1
    assert len(set(sizes)) == 1


def test_pictures_that_are_not_finite_cost_ifid_alone(
    olvae, trained, tmp_path, monkeypatch, weights_dir, caplog
):
    def fail(*_: object) -> None:
        raise ArithmeticError("a picture of neighbours is not finite")

    monkeypatch.setattr(
        "olvae.evaluation.observers.interpolated.Inception", lambda path, device: extract
    )
    monkeypatch.setattr("olvae.evaluation.observers.ifid.InterpolatedFID.examine", fail)
    assert (
        olvae("latents", trained, "--ifid", "--weights-dir", weights_dir, "--out", tmp_path)[0] == 0
    )
    (row,) = json.loads((tmp_path / "latents.json").read_text())["results"]
    assert "ifid" not in row
    assert row["std"] > 0
    assert "ifid: left out: " in caplog.text


def test_ifid_without_its_network_is_refused(refused, trained, tmp_path, nowhere):
    line = refused(1, "latents", trained, "--ifid", "--out", tmp_path / "out")
    assert "pt_inception-2015-12-05-6726825d.pth" in line
    assert "--weights-dir" in line
    assert not (tmp_path / "out").exists()


def test_latents_of_two_models_on_a_folder(olvae, done, trained, tmp_path, photos):
    """The factors turn this model's latents of these pictures into mean 0 and variance 1.

    Both see the same images.
    """
    config = load([trained / "config.yaml"])
    weights = trained / "checkpoints/last.ckpt"
    out = tmp_path / "report"
    given = ("--config", trained / "config.yaml", "--data", photos, "-B", 5, "--out", out, "--json")
    code, text, _ = olvae("latents", trained, weights, *given)
    assert code == 0
    content = json.loads((out / "latents.json").read_text())
    assert json.loads(text) == content
    first, second = content["results"]
    assert [first.pop("target"), second.pop("target")] == [trained.name, str(weights)]
    assert first == second
    assert content["data"] == {
        "source": str(photos),
        "images": "bicubic antialiased resize of the shorter side (Pillow), centre crop",
        "size": config["data"]["params"]["size"],
        "n": 12,
    }
    pictures = [
        image_to_tensor(EvalTransform(16)(read_picture(path))) for path in find_images(photos)
    ]
    with torch.inference_mode():
        posterior = find_target(trained).load().encode(from_uint8(torch.stack(pictures)))
    mean, var = posterior.mean.double().numpy(), posterior.var.double().numpy()
    factors = first["diffusion"]
    assert factors["shift_factor"] == pytest.approx(mean.mean(), abs=1e-6)
    scaled = (mean - factors["shift_factor"]) * factors["scaling_factor"]
    assert np.mean(scaled**2 + var * factors["scaling_factor"] ** 2) == pytest.approx(1.0, rel=1e-5)
    assert factors["latents_mean"] == pytest.approx(mean.mean((0, 2, 3)), abs=1e-6)
    assert factors["latents_std"] == pytest.approx(
        np.sqrt(mean.var((0, 2, 3)) + var.mean((0, 2, 3))), rel=1e-5
    )
    err = done("latents", trained, "--data", photos, "--images", 1, "--out", tmp_path / "one")
    assert "MMD: skipped" in err
    assert json.loads((tmp_path / "one/latents.json").read_text())["results"][0]["n"] == 1


def test_latents_in_two_processes_have_the_numbers_of_one(olvae, capfd, trained, tmp_path, photos):
    """One image at a time, so that each is encoded in the same batch.

    The MMD's noise is the images' own.
    """
    command = ["latents", trained, "--data", photos, "-B", 1, "--device", "cpu", "--images", 3]
    assert olvae(*command, "--out", tmp_path / "one")[0] == 0
    fork_ranks(main, [str(a) for a in (*command, "--out", tmp_path / "two")])
    assert capfd.readouterr().err.count("numbers: ") == 1
    one, two = (
        json.loads((tmp_path / name / "latents.json").read_text()) for name in ("one", "two")
    )
    assert one["data"]["n"] == two["data"]["n"] == 3
    for (path, value), (name, other) in zip(numbers(one), numbers(two), strict=True):
        assert (name, other) == (path, pytest.approx(value, rel=1e-6, abs=1e-9))


def test_unreadable_images_of_all_processes_end_latents_together(
    olvae, olvae_on_two, trained, tmp_path, photos
):
    """As in one process, at the same limit."""
    shutil.copytree(photos, tmp_path / "photos")
    for i in range(4):
        (tmp_path / "photos" / f"bad{i}.png").touch()
    config = load([trained / "config.yaml"])
    config["data"]["params"]["val_root"] = str(tmp_path / "photos")
    save(config, tmp_path / "config.yaml")
    weights = shutil.copy(trained / "checkpoints/last.ckpt", tmp_path / "loose.ckpt")
    command = ["latents", weights, "--config", tmp_path / "config.yaml", "--device", "cpu"]
    command += ["--out", tmp_path / "out"]
    code, _, one = olvae(*command)
    assert code == 1
    err = olvae_on_two(*command, exits=(1, 1))
    assert one.count("error: ") == err.count("error: ") == 1
    assert "data.params.max_unreadable" in err
    for i in range(4):
        assert err.count(f"bad{i}.png (the file is empty)") == 1
    assert not (tmp_path / "out").exists()


def test_an_error_in_one_process_ends_latents_with_one_line(
    olvae_on_two, trained, tmp_path, photos, monkeypatch
):
    update = LatentAccumulator.update

    def fail(self, *arguments):
        if os.environ["RANK"] == "1":
            raise ValueError("not finite")
        update(self, *arguments)

    monkeypatch.setattr(LatentAccumulator, "update", fail)
    out = tmp_path / "out"
    command = ("latents", trained, "--data", photos, "-B", 1, "--device", "cpu", "--out", out)
    assert olvae_on_two(*command, exits=(1, 1)) == f"error: {trained.name}: not finite\n"
    assert not out.exists()


def test_a_deterministic_autoencoder_has_no_kl(olvae, tmp_path, photos):
    taesd().save_pretrained(tmp_path / "tiny")
    out_folder = tmp_path / "out"
    code, out, err = olvae(
        "latents", f"diffusers:{tmp_path / 'tiny'}", "--data", photos, "--out", out_folder, "--json"
    )
    assert code == 0
    (result,) = json.loads(out)["results"]
    assert result["deterministic"] is True
    assert set(result["skipped"]) == {"kl", "active"}
    assert "mmd" in result
    assert not [path for path, _ in numbers(result) if "kl" in path or "active" in path]
    assert "KL and active" in err
    assert err.count("skipped") >= 4  # three times in the table


def test_latents_mistakes_are_one_line(olvae, refused, trained, tmp_path):
    config = trained / "config.yaml"
    weights = shutil.copy(trained / "checkpoints/last.ckpt", tmp_path / "loose.ckpt")
    changed = load([config])
    changed["data"]["params"]["size"] = 20
    save(changed, tmp_path / "size.yaml")
    del changed["data"]
    save(changed, tmp_path / "no_data.yaml")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"not a picture")
    out = ["--out", tmp_path / "out"]
    cases = [
        (["missing", *out], 1, "not found; a target is"),
        ([trained, "--weights-dir", tmp_path, *out], 2, "--weights-dir applies to --ifid"),
        ([weights, *out], 2, "name it with --config"),
        ([weights, "--config", tmp_path / "no_data.yaml", *out], 2, "set --data"),
        (
            [weights, "--config", tmp_path / "size.yaml", *out],
            2,
            "20 is not a multiple of 8: set `size` to 16",
        ),
        ([trained, "--data", broken, *out], 1, "no images"),
    ]
    for arguments, code, text in cases:
        assert text in refused(code, "latents", *arguments)
        assert not (tmp_path / "out").exists()
    code, _, err = olvae("latents", trained, "--images", 0)
    assert code == 2
    assert "--images" in err
