import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from olvae.config import ConfigError, save
from olvae.data.image import EvalTransform, image_to_tensor
from olvae.data.picture_folder import find_images
from olvae.data.pixels.size_and_range import from_uint8
from olvae.data.shards.tar_reading import Shard
from olvae.evaluation.latent_report import LatentAccumulator
from olvae.export.decoding import decode_shards
from olvae.export.encode_inputs import find_inputs
from olvae.models.large.tiling import pad_to_multiple
from tests.data.images import encoded, picture, write_shard, write_shards, write_tar
from tests.export.latents import Blocks, Shrunk, encode, everything, pictures, tiny_vae
from tests.soak.killed import killed_before


def files(folder: Path) -> dict[str, dict[str, bytes]]:
    """Of every shard, its files in their order."""
    out = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            out[path.name] = {member.name: archive.extractfile(member).read() for member in archive}
    return out


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of every image, by its key."""
    found = {}
    for shard in files(folder).values():
        for name, content in shard.items():
            if name.endswith(".latent.safetensors"):
                meta = json.loads(shard[name.replace(".safetensors", ".json")])
                assert meta["key"] not in found
                found[meta["key"]] = load(content)
    return found


def noise(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Pictures without flat regions, which group norms would divide by next to nothing."""
    folder.mkdir()
    for i, (width, height) in enumerate(sizes):
        array = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_encoded_moments_are_those_of_the_model_rounded(tmp_path, image_folder, dtype, batch_size):
    model = tiny_vae()
    encode(
        image_folder,
        tmp_path / "out",
        model,
        dtype=str(dtype)[6:],
        flip=True,
        batch_size=batch_size,
    )
    keys = [path.relative_to(image_folder).as_posix() for path in find_images(image_folder)]
    found = tensors(tmp_path / "out")
    assert list(found) == keys
    x = pictures(image_folder)
    batches = [part for shard in x.split(5) for part in shard.split(batch_size)]
    with torch.inference_mode():
        for ending, images in (("", batches), ("_flip", [part.flip(-1) for part in batches])):
            posteriors = [model.encode(part) for part in images]
            for kind in ("mean", "std"):
                exact = torch.cat([getattr(posterior, kind) for posterior in posteriors])
                got = torch.stack([found[key][kind + ending] for key in keys])
                assert got.dtype == dtype
                assert torch.equal(got, exact.to(dtype))
    assert all(set(one) == {"mean", "std", "mean_flip", "std_flip"} for one in found.values())
    assert not torch.equal(found[keys[0]]["mean"], found[keys[0]]["mean_flip"])


def test_encoded_shards_layout_and_stats_json(tmp_path, image_folder):
    stats = encode(image_folder, tmp_path / "out")
    found = files(tmp_path / "out")
    assert [len(shard) for shard in found.values()] == [10, 10, 4]  # 5, 5 and 2 images
    assert list(found["000001.tar"])[:2] == ["00000005.latent.json", "00000005.latent.safetensors"]
    meta = {"key": "class0/0.png", "width": 48, "height": 40, "image": [16, 16]}
    assert json.loads(found["000000.tar"]["00000000.latent.json"]) == meta
    index = json.loads((tmp_path / "out/index.json").read_text())["shards"]
    assert index == {f"00000{i}.tar": {"images": n} for i, n in enumerate((5, 5, 2))}
    assert json.loads((tmp_path / "out/stats.json").read_text()) == stats
    assert stats["latent_shape"] == [4, 2, 2]
    said = {
        "count": 12,
        "size": 16,
        "moments": True,
        "dtype": "float16",
        "flip": False,
        "target": "tiny",
    }
    assert said.items() <= stats.items()
    assert stats["unreadable"] == {"count": 0, "images": []}


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_encoding_keeps_the_pixels_beside_the_latents(tmp_path, image_folder, source):
    """Everything else is as without them."""
    if source == "shards":
        image_folder = tmp_path / "shards"
        write_shards(image_folder, (5, 4))
    plain = encode(image_folder, tmp_path / "plain", flip=True)
    stats = encode(image_folder, tmp_path / "out", flip=True, images=True)
    assert stats == {**plain, "images": True}
    before, after = files(tmp_path / "plain"), files(tmp_path / "out")
    assert before.keys() == after.keys()
    pixels = []
    for name, shard in after.items():
        pixels += [(n, c) for n, c in shard.items() if n.endswith(".latent.png")]
        assert before[name] == {n: c for n, c in shard.items() if not n.endswith(".latent.png")}
    if source == "folder":
        photographs = [path.read_bytes() for path in find_images(image_folder)]
    else:
        photographs = [encoded(number) for number in range(9)]
    assert len(pixels) == len(photographs)
    for (_, content), photograph in zip(pixels, photographs, strict=True):
        found = Image.open(io.BytesIO(content))
        expected = EvalTransform(16)(Image.open(io.BytesIO(photograph)).convert("RGB"))
        assert (found.format, found.mode, found.size) == ("PNG", "RGB", (16, 16))
        assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("flip", [False, True])
