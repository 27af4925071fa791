"""Which Debian packages the corpus is made of, and which of their pictures are photographs.

``free.py`` chooses among them, and adds some, for the corpus of free licences.
"""

from typing import NamedTuple

SNAPSHOT = "https://snapshot.debian.org/archive/debian/20261130T000000Z"
"""Debian as it was on 30 November 2026. A mirror has the versions below as long as they are
in Debian 13 (trixie). Files are checked by SHA-256."""


class Package(NamedTuple):
    """A Debian package, or one of npm's, at one version, and the photographs in it.

    Args:
        file: its path on a mirror of Debian, or ``npm/`` and the name that npm packs it under.
        sha256: of that file.
        photographs: patterns (``fnmatch``; ``*`` crosses folders) of the paths that are taken.
            Files inside Qt's resource files (``.rcc``) have paths of their own.
        source: what the paths start with in Debian's copyright file, ``old`` for ``new`` in each
            pair.
    """

    name: str
    version: str
    file: str
    sha256: str
    photographs: tuple[str, ...]
    source: tuple[tuple[str, str], ...] = ()


def _paths(path: str, names: str) -> tuple[str, ...]:
    """``path`` with each of the names in the place of ``@``."""
    return tuple(path.replace("@", name) for name in names.split())


PACKAGES = (
    Package(
        "mate-backgrounds",
        "1.26.0-1",
        "pool/main/m/mate-backgrounds/mate-backgrounds_1.26.0-1_all.deb",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        ("usr/share/backgrounds/mate/nature/*",),
        (("usr/share/backgrounds/mate/", ""),),
    ),
    Package(
        "plasma-workspace-wallpapers",
        "4:6.3.4-1",
        "pool/main/p/plasma-workspace-wallpapers/plasma-workspace-wallpapers_6.3.4-1_all.deb",
        "b521d36486817f7a44c26faf247b9528138cc1ea1e8b154442a757c7e31faa2c",
        _paths(
            "usr/share/wallpapers/@/contents/images/*",
            "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey MilkyWay "
            "OneStandsOut Path Shell summer_1am",
        ),
    ),
    Package(
        "budgie-backgrounds",
        "3.0-1",
        "pool/main/b/budgie-backgrounds/budgie-backgrounds_3.0-1_all.deb",
        "b91c2d5209558bc11d8d3a161f22a608857e3f8c735980cfab0d6650b03014ca",
        _paths(
            "usr/share/backgrounds/budgie/@",
            "abstract-spiral.jpg beacon-street-sunset.jpg blue-periwinkle.jpg canyon-wren.jpg "
            "casa-mila.jpg extreme-desert-hike.jpg high-trestle-trail.jpg lake-sherburne.jpg "
            "oakland-zoo-otters.jpg perched-osprey.jpg piazza-gae-aulenti.jpg roman-colosseum.jpg "
            "saturnian-profile.jpg singaporean-cityscape.jpg tea-gardens.jpg",
        ),
    ),
    Package(
        "lomiri-wallpapers-16.04",
        "20.04.0-4",
        "pool/main/l/lomiri-wallpapers/lomiri-wallpapers-16.04_20.04.0-4_all.deb",
        "f74676719f9d0128e5310e65ef97d596bcece8b6a43524ab8949ee1be0a4f18c",
        _paths(
            "usr/share/backgrounds/@",
            "Bridge_*.jpg Dragonfly_*.jpg Picture_*.jpg Wine_*.jpg aitzgorri_*.jpg "
            "analogpattern_*.jpg free_*.jpg friends_*.jpg greentock_*.jpg life_*.jpg "
            "picosdeeuropa_*.jpg seeding_*.jpg sunset_*.jpg",
        ),
        (("usr/share/backgrounds/", "16.04/"),),
    ),
    Package(
        "lomiri-wallpapers-20.04",
        "20.04.0-4",
        "pool/main/l/lomiri-wallpapers/lomiri-wallpapers-20.04_20.04.0-4_all.deb",
        "fbf4c3bcbfea7f70bc1f5ed270fe97995119d02e9102715e0377d877ee848b0b",
        ("usr/share/backgrounds/Kleiber_*.jpg",),
        (("usr/share/backgrounds/", "20.04/"),),
    ),
    Package(
        "lxqt-themes",
        "2.1.0-1",
        "pool/main/l/lxqt-themes/lxqt-themes_2.1.0-1_all.deb",
        "a98e6871e2ea42bcd390d2f62c0e04c27deab0cb27fd73d23d7bda25593ace15",
        _paths(
            "usr/share/lxqt/wallpapers/@",
            "after-the-rain.jpg Butterfly-*.jpg fog.jpg this-is-not-windows.jpg",
        ),
        (("usr/share/lxqt/", ""),),
    ),
    Package(
        "palapeli-data",
        "4:25.04.0-1",
        "pool/main/p/palapeli/palapeli-data_25.04.0-1_all.deb",
        "c1cfb91a853f4a83bea7b5abe7808ccdc452917349bcc3f03460457a5307d0de",
        ("usr/share/palapeli/collection/*.jpg",),
        (("usr/share/palapeli/collection/", "puzzles/"),),
    ),
    Package(
        "gcompris-qt-data",
        "25.0.12-1",
        "pool/main/g/gcompris-qt/gcompris-qt-data_25.0.12-1_all.deb",
        "7312aa5387d4c5a6a1145609db5e8c38e2e2a9056c8b3b9d44e52f12358ac41d",
        (
            *_paths(
                "gcompris/src/activities/@",
                "erase/resource/*.webp explore_farm_animals/resource/*.webp "
                "explore_monuments/resource/*.webp explore_world_animals/resource/*.webp "
                "explore_world_music/resource/*.webp clickgame/resource/sea*.webp",
            ),
            *_paths(
                "gcompris/src/activities/details/resource/image/@",
                "Chenonceau_background.webp EgeskovSlotSpejling_background.webp "
                "EilanDonanCastle_background.webp FanoeWindmill_background.webp "
                "GizahPyramids_background.webp Louvre_*_background.webp NDP_background.webp "
                "Nagoya_background.webp Neuschwanstein_background.webp "
                "OperaSidney_background.webp TajMahal_background.webp TourEiffel_background.webp "
                "TowerBridgeLondon_background.webp",
            ),
        ),
        (("gcompris/", ""), (".webp", ".jpg")),
    ),
    Package(
        "tuxpaint-stamps-default",
        "2025.03.31-1",
        "pool/main/t/tuxpaint-stamps/tuxpaint-stamps-default_2025.03.31-1_all.deb",
        "6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb",
        _paths(
            "usr/share/tuxpaint/stamps/*/@.png",
            "albino_peahen crowned_crane helmeted_guineafowl lobster Woodlouse mantis "
            "european-bear gnu-baby gnu-baby-stand indian_blackbuck Apricot_whole Cherry_Stella "
            "Strawberry2 avocado cherimoya orange_seville ginger Lightbulb cementmixer "
            "stethoscope anemone_red daffodil holm_oak liberia-palm rambutan tree336 0_sun "
            "1_mercury 2_venus 3_earth 4_mars 5_jupiter inukshuk-photo railroad_crossing dumper "
            "firetruck balloon360 indycar wheel_tractor 7spoke256",
        ),
    ),
)
"""Chosen on contact sheets of every picture of these packages: photographs only.

Wallpapers that are drawn or rendered are left out: the study is about photographs. So
gnome-backgrounds, whose 36 pictures in this release are all renderings, gives none, and with it
JPEG XL is not needed; phosh-wallpapers, ukui-wallpapers and breeze-wallpaper neither.
gcompris-qt-data gives more photographs than all wallpapers together. Of Tux Paint's 962 stamps
these are the ones that are photographs and at least 256 pixels high and wide; the others are
drawings, or smaller.
"""

ALIASES = (
    (
        "plasma-workspace-wallpapers_milkyway-1080x1920",
        "plasma-workspace-wallpapers_milkyway-5120x2880",
    ),
    ("plasma-workspace-wallpapers_shell-5120x2880", "plasma-workspace-wallpapers_shell-720x1440"),
    (
        "gcompris-qt-data_details-neuschwanstein-background",
        "gcompris-qt-data_explore-monuments-germany-neuschwansteincastle",
    ),
    (
        "gcompris-qt-data_details-tajmahal-background",
        "gcompris-qt-data_explore-monuments-wonders-tajmahal",
    ),
    (
        "gcompris-qt-data_details-toureiffel-background",
        "gcompris-qt-data_explore-monuments-france-eiffeltower",
    ),
)
"""Pairs of one scene, or two crops of one photograph, that no hash recognises.

Seen on contact sheets.
"""

SAMPLES_HELD_OUT = (
    "budgie-backgrounds_roman-colosseum",
    "gcompris-qt-data_explore-monuments-india-gatewayofindia",
    "lomiri-wallpapers-16-04_picosdeeuropa-by-aitzol-berasategi",
)
"""Photographs of the corpus that ``olvae.data.dataset`` holds out: they are held out here, too."""
