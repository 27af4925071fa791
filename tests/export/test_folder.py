import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olvae import AutoencoderLiteVAE, LiteVAE
from olvae.export import compare as compare_module
from olvae.export.folder import Provenance, export, read_factors
from olvae.models.spec import WEIGHTS_NAME
from tests.conftest import tiny_config
from tests.export.tiny import tiny_litevae

SOURCE = Provenance("a_run", config=tiny_config(), licence="mit", factors_from="measured")


@pytest.fixture
def model() -> LiteVAE:
    model = tiny_litevae()
    model.scaling_factor, model.shift_factor = 0.9, -0.1
    return model


@pytest.fixture
def metrics(tmp_path) -> Path:
    path = tmp_path / "metrics.json"
    result = {"target": "a_run", "n": 22, "metrics": {"psnr": 24.6312, "ssim": 0.7}, "skipped": {"rfid": "why"}}
    other = {"target": "bicubic", "n": 22, "metrics": {"ssim": 0.612}, "skipped": {}}
    protocol = {"name": "open-litevae", "version": 1, "size": 64}
    path.write_text(json.dumps({"protocol": protocol, "protocol_hash": "ab12", "results": [result, other]}))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fold", [False, True])
def test_a_run_an_export_diffusers_and_an_export_again(model, dtype, fold, tmp_path):
    out = tmp_path / "out" / "vae"
    differences = export(model, out, SOURCE, dtype, fold)
    assert differences["loaded back"] == differences["in diffusers"] == 0.0
    assert ("folded" in differences) == fold
    meant = (model.fold() if fold else model).state_dict()
    written = load_file(out / WEIGHTS_NAME)
    assert written.keys() == meant.keys()
    assert all(torch.equal(tensor, meant[name].to(dtype)) for name, tensor in written.items())

    x = torch.rand(2, 3, 16, 16, dtype=dtype) * 2 - 1
    again = LiteVAE.from_pretrained(out, dtype=dtype)
    expected = again(x)[0]
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(expected.float(), model(x.float())[0], rtol=tolerance, atol=tolerance)
    in_diffusers = AutoencoderLiteVAE.from_pretrained(out, torch_dtype=dtype)
    assert torch.equal(in_diffusers(x).sample, expected)
    in_diffusers.save_pretrained(tmp_path / "diffusers")
    export(LiteVAE.from_pretrained(tmp_path / "diffusers"), tmp_path / "twice", SOURCE, dtype, fold)
    for file in (WEIGHTS_NAME, "config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (out / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["vae"]


def test_the_model_card(model, metrics, tmp_path):
    config = {
        **SOURCE.config,
        "data": {"target": "olvae.data.mapped.picture_folder.FolderSource", "params": {"root": "/home/me/cats"}},
        "run": {"weights": "/home/me/runs/2026_a_32/checkpoints/last.ckpt"},
    }
    export(model, tmp_path / "vae", Provenance("a_run", config, metrics, licence="mit", factors_from="measured"))
    card = (tmp_path / "vae" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for text in (
        "license: mit\n",
        "# vae\n",
        "(3, H, W) to (4, H/8, W/8)",
        "| scaling factor, shift factor | 0.9, -0.1 (measured)",
        "| | images | PSNR, dB | SSIM |",
        "| a_run | 22 | 24.63 | 0.7 |",
        "| bicubic | 22 | - | 0.612 |",
        "`open-litevae`, version 1, ab12",
        "Precision: not measured: `olvae evaluate --precision fp16,bf16,32` does.",
        "`olvae.data.mapped.picture_folder.FolderSource`, cats, 4 steps, from the weights of 2026_a_32.",
        "Weights: mit.",
        "LiteVAE.from_pretrained(",
    ):
        assert text in card
    assert "/home/me" not in card
    assert (tmp_path / "vae" / "metrics.json").read_bytes() == metrics.read_bytes()

    export(model.fold(), tmp_path / "bare", Provenance("x", raw=True))
    card = (tmp_path / "bare" / "README.md").read_text()
    for text in ("license: unknown", "Not measured", "not measured: `olvae latents`", "Unknown.", "Not stated;",
                 "float32, as trained, self-modulated convolutions folded"):  # fmt: skip
        assert text in card
    assert not (tmp_path / "bare" / "metrics.json").exists()


def measured(target: str, dtype: str, largest: float, first: str | None = None, lost: float | None = 0.0) -> dict:
    precision = {
        "dtype": dtype,
        "largest_name": "decoder.conv_in",
        "largest_value": largest,
        "non_finite": {"images": int(first is not None), "values": int(first is not None), "first": first},
        "psnr_lost": lost,
        "safe": first is None and lost == 0.0,
    }
    return {"target": target, "n": 22, "metrics": {"psnr": 20.0}, "precision": precision}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [measured("a_run, fp16", "fp16", 812.0), measured("a_run, bf16", "bf16", 810.0)],
            ", measured on 22 images of 64 px: fp16 and bf16 are safe (largest activation 812 at `decoder.conv_in`).",
        ),
        (
            [measured("a_run, fp16", "fp16", 9.0, "encoder.x"), measured("a_run, bf16", "bf16", 7e4)],
            ", measured on 22 images of 64 px: bf16 is safe (largest activation 7e+04 at `decoder.conv_in`); "
            "fp16 overflows at `encoder.x`: use bf16 or float32.",
        ),
        (
            [measured("a_run, bf16", "bf16", 9.0, lost=0.25)],
            ", measured on 22 images of 64 px: bf16 changes PSNR by -0.25 dB: use float32.",
        ),
        (
            [measured("other", "32", 1.0), measured("other, fp16", "fp16", 9.0)],
            ": not measured: `olvae evaluate --precision fp16,bf16,32` does.",
        ),
    ],
)
def test_the_card_says_which_precisions_are_safe(model, tmp_path, metrics, rows, sentence):
    content = json.loads(metrics.read_text())
    content["results"] = [measured("a_run", "32", 812.0), *rows, measured("b", "32", 1.0)]
    metrics.write_text(json.dumps(content))
    export(model, tmp_path / "vae", Provenance("a_run", metrics=metrics))
    assert f"\nPrecision{sentence}\n" in (tmp_path / "vae" / "README.md").read_text()


