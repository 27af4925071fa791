"""What ``olvae data check`` does with the indexes of shards: compares, and writes those that are missing."""

from collections.abc import Sequence
from pathlib import Path

from olvae.data.findings import Findings, SeenShard, name_some
from olvae.data.index import Index, ShardRecord
from olvae.data.shard_urls import is_local, local_path
from olvae.data.shards import INDEX, count_images

__all__ = ["compare", "count_by_indexes", "read_indexes", "write_indexes"]


def read_indexes(folders: set[Path]) -> tuple[dict[Path, Index], list[str]]:
    """Of the folders that have one; and what there is to say of the others."""
    indexes: dict[Path, Index] = {}
    notes: list[str] = []
    for folder in sorted(folders):
        if not (folder / INDEX).is_file():
            notes.append(f"{folder}: has no {INDEX}: --index writes it, so that training need not count the images")
            continue
        try:
            indexes[folder] = Index.read(folder / INDEX)
        except ValueError as error:
            notes.append(f"{error}; --index writes it anew")
    return indexes, notes


def count_by_indexes(urls: Sequence[str], indexes: dict[Path, Index]) -> int | None:
    """Images of the shards, where they are local; for a progress bar."""
    total = 0
    for url in urls:
        if not is_local(url):
            return None
        path = Path(local_path(url))
        record = indexes[path.parent].shards.get(path.name) if path.parent in indexes else None
        total += record.images if record is not None else count_images(path) if path.is_file() else 0
    return total


def compare(src: str, folder: Path, index: Index, shards: Sequence[SeenShard]) -> list[str]:
    """Where the shards of a folder are not what its index says."""
    problems = []
    here = {path.name: shard for shard in shards if (path := Path(local_path(shard.url))).parent == folder}
    for name, shard in here.items():
        record = index.shards.get(name)
        if record is None:
            problems.append(f"{shard.url}: {INDEX} does not know it: --index writes it anew")
        elif shard.images != record.images:
            problems.append(f"{shard.url}: has {shard.images} images, and by {INDEX} {record.images}")
        elif shard.sha256 is not None and shard.sha256 != record.sha256:
            problems.append(f"{shard.url}: its checksum is not that of {INDEX}: changed or damaged since")
    if Path(src).expanduser().is_dir() and (gone := sorted(set(index.shards) - set(here))):
        problems.append(f"{folder}: {len(gone)} shards of {INDEX} are missing: {name_some(gone)}")
    return problems


def write_indexes(findings: Findings, folders: set[Path], indexes: dict[Path, Index]) -> None:
    """Where there is none, or one that does not know all of a folder's shards; not for broken ones."""
    for folder in sorted(folders):
        here = [shard for shard in findings.shards if Path(local_path(shard.url)).parent == folder]
        names = {Path(local_path(shard.url)).name for shard in here}
        if folder in indexes and names <= set(indexes[folder].shards):
            findings.notes.append(f"{folder / INDEX}: is there already, and left as it is")
            continue
        if any(shard.broken for shard in here):
            findings.notes.append(f"{folder / INDEX}: not written, because shards are broken")
            continue
        records = {
            Path(local_path(shard.url)).name: ShardRecord(shard.images, shard.bytes or 0, shard.sha256 or "")
            for shard in here
        }
        Index(records).write(folder / INDEX)
        findings.notes.append(f"{folder / INDEX}: written")
