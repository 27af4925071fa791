"""Commands on files whose names are not UTF-8, as old cameras, archives and Windows left them."""

import csv
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from tests.data.images import encoded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")


COUNT = 3
KEYS = {f"caf\\xe9{i}.jpg" for i in range(COUNT)}


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(COUNT):
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9%d.jpg" % i)).write_bytes(encoded(i))
    return folder


def test_data_check_of_names_that_are_not_utf_8(olvae, photos, monkeypatch):
    """test_packing.py has such names in shards."""
    Path(os.fsdecode(os.fsencode(photos) + b"/bad\xe9.jpg")).write_text("no picture")
    code, out, _ = olvae("data", "check", photos, "--size", 16, "--json")
    assert [error["name"] for error in json.loads(out)["unreadable"]] == ["bad\\xe9.jpg"]
    assert code == 1


def test_encode_and_decode_of_names_that_are_not_utf_8(olvae, done, photos, target, tmp_path):
    """Of GNU tar, whose names are those of the files; and the shard's own is no better."""
    (tmp_path / "shards").mkdir()
    with tarfile.open(os.fsencode(tmp_path) + b"/shards/\xe9t\xe9.tar", "w") as archive:
        for path in sorted(photos.iterdir()):
            archive.add(path, path.name)
    done(
        "encode", target, "--data", tmp_path / "shards", "--size", 16, "--out", tmp_path / "latents"
    )
    assert olvae("decode", target, tmp_path / "latents", "--out", tmp_path / "images")[0] == 0
    names = {
        str(path.relative_to(tmp_path / "images")) for path in (tmp_path / "images").rglob("*.png")
    }
    assert names == {f"\\xe9t\\xe9/caf\\xe9{i}.png" for i in range(COUNT)}


def test_evaluate_and_reconstruct_of_names_that_are_not_utf_8(
    olvae, done, photos, target, tmp_path
):
    out = tmp_path / "evaluation"
    assert (
        olvae(
            "evaluate", target, "--data", photos, "--size", 16, "--metrics", "psnr", "--out", out
        )[0]
        == 0
    )
    rows = csv.DictReader(io.StringIO((out / "per_image.csv").read_text(encoding="utf-8")))
    assert {row["key"] for row in rows} == KEYS
    assert "caf\\xe90.jpg" in (out / "report.html").read_text(encoding="utf-8")
    err = done("reconstruct", target, photos, "--out", tmp_path / "out")
    assert f"{photos}/caf\\xe90.jpg -> {tmp_path}/out/caf\\xe90.png" in err
