"""Index shards from elsewhere: how many images each has, and where in the file each begins."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from olvae.config import ConfigError
from olvae.config.reading import is_local
from olvae.data.shards.index import INDEX, Index, ShardRecord, find_shards
from olvae.data.shards.offsets import OFFSETS, Scanned, scan
from olvae.data.shards.tar_reading import file_name
from olvae.files import atomic_write
from olvae.pool import OnProgress, SharedProgress, run_in_processes


def index_shards(
    places: str | Sequence[str],
    out: Path | None = None,
    image_key: str | None = None,
    workers: int = 1,
    on_progress: OnProgress = lambda _, __: None,
) -> tuple[Path, Index, list[str]] | None:
    """Write ``index.json`` and ``index.offsets`` of shards: beside them, or into ``out``.

    What an index that is there says of their bytes and checksums stays. Returns the place of the
    index, its content, and the names of shards that can't be read whole, whose images before the
    damage are counted; None in all processes but the first. Raises ConfigError if remote shards
    have no ``out``, or shards of several folders; ValueError if two have one name, or none has an
    image.
    """
    # Where the index belongs.
    urls = find_shards(places)
    if out is None:
        folders = {Path(url).parent for url in urls if is_local(url)}
        if len(folders) != 1 or not all(map(is_local, urls)):
            raise ConfigError(
                "`out`: name a folder for the index of remote shards, or of several folders"
            )
        out = folders.pop()
    names = [file_name(url) for url in urls]
    name, amount = Counter(names).most_common(1)[0]
    if amount > 1:
        raise ValueError(f"{name}: two shards have this name: index one folder after the other")

    # Scan all of them, each in one process.
    scanner = partial(scan_shard, image_key=image_key)
    found = run_in_processes(scanner, urls, workers, lambda done: on_progress(done, len(urls)))
    if found is None:
        return None
    scanned = dict(zip(names, found, strict=True))
    if not any(len(one.offsets) for one in scanned.values()):
        raise ValueError(f"{urls[0]}: no images in these shards, or none that can be read")

    # The offsets first: an index that names them is the last thing that is written.
    out.mkdir(parents=True, exist_ok=True)
    before = Index(shards={})
    if (out / INDEX).is_file():
        before = Index.read(out / INDEX)
    records = {}
    with atomic_write(out / OFFSETS) as partial_file, partial_file.open("wb") as stream:
        for name in sorted(scanned):
            offsets = scanned[name].offsets
            stream.write(offsets.tobytes())
            known = before.shards.get(name, ShardRecord(0))
            records[name] = ShardRecord(len(offsets), known.bytes, known.sha256)

    # Classes, where images have them.
    counts = [len(one.classes) for one in scanned.values()]
    everything = set().union(*(one.classes for one in scanned.values()))
    classes = (sum(counts) / len(counts), len(everything)) if everything else None
    index = Index(records, before.packed, before.plan, before.unreadable, True, image_key, classes)
    index.write(out / INDEX)
    return out / INDEX, index, [name for name, one in scanned.items() if not one.whole]


def scan_shard(url: str, progress: SharedProgress, image_key: str | None) -> Scanned:
    """Scan a shard as a task of :func:`index_shards`."""
    found = scan(url, image_key, classes=True)
    progress.advance()
    return found