def test_what_is_there_is_kept(model, tmp_path, monkeypatch):
    out = tmp_path / "vae"
    out.mkdir()
    export(model, out, SOURCE)  # an empty folder is none
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(FileExistsError, match=r"contains an export: --force replaces it"):
        export(model, out, SOURCE)
    export(model.fold(), out, SOURCE, force=True)
    assert (out / WEIGHTS_NAME).read_bytes() != before[WEIGHTS_NAME]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    for force in (False, True):
        with pytest.raises(FileExistsError, match=r"not an export: --force replaces exports only"):
            export(model, tmp_path / "photos", SOURCE, force=force)
    with pytest.raises(FileExistsError, match=r"this is a file"):
        export(model, tmp_path / "photos" / "cat.png", SOURCE, force=True)
    with pytest.raises(FileExistsError, match=r"cat.png/vae: .*cat.png is a file"):
        export(model, tmp_path / "photos" / "cat.png" / "vae", SOURCE)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for place in (".", tmp_path / "empty"):
        with pytest.raises(FileExistsError, match=r"the current folder, or a mount point: name a new folder in it"):
            export(model, place, SOURCE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "photos", "vae"]


def test_a_link_stays_a_link(model, tmp_path):
    """A folder that stands for one on a larger disk: the export goes there, now and when it is replaced."""
    for there in (True, False):
        disk, link = tmp_path / f"disk-{there}", tmp_path / f"vae-{there}"
        if there:
            disk.mkdir()
        link.symlink_to(disk)
        export(model, link, SOURCE)
        export(model.fold(), link, SOURCE, force=True)
        assert link.is_symlink()
        assert LiteVAE.from_pretrained(disk).folded
        assert f"# {link.name}\n" in (disk / "README.md").read_text()


