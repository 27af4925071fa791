"""``olvae export`` as a user types it, from a run to a folder that loads everywhere."""

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.config import save
from olvae.data.shards.latent_source import LatentSource
from olvae.export.formats import Layout
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.spec import WEIGHTS_NAME
from olvae.models.weight_files import LOADER_NAME
from olvae.training.start_from import start_from
from tests.cli.conftest import Ended, run_once
from tests.conftest import tiny_config
from tests.models.autoencoder_kl import PER_CHANNEL, SHAPES, autoencoder_kl


@pytest.fixture
def olvae(olvae):
    """``olvae export``."""
    return partial(olvae, "export")


def make_run(folder: Path) -> Path:
    """A run that was not trained, with averages, raw weights and metrics."""
    config = tiny_config(use_ema=True)
    model = LiteAutoencoderKL(**config["model"]["params"])
    run = folder / "2026-01-31T12-00-00_tiny_32"
    (run / "checkpoints").mkdir(parents=True)
    raw = {name: t + 1 for name, t in model.state_dict().items()}
    torch.save(
        {"state_dict": model.state_dict(), "current_model_state": raw, "global_step": 3},
        run / "checkpoints" / "last.ckpt",
    )
    save(config, run / "config.yaml")
    content = {"protocol": {"name": "p", "version": 1}, "protocol_hash": "h"}
    result = {"target": run.name, "n": 2, "metrics": {"psnr": 20.0}, "skipped": {}}
    (run / "metrics.json").write_text(json.dumps({**content, "results": [result]}))
    return run


@pytest.fixture
def run_folder(tmp_path) -> Path:
    return make_run(tmp_path)


class Exported(NamedTuple):
    run: Path
    folder: Path
    ended: Ended


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    """A run and its export, not to be changed."""
    run = make_run(tmp_path_factory.mktemp("exported"))
    folder = run.parent / "vae"
    return Exported(run, folder, run_once("export", run, "--out", folder, "--license", "mit"))


@pytest.fixture
def any_command(olvae):
    return olvae.func


def test_export_takes_factors_from_the_folder_of_encode_or_latents(
    any_command, run_folder, image_folder, tmp_path
):
    for command, name in (("encode", "stats"), ("latents", "latents")):
        folder, out = tmp_path / command, tmp_path / f"{command}-vae"
        code, _, err = any_command(command, run_folder, "--data", image_folder, "--out", folder)
        assert code == 0, err
        content = json.loads((folder / f"{name}.json").read_text())
        expected = content if command == "encode" else content["results"][0]["diffusion"]
        code, _, err = any_command("export", run_folder, "--out", out, "--latents", folder)
        assert code == 0, err
        vae = LiteVAE.from_pretrained(out)
        assert (vae.scaling_factor, vae.shift_factor) == (
            expected["scaling_factor"],
            expected["shift_factor"],
        )
        assert f"by olvae {command}" in (out / "README.md").read_text()
        assert re.search(r"the factors are measured on \d+ images: with fewer than 100", err)
    vae.set_for_diffusion({"scaling_factor": 0.5, "shift_factor": 0.0}).save_pretrained(out)
    for target, warns in ((tmp_path / "encode-vae", False), (out, True)):
        size = ("--size", content["data"]["size"], "--out", tmp_path / f"of-{target.name}")
        code, _, err = any_command("encode", target, "--data", image_folder, *size)
        assert code == 0, err
        warned = re.search(
            r"warning: .*vae has scaling_factor 0\.5000, .*: use one pair; olvae export --latents",
            err,
        )
        assert bool(warned) == warns == ("one pair" in err), err
    for values, packed in ((4, ""), (16, ", of packed 2x2 positions,")):
        units = {
            "scaling_factor": 1.0,
            "latents_mean": [0.0] * values,
            "latents_std": [1.0] * values,
        }
        vae.set_for_diffusion(units).save_pretrained(out)
        code, _, err = any_command(
            "encode", out, "--data", image_folder, *size[:3], tmp_path / f"of-{values}"
        )
        assert (
            f"latents_mean and latents_std: its diffusion models take these{packed} in place of"
            in err
        ), err


