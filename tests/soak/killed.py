"""A command that tells what it writes, or is killed there:
``python -m tests.soak.killed SETTINGS evaluate ...``.

SETTINGS are JSON: the ``root`` that is watched, and the ``log`` of its writes, to be made, or the
``kill``, a Write and a percentage; ``limit``, the bytes at which a file is as on a full disk;
``back``, seconds by which the clock is slow. An audit hook sees a file that is opened for writing,
renamed or removed. What is renamed was written under another name, by Python or by others, and is
whole: cut to a share of it, it is what a kill on the way leaves. A file that stays where it was
opened is cut at the next such moment.
"""

import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PERCENTS = {"open": (0, 50, 100), "rename": (0, 50, 100), "remove": (0,)}
"""Of a file where a command may be killed, by what happens to it."""


class Write(NamedTuple):
    """The nth time that something happens to a file,
    whose name has neither a time nor a random number."""

    kind: str
    name: str
    nth: int


class Watch:
    """The audit hook."""

    def __init__(self, root: Path, log: Path | None, kill: tuple[Write, int] | None) -> None:
        self.root, self.kill = str(root), kill
        self.log = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY) if log is not None else None
        self.counts = Counter[tuple[str, str]]()
        self.due: tuple[str, int] | None = (
            None  # a file to be cut, and its size before it was opened
        )
        self.begun = time.monotonic()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path, source, kind = arguments[0], arguments[0], "open"
        elif event == "os.rename":
            source, path, kind = arguments[0], arguments[1], "rename"
        elif event == "os.remove":
            path, source, kind = _place(*arguments), "", "remove"
        else:
            return
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not path.startswith(f"{self.root}/"):
            return
        if self.due is not None:
            self.die(*self.due)
        if ".partial-" in path and kind != "rename":  # of which the rename tells
            return
        changing = (
            r"\d{4}-\d\d-\d\dT[\d-]+_|\d{8}_\d{6}|(?<=tfevents)\..*|"
            r"[^./]+-\d+-\w{8}(?=/|$)|_\w{20}(?=\.png$)"
        )
        name = re.sub(changing, "", path[len(self.root) + 1 :])
        self.counts[kind, name] += 1
        write = Write(kind, name, self.counts[kind, name])
        if self.log is not None:
            os.write(self.log, f"{json.dumps([time.monotonic() - self.begun, *write])}\n".encode())
        if self.kill is not None and write == self.kill[0]:
            if kind == "rename":
                self.die(os.fsdecode(source))
            elif kind == "remove":
                self.die(None)
            file, percent = Path(path), self.kill[1]
            before = file.stat().st_size if arguments[2] & os.O_APPEND and file.exists() else 0
            if percent == 0:
                self.kill = None  # it is seen here, too
                file.open("ab" if before else "wb").close()
                os.killpg(0, signal.SIGKILL)
            self.due = path, before

    def die(self, path: str | None, before: int = 0) -> None:
        """Kill this process and those that it started,
        with so much of the file as a kill on the way leaves."""
        if path is not None and not Path(path).is_dir():  # a folder is moved whole
            os.truncate(path, before + (Path(path).stat().st_size - before) * self.kill[1] // 100)
        os.killpg(0, signal.SIGKILL)


def _place(path: Any, folder: int) -> str:
    return os.fsdecode(path if folder == -1 else Path(f"/proc/self/fd/{folder}").readlink() / path)


def watch(root: Path, log: Path | None = None, kill: tuple[Write, int] | None = None) -> None:
    """Watch this process from now on, as the first of a group of its own."""
    os.setsid()
    sys.addaudithook(Watch(root, log, kill))


def killed_before(root: Path, name: str, work: Callable[[], Any]) -> None:
    """Do some work in a fork of this process,
    which is killed when half of a file is written that is to be renamed."""

    def watched() -> None:
        watch(root, kill=(Write("rename", name, 1), 50))
        work()

    process = multiprocessing.get_context("fork").Process(target=watched)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len([*root.rglob(".partial-*")]) == 1


def main() -> None:
    settings = json.loads(sys.argv[1])
    kill = settings.get("kill")
    watch(settings["root"], settings.get("log"), (Write(*kill[0]), kill[1]) if kill else None)
    if limit := settings.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if back := settings.get("back"):
        now = time.time
        time.time = lambda: now() - back
    from olvae.cli.main import main as command

    command(sys.argv[2:])


if __name__ == "__main__":
    main()
