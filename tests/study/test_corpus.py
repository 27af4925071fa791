import json

import imagehash
import numpy as np
import pytest
from PIL import Image

from olvae.files import file_sha256
from study import corpus
from study.debian import Licence
from study.packages import PACKAGES, SAMPLES_HELD_OUT, Package
from tests.data.images import saved

PACKAGE = Package("wallpapers", "1-1", "w.deb", "", ("*",))


def noise(width, height, seed=0, cell=4):
    """A picture with detail at every scale."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // cell, width // cell, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def photograph(name, image):
    return corpus.Photograph(
        name, PACKAGE, f"usr/{name}.png", saved(image, "PNG"), Licence("Ada", "CC0-1.0", "a file")
    )


def test_detail_is_the_psnr_after_shrinking():
    image = noise(64, 64)
    back = image.resize((8, 8), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    error = np.mean((np.asarray(image, float) - np.asarray(back, float)) ** 2)
    assert corpus.detail(image) == pytest.approx(10 * np.log10(255**2 / error))
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    assert corpus.detail(image) < corpus.LARGEST_PSNR < corpus.detail(ramp)


@pytest.mark.parametrize(
    ("size", "whole", "tiles"),
    [
        ((300, 400), (300, 400), 0),
        ((800, 600), (683, 512), 0),  # a tile would be the whole again
        ((1024, 768), (683, 512), 2),
        ((1920, 1080), (910, 512), 6),
        ((2880, 1440), (1024, 512), 2),  # at half its resolution
    ],
)
def test_cut_gives_the_whole_and_its_tiles(size, whole, tiles):
    ends, pictures = zip(*corpus.cut(noise(*size)), strict=True)
    assert pictures[0].size == whole
    assert [picture.size for picture in pictures[1:]] == [(512, 512)] * tiles
    assert len(set(ends)) == 1 + tiles


def test_near_duplicates_are_one_group():
    image = noise(640, 480, cell=80)
    same = [image, image.resize((320, 240)), image.point(lambda v: v // 2)]
    pictures = [*same, noise(640, 480, 1, 80), image.rotate(180)]
    hashes = [imagehash.dhash(picture) for picture in pictures]
    names = ["a", "b", "c", "d", "e"]
    assert corpus.groups(names, hashes, ()) == ["a", "a", "a", "d", "e"]
    assert corpus.groups(names, hashes, [("e", "d")]) == ["a", "a", "a", "d", "d"]


def test_one_group_in_six_is_held_out():
    held_out = [name for name in map(str, range(3000)) if corpus.is_held_out([name])]
    assert len(held_out) == pytest.approx(500, abs=70)
    assert corpus.is_held_out(["zz", held_out[0]]) == corpus.is_held_out([held_out[0], "zz"])
    assert all(corpus.is_held_out([name, "0"]) for name in SAMPLES_HELD_OUT)


def test_build_groups_selects_and_writes_a_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "HELD_OUT", 2)
    pictures = {f"p{i}": noise(700, 660, i, 20) for i in range(6)}
    pictures |= {"p0-small": pictures["p0"].resize((350, 330)), "tiny": noise(200, 400)}
    pictures["grey"] = Image.new("RGB", (300, 300), (90, 90, 90))
    stamp = noise(300, 300, 9).convert("RGBA")
    stamp.putalpha(Image.fromarray(np.tile(np.repeat([0, 255], 150).astype(np.uint8), (300, 1))))
    pictures["stamp"] = stamp
    found = [photograph(name, image) for name, image in pictures.items()]
    result = corpus.build(found, tmp_path, "recipe")

    assert set(result["dropped"]) == {"tiny", "grey"}
    assert "smaller than 256" in result["dropped"]["tiny"]
    assert "without detail" in result["dropped"]["grey"]
    sides = {name: source["held_out"] for name, source in result["photographs"].items()}
    assert set(sides.values()) == {True, False}
    assert result["photographs"]["p0-small"]["group"] == "p0"
    assert sides["p0-small"] == sides["p0"]
    assert sides["stamp"] is False
    on_disk = {f"{path.parent.name}/{path.name}" for path in tmp_path.glob("*/*.jpg")}
    assert on_disk == set(result["files"])
    for name, file in result["files"].items():
        assert file["sha256"] == file_sha256(tmp_path / name)
        assert sides[file["photograph"]] == name.startswith("held_out")
    wholes = [name for name in on_disk if name.startswith("held_out/")]
    assert len(wholes) == sum(sides.values())

    with Image.open(tmp_path / "train" / "stamp.jpg") as image:
        left = np.asarray(image)[:, 10:140]
    assert left.std((0, 1)).max() < 2  # one colour where it was transparent

    text = corpus.licences(result)
    assert text.count("Licence: CC0-1.0") == len(sides)
    again = corpus.build(found, tmp_path, "recipe")
    assert again == result


def test_a_finished_corpus_is_kept_and_another_recipe_starts_anew(tmp_path, monkeypatch):
    made = []

    def contents(path, package):
        made.append(package.name)
        images = {
            f"usr/{package.name}-{i}.png": saved(
                noise(300, 300, 10 * len(package.name) + i, 20), "PNG"
            )
            for i in range(3)
        }
        return type(
            "Contents",
            (),
            {
                "photographs": images,
                "package": package,
                "licence": lambda *_: Licence("A", "B", "C"),
            },
        )()

    monkeypatch.setattr(
        corpus, "fetch", lambda package, folder, mirror: folder / mirror.rpartition("/")[2]
    )
    monkeypatch.setattr(corpus, "Contents", contents)
    monkeypatch.setattr(corpus, "PACKAGES", PACKAGES[:2])
    arguments = ["--out", str(tmp_path / "out"), "--mirror", "file:///mirror"]
    for _ in range(2):
        corpus.main(arguments)
    assert made == [package.name for package in PACKAGES[:2]]
    before = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert len(before["photographs"]) == 6
    monkeypatch.setattr(corpus, "PACKAGES", PACKAGES[:1])
    features = tmp_path / "out" / "held_out_tiles.lite0.npy"
    features.touch()
    corpus.main(arguments)
    assert not features.exists()
    assert len(json.loads((tmp_path / "out" / "corpus.json").read_text())["photographs"]) == 3
    assert len(list((tmp_path / "out").glob("*/*.jpg"))) == 2 * 3  # each picture, and its one tile


def test_packages_of_the_corpus_have_versions_and_checksums():
    assert len({package.name for package in PACKAGES}) == len(PACKAGES)
    for package in PACKAGES:
        assert package.file.startswith("pool/main/")
        assert package.version.rpartition(":")[2] in package.file
        assert len(package.sha256) == 64
