"""What several commands share: arguments, the exit codes after a stop, the progress bar."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from olvae.models.names import check_target

if TYPE_CHECKING:  # slow to import
    from olvae.data.source import Batch

STOPPED = 130
"""The exit code after Ctrl-C, as in shells."""

PREEMPTED = 75
"""The exit code where a scheduler's signal or a limit on time ended the command, EX_TEMPFAIL in sysexits.h: the same
command again goes on, or ``olvae train --resume`` does."""

Callback = Callable[[typer.CallbackParam, str | None], str | None]
"""Of an option: called with what the user gave, returns what the command gets."""

PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "32": "32"} | {
    "16": "fp16",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "32",
}
"""The names in :data:`olvae.devices.PRECISIONS`, which imports torch, by themselves and their aliases."""


def check_precision(param: typer.CallbackParam, value: str | None) -> str | None:
    """Take fp16, bf16, 32, or an alias of one of them."""
    from olvae.config import ConfigError

    if value is not None and value not in PRECISIONS:
        raise ConfigError(f"{param.opts[0]} {value}: choose from {', '.join(dict.fromkeys(PRECISIONS.values()))}")
    return None if value is None else PRECISIONS[value]


def check_device(param: typer.CallbackParam, value: str | None) -> str | None:
    """Take a device by its form; :func:`olvae.devices.resolve_device` checks that the machine has it."""
    from olvae.config import ConfigError

    if value is not None and not re.fullmatch(r"cpu(:0)?|cuda(:\d+)?", value):
        raise ConfigError(f"{param.opts[0]} {value}: choose cpu, cuda, or cuda:N")
    return value


def comma_list(names: Iterable[str], aliases: Iterable[str] = ()) -> Callback:
    """Take names separated by commas; ``aliases`` are accepted, but not shown in the message."""
    known = (*names,)
    accepted = {*known, *aliases}

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        from olvae.config import ConfigError

        if value is not None and not ({*split_commas(value)} or {""}) <= accepted:
            raise ConfigError(f"{param.opts[0]} {value}: choose from {', '.join(known)}")
        return value

    return check


def split_commas(text: str) -> list[str]:
    """Split a list at its commas; each name once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A run folder, checkpoint, export, olvae:NAME, id of the Hugging Face hub, or diffusers:ID_OR_FOLDER.",
    ),
]

ConfigFile = Annotated[
    Path | None,
    typer.Option(metavar="CFG", help="The config of a checkpoint, a file or recipe; a run folder has its own."),
]

Raw = Annotated[bool, typer.Option("--raw", help="Use the weights as trained, not the averaged ones (EMA).")]

AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Load weights even if only some of them fit; the others are listed.")
]

Device = Annotated[
    str | None, typer.Option(callback=check_device, help="cpu or cuda; by default a GPU if there is one.")
]


_received: list[int] = []

_flags: dict[str, str] = {}
"""The running command's flags by the names of their settings."""


def end_on(*numbers: int) -> None:
    """From now on these signals end the command as Ctrl-C does, with :data:`PREEMPTED` for its exit code."""
    _received.clear()

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (Python's signature)
        _received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in numbers:
            signal.signal(number, end)


def stop_code() -> int:
    """The exit code of a command that was interrupted."""
    return PREEMPTED if _received else STOPPED


def loading() -> Status:
    """What a terminal shows inside the ``with`` block, while torch is imported and weights are read."""
    return Console(stderr=True).status("loading")


def check_paths(*targets: str, data: str | None = None) -> None:
    """Check that what a command names is there, before anything slow is imported.

    Args:
        data: SRC; only one that can be nothing but a path is looked for here.

    Raises:
        FileNotFoundError: it is not.
    """
    for target in targets:
        check_target(target)
    may_be_elsewhere = data is None or re.search(r"[:*?\[{]|\.(ya?ml|tar|tgz|gz)$|^(samples|-)$", data)
    if data is not None and not may_be_elsewhere and not Path(data).expanduser().exists():
        what = "list of images" if data.lower().endswith(".txt") else "folder"
        raise FileNotFoundError(f"{data}: no such {what}")


def name_flags(command: Any, arguments: Sequence[str]) -> None:
    """Remember the flags of the command that the arguments call, for :func:`in_flags`."""
    _flags.clear()
    for argument in arguments:
        inner = getattr(command, "commands", {}).get(argument)
        command = command if inner is None else inner
    for parameter in command.params:
        if parameter.name is not None and max(parameter.opts, key=len).startswith("--"):
            flag = max(parameter.opts, key=len)
            _flags[parameter.name] = _flags[flag.removeprefix("--").replace("-", "_")] = flag


def in_flags(text: str) -> str:
    """Write settings as this command's flags: the library's "`precision` 64" becomes "--precision 64"."""
    return re.sub(r"`(\w+)`", lambda match: _flags.get(match[1], match[0]), text)


LINE_EVERY_S = 15.0  # without a terminal


class ProgressBar:
    """Progress on standard error, inside a ``with`` block; the bar disappears at its end.

    Args:
        description: what is being done, such as ``encoding``.
        total: of the units; None if unknown.
        enabled: show anything at all; for ranks other than the first.
        unit: what is counted.
        at_once: show the bar immediately. Without it, the bar and its thread start with the first count, because worker
            processes have to be forked before.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        enabled: bool = True,
        unit: str = "images",
        at_once: bool = True,
    ) -> None:
        self.description = description
        self.total = total
        self.enabled = enabled
        self.unit = unit
        self.done = 0.0
        self._line_at = time.monotonic() + LINE_EVERY_S
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if enabled and console.is_terminal:
            name = TextColumn("{task.description}", markup=False)
            columns = (name, BarColumn(), MofNCompleteColumn(), _RateColumn(unit), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(description, total=total)
            if at_once:
                self._bar.start()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, n: float = 1) -> None:
        """Count further units."""
        self.set(self.done + n)

    def set(self, done: float, total: float | None = None) -> None:
        """Set the number of units done, and the total once it is known."""
        self.done = done
        self.total = self.total if total is None else total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total)
            self._bar.start()
        elif self.enabled and time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + LINE_EVERY_S
            of_total = "" if self.total is None else f" of {self.total:.0f}"
            typer.echo(f"{self.description}: {int(done)}{of_total} {self.unit}", err=True)

    def print(self, line: str) -> None:
        """Print a line to standard error, above the bar if there is one."""
        if self._bar is None:
            typer.echo(line, err=True)
        else:
            self._bar.console.print(line, soft_wrap=True, markup=False, highlight=False)


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.{0 if speed >= 10 else 1}f} {self.unit}/s")


def watched(description: str, shared: bool = True) -> Callable[["Iterable[Batch]", int | None], "Iterator[Batch]"]:
    """Wraps the batches of this process in a progress bar over the images of all; only the first process shows one.

    If they are not ``shared``, the first process alone has batches.
    """
    from olvae.devices import this_process

    def wrap(batches: "Iterable[Batch]", total: int | None) -> "Iterator[Batch]":
        rank, world = this_process()
        with ProgressBar(description, total, enabled=rank == 0, at_once=False) as bar:
            for batch in batches:
                yield batch
                bar.advance(len(batch["image"]) * (world if shared else 1))

    return wrap