def test_factors_per_channel_are_the_ones_that_latent_source_scales_with(
    any_command, olvae, refused, run_folder, image_folder, tmp_path
):
    """Back and forth; without the flag a note names it, and a format without a place refuses it."""
    folder = tmp_path / "latents"
    code, _, err = any_command("encode", run_folder, "--data", image_folder, "--out", folder)
    assert code == 0, err
    out = tmp_path / "vae"
    code, _, err = olvae(run_folder, "--out", out, "--latents", folder)
    assert code == 0, err
    assert "LatentSource(per_channel=True) needs --per-channel\n" in err
    code, _, err = olvae(run_folder, "--out", out, "--latents", folder, "--per-channel", "--force")
    assert code == 0, err
    assert "needs --per-channel" not in err
    assert "latents_std | " in (out / "README.md").read_text()

    vae = LiteVAE.from_pretrained(out)
    theirs = AutoencoderLiteVAE.from_pretrained(out).config
    stats = json.loads((folder / "stats.json").read_text())
    assert (vae.latents_mean, vae.latents_std) == (stats["latents_mean"], stats["latents_std"])
    assert (theirs.latents_mean, theirs.latents_std) == (vae.latents_mean, vae.latents_std)
    assert (vae.scaling_factor, vae.shift_factor) == (1.0, 0.0)
    plain, scaled = (
        next(iter(LatentSource(folder, 3, per_channel=channels).val_loader()))["latent"]
        for channels in (False, True)
    )
    z = plain / stats["scaling_factor"] + stats["shift_factor"]
    torch.testing.assert_close(vae.from_diffusion(scaled), z)

    assert "numbers from --latents" in refused(
        2, run_folder, "--out", tmp_path / "other", "--per-channel"
    )
    content = json.loads((folder / "stats.json").read_text())
    for change, message in (
        ({"latents_std": None}, "has no latents_mean and latents_std: measure again"),
        ({"latents_mean": [0.0]}, "latents_mean: expected 4 numbers, one per channel, got [0.0]"),
        ({"latents_std": [0.0] * 4}, "latents_std: expected 4 numbers above 0"),
    ):
        (tmp_path / "stats.json").write_text(json.dumps(content | change))
        given = (run_folder, "--out", tmp_path / "other", "--latents", tmp_path / "stats.json")
        assert message in refused(1, *given, "--per-channel")
        assert not (tmp_path / "other").exists()


def test_from_pretrained_of_diffusers_refuses_a_run(any_command, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(run_folder.parent)
    for given in (run_folder, run_folder / "checkpoints" / "last.ckpt", "last"):
        with pytest.raises(ValueError, match=f"{given}: diffusers loads"):
            AutoencoderLiteVAE.from_pretrained(given)
    with pytest.raises(OSError, match="nothing"):
        AutoencoderLiteVAE.from_pretrained(tmp_path / "nothing", local_files_only=True)


def test_export_keeps_the_licence_of_a_shipped_model_word_for_word(done, tmp_path):
    done("olvae:photos-f8c4", "--out", tmp_path / "shipped")
    assert (tmp_path / "shipped" / "metrics.json").is_file()
    licence = (tmp_path / "shipped" / "README.md").read_text().partition("## Licence")[2]
    assert licence.startswith(
        "\n\nWeights: apache-2.0, which is this project's view: they hold no photograph"
    )
    assert "open-LiteVAE, the code, is under Apache-2.0.\n\n## Use" in licence
    edited = (
        (tmp_path / "shipped" / "README.md")
        .read_text()
        .replace("license: apache-2.0", "license: mit")
    )
    (tmp_path / "shipped" / "README.md").write_text(edited)
    done(tmp_path / "shipped", "--out", tmp_path / "edited")
    assert "Weights: mit. " in (tmp_path / "edited" / "README.md").read_text()


def test_an_export_of_a_run_loads_as_litevae_and_in_diffusers(exported):
    run, out, (code, stdout, err) = exported
    assert (code, stdout) == (0, "")
    assert "loaded back: equal\nin diffusers: equal\n" in err
    assert "not measured" in err
    assert err.endswith(f"export: {out}\n")
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "config.json", WEIGHTS_NAME, "metrics.json", LOADER_NAME)
    }
    assert "(EMA)" in (out / "README.md").read_text()
    x = torch.rand(1, 3, 16, 16)
    expected = LiteVAE.from_pretrained(run)(x)[0]
    assert torch.equal(LiteVAE.from_pretrained(out)(x)[0], expected)
    assert torch.equal(AutoencoderLiteVAE.from_pretrained(out)(x).sample, expected)


