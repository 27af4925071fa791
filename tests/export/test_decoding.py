import json
import math
import os
import re

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import save

from olvae.config import ConfigError
from olvae.data.image import image_to_tensor
from olvae.data.pixels.size_and_range import PixelRange, from_uint8, to_uint8
from olvae.data.scenes.georeference import PLACE_FILE
from olvae.data.shards.index import find_shards, with_counts
from olvae.data.shards.latent_files import LATENT, LATENT_META, Latent
from olvae.data.shards.tar_reading import Shard, read_shard
from olvae.export import decoding as module
from olvae.export.decoding import decode_shards
from olvae.models.large.tiling import crop_to, pad_to_multiple
from tests.conftest import tiny, tiny_config
from tests.data.images import picture, saved, write_shards, write_tar
from tests.export.latents import Shrunk, encode, pictures, tiny_vae
from tests.soak.killed import killed_before


def shards(folder):
    return with_counts(find_shards(str(folder)), image_key=LATENT)


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def files_of_names(folder):
    return {str(name): content for name, content in files(folder).items()}


def read(path):
    return image_to_tensor(Image.open(path))


def test_decoded_images_are_those_of_the_decoder(tmp_path, image_folder):
    model = tiny_vae()
    encode(image_folder, tmp_path / "latents", model, dtype="float32", batch_size=5)
    told = []
    done = decode_shards(
        model, shards(tmp_path / "latents"), tmp_path / "out", batch_size=4, advance=told.append
    )
    assert (*done, told) == (12, [], [4, 4, 4])
    paths = sorted((tmp_path / "out").rglob("*.png"))
    wanted = sorted(path.relative_to(image_folder) for path in image_folder.rglob("*.png"))
    assert [path.relative_to(tmp_path / "out") for path in paths] == wanted
    with torch.inference_mode():
        images = to_uint8(model.decode(model.encode(pictures(image_folder)).mode()))
    for path, image in zip(paths, images, strict=True):
        # Rounding at a half may go either way.
        assert (read(path).int() - image.int()).abs().max() <= 1


@torch.inference_mode()
def test_a_decoder_at_2x_decodes_to_twice_the_size(tmp_path):
    """Of images whose sides are no multiples of f: the padding is cut off at twice the size."""
    decoder = tiny_config()["model"]["params"]["decoder_config"]
    decoder["params"]["enlarge"] = 2
    model = tiny(decoder_config=decoder)
    (tmp_path / "photos").mkdir()
    photo = picture(0).resize((21, 13))
    photo.save(tmp_path / "photos" / "a.png")
    encode(tmp_path / "photos", tmp_path / "latents", model, size=None, dtype="float32")
    decode_shards(model, shards(tmp_path / "latents"), tmp_path / "out")
    x = pad_to_multiple(from_uint8(image_to_tensor(photo)[None]), 8)
    expected = crop_to(to_uint8(model.decode(model.encode(x).mode())), (26, 42))[0]
    found = read(tmp_path / "out" / "a.png")
    assert found.shape == (3, 26, 42)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_encoded_latents_decode_to_the_reconstruction(tmp_path):
    """Through a model that loses only what shrinking loses; as jpg, with the keys of shards."""
    write_shards(tmp_path / "shards", (3, 2))
    encode(tmp_path / "shards", tmp_path / "latents", Shrunk(3.0), size=32)
    decode_shards(Shrunk(3.0), shards(tmp_path / "latents"), tmp_path / "out", "jpg")
    names = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.jpg")
    )
    assert names == ["000/0000.jpg", "000/0001.jpg", "000/0002.jpg", "001/0003.jpg", "001/0004.jpg"]
    decode_shards(Shrunk(3.0), shards(tmp_path / "latents"), tmp_path / "exact")
    exact = Image.open(tmp_path / "exact/001/0003.png")
    content = (tmp_path / "out/001/0003.jpg").read_bytes()
    assert content == saved(exact, "JPEG", quality=95, subsampling=0)
    image = from_uint8(read(tmp_path / "out/001/0003.jpg"))
    original = from_uint8(image_to_tensor(picture(3).crop((4, 0, 36, 32))))
    assert float((image - original).abs().mean()) < 0.07


