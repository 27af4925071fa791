"""``olvae export`` as a user types it, from a run to a folder that loads everywhere."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.config import save
from olvae.models.liteautoencoder import LiteAutoencoderKL
from olvae.models.spec import WEIGHTS_NAME
from tests.conftest import tiny_config


@pytest.fixture
def olvae(olvae):
    """``olvae export``."""
    return partial(olvae, "export")


@pytest.fixture
def run_folder(tmp_path):
    config = tiny_config(use_ema=True)
    model = LiteAutoencoderKL(**config["model"]["params"])
    run = tmp_path / "2026-01-31T12-00-00_tiny_32"
    (run / "checkpoints").mkdir(parents=True)
    raw = {name: t + 1 for name, t in model.state_dict().items()}
    torch.save({"state_dict": model.state_dict(), "current_model_state": raw}, run / "checkpoints" / "last.ckpt")
    save(config, run / "config.yaml")
    content = {"protocol": {"name": "p", "version": 1}, "protocol_hash": "h"}
    result = {"target": run.name, "n": 2, "metrics": {"psnr": 20.0}, "skipped": {}}
    (run / "metrics.json").write_text(json.dumps({**content, "results": [result]}))
    return run


def test_from_a_run_to_everything(olvae, run_folder, tmp_path):
    out = tmp_path / "vae"
    code, stdout, err = olvae(run_folder, "--out", out)
    assert (code, stdout) == (0, "")
    assert "loaded back: equal\nin diffusers: equal\n" in err
    assert "not measured: measure with olvae latents" in err
    assert err.endswith(f"export: {out}\n")
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", WEIGHTS_NAME, "metrics.json"]
    assert "averaged over training (EMA)" in (out / "README.md").read_text()
    x = torch.rand(1, 3, 16, 16)
    expected = LiteVAE.from_pretrained(run_folder)(x)[0]
    assert torch.equal(LiteVAE.from_pretrained(out)(x)[0], expected)
    assert torch.equal(AutoencoderLiteVAE.from_pretrained(out)(x).sample, expected)

    latents = tmp_path / "latents.json"
    factors = {"scaling_factor": 0.5, "shift_factor": 0.125}
    latents.write_text(json.dumps({"results": [{"target": "vae", "diffusion": factors}]}))
    code, _, err = olvae(out, "--out", tmp_path / "half", "--dtype", "bfloat16", "--fold", "--latents", latents)
    assert code == 0
    assert "not measured" not in err
    half = LiteVAE.from_pretrained(tmp_path / "half")
    assert (half.folded, half.scaling_factor, half.shift_factor) == (True, 0.5, 0.125)
    torch.testing.assert_close(half(x)[0], expected, rtol=0.1, atol=0.1)
    assert (tmp_path / "half" / "metrics.json").is_file()

    code, _, err = olvae(run_folder, "--out", out, "--raw", "--scaling-factor", 2, "--shift-factor", -1, "--force")
    name = run_folder.name
    assert f"metrics.json is left out: it is about {name}, not {name}, raw weights\n" in err
    assert not (out / "metrics.json").exists()
    assert "Not measured" in (out / "README.md").read_text()
    raw = LiteVAE.from_pretrained(out)
    assert (code, raw.scaling_factor, raw.shift_factor) == (0, 2.0, -1.0)
    trained = LiteVAE.from_pretrained(run_folder, raw=True).state_dict()
    assert all(torch.equal(t, trained[name]) for name, t in raw.state_dict().items())
    assert "float32, as trained" in (out / "README.md").read_text()

    with pytest.warns(UserWarning, match=r"--raw is ignored"):  # nothing tells which ones an export has
        assert olvae(out, "--out", tmp_path / "again", "--raw")[0] == 0
    assert "as trained" not in (tmp_path / "again" / "README.md").read_text()


def test_a_polite_kill_leaves_nothing(olvae, run_folder, tmp_path, monkeypatch):
    def killed(_: LiteVAE, folder: Path) -> None:
        folder.mkdir()
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr(LiteVAE, "save_pretrained", killed)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert olvae(run_folder, "--out", tmp_path / "vae")[0] == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == [run_folder.name]


def test_mistakes_are_one_line_and_leave_nothing(olvae, run_folder, tmp_path):
    out = tmp_path / "vae"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "last.ckpt").write_bytes((run_folder / "checkpoints" / "last.ckpt").read_bytes()[:2000])
    save(tiny_config(), broken / "config.yaml")
    odd = tmp_path / "odd"
    shutil.copytree(run_folder, odd)
    (odd / "metrics.json").write_text("{}")
    taesd = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    taesd.save_pretrained(tmp_path / "taesd")
    for arguments, code, text in (
        ([f"diffusers:{tmp_path / 'taesd'}"], 2, "AutoencoderTiny: only LiteVAE and AutoencoderKL can be trained and exported here"),
        ([tmp_path / "missing"], 1, "not found; a target is a run folder"),
        ([broken], 1, "not a readable checkpoint"),
        ([odd], 1, "metrics.json: not a metrics.json of olvae evaluate: KeyError: 'results'"),
        ([run_folder, "--latents", tmp_path / "none.json"], 1, "none.json: not a latents.json"),
        ([run_folder, "--latents", "x", "--shift-factor", "1"], 2, "--latents has both factors"),
        ([run_folder, "--scaling-factor", "0"], 2, "--scaling-factor 0.0: give a number above 0"),
        ([run_folder, "--scaling-factor", "nan"], 2, "--scaling-factor nan: give a number above 0"),
        ([run_folder, "--shift-factor", "inf"], 2, "--shift-factor inf: give a finite number"),
        ([run_folder, "--onnx", "--dtype", "float16"], 2, "--onnx writes float32"),
        ([run_folder, "--config", "a", "--config_base", "b"], 2, "give one of them"),
        (["nobody/nothing-here"], 1, "nobody/nothing-here: no such file or folder here"),
    ):
        got, stdout, err = olvae(*arguments, "--out", out)
        assert (got, stdout) == (code, "")
        assert text in err
        assert err.count("\n") == 1
        assert not out.exists()
    got, _, err = olvae(run_folder, "--out", run_folder, "--force")
    assert got == 1
    assert "not an export: --force replaces exports only" in err
    assert (run_folder / "checkpoints" / "last.ckpt").is_file()