def test_encoding_statistics_are_those_of_olvae_latents(tmp_path, image_folder, flip):
    model = tiny_vae()
    stats = encode(image_folder, tmp_path / "out", model, dtype="float32", flip=flip)
    x = pictures(image_folder)
    accumulator = LatentAccumulator(0)
    with torch.inference_mode():
        for part in [x, x.flip(-1)] if flip else [x]:
            accumulator.update(model.encode(part), range(len(x)))
    expected = accumulator.compute()["diffusion"]
    assert stats["count"] == 12
    assert stats["shift_factor"] == pytest.approx(expected["shift_factor"], abs=1e-6)
    assert stats["scaling_factor"] == pytest.approx(expected["scaling_factor"], rel=1e-5)
    assert stats["latents_mean"] == pytest.approx(expected["latents_mean"], abs=1e-6)
    assert stats["latents_std"] == pytest.approx(expected["latents_std"], rel=1e-5)


def test_encoded_samples_depend_on_seed_and_key_alone(tmp_path):
    noise_folder = noise(tmp_path / "noise", [(16, 16)] * 7)
    options = {"moments": False, "dtype": "float32", "flip": True}
    encode(noise_folder, tmp_path / "a", shard_size=5, batch_size=4, **options)
    encode(noise_folder, tmp_path / "b", shard_size=3, batch_size=1, **options)
    encode(noise_folder, tmp_path / "c", shard_size=5, seed=1, **options)
    model = tiny_vae()
    with torch.inference_mode():
        posterior = model.encode(pictures(noise_folder))
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    noises = []
    for i, key in enumerate(a):
        assert set(a[key]) == {"latent", "latent_flip"}
        assert torch.allclose(a[key]["latent"], b[key]["latent"], atol=1e-5)
        assert not torch.allclose(a[key]["latent"], c[key]["latent"], atol=1e-2)
        noises.append((a[key]["latent"] - posterior.mean[i]) / posterior.std[i])
    drawn = torch.stack(noises).double()
    assert abs(float(drawn.mean())) < 4 / drawn.numel() ** 0.5
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.2)
    assert len({float(one[0, 0, 0]) for one in noises}) == len(noises)


def test_encoding_with_a_deterministic_autoencoder_gives_its_latent(tmp_path, image_folder):
    stats = encode(image_folder, tmp_path / "out", Shrunk(), dtype="float32")
    x = torch.nn.functional.avg_pool2d(pictures(image_folder), 2)
    found = tensors(tmp_path / "out")
    assert all(set(one) == {"latent"} for one in found.values())
    assert torch.allclose(torch.stack([one["latent"] for one in found.values()]), x, atol=1e-6)
    assert stats["scaling_factor"] == pytest.approx(
        1 / float(x.double().std(correction=0)), rel=1e-5
    )


def test_encoding_with_an_autoencoder_without_weights(tmp_path, image_folder):
    bare = Shrunk()
    del bare.gain
    bare.gain = 1.0
    for name, model in (("bare", bare), ("same", Shrunk())):
        encode(image_folder, tmp_path / name, model)
        decode_shards(
            model,
            [Shard(str(path)) for path in sorted((tmp_path / name).glob("*.tar"))],
            tmp_path / name,
        )
    assert files(tmp_path / "bare") == files(tmp_path / "same")