def test_decoding_to_a_format_that_cannot_hold_the_channels_writes_nothing(tmp_path, image_folder):
    encode(image_folder, tmp_path / "latents", Shrunk())
    model = Shrunk()
    model.in_channels = 4
    with pytest.raises(ConfigError, match=r"`format` jpg: .*4 channels"):
        decode_shards(model, shards(tmp_path / "latents"), tmp_path / "out", "jpg")
    assert not (tmp_path / "out").exists()
    model = Shrunk()
    model.pixel_range = PixelRange.from_node([0, 4095])
    with pytest.raises(ConfigError, match=r"`format` png: 8 bits can't hold values of 0 to 4095"):
        decode_shards(model, shards(tmp_path / "latents"), tmp_path / "out", "png")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("channels", "values"), [(2, None), (3, [0, 4095])])
def test_what_png_does_not_hold_is_an_array(tmp_path, channels, values):
    write_tar(
        tmp_path / "0.tar",
        [
            ("a.latent.safetensors", save({"latent": torch.full((channels, 8, 8), 0.25)})),
            ("a.latent.json", meta_bytes("a")),
        ],
    )
    model = Shrunk()
    model.in_channels = model.latent_channels = channels
    model.pixel_range = PixelRange.from_node(values)
    assert decode_shards(model, shards(tmp_path), tmp_path / "out") == (1, [])
    found = np.load(tmp_path / "out" / "a.npy")
    level = 159 if values is None else 0.625 * 4095
    assert found.shape == (16, 16, channels)
    np.testing.assert_allclose(found, level, rtol=1e-6)


def test_tiles_of_scenes_have_their_place_in_a_tiff(tmp_path, monkeypatch):
    """If they were not resized, which their width and height show."""
    place = ((42112, "s", 0, "here", True),)

    def tags_from(content, enlarge):
        if content == b"broken":
            raise ValueError("no place")
        assert (content, enlarge) == (b"place", 1)
        return place

    monkeypatch.setattr(module, "tags_from", tags_from)
    files = []
    for name, content, size in (
        ("a", b"place", [16, 16]),
        ("b", b"place", [8, 16]),
        ("c", b"broken", [16, 16]),
    ):
        meta = {"key": name, "width": size[0], "height": size[1], "image": [16, 16]}
        files += [
            (f"{name}.latent.safetensors", save({"latent": torch.zeros(3, 8, 8)})),
            (f"{name}.latent.json", json.dumps(meta).encode()),
            (f"{name}.{PLACE_FILE}", content),
        ]
    write_tar(tmp_path / "0.tar", files)
    done, (error,) = decode_shards(Shrunk(), shards(tmp_path), tmp_path / "out", "tif")
    assert (done, error.reason) == (2, "no place")
    assert error.name.endswith("c.latent.safetensors")
    for name, found in (("a", "here"), ("b", None)):
        with tifffile.TiffFile(tmp_path / "out" / f"{name}.tif") as file:
            assert file.pages.first.tags.valueof(42112) == found
    assert decode_shards(Shrunk(), shards(tmp_path), tmp_path / "png") == (3, [])


def test_a_file_that_decoding_did_not_make_is_not_replaced(tmp_path):
    files = [("a.latent.safetensors", latent_bytes()), ("a.latent.json", meta_bytes("a"))]
    write_tar(tmp_path / "0.tar", files)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"a\.png: is there already"):
        decode_shards(tiny_vae(), shards(tmp_path / "0.tar"), out)
    assert files_of_names(out) == {"a.png": b"mine"}
    (out / "a.png").unlink()
    for _ in range(2):
        decode_shards(tiny_vae(), shards(tmp_path / "0.tar"), out)
    assert (out / ".decoded").read_text() == '"a.png"\n'


def write_alike(path, names, key):
    """A shard of latents that all have one key."""
    files = []
    for name in names:
        files += [
            (f"{name}.latent.safetensors", latent_bytes()),
            (f"{name}.latent.json", meta_bytes(key)),
        ]
    write_tar(path, files)


def test_two_latents_of_one_key_are_refused(tmp_path):
    write_alike(tmp_path / "0.tar", "ab", "x")
    with pytest.raises(ValueError, match="two latents have the key 'x'"):
        decode_shards(tiny_vae(), shards(tmp_path), tmp_path / "out")


def test_the_first_reasons_are_named_where_nothing_is_decoded(tmp_path):
    write_alike(tmp_path / "0.tar", "abcd", "../x")
    with pytest.raises(ValueError, match=r"^no latents to decode: ") as error:
        decode_shards(tiny_vae(), shards(tmp_path), tmp_path / "out")
    assert str(error.value).count("leads out") == 3


