"""``olvae encode`` and ``olvae decode`` as a user types them."""

import json
from pathlib import Path

import pytest
import torch

from olvae.cli.encode import _encoder
from olvae.cli.main import main
from olvae.config import ConfigError
from olvae.data.image import image_to_tensor, read_picture
from olvae.data.pixels.size_and_range import to_uint8
from olvae.data.shards.write import ResumableShards
from tests.export.latents import everything, pictures, tiny_vae
from tests.test_devices import fork_two


@pytest.fixture
def olvae_on_two(capfd):
    """Run a command in two processes; what both write to standard error."""

    def run(*arguments: object) -> str:
        fork_two(main, [str(a) for a in arguments])
        return capfd.readouterr().err

    return run


@pytest.fixture
def target(tmp_path) -> Path:
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_there_and_back(olvae, target, tmp_path, image_folder):
    latents, images = tmp_path / "latents", tmp_path / "images"
    encode = ["encode", target, "--data", image_folder, "--size", 16, "--out", latents, "--dtype", "float32"]
    code, out, err = olvae(*encode, "--json")
    assert code == 0
    stats = json.loads(out)
    assert stats == json.loads((latents / "stats.json").read_text())
    assert (stats["count"], stats["source"], stats["target"]) == (12, str(image_folder), "vae")
    assert f"latents: {latents}, 12 images of 16 px in 1 shard\n" in err
    assert f"scaling_factor {stats['scaling_factor']:.4f}" in err
    before = everything(latents)
    assert olvae(*encode)[:2] == (0, "")  # once more: nothing is left to do
    assert everything(latents) == before
    code, out, err = olvae("decode", target, latents, "--out", images)
    assert (code, out, err) == (0, "", f"images: {images}, 12 of them\n")
    model = tiny_vae()
    with torch.inference_mode():
        expected = to_uint8(model.decode(model.encode(pictures(image_folder)).mode()))
    got = torch.stack([image_to_tensor(read_picture(path)) for path in sorted(images.rglob("*.png"))])
    assert (got.int() - expected.int()).abs().max() <= 1
    tiny_vae(1).save_pretrained(tmp_path / "other")
    code, _, err = olvae("decode", tmp_path / "other", latents, "--out", tmp_path / "more")
    assert code == 0
    assert f"note: vae made these latents, with other weights than {tmp_path / 'other'}'s" in err


def test_two_processes_give_what_one_gives(olvae, olvae_on_two, target, tmp_path, image_folder):
    encode = ["encode", target, "--data", image_folder, "--size", 16, "--shard-size", 3, "--flip", "--images"]
    encode += ["--device", "cpu"]
    assert olvae(*encode, "--out", tmp_path / "one")[0] == 0
    err = olvae_on_two(*encode, "--out", tmp_path / "two")
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert len(everything(tmp_path / "two")) == 4 + 2
    assert err.count("12 images of 16 px in 4 shards") == 1  # the first says it, the other nothing
    assert "nothing to do" not in err
    encode[encode.index(3)] = 1000
    err = olvae_on_two(*encode, "--out", tmp_path / "few")
    assert "note: 1 shard of latents for 2 processes: the others have" in err


def test_compiled_or_told_that_it_is_not(olvae, target, tmp_path, image_folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        "olvae.models.optimization.compile_networks", lambda modules, device: compiled.extend(modules) or False
    )
    out = tmp_path / "latents"
    encode = ["encode", target, "--data", image_folder, "--size", 16, "--compile", "--out", out, "--device", "cpu"]
    assert olvae(*encode)[0] == 0
    assert [type(module).__name__ for module in compiled] == ["LiteVAE_Encoder"]


