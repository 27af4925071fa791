"""What the tests of packing and checking share: small pictures, and shards read with tarfile."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def members(folder: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """By name in the source: the file and what is said about it; read with tarfile."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {m.name: archive.extractfile(m).read() for m in archive}
        for name, data in files.items():
            if name.endswith(".json"):
                details = json.loads(data)
                (image,) = (n for n in files if n.startswith(name[:-4]) and n != name)
                assert details["name"] not in found
                found[details["name"]] = (files[image], {**details, "file": image})
    return found