@pytest.mark.parametrize("key", ["k" * 251, "k/" * 1021 + "kk"])
def test_the_longest_names_and_paths_are_taken(key):
    """Of 255 and of 2048 bytes, with .png."""
    latent = Latent(torch.zeros(4, 2, 2))
    meta = {"key": key, "image": [16, 16]}
    module._check_place("a", latent, meta, tiny_vae())
    with pytest.raises(ValueError, match="can't name a file"):
        module._check_place("a", latent, {**meta, "key": f"{key}k"}, tiny_vae())


def test_decoded_images_have_their_own_sizes(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(16, 16), (13, 9), (40, 24)]):
        picture(i, size).save(tmp_path / f"photos/{i}.png")
    model = tiny_vae()
    encode(tmp_path / "photos", tmp_path / "latents", model, size=0, dtype="float32")
    decode_shards(model, shards(tmp_path / "latents"), tmp_path / "out")
    for i in range(3):
        x = from_uint8(read(tmp_path / f"photos/{i}.png"))[None]
        with torch.inference_mode():
            posterior = model.encode(pad_to_multiple(x, model.downscale))
            expected = to_uint8(crop_to(model.decode(posterior.mode()), tuple(x.shape[-2:])))[0]
        got = read(tmp_path / f"out/{i}.png")
        assert got.shape == expected.shape
        assert (got.int() - expected.int()).abs().max() <= 1


