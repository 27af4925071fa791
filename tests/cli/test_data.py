"""``olvae data``, as a user types it."""

import json
from functools import partial

import pytest

from olvae.cli.options import ProgressBar
from tests.data.images import members, noise
from tests.data.pixels.files import tiff_of_pages, values


@pytest.fixture
def olvae(olvae):
    return partial(olvae, "data")


def test_pack_and_check(olvae, done, image_folder, tmp_path):
    shards = tmp_path / "shards"
    code, out, err = olvae("pack", image_folder, "--out", shards, "--shard-size", 5)
    assert (code, out) == (0, "")
    assert "12 images" in err
    assert "in 3 shards\n" in err
    assert err.endswith(f"shards:  {shards}\nindex:   {shards / 'index.json'}\n")
    err = done("pack", image_folder, "--out", shards, "--shard-size", 5)
    assert "3 shards, 3 of them" in err
    code, out, err = olvae("check", shards, "--size", 32, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["images"], found["problems"], len(found["shards"])) == (12, [], 3)
    assert found["width"] == {"min": 48.0, "median": 48.0, "max": 48.0}
    assert err == ""
    assert "12, all readable" in done("check", image_folder, "--size", 32)


def test_pack_resizes_converts_and_counts_the_unreadable(olvae, done, image_folder, tmp_path):
    (image_folder / "bad.png").touch()
    options = (
        "--resize",
        20,
        "--format",
        "webp",
        "--quality",
        80,
        "--no-shuffle",
        "--max-unreadable",
        0.1,
    )
    err = done("pack", image_folder, "--out", tmp_path / "shards", *options, "--workers", 1)
    assert "1 unreadable image left out: bad.png " in err
    packed = members(tmp_path / "shards")
    assert list(packed) == sorted(packed)
    for _, details in packed.values():
        assert (details["width"], details["height"]) == (24, 20)
        assert details["file"].endswith(".webp")
    packed_with = json.loads((tmp_path / "shards" / "index.json").read_text())["packed"]
    expected = {
        "shard_size": 1,
        "seed": None,
        "resize": 20,
        "format": "webp",
        "quality": 80,
        "channels": 3,
    }
    assert packed_with == expected
    code, _, err = olvae("pack", image_folder, "--out", tmp_path / "other")
    assert code == 1
    assert "more than --max-unreadable 0.01: bad.png " in err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("pack", "PHOTOS", "--out", "OUT", "--quality", "80"), "--resize"),
        (
            ("pack", "PHOTOS", "--out", "OUT", "--resize", "8", "--format", "gif"),
            "choose from jpg, png, webp",
        ),
        (
            (
                "pack",
                "PHOTOS",
                "--out",
                "OUT",
                "--resize",
                "8",
                "--format",
                "png",
                "--quality",
                "8",
            ),
            "--quality applies",
        ),
        (
            ("pack", "PHOTOS", "--out", "OUT", "--seed", "3", "--no-shuffle"),
            "--seed applies to --shuffle",
        ),
        (("pack", "PHOTOS", "--out", "PHOTOS/out"), "is inside the images' folder"),
    ],
)
def test_wrong_usage_of_pack_is_one_line(refused, image_folder, tmp_path, arguments, line):
    given = [
        a.replace("PHOTOS", str(image_folder)).replace("OUT", str(tmp_path / "out"))
        for a in arguments
    ]
    assert line in refused(2, *given)
    assert not (tmp_path / "out").exists()


def test_data_check_exits_with_1_where_something_is_wrong(olvae, image_folder, tmp_path):
    (image_folder / "bad.png").write_text("not a picture")
    code, _, err = olvae("check", image_folder, "--size", 32)
    assert code == 1
    assert "bad.png: no known" in err
    assert "problem: 1 of 13 " in err
    (tmp_path / "nothing").mkdir()
    code, _, err = olvae("check", tmp_path / "nothing")
    assert code == 1
    assert "no images" in err


def test_ctrl_c_while_packing_says_how_to_go_on(olvae, done, image_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupt(*_: object) -> None:
        if list(out.glob("*.tar")):
            raise KeyboardInterrupt

    for i in range(20):
        noise(i, (400, 400)).save(image_folder / f"{i}.bmp")
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "set", interrupt)
        code, _, err = olvae("pack", image_folder, "--out", out, "--shard-size", 1, "--workers", 1)
    assert (code, err) == (
        130,
        f"stopped: finished shards are in {out}; the same command continues from there\n",
    )
    assert not list(out.glob(".packing/.partial-*"))
    assert not (out / "index.json").exists()
    finished = len(list(out.glob("*.tar")))
    assert 0 < finished < 32
    err = done("pack", image_folder, "--out", out, "--shard-size", 1)
    assert f"{finished} of them" in err


def test_the_range_of_a_stack_says_that_pages_are_no_channels(done, tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff_of_pages(values("uint16", 40).transpose(2, 0, 1)))
    err = done("range", tmp_path)
    assert f"{tmp_path / 'a.tif'}: its 40 channels" in err