def test_encoded_shards_keep_names_and_other_files(tmp_path):
    paths = write_shards(tmp_path / "shards", (3, 2))
    first = [
        ("0000.jpg", encoded(0)),
        ("0000.json", b'{"a": 1}'),
        ("0000.cls", b"7"),
        ("0000.txt", "ä cat".encode()),
    ]
    write_tar(paths[0], [*first, ("0001.jpg", encoded(1)), ("0001.cls", b"8")])
    stats = encode(tmp_path / "shards", tmp_path / "out")
    found = files(tmp_path / "out")
    assert stats["count"] == 4
    assert set(found["000000.tar"]) == {
        *("0000.json", "0000.cls", "0000.txt", "0000.latent.json", "0000.latent.safetensors"),
        *("0001.cls", "0001.latent.json", "0001.latent.safetensors"),
    }
    for name, content in first[1:]:
        assert found["000000.tar"][name] == content
    assert json.loads(found["000001.tar"]["0003.json"]) == {"n": 3}
    meta = {"key": "001/0003", "width": 40, "height": 32, "image": [16, 16]}
    assert json.loads(found["000001.tar"]["0003.latent.json"]) == meta


def test_encoding_images_of_their_own_sizes(tmp_path):
    """Odd sizes among others; mirrored before they are padded,
    so that the padding stays at the right.
    """
    sizes = [(16, 16), (16, 16), (13, 9), (8, 24), (16, 16), (3, 1)]
    (tmp_path / "photos").mkdir()
    for i, size in enumerate(sizes):
        picture(i, size).save(tmp_path / f"photos/{i}.png")
    model = tiny_vae()
    stats = encode(
        tmp_path / "photos",
        tmp_path / "out",
        model,
        size=0,
        flip=True,
        dtype="float32",
        shard_size=10,
    )
    assert (stats["count"], stats["latent_shape"], stats["size"]) == (6, None, 0)
    found = tensors(tmp_path / "out")
    values = []
    for i, (width, height) in enumerate(sizes):
        x = from_uint8(image_to_tensor(picture(i, (width, height))))[None]
        for name, image in (("mean", x), ("mean_flip", x.flip(-1))):
            with torch.inference_mode():
                expected = model.encode(pad_to_multiple(image, model.downscale)).mean[0]
            got = found[f"{i}.png"][name]
            assert got.shape == expected.shape == (4, -(-height // 8), -(-width // 8))
            assert torch.allclose(got, expected, atol=1e-4)
            values.append(got.double().flatten())
    assert stats["shift_factor"] == pytest.approx(float(torch.cat(values).mean()), abs=1e-6)
    meta = files(tmp_path / "out")["000000.tar"]["00000002.latent.json"]
    assert json.loads(meta) == {"key": "2.png", "width": 13, "height": 9, "image": [13, 9]}


@pytest.fixture
def many_sizes(tmp_path) -> Path:
    sizes = [(16, 24), (24, 16), (16, 24), (15, 22), (8, 8), (24, 16), (16, 23), (24, 15)]
    return noise(tmp_path / "many", sizes)


@pytest.mark.parametrize("flip", [False, True])
def test_batches_of_padded_images_are_as_one_by_one(tmp_path, many_sizes, flip):
    options = {"size": 0, "dtype": "float32", "flip": flip, "shard_size": 7}
    for kind, model in (("blocks", Blocks()), ("tiny", tiny_vae())):
        one = encode(many_sizes, tmp_path / f"{kind}1", model, batch_size=1, **options)
        four = encode(many_sizes, tmp_path / f"{kind}4", model, batch_size=4, **options)
        a, b = files(tmp_path / f"{kind}1"), files(tmp_path / f"{kind}4")
        # The same order.
        assert [list(shard) for shard in a.values()] == [list(shard) for shard in b.values()]
        found, batched = tensors(tmp_path / f"{kind}1"), tensors(tmp_path / f"{kind}4")
        for key, kinds in found.items():
            for name, z in kinds.items():
                assert float((z - batched[key][name]).square().mean().sqrt()) < 1e-5
        if kind == "blocks":  # no sum that another batch could round in another way
            assert (a, one) == (b, four)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_encoding_in_half_precision_is_autocast_with_a_float32_posterior(
    tmp_path, image_folder, precision
):
    model, dtype = tiny_vae(), {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    options = {"dtype": "float32", "batch_size": 5}
    stats = encode(image_folder, tmp_path / "half", model, precision=precision, **options)
    assert stats["precision"] == precision
    found = list(tensors(tmp_path / "half").values())
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        moments = torch.cat([model.moments(x) for x in pictures(image_folder).split(5)])
    mean, logvar = moments.float().chunk(2, dim=1)
    got = {name: torch.stack([one[name] for one in found]) for name in ("mean", "std")}
    assert torch.equal(got["mean"], mean)
    assert torch.allclose(got["std"], (0.5 * logvar).exp())
    assert not torch.equal(got["std"], got["std"].to(dtype).float())
    encode(image_folder, tmp_path / "full", model, **options)
    full = torch.stack([one["mean"] for one in tensors(tmp_path / "full").values()])
    assert 0 < float((full - mean).abs().max()) < 0.1


def test_encoding_takes_folders_as_classes_if_asked(tmp_path, image_folder):
    stats = encode(image_folder, tmp_path / "out", classes=True)
    assert stats["classes"] == ["class0", "class1", "class2"]
    for shard in files(tmp_path / "out").values():
        for name, content in shard.items():
            if name.endswith(".latent.json"):
                folder = json.loads(content)["key"].split("/")[0]
                assert (
                    shard[name.replace("latent.json", "cls")]
                    == folder.removeprefix("class").encode()
                )
    picture(0).save(image_folder / "loose.png")
    with pytest.raises(ConfigError, match=r"`classes`: loose\.png"):
        encode(image_folder, tmp_path / "loose", classes=True)
    write_shards(tmp_path / "shards", (2,))
    params = {
        "shards": str(tmp_path / "shards"),
        "val_shards": str(tmp_path / "shards"),
        "size": 16,
        "batch_size": 1,
    }
    node = {"target": "olvae.data.shards.webdataset.WebDatasetSource", "params": params}
    save({"data": node}, tmp_path / "shards.yaml")
    for shards in ("shards", "shards.yaml"):
        with pytest.raises(ConfigError, match="`classes` is"):
            encode(tmp_path / shards, tmp_path / "more", classes=True)


def test_encoding_skips_and_lists_unreadable_images(tmp_path, image_folder):
    broken = find_images(image_folder)[1]
    whole = encode(image_folder, tmp_path / "whole")
    broken.write_bytes(b"no picture")
    stats = encode(image_folder, tmp_path / "out")
    assert stats["count"] == whole["count"] - 1 == 11
    assert stats["unreadable"]["count"] == 1
    assert stats["unreadable"]["images"][0]["name"].endswith("class0/3.png")
    name = broken.relative_to(image_folder).as_posix()
    assert set(tensors(tmp_path / "whole")) - set(tensors(tmp_path / "out")) == {name}
    for path in find_images(image_folder):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of .*class0/0\.png"):
        encode(image_folder, tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == [".encode"]
    for number, path in enumerate(find_images(image_folder)):
        picture(number).save(path)
    assert encode(image_folder, tmp_path / "none")["count"] == 12  # nothing of the failure is left


def test_encoding_a_shard_without_images_and_one_that_is_cut_off(tmp_path):
    paths = write_shards(tmp_path / "shards", (3, 3, 3))
    write_shard(paths[0], [0, 1], broken={0: b"x", 1: b"y"})
    paths[2].write_bytes(paths[2].read_bytes()[:4000])
    stats = encode(tmp_path / "shards", tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == ["000001.tar", "000002.tar"]
    assert list(json.loads((tmp_path / "out/index.json").read_text())["shards"]) == [
        "000001.tar",
        "000002.tar",
    ]
    names = [error["name"] for error in stats["unreadable"]["images"]]
    assert names[:2] == ["000/0000", "000/0001"]
    assert names[2:] == [str(paths[2])]
    # How many images the shard had that is cut off is unknown.
    assert stats["unreadable"]["count"] == 3
    paths[2].write_bytes(paths[2].read_bytes()[:700])
    counts = {path.name: {"images": n} for path, n in zip(paths, (2, 3, 3), strict=True)}
    (tmp_path / "shards/index.json").write_text(json.dumps({"shards": counts}))
    stats = encode(tmp_path / "shards", tmp_path / "indexed")
    assert (stats["count"], stats["unreadable"]["count"], len(stats["unreadable"]["images"])) == (
        3,
        5,
        3,
    )


def test_encoding_a_remote_shard_that_fails_is_not_finished(tmp_path):
    write_shards(tmp_path / "shards", (3,))
    shard = tmp_path / "shards/000.tar"
    url = f"pipe:cat {shard}; test ! -e {tmp_path}/down"
    (tmp_path / "down").touch()
    with pytest.raises(OSError, match="to continue"):
        encode(url, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))
    (tmp_path / "down").unlink()
    assert encode(url, tmp_path / "out")["count"] == 3


def test_killed_encoding_leaves_nothing_half_written_when_run_again(tmp_path, image_folder):
    def encode_to(folder: Path) -> None:
        encode(image_folder, folder, shard_size=2, batch_size=4, workers=1, flip=True, images=True)

    out = tmp_path / "out"
    encode_to(tmp_path / "whole")
    for name in (
        ".encode/plan.json",
        "000001.tar",
        ".encode/000001.json",
        "index.json",
        "stats.json",
    ):
        killed_before(out, name, lambda: encode_to(out))
        assert not (out / "stats.json").exists()
    encode_to(out)
    assert everything(out) == everything(tmp_path / "whole")
    assert everything(out / ".encode") == everything(tmp_path / "whole" / ".encode")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 24}, r"size 16 \(now 24\)"),
        ({"flip": True}, r"flip False \(now True\)"),
        ({"precision": "bf16"}, r"precision 32 \(now bf16\)"),
        ({"images": True}, r"images False \(now True\)"),
        ({"model": 1}, "begun with other weights:"),
        ({"source": 1}, "begun with other images:"),
        ({"edited": 1}, "begun with other images:"),
        ({"shard_size": 4}, r"shard_size 5 \(now 4\)"),
    ],
)
def test_encoding_refuses_another_job_in_the_same_folder(tmp_path, image_folder, change, text):
    encode(image_folder, tmp_path / "out")
    before = everything(tmp_path / "out")
    if change.pop("model", None):
        change["model"] = tiny_vae(1)
    if change.pop("source", None):
        find_images(image_folder)[0].unlink()
    if change.pop("edited", None):  # the same name
        Image.new("RGB", (48, 40)).save(find_images(image_folder)[0])
    with pytest.raises(ConfigError, match=text):
        encode(image_folder, tmp_path / "out", **change)
    assert everything(tmp_path / "out") == before