def test_an_export_in_bfloat16_is_folded_and_has_the_measured_factors(done, exported, tmp_path):
    latents = tmp_path / "latents.json"
    factors = {"scaling_factor": 0.5, "shift_factor": 0.125}
    latents.write_text(json.dumps({"results": [{"target": "vae", "diffusion": factors}]}))
    options = ("--dtype", "bfloat16", "--fold", "--latents", tmp_path)
    err = done(exported.folder, "--out", tmp_path / "half", *options)
    assert "not measured" not in err
    half = LiteVAE.from_pretrained(tmp_path / "half")
    assert (half.folded, half.scaling_factor, half.shift_factor) == (True, 0.5, 0.125)
    x = torch.rand(1, 3, 16, 16)
    expected = LiteVAE.from_pretrained(exported.run)(x)[0]
    torch.testing.assert_close(half(x)[0], expected, rtol=0.1, atol=0.1)
    assert (tmp_path / "half" / "metrics.json").is_file()
    cards = [(folder / "README.md").read_text() for folder in (exported.folder, tmp_path / "half")]
    first, again = (card.partition("## Training data")[2].partition("## Use")[0] for card in cards)
    assert first == again
    # The steps of these weights, as the run may have been stopped before its last one.
    assert "`, crops of 16x16, 3 steps." in first
    assert "Weights: mit." in first


def test_an_export_of_raw_weights_replaces_one_and_leaves_out_its_metrics(
    olvae, exported, tmp_path
):
    out = shutil.copytree(exported.folder, tmp_path / "vae")
    code, _, err = olvae(
        exported.run, "--out", out, "--raw", "--scaling-factor", 2, "--shift-factor", -1, "--force"
    )
    name = exported.run.name
    assert f"about {name}, not {name}, raw weights\n" in err
    assert not (out / "metrics.json").exists()
    assert "Not measured" in (out / "README.md").read_text()
    raw = LiteVAE.from_pretrained(out)
    assert (code, raw.scaling_factor, raw.shift_factor) == (0, 2.0, -1.0)
    trained = LiteVAE.from_pretrained(exported.run, raw=True).state_dict()
    assert all(torch.equal(t, trained[name]) for name, t in raw.state_dict().items())
    assert "float32, as trained" in (out / "README.md").read_text()

    # nothing tells which ones an export has
    with pytest.warns(UserWarning, match=r"`?-*raw`? is ignored"):
        assert olvae(out, "--out", tmp_path / "again", "--raw")[0] == 0
    assert "as trained" not in (tmp_path / "again" / "README.md").read_text()


def test_an_export_leaves_out_metrics_of_earlier_weights(olvae, run_folder, tmp_path):
    content = json.loads((run_folder / "metrics.json").read_text())
    content["results"][0]["weights"] = "12ab"
    (run_folder / "metrics.json").write_text(json.dumps(content))
    assert "earlier weights" in olvae(run_folder, "--out", tmp_path / "resumed")[2]


def test_sigterm_leaves_nothing_of_an_export(olvae, run_folder, tmp_path, monkeypatch):
    def killed(_: Layout, model: LiteVAE, folder: Path) -> None:
        folder.mkdir()
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr(Layout, "write", killed)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert olvae(run_folder, "--out", tmp_path / "vae")[0] == 75
    assert [path.name for path in tmp_path.iterdir()] == [run_folder.name]


def test_export_mistakes_are_one_line_and_leave_nothing(refused, run_folder, tmp_path):
    out = tmp_path / "vae"
    odd = tmp_path / "odd"
    shutil.copytree(run_folder, odd)
    (odd / "metrics.json").write_text("{}")
    for arguments, code, text in (
        ([tmp_path / "missing"], 1, "not found; a target is a run folder"),
        ([odd], 1, "metrics.json: not a metrics.json: KeyError 'results'"),
        (
            [run_folder, "--latents", tmp_path / "none.json"],
            1,
            "none.json: not what olvae latents or olvae encode",
        ),
        (
            [run_folder, "--latents", tmp_path],
            1,
            "not what olvae latents or olvae encode wrote, nor its folder",
        ),
        ([run_folder, "--latents", "x", "--shift-factor", "1"], 2, "--latents has both factors"),
        (
            [run_folder, "--scaling-factor", "0"],
            2,
            "scaling_factor: expected a number above 0, got 0.0",
        ),
        ([run_folder, "--onnx", "--dtype", "bfloat16"], 2, "--onnx writes float32, or float16"),
        ([run_folder, "--config", "a", "--config_base", "b"], 2, "give one of them"),
        (["nobody/nothing-here"], 1, "nobody/nothing-here: no such file or folder here"),
    ):
        assert text in refused(code, *arguments, "--out", out)
        assert not out.exists()
    assert "--force" in refused(1, run_folder, "--out", run_folder, "--force")
    assert (run_folder / "checkpoints" / "last.ckpt").is_file()