def test_decoding_gives_keys_with_one_file_name_different_files(tmp_path):
    for name in ("A.png", "A.bmp", "a.b.png", "a\nb.png"):
        picture(len(name)).save(tmp_path / name)
    encode(tmp_path, tmp_path / "latents")
    for _ in range(2):
        decode_shards(tiny_vae(), shards(tmp_path / "latents"), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["A.png", "A.png.png", "a\nb.png", "a.b.png"]


def test_killed_decoding_starts_again_and_leaves_nothing_half_written(tmp_path, image_folder):
    """A file that another process is writing at the moment stays."""
    model, out = tiny_vae(), tmp_path / "out"
    encode(image_folder, tmp_path / "latents", model)
    decode_shards(model, shards(tmp_path / "latents"), tmp_path / "whole")
    killed_before(
        out, "class1/4.png", lambda: decode_shards(model, shards(tmp_path / "latents"), out)
    )
    (partial,) = (out / "class1").glob(".partial-*")
    os.utime(partial, (0, 0))
    at_work = out / "class1" / ".partial-another.png"
    at_work.touch()
    decode_shards(model, shards(tmp_path / "latents"), out)
    at_work.unlink()
    assert files(out) == files(tmp_path / "whole")


def altered(tmp_path, image_folder, **changes):
    """A shard of one image, with other files in place of some."""
    encode(image_folder, tmp_path / "latents", shard_size=20)
    (shard,) = shards(tmp_path / "latents")
    entry = next(iter(read_shard(shard, LATENT)))
    files = {LATENT: entry.data, LATENT_META: entry.files[LATENT_META], **changes}
    write_tar(tmp_path / "one.tar", [(f"x.{ext}", content) for ext, content in files.items()])
    return shards(tmp_path / "one.tar")


@pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", "."])
def test_decoding_refuses_keys_that_lead_out_of_the_folder(tmp_path, image_folder, key):
    meta = f'{{"key": "{key}", "image": [16, 16]}}'.encode()
    with pytest.raises(ValueError, match="leads out"):
        decode_shards(
            tiny_vae(), altered(tmp_path, image_folder, **{LATENT_META: meta}), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("meta", [b"{", b"{}", b"7", b'{"key": "x", "image": 5}', None])
def test_decoding_broken_latents_is_refused(tmp_path, image_folder, meta):
    changes = {LATENT: b"\0" * 40} if meta is None else {LATENT_META: meta}
    with pytest.raises(ValueError, match=r"x\.latent\.safetensors: "):
        decode_shards(tiny_vae(), altered(tmp_path, image_folder, **changes), tmp_path / "out")


def latent_bytes(**changes):
    """A posterior of 2x2 positions for tiny_vae, with other tensors in place of some."""
    return save({"mean": torch.zeros(4, 2, 2), "std": torch.ones(4, 2, 2), **changes})


def meta_bytes(key, image=(16, 16)):
    return json.dumps({"key": key, "width": 16, "height": 16, "image": image}).encode()


@pytest.mark.parametrize(
    ("data", "meta", "message"),
    [
        (latent_bytes(mean=torch.full((4, 2, 2), math.nan)), None, "mean has values that are not"),
        (latent_bytes(mean=torch.full((4, 2, 2), 3e38)), None, "mean has values that are not"),
        (latent_bytes(std=torch.full((4, 2, 2), math.inf)), None, "std has values that are not"),
        (latent_bytes(std=torch.full((4, 2, 2), -1.0)), None, "std has negative values"),
        (
            latent_bytes(mean=torch.zeros(4, 0, 4), std=torch.ones(4, 0, 4)),
            None,
            r"of shape \(4, 0, 4\)",
        ),
        (None, meta_bytes("bad", (-5, -5)), "of an image of -5x-5 pixels"),
        (None, meta_bytes("bad", (16, 9999)), "'bad' has 16x9999 pixels, but a latent of 2x2"),
        (None, meta_bytes("bad", (8, 16)), "'bad' has 8x16 pixels, but a latent of 2x2"),
        (None, meta_bytes("a\0b"), r"the key 'a\\x00b' can't name a file"),
        (None, meta_bytes("\ud800"), r"the key '\\ud800' is not text"),
        (None, meta_bytes("\ud800" + 59 * "k"), r"the key '\\ud800k{59}' is not text"),
        (None, meta_bytes("\ud800" + 60 * "k"), r"the key '\\ud800k{56}\.\.\.' is not text"),
        (None, meta_bytes("k" * 300), "the key 'kkkkk.*\\.\\.\\.' can't name a file"),
        (None, meta_bytes("k/" * 1500), "the key 'k/k/.*' can't name a file"),
        (None, meta_bytes("../x"), "the key '../x' leads out of the folder"),
    ],
)
def test_a_bad_latent_is_named_and_the_others_are_decoded(tmp_path, data, meta, message):
    """With its shard and its files' name."""
    (tmp_path / "shards").mkdir()
    files = [("a.latent.safetensors", latent_bytes()), ("a.latent.json", meta_bytes("a"))]
    files += [("bad.latent.safetensors", data or latent_bytes())]
    files += [("bad.latent.json", meta or meta_bytes("bad"))]
    files += [("c.latent.safetensors", latent_bytes()), ("c.latent.json", meta_bytes("c"))]
    write_tar(tmp_path / "shards" / "0.tar", files)
    done, (error,) = decode_shards(tiny_vae(), shards(tmp_path / "shards"), tmp_path / "out")
    assert done == 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["a.png", "c.png"]
    assert error.name.startswith(str(tmp_path / "shards" / "0.tar"))
    assert error.name.endswith("bad.latent.safetensors")
    assert re.search(message, error.reason), error.reason


def test_a_damaged_shard_is_named_and_what_comes_before_is_decoded(tmp_path):
    files = [(f"{name}.latent.safetensors", latent_bytes()) for name in "ab"]
    files += [(f"{name}.latent.json", meta_bytes(name)) for name in "ab"]
    path = write_tar(tmp_path / "0.tar", sorted(files))
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"b.latent.safetensors") + 600])
    done, (error,) = decode_shards(tiny_vae(), [Shard(str(path), 2)], tmp_path / "out")
    assert (done, error.name) == (1, str(path))
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["a.png"]


def test_a_latent_that_decodes_to_no_picture(tmp_path):
    """Its values are allowed, but the decoder makes none of them."""
    (tmp_path / "shards").mkdir()
    model = Shrunk()
    files = [("a.latent.safetensors", save({"latent": torch.zeros(3, 8, 8)}))]
    files += [("a.latent.json", meta_bytes("a"))]
    files += [("b.latent.safetensors", save({"latent": torch.full((3, 8, 8), 1e5)}))]
    files += [("b.latent.json", meta_bytes("b"))]
    write_tar(tmp_path / "shards" / "0.tar", files)
    model.gain.data.fill_(1e-35)
    done, (error,) = decode_shards(model, shards(tmp_path / "shards"), tmp_path / "out")
    assert done == 1
    assert error.reason == "'b' decodes to values that are not finite"


def test_decoding_latents_of_another_model_is_refused(tmp_path, image_folder):
    encode(image_folder, tmp_path / "latents", Shrunk())
    with pytest.raises(ValueError, match=r"class0/0\.png: .*3 channels"):
        decode_shards(tiny_vae(), shards(tmp_path / "latents"), tmp_path / "out")
