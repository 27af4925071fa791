"""Make the study's corpus: photographs from Debian packages, 512 pixels high or wide,
some of them held out.

    python -m study.corpus --out study/corpus-out
    python -m study.corpus --free --out study/corpus-free  # CC0, public domain and CC BY alone

Folders: `train`; `train_tiles`, parts of these of 256 pixels, for small crops at the scale of
pictures of that size; `held_out`, one picture for each photograph that is never trained on;
`held_out_tiles`, parts of these at a larger scale. `corpus.json` says where every file is from,
with its SHA-256; `LICENCES.txt` who made it.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import imagecodecs
import imagehash
import numpy as np
import PIL
from PIL import Image

from olvae.cli.main import print_error
from olvae.data.image import resize_shorter_side
from olvae.files import atomic_write, check_folder, file_sha256, write_json
from study.debian import Contents, Licence, fetch, system_mirror
from study.free import FREE, HELD_OUT_BEFORE, STATED, belong_together
from study.packages import ALIASES, PACKAGES, SAMPLES_HELD_OUT, Package

SIDE = 512  # pixels: the shorter side of whole photographs, both sides of tiles
SMALLEST = 256  # pixels: the shortest side of a photograph; also the sides of `train_tiles`
HALVED = 1440  # pixels: from this shorter side on, tiles are cut at half the resolution
LARGEST_PSNR = 42.0
"""In dB, after shrinking to an eighth and back: above, a picture has no detail to speak of."""

DISTANCE = 8  # bits of 64 in which the difference hashes of near-duplicates may differ
HELD_OUT = 6  # one photograph in so many is held out
QUALITY = 95
# folders that tell no photographs apart
UNTOLD = ("contents", "images", "resource", "image", "animals")

FOLDERS = ("train", "train_tiles", "held_out", "held_out_tiles")
FEATURES = (
    ".lite0.npy"  # at the end of a folder's name: the file that study.measure keeps beside it
)


class Photograph(NamedTuple):
    """One photograph of a package: its name in the corpus, and where it is from."""

    name: str
    package: Package
    path: str
    content: bytes
    licence: Licence

    def open(self) -> Image.Image:
        """The picture in RGB; a cut-out is put on one colour, which its name decides."""
        with self._image() as image:
            if not self.is_cut_out:
                return image.convert("RGB")
            colour = tuple(hashlib.sha256(self.name.encode()).digest()[:3])
            picture = Image.new("RGB", image.size, colour)
            picture.paste(image.convert("RGB"), mask=image.convert("RGBA").getchannel("A"))
            return picture

    def _image(self) -> Image.Image:
        if self.path.endswith(".jxl"):  # which Pillow doesn't read
            return Image.fromarray(imagecodecs.jpegxl_decode(self.content))
        return Image.open(io.BytesIO(self.content))

    @property
    def is_cut_out(self) -> bool:
        """Has transparent parts: a stamp."""
        with self._image() as image:
            return (
                image.has_transparency_data
                and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
            )


def photographs(contents: Contents, free: bool = False) -> list[Photograph]:
    """The photographs of a package, by path, with the licences that the package states,
    or free.tsv.

    They are named after the package and the folders that tell them apart.

    Raises:
        ValueError: a picture is not the one that free.tsv means.
    """
    found = []
    root = os.path.commonpath([str(PurePosixPath(path).parent) for path in contents.photographs])
    for path, content in sorted(contents.photographs.items()):
        parts = PurePosixPath(path).relative_to(root).with_suffix("").parts
        title = "-".join(part for part in parts if part not in UNTOLD)
        name = f"{_slug(contents.package.name)}_{_slug(title)}"
        if free:
            licence, checksum = STATED[contents.package.name, path]
            if hashlib.sha256(content).hexdigest() != checksum:
                raise ValueError(f"{path} of {contents.package.name} is not free.tsv's picture")
        else:
            licence = contents.licence(path)
        found.append(Photograph(name, contents.package, path, content, licence))
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def detail(image: Image.Image) -> float:
    """How well an image survives shrinking to an eighth and back (bicubic): PSNR in dB,
    low for much detail."""
    small = image.resize(
        (max(1, image.width // 8), max(1, image.height // 8)), Image.Resampling.BICUBIC
    )
    back = np.asarray(small.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float64)
    error = float(np.mean((np.asarray(image, dtype=np.float64) - back) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-12)))


def groups(
    names: Sequence[str], hashes: Sequence[imagehash.ImageHash], aliases: Sequence[tuple[str, str]]
) -> list[str]:
    """For each photograph the first name of its group of near-duplicates.

    Args:
        hashes: difference hashes; those at most ``DISTANCE`` bits apart belong together, and so do
            chains of them.
        aliases: pairs of names that belong together all the same.
    """
    pairs = {frozenset(pair) for pair in aliases}
    group = list(range(len(names)))
    for i in range(len(names)):
        for j in range(i):
            if hashes[i] - hashes[j] <= DISTANCE or {names[i], names[j]} in pairs:
                low, high = sorted((group[i], group[j]))
                group = [low if other == high else other for other in group]
    return [names[index] for index in group]


def is_held_out(group: Sequence[str], always: Sequence[str] = SAMPLES_HELD_OUT) -> bool:
    """Whether photographs that belong together are held out: one group in six,
    by the hash of its first name, and those with one of ``always``."""
    if any(name in always for name in group):
        return True
    return int.from_bytes(hashlib.sha256(min(group).encode()).digest()[:8], "big") % HELD_OUT == 0


def cut(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """The whole photograph, and tiles of it at a larger scale, each with the end of its name.

    The whole is resized to a shorter side of at most 512 pixels. Tiles are 512 pixels wide and
    high, do not overlap and lie around the centre. Photographs of 1440 pixels and more are cut at
    half their resolution, where they are sharp; smaller ones as they are, if they are a quarter
    larger than the whole.
    """
    yield (
        "",
        resize_shorter_side(image, SIDE, Image.Resampling.LANCZOS)
        if min(image.size) > SIDE
        else image,
    )
    if min(image.size) >= HALVED:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    if min(image.size) < SIDE * 5 // 4:
        return
    yield from _tiles(image, SIDE)


def _tiles(image: Image.Image, side: int) -> Iterator[tuple[str, Image.Image]]:
    for row in range(image.height // side):
        for column in range(image.width // side):
            left = image.width % side // 2 + column * side
            top = image.height % side // 2 + row * side
            yield f"_{row}{column}", image.crop((left, top, left + side, top + side))


def build(
    found: Sequence[Photograph], out: Path, recipe: str, free: bool = False
) -> dict[str, Any]:
    """Write the corpus of these photographs into a folder.

    Pictures that are there already are kept. Of the free corpus photographs by one author are on
    one side.

    Returns:
        what corpus.json says: ``photographs`` (where each is from, its group and side), ``dropped``
        (with the reason), ``files`` (each with its photograph, size and SHA-256), the recipe's
        hash, and Pillow's version, on which the bytes of the files depend.

    Raises:
        ValueError: two photographs have the same name.
    """
    if len({photograph.name for photograph in found}) < len(found):
        raise ValueError("two photographs have the same name")
    dropped: dict[str, str] = {}
    kept: list[Photograph] = []
    hashes: list[imagehash.ImageHash] = []
    for photograph in found:
        image = photograph.open()
        if min(image.size) < SMALLEST:
            dropped[photograph.name] = (
                f"{image.width}x{image.height} pixels: smaller than {SMALLEST}"
            )
        elif (psnr := detail(next(cut(image))[1])) > LARGEST_PSNR:
            dropped[photograph.name] = (
                f"without detail: {psnr:.1f} dB after shrinking to an eighth and back"
            )
        else:
            kept.append(photograph)
            hashes.append(imagehash.dhash(image))
    names = [photograph.name for photograph in kept]
    authors = [(photograph.name, photograph.licence.author) for photograph in kept]
    aliases = belong_together(authors) if free else ALIASES
    group_of = dict(zip(names, groups(names, hashes, aliases), strict=True))
    sources: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}
    for folder in FOLDERS:
        (out / folder).mkdir(parents=True, exist_ok=True)
    for photograph in kept:
        group = group_of[photograph.name]
        members = [name for name in names if group_of[name] == group]
        always = HELD_OUT_BEFORE if free else SAMPLES_HELD_OUT
        held_out = is_held_out(members, always) and not photograph.is_cut_out
        sources[photograph.name] = {
            "package": f"{photograph.package.name} {photograph.package.version}",
            "path": photograph.path,
            "group": group,
            "held_out": held_out,
            **photograph.licence._asdict(),
        }
        for end, picture in cut(photograph.open()):
            if end and detail(picture) > LARGEST_PSNR:
                continue
            folder = "train" if not held_out else "held_out_tiles" if end else "held_out"
            written = {f"{folder}/{photograph.name}{end}.jpg": picture}
            if not held_out:
                tiles = _tiles(picture, SMALLEST)
                written |= {
                    f"train_tiles/{photograph.name}{end}{part}.jpg": tile for part, tile in tiles
                }
            for name, image in written.items():
                if not (path := out / name).exists():
                    with atomic_write(path) as partial:
                        image.save(partial, quality=QUALITY, subsampling=0)
                size, checksum = list(image.size), file_sha256(path)
                files[name] = {"photograph": photograph.name, "size": size, "sha256": checksum}
    return {
        "recipe": recipe,
        "pillow": PIL.__version__,
        "photographs": sources,
        "dropped": dropped,
        "files": files,
    }


def licences(corpus: dict[str, Any]) -> str:
    """The text of LICENCES.txt: one entry for each photograph."""
    from_npm = {name for name, it in corpus["photographs"].items() if it["package"][0] == "@"}
    packages = "packages of Debian and npm" if from_npm else "Debian packages"
    lines = [
        (
            f"The pictures in these folders are made of photographs from {packages}; each is "
            "under the licence that"
        ),
        (
            "its entry names. Changes: cropped, resized, stored as JPEG; stamps were put on one "
            "colour."
        ),
    ]
    for name, source in corpus["photographs"].items():
        lines += [
            "",
            name,
            f"  Author: {source['author']}",
            f"  Source: {'npm' if name in from_npm else 'Debian'} {source['package']}, "
            f"{source['path']}",
            f"  Licence: {source['licence']}",
            f"  Stated in: {source['stated_in']}",
        ]
    return "\n".join(lines) + "\n"


def recipe_hash(free: bool = False) -> str:
    """A hash of everything that decides what the corpus holds."""
    rules = (
        FOLDERS,
        SIDE,
        SMALLEST,
        HALVED,
        LARGEST_PSNR,
        DISTANCE,
        HELD_OUT,
        QUALITY,
        UNTOLD,
        ALIASES,
        SAMPLES_HELD_OUT,
        (FREE, STATED, HELD_OUT_BEFORE) if free else PACKAGES,
    )
    return hashlib.sha256(repr(rules).encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch, choose, cut.

    What an earlier run downloaded and wrote is kept if the rules are the same.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("study/corpus-out"), help="the corpus's folder"
    )
    parser.add_argument("--mirror", help="a mirror of Debian (default: the one that apt uses here)")
    parser.add_argument(
        "--free",
        action="store_true",
        help="only photographs that are CC0, in the public domain or CC BY, with author and page",
    )
    given = parser.parse_args(arguments)
    try:
        print(summary(make(given.out, given.mirror, given.free)))
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))


def make(out: Path, mirror: str | None, free: bool = False) -> dict[str, Any]:
    """Make the corpus, or that of free licences, in a folder, unless it is there by these rules.

    Returns what corpus.json says, as :func:`build`.

    Raises:
        ValueError: a package can't be had, or is not as expected.
        OSError: the folder can't be written to.
    """
    recipe, finished = recipe_hash(free), check_folder(out) / "corpus.json"
    mark = out / "recipe"
    if not (mark.exists() and mark.read_text() == recipe):
        finished.unlink(missing_ok=True)
        for folder in FOLDERS:
            shutil.rmtree(out / folder, ignore_errors=True)
            (out / f"{folder}{FEATURES}").unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text(recipe)
    if not finished.exists():
        mirror = mirror or system_mirror()
        found = []
        for package in FREE if free else PACKAGES:
            contents = Contents(fetch(package, out / "packages", mirror), package)
            found += photographs(contents, free)
            print(f"{package.name} {package.version}: {len(contents.photographs)} photographs")
        corpus = build(found, out, recipe, free)
        (out / "LICENCES.txt").write_text(licences(corpus), encoding="utf-8")
        write_json(corpus, finished)
    content: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
    return content


def summary(corpus: dict[str, Any]) -> str:
    """How many photographs and pictures there are."""
    held_out = sum(source["held_out"] for source in corpus["photographs"].values())
    counts = {
        folder: sum(name.startswith(f"{folder}/") for name in corpus["files"]) for folder in FOLDERS
    }
    return (
        f"{len(corpus['photographs']) - held_out} photographs to train on "
        f"({counts['train']} pictures, {counts['train_tiles']} tiles), {held_out} held out "
        f"({counts['held_out']} pictures and {counts['held_out_tiles']} tiles), "
        f"{len(corpus['dropped'])} dropped"
    )


if __name__ == "__main__":
    main()
