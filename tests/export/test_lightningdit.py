"""LightningDiT's files, read with safetensors and torch alone, as its data set reads them."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from olvae.config import ConfigError
from olvae.data.shards.latent_source import LatentSource
from olvae.export.encode import EncodeJob
from olvae.export.inputs import find_inputs
from olvae.export.writers import EncodeOptions
from olvae.modules.distributions import keyed_generator
from tests.data.images import encoded, write_shards, write_tar
from tests.export.latents import encode, pictures, tiny_vae

OPTIONS = {"format": "lightningdit", "moments": False, "dtype": "float32", "flip": True}


def everything(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_latents_labels_and_statistics(tmp_path, image_folder):
    model, out = tiny_vae(), tmp_path / "out"
    stats = encode(image_folder, out, model, classes=True, **OPTIONS)
    assert list(everything(out)) == [*(f"00000{i}.safetensors" for i in range(3)), "latents_stats.pt", "stats.json"]
    found = {"latents": [], "latents_flip": [], "labels": []}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(found)
            for name, parts in found.items():
                parts.append(file.get_slice(name)[:])
    latents, mirrored, labels = (torch.cat(parts) for parts in found.values())
    assert (labels.dtype, labels.tolist()) == (torch.int64, [0] * 4 + [1] * 4 + [2] * 4)
    x = pictures(image_folder)
    keys = [path.relative_to(image_folder).as_posix() for path in sorted(image_folder.rglob("*.png"))]
    for images, ending, got in ((x, "", latents), (x.flip(-1), "\nflip", mirrored)):
        with torch.inference_mode():
            posterior = model.encode(images)
        noise = [torch.randn(4, 2, 2, generator=keyed_generator(f"0\n{key}{ending}")) for key in keys]
        assert (got.dtype, got.shape) == (torch.float32, (12, 4, 2, 2))
        assert torch.allclose(got, posterior.mean + posterior.std * torch.stack(noise), atol=1e-4)
    known = torch.load(out / "latents_stats.pt")
    both = torch.cat([latents, mirrored]).double()
    for name, value in (("mean", both.mean((0, 2, 3))), ("std", both.std((0, 2, 3), correction=0))):
        assert (known[name].dtype, known[name].shape) == (torch.float32, (1, 4, 1, 1))
        assert torch.allclose(known[name].flatten().double(), value, atol=1e-6)
    assert np.allclose(stats["latents_mean"], known["mean"].flatten())
    with pytest.raises(ValueError, match="in the format lightningdit: this takes those of --format shards"):
        LatentSource(str(out), 1)


def test_resumed_and_shared(tmp_path, image_folder):
    encode(image_folder, tmp_path / "whole", classes=True, **OPTIONS)
    job = EncodeJob(
        tiny_vae(), find_inputs(str(image_folder), 3, 5, True), EncodeOptions(16, **OPTIONS), tmp_path / "out", {}
    )
    job.run(1, 2, batch_size=3)
    (tmp_path / "out/000001.safetensors").unlink()
    job.run(batch_size=3)
    job.finish()
    whole, out = everything(tmp_path / "whole"), everything(tmp_path / "out")
    assert {n: c for n, c in out.items() if n != "stats.json"} == {n: c for n, c in whole.items() if n != "stats.json"}


def test_labels_of_shards(tmp_path):
    (path,) = write_shards(tmp_path / "shards", (2,))
    write_tar(path, [("a.jpg", encoded(0)), ("a.cls", b"7"), ("b.jpg", encoded(1))])
    stats = encode(tmp_path / "shards", tmp_path / "out", **OPTIONS)
    assert stats["unreadable"]["images"] == [{"name": "000/b", "reason": "no .cls file with a number"}]
    with safe_open(tmp_path / "out/000000.safetensors", framework="pt") as file:
        assert file.get_tensor("labels").tolist() == [7]


def test_what_it_refuses(tmp_path, image_folder):
    for change, text in [
        ({"size": 0}, "--native: lightningdit holds latents of one size"),
        ({"flip": False}, "add --flip"),
        ({"classes": False}, "every image has a label: add --classes"),
        ({"moments": True}, "--moments: lightningdit holds one latent"),
    ]:
        with pytest.raises(ConfigError, match=text):
            encode(image_folder, tmp_path / "out", **{"classes": True, **OPTIONS, **change})
        assert not (tmp_path / "out").exists()