@pytest.mark.parametrize("during", ["old", "new"])
def test_ctrl_c_between_the_old_and_the_new_keeps_the_old(model, tmp_path, monkeypatch, during):
    """Python tells of a signal after the call that it came in, when the old one has been moved."""
    out = tmp_path / "vae"
    export(model, out, SOURCE)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    move = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if during == "old" and self == out:
            move(self, target)
            raise KeyboardInterrupt
        if during == "new" and target == out and self.name == out.name:
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(model.fold(), out, SOURCE, force=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_nothing_and_takes_nothing(model, metrics, tmp_path, monkeypatch, force):
    out = tmp_path / "deep" / "down" / "vae"
    if force:
        export(model, out, SOURCE)
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def spoil(self: LiteVAE, folder: Path) -> None:
        write(self, folder)
        state = load_file(folder / WEIGHTS_NAME)
        state["decoder.conv_out.bias"] += 1e-6
        save_file(state, folder / WEIGHTS_NAME)

    write = LiteVAE.save_pretrained
    monkeypatch.setattr(LiteVAE, "save_pretrained", spoil)
    with pytest.raises(ValueError, match=r"decoder.conv_out.bias differs from what was written"):
        export(model, out, SOURCE, force=force)
    monkeypatch.undo()
    metrics.write_text("{}")
    with pytest.raises(ValueError, match=r"not a metrics.json of olvae evaluate: KeyError"):
        export(model, out, Provenance("x", metrics=metrics), force=force)
    metrics.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "FOLDING", -1.0)
        with pytest.raises(ValueError, match=r"folding changes the result by"):
            export(model, out, SOURCE, fold=True, force=force)
    model.decoder.conv_out.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"1 tensors do not fit into torch.float16"):
        export(model, out, SOURCE, torch.float16, force=force)
    del kept[tmp_path / "metrics.json"]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == kept
    assert (tmp_path / "deep").exists() == force


def test_outputs_that_differ_are_noticed(model, tmp_path, monkeypatch):
    """The same tensors, and another function: what only a comparison of outputs finds."""
    load = LiteVAE.from_pretrained

    def other(folder: Path) -> LiteVAE:
        loaded = load(folder)
        loaded.decoder.conv_out.register_forward_hook(lambda _, __, out: out * (1 + 4e-6))
        return loaded

    monkeypatch.setattr(LiteVAE, "from_pretrained", other)
    with pytest.raises(ValueError, match=r"loading it back changes the result by"):
        export(model, tmp_path / "vae", SOURCE)
    assert not any(tmp_path.iterdir())


def test_factors_of_latents_json(tmp_path):
    def result(name: str, scale: float) -> dict:
        return {"target": name, "n": 3, "diffusion": {"scaling_factor": scale, "shift_factor": 0.25}}

    path = tmp_path / "latents.json"
    path.write_text(json.dumps({"data": {}, "results": [result("a", 2.0), result("b", 3.0)]}))
    assert read_factors(path, "b") == (3.0, 0.25)
    with pytest.raises(ValueError, match=r"has no factors of c, but of a, b"):
        read_factors(path, "c")
    path.write_text(json.dumps({"results": [result("a", 2.0)]}))
    assert read_factors(path, "c") == (2.0, 0.25)  # the only one
    path.write_text(json.dumps({"target": "a", "weights": "12ab", "scaling_factor": 2.0, "shift_factor": 0.25}))
    assert read_factors(path, "c", "12ab") == (2.0, 0.25)  # a stats.json, of the same weights
    with pytest.raises(ValueError, match=r"of latents that a made, with other weights than c's"):
        read_factors(path, "c", "34cd")
    for content in ("", "[]", '{"results": [{"target": "a"}]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"neither a latents.json of olvae latents nor"):
            read_factors(path, "a")