def test_mistakes_are_one_line(olvae, target, tmp_path, image_folder):
    def encode(*arguments: object) -> list[object]:
        return ["encode", target, "--data", image_folder, "--size", 16, "--out", tmp_path / "out", *arguments]

    cases = [
        (encode("--dtype", "int8"), 2, "'int8' is not one of 'float16', 'bfloat16', 'float32'"),
        (encode("--precision", "int8"), 2, "--precision int8: choose from fp16, bf16, 32"),
        (encode("--native"), 2, "--native and --size: give one of the two"),
        (encode("--size", 20), 1, "multiple of 8"),
        (["encode", target, "--data", image_folder, "--native", "--images", "--out", tmp_path / "out"], 1, "one size"),
        (encode("--data", tmp_path / "nowhere"), 1, "no such folder"),
        (encode("--out", image_folder), 2, "has other files already"),
        (encode("--out", image_folder / "class0/0.png"), 1, "results need a folder"),
        (["decode", target, image_folder, "--out", image_folder / "class0/0.png"], 1, "results need a folder"),
        (["encode", tmp_path / "gone", *encode()[2:]], 1, "not found; a target is"),
        (["decode", target, image_folder, "--out", tmp_path / "out"], 1, "no stats.json"),
        (["decode", target, tmp_path / "x.tar", "--out", tmp_path / "out"], 1, "no shards"),
        (["decode", target, image_folder, "--out", tmp_path / "out", "--format", "gif"], 2, "not one of 'png', 'jpg'"),
    ]
    for arguments, code, text in cases:
        got, stdout, err = olvae(*arguments)
        assert (got, stdout) == (code, ""), err
        assert text in err
        assert err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()
    assert olvae(*encode())[0] == 0
    code, _, err = olvae(*encode("--data", tmp_path / "out", "--out", tmp_path / "again"))
    assert (code, err) == (1, "error: no images in these shards: an image is a file KEY.jpg, KEY.png, ...\n")
    code, _, err = olvae(*encode("--seed", 1))
    assert (code, err.count("\n")) == (2, 1)
    assert "was begun with seed 0 (now 1): give the same options and images" in err
    code, _, err = olvae("encode", target, "--data", "samples", "--out", tmp_path / "out", "--size", 16)
    assert code == 2
    assert "was begun with other images: give the same options and images" in err


@pytest.mark.parametrize("shards", [0, 2])
def test_ctrl_c_says_how_to_go_on(olvae, target, tmp_path, image_folder, monkeypatch, shards):
    """Where a shard is finished; else it leaves nothing."""
    write = ResumableShards.write
    written = []

    def interrupt(self, number, samples, details):
        if number == shards:
            raise KeyboardInterrupt
        written.append(number)
        return write(self, number, samples, details)

    monkeypatch.setattr(ResumableShards, "write", interrupt)
    latents = tmp_path / "new" / "latents"
    encode = ("encode", target, "--data", image_folder, "--size", 16, "--out", latents, "--shard-size", 3)
    code, out, err = olvae(*encode)
    assert (code, out, written) == (130, "", [*range(shards)])
    kept = f"finished shards are in {latents}" if shards else "no shard is finished yet"
    assert err.endswith(f"stopped: {kept}; the same command continues\n")
    assert latents.parent.exists() == bool(shards)


def test_a_failure_leaves_no_folder(olvae, target, tmp_path, image_folder):
    """Of encode where no image can be read, and of decode where no latent can."""
    bad, out = tmp_path / "bad", tmp_path / "new" / "out"
    bad.mkdir()
    (bad / "a.png").touch()
    code, _, err = olvae("encode", target, "--data", bad, "--size", 16, "--out", out)
    assert (code, err) == (1, "error: none of the images could be read: a.png: the file is empty\n")
    assert not out.parent.exists()
    out.mkdir(parents=True)
    assert olvae("encode", target, "--data", bad, "--size", 16, "--out", out)[0] == 1
    assert not list(out.iterdir())  # the user's own stays
    out.rmdir()
    latents = tmp_path / "latents"
    assert olvae("encode", target, "--data", image_folder, "--size", 16, "--out", latents)[0] == 0
    (latents / "000000.tar").write_bytes(b"no tar file")
    code, _, err = olvae("decode", target, latents, "--out", out)
    assert (code, err.count("\n")) == (1, 1)
    assert "no latents to decode" in err
    assert list((tmp_path / "new").iterdir()) == []


def test_compiling_without_an_encoder_is_one_line():
    with pytest.raises(ConfigError, match="--compile: mine has no module `encoder`"):
        _encoder(torch.nn.Identity(), "mine")
