"""Index shards from elsewhere: how many images each has, and where in the file each begins."""

import gzip
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from olvae.config import ConfigError
from olvae.config.reading import is_local
from olvae.data.shards.index import INDEX, Index, ShardRecord, find_shards
from olvae.data.shards.offsets import OFFSETS, Scanned, scan
from olvae.data.shards.tar_reading import file_name
from olvae.files import atomic_write, counted, list_skipped, reason
from olvae.pool import OnProgress, SharedProgress, run_in_processes


def index_shards(
    places: str | Sequence[str],
    out: Path | None = None,
    image_key: str | None = None,
    workers: int = 1,
    on_progress: OnProgress = lambda _, __: None,
) -> tuple[Path, Index, list[str]] | None:
    """Write ``index.json`` and ``index.offsets`` of shards: beside them, or into ``out``.

    What an index that is there says of checksums stays, unless a shard has another size. Returns
    the place of the index, its content, and the names of shards that can't be read whole, whose
    images before the damage are counted; None in all processes but the first. Raises ConfigError if
    remote shards have no ``out``, or shards of several folders, or the index there lists others;
    ValueError if two have one name, or none has an image; OSError, once the index has the others,
    if some could not be fetched.
    """
    # Where the index belongs.
    urls = find_shards(places)
    if out is None:
        folders = {Path(url).parent if is_local(url) else None for url in urls}
        out = folders.pop()
        if out is None or folders:
            raise ConfigError(
                "`out`: name a folder for the index of remote shards, or of several folders"
            )
    names = [file_name(url) for url in urls]
    name, amount = Counter(names).most_common(1)[0]
    if amount > 1:
        raise ValueError(f"{name}: two shards have this name: index one folder after the other")

    before = index_before(out, urls, names)

    # Scan all of them, each in one process.
    scanner = partial(scan_shard, image_key=image_key)
    found = run_in_processes(scanner, urls, workers, lambda done: on_progress(done, len(urls)))
    if found is None:
        return None
    scanned = dict(zip(names, found, strict=True))
    places_by_name = dict(zip(names, urls, strict=True))
    lost = []
    for name, url in places_by_name.items():
        error = scanned[name].error
        if error is not None and is_unfetched(url, error):
            lost.append((url, reason(error)))
            del scanned[name]
    problem = f"{counted(len(lost), 'shard')} could not be read: {list_skipped(lost)}"
    if not scanned:
        raise OSError(problem)
    if not any(len(one.offsets) for one in scanned.values()):
        raise ValueError(f"{urls[0]}: no images in these shards, or none that can be read")

    # The offsets first: an index that names them is the last thing that is written.
    out.mkdir(parents=True, exist_ok=True)
    records = {}
    with atomic_write(out / OFFSETS) as partial_file, partial_file.open("wb") as stream:
        for name in sorted(scanned):
            offsets = scanned[name].offsets
            stream.write(offsets.tobytes())
            known = before.shards.get(name, ShardRecord(0))
            url = places_by_name[name]
            size = Path(url).stat().st_size if is_local(url) else known.bytes
            # The checksum of a file of another size is another file's.
            checksum = known.sha256 if known.bytes in (None, size) else None
            records[name] = ShardRecord(len(offsets), size, checksum)

    # Classes, where images have them.
    counts = [len(one.classes) for one in scanned.values()]
    everything = set().union(*(one.classes for one in scanned.values()))
    classes = (sum(counts) / len(counts), len(everything)) if everything else None
    index = Index(records, before.packed, before.plan, before.unreadable, True, image_key, classes)
    index.write(out / INDEX)
    if lost:
        raise OSError(f"{problem}; {out / INDEX} has the others: repeat the command")
    return out / INDEX, index, [name for name, one in scanned.items() if one.error]


def index_before(out: Path, urls: Sequence[str], names: Sequence[str]) -> Index:
    """Read the index that is there; ConfigError if it lists other shards, which would be lost."""
    if not (out / INDEX).is_file():
        return Index(shards={})
    before = Index.read(out / INDEX)
    others = sorted({*before.shards} - {*names})
    if {Path(url).parent for url in urls} == {out}:
        others = [name for name in others if (out / name).exists()]
    if others:
        raise ConfigError(
            f"`out` {out}: its {INDEX} lists other shards, such as {others[0]}: index all of them "
            "together, name another folder, or remove it"
        )
    return before


def is_unfetched(url: str, error: Exception) -> bool:
    """Whether a shard could not be opened or fetched, and is perhaps not damaged."""
    if not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile):
        return False
    return error.errno is not None or not is_local(url)


def scan_shard(url: str, progress: SharedProgress, image_key: str | None) -> Scanned:
    """Scan a shard as a task of :func:`index_shards`."""
    found = scan(url, image_key, classes=True)
    progress.advance()
    return found