def test_encoding_refuses_settings_that_do_not_fit(tmp_path, image_folder):
    with pytest.raises(ValueError, match=r"`size` 20: .*8"):
        encode(image_folder, tmp_path / "out", size=20)
    with pytest.raises(ValueError, match=r"`images`: .*one size"):
        encode(image_folder, tmp_path / "out", size=0, images=True)
    multispectral = Shrunk()
    multispectral.in_channels = 6
    with pytest.raises(ValueError, match=r"PNG .* 6"):
        encode(image_folder, tmp_path / "out", multispectral, images=True)
    grey = {"root": str(image_folder), "size": 16, "batch_size": 1, "channels": 1}
    save(
        {"data": {"target": "olvae.data.picture_folder.FolderSource", "params": grey}},
        tmp_path / "grey.yaml",
    )
    with pytest.raises(ConfigError, match=r"1 channel, .*takes 3"):
        encode(tmp_path / "grey.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="other files"):
        encode(image_folder, image_folder)
    with pytest.raises(ValueError, match=r"e\+05 .*float16"):
        encode(image_folder, tmp_path / "large", Shrunk(3e5))
    with pytest.raises(ValueError, match=r"in 32: .*diverged"):
        encode(image_folder, tmp_path / "nan", Shrunk(float("nan")))
    with pytest.raises(ValueError, match=r"in fp16: .*`precision`"):
        encode(image_folder, tmp_path / "half", Shrunk(float("nan")), precision="fp16")
    for name in ("large", "nan"):
        assert [path.name for path in (tmp_path / name).iterdir()] == [".encode"]
    # Nothing was finished with float16.
    encode(image_folder, tmp_path / "large", Shrunk(3e5), dtype="bfloat16")
    with pytest.raises(ValueError, match="all equal"):
        encode(image_folder, tmp_path / "zero", Shrunk(0.0))
    (tmp_path / "mix.yaml").write_text(
        "data: {target: olvae.data.mix.MixSource, params: {size: 16, batch_size: 1, sources: "
        "[{target: olvae.data.picture_folder.FolderSource, "
        f"params: {{root: {image_folder}, size: 16, batch_size: 1}}}}]}}}}"
    )
    with pytest.raises(ConfigError, match="one by one"):
        find_inputs(str(tmp_path / "mix.yaml"), 3, 5)