# Stable Diffusion's networks
@pytest.fixture
def stock_folder(tmp_path):
    model = autoencoder_kl((32, 32, 64), **SHAPES["sdxl"])
    model.save_pretrained(tmp_path / "sd-vae")
    return tmp_path / "sd-vae"


@pytest.fixture
def make_stock_run(stock_folder, tmp_path):
    """A run that began with --from diffusers:sd-vae."""

    def make(name="2026-01-31T12-00-00_sd_32", run=None):
        config = tiny_config(use_ema=False, freeze_encoder=False)
        config["model"]["from"] = f"diffusers:{stock_folder}"
        weights, _ = start_from(config)
        config["run"] = run or {}
        model = LiteAutoencoderKL(**config["model"]["params"])
        model.load_state_dict(weights, strict=False)
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        torch.save({"state_dict": model.state_dict()}, folder / "checkpoints" / "last.ckpt")
        save(config, folder / "config.yaml")
        return folder

    return make


def test_export_writes_stock_networks_for_diffusers_and_as_one_file(
    olvae, done, stock_folder, make_stock_run, tmp_path
):
    """A run to diffusers' folder, to one file, and back:
    the same bits as the folder that it began with."""
    expected = AutoencoderKL.from_pretrained(stock_folder).state_dict()
    run = make_stock_run()
    code, stdout, err = olvae(run, "--out", tmp_path / "diffusers", "--license", "mit")
    assert (code, stdout) == (0, "")
    assert err == f"in diffusers: equal\nexport: {tmp_path / 'diffusers'}\n"
    card = (tmp_path / "diffusers" / "README.md").read_text()
    assert f"0.13025, 0 (from {run.name});" in card
    assert "Weights: mit." in card
    assert AutoencoderKL.from_pretrained(tmp_path / "diffusers").config.force_upcast

    file = tmp_path / "vae.safetensors"
    for target in (run, f"diffusers:{tmp_path / 'diffusers'}"):
        code, stdout, err = olvae(target, "--format", "ldm", "--out", file, "--force")
        assert (code, stdout) == (0, "")
        assert err == (
            "loaded back: equal\n"
            "note: ComfyUI and A1111 build Stable Diffusion's widths only, not "
            "block_out_channels [32, 32, 64]\n"
            f"export: {file}\n"
        )
    err = done(file, "--out", tmp_path / "back")
    assert f"note: {file} holds no factors: 0.18215 and 0 " in err
    assert "holds none" in (tmp_path / "back" / "README.md").read_text()
    code, _, err = olvae(file, "--out", tmp_path / "back", "--force", "--scaling-factor", 0.13025)
    assert "note:" not in err
    assert AutoencoderKL.from_pretrained(tmp_path / "back").config.scaling_factor == 0.13025
    for folder in ("diffusers", "back"):
        state = AutoencoderKL.from_pretrained(tmp_path / folder).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_export_refuses_an_untrained_half(refused, make_stock_run, tmp_path, half):
    run, out = make_stock_run(run={"untrained": half}), tmp_path / "vae"
    assert f"{half} has never" in refused(2, run, "--out", out)
    assert not out.exists()


def test_export_of_what_does_not_fit_a_format_is_one_line_and_leaves_nothing(
    refused, run_folder, stock_folder, tmp_path
):
    stock = f"diffusers:{stock_folder}"
    other = "no class of diffusers has these networks: --format litevae is for"
    autoencoder_kl((32, 32), **PER_CHANNEL).save_pretrained(tmp_path / "channels")
    before = sorted(path for path in tmp_path.rglob("*"))
    file, folder = tmp_path / "vae.safetensors", tmp_path / "vae"
    for target, layout, out, arguments, text in (
        (run_folder, "diffusers", folder, [], other),
        (
            stock,
            "diffusers",
            file,
            [],
            "names a file, but this format is a folder; --format ldm is one file",
        ),
        (
            stock,
            None,
            folder,
            ["--fold"],
            "--fold does not go with --format diffusers: the networks of this",
        ),
        (
            stock,
            "ldm",
            file,
            ["--license", "mit"],
            "--license does not go with --format ldm: one file has no",
        ),
        (
            stock,
            "ldm",
            file,
            ["--latents", "x"],
            "--latents does not go with --format ldm: the factors are the",
        ),
        (
            f"diffusers:{tmp_path / 'channels'}",
            None,
            folder,
            ["--scaling-factor", "2"],
            "has latents_mean and",
        ),
    ):
        form = [] if layout is None else ["--format", layout]
        assert text in refused(2, target, "--out", out, *form, *arguments)
        assert sorted(path for path in tmp_path.rglob("*")) == before
