"""``olvae data pack``: images to shards, in parallel; the same bytes however often it is stopped on the way."""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from olvae.config import ConfigError
from olvae.data.faults import FaultLimitError
from olvae.data.find import list_images
from olvae.data.folder import Files
from olvae.data.index import Index, ShardRecord, Skipped, named
from olvae.data.lists import ImageList
from olvae.data.parallel import OnProgress, in_processes, unseen
from olvae.data.sharding import STATE, Finished, PackOptions, ShardMaker, shard_count, shard_name, usual_shard_size
from olvae.data.shards import INDEX
from olvae.files import write_json

__all__ = ["Packed", "pack"]

PLAN = "plan.json"
LOCK_S = 5.0  # processes of a run that was killed need a moment to notice


@dataclass(frozen=True)
class Packed:
    """The result: the index that was written, and how many of the shards were there from an earlier run."""

    index: Index
    found: int


def pack(
    src: str,
    out: Path,
    options: PackOptions,
    workers: int = 1,
    max_unreadable: float = 0.01,
    on_progress: OnProgress = unseen,
) -> Packed:
    """Write the images of a source to ``out/000000.tar``, ``000001.tar``, ... and last an ``index.json``.

    In a shard there are for each image ``KEY.jpg`` (or .png, .webp, .npy) and ``KEY.json`` with its name in the
    source, its width and height, upright, and its class where a data set gives one; KEY is its place in the order.
    Shards and index depend on the source and the options alone. Finished shards of an earlier run are verified and
    kept.

    Args:
        src: a folder, pattern, list or data set; see :data:`~olvae.data.find.SRC`.
        workers: processes.
        max_unreadable: share of the images that may be unreadable; these are left out.
        on_progress: called with the number of images that are done, and of all.

    Raises:
        ConfigError: the folder holds something else, or what other options made; it is inside the source or around it.
        FaultLimitError: too many images can't be read. No index is written then.
        ValueError: the source has changed since the earlier run, or none of its images can be read.
        OSError: a shard could not be written.
    """
    _keep_apart(src, out)
    images = list_images(src, options.channels)
    if not options.shard_size:
        options = replace(options, shard_size=usual_shard_size(len(images)))
    plan = _plan(src, images, options)
    state = out / STATE
    known = _earlier(out, plan, options)
    try:
        state.mkdir(parents=True, exist_ok=True)
        with _alone(state, out):
            _remove_unfinished(state)
            write_json({"plan": plan, "packed": asdict(options)}, state / PLAN)
            count = shard_count(len(images), options.shard_size)
            finished: dict[int, Finished] = {}
            maker = ShardMaker(images, options, out, known)
            running = in_processes(maker, range(count), workers, lambda done: on_progress(done, len(images)))
            with closing(running):
                for shard in running:
                    finished[shard.number] = shard
                    _check_unreadable(finished, len(images), max_unreadable)
            index = _index(finished, plan, options)
            if not index.shards:
                raise ValueError(f"{src}: none of its {len(images)} images can be read: {_names(index.unreadable)}")
            index.write(out / INDEX)
            shutil.rmtree(state)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{out}: {reason}; finished shards stay, and the same command goes on from there") from error
    return Packed(index, sum(shard.found for shard in finished.values()))


def _keep_apart(src: str, out: Path) -> None:
    source, target = Path(src).expanduser(), out.resolve()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--out {out}: is a file")
    if not source.is_dir():
        return
    source = source.resolve()
    if target.is_relative_to(source):
        raise ConfigError(f"--out {out}: is inside the images' folder {src}: choose one beside it")
    if source.is_relative_to(target):
        raise ConfigError(f"--out {out}: holds the images' folder {src}: choose one beside it")


def _plan(src: str, images: ImageList, options: PackOptions) -> str:
    """A hash of what the shards depend on: the options, and names, sizes and times of files."""
    digest = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode())
    if not isinstance(images, Files):
        digest.update(src.encode())
    for index in range(len(images)):
        line = images.key(index)
        if isinstance(images, Files):
            try:
                state = images.paths[index].stat()
                line += f"\0{state.st_size} {state.st_mtime_ns}"
            except (OSError, ValueError):  # ValueError: a name that no file can have
                line += "\0missing"
        digest.update(f"{line}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _earlier(out: Path, plan: str, options: PackOptions) -> dict[int, Finished]:
    """The shards that earlier runs of the same plan have finished.

    Raises:
        ConfigError, ValueError: the folder holds something else, or shards of another plan.
    """
    finished: dict[int, Finished] = {}
    if (out / INDEX).is_file():
        index = Index.read(out / INDEX)
        if index.plan is None or index.packed is None:
            raise ConfigError(f"--out {out}: holds shards that this command has not made: choose another folder")
        _compare(out, index.plan, index.packed, plan, options)
        finished.update(_indexed(index))
    if (out / STATE / PLAN).is_file():
        head = json.loads((out / STATE / PLAN).read_text(encoding="utf-8"))
        _compare(out, head["plan"], head["packed"], plan, options)
        finished.update(_recorded(out / STATE))
    elif not (out / INDEX).is_file() and out.exists() and any(path.name != STATE for path in out.iterdir()):
        raise ConfigError(f"--out {out}: is not empty, and nothing that this command began: choose another folder")
    return finished


def _indexed(index: Index) -> dict[int, Finished]:
    skipped: dict[str, list[Skipped]] = {}
    for image in index.unreadable:
        skipped.setdefault(image.shard, []).append(image)
    shards = ((name, int(Path(name).stem), record) for name, record in index.shards.items())
    return {number: Finished(number, record, skipped.get(name, []), found=True) for name, number, record in shards}


def _recorded(state: Path) -> dict[int, Finished]:
    finished = {}
    for path in sorted(state.glob("[0-9]*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        unreadable = [Skipped(**skipped) for skipped in content["unreadable"]]
        finished[int(path.stem)] = Finished(int(path.stem), ShardRecord(**content["record"]), unreadable, found=True)
    return finished


def _compare(out: Path, old_plan: str, old: Mapping[str, object], plan: str, options: PackOptions) -> None:
    if old_plan == plan:
        return
    now = asdict(options)
    others = [f"{name} {old.get(name)}, now {now[name]}" for name in now if old.get(name) != now[name]]
    remedy = "choose another --out, or remove the folder to pack anew"
    if others:
        raise ConfigError(f"--out {out}: was begun with other options ({'; '.join(others)}): {remedy}")
    raise ValueError(f"--out {out}: the images have changed since it was begun: {remedy}")


@contextmanager
def _alone(state: Path, out: Path) -> Iterator[None]:
    """Two runs that write the same shards would take each other's unfinished files away."""
    with (state / "lock").open("w") as file:
        end = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise ConfigError(f"--out {out}: another `olvae data pack` is at work there") from error
                time.sleep(0.1)
        yield


def _remove_unfinished(state: Path) -> None:
    for path in [*state.glob("*.tar.*"), *state.glob(".*.partial")]:
        path.unlink(missing_ok=True)


def _check_unreadable(finished: Mapping[int, Finished], images: int, limit: float) -> None:
    unreadable = [skipped for number in sorted(finished) for skipped in finished[number].unreadable]
    if len(unreadable) > limit * images:
        raise FaultLimitError(
            f"{len(unreadable)} of {images} images can't be read, more than --max-unreadable {limit:g}: "
            f"{_names(unreadable)}"
        )


def _names(unreadable: Sequence[Skipped]) -> str:
    return named((skipped.name, skipped.reason) for skipped in unreadable)


def _index(finished: Mapping[int, Finished], plan: str, options: PackOptions) -> Index:
    shards = [finished[number] for number in sorted(finished)]
    records = {shard_name(shard.number): shard.record for shard in shards if shard.record.images}
    unreadable = [skipped for shard in shards for skipped in shard.unreadable]
    return Index(records, asdict(options), plan, unreadable)
