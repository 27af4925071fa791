"""Arguments, checks of values, exit codes and the progress bar that several commands share."""

import atexit
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.text import Text

from olvae.config import ConfigError
from olvae.files import ECHO_S, ON_WINDOWS, SIGNALS, nearest_path
from olvae.models.target_names import check_target

if TYPE_CHECKING:  # slow to import
    from olvae.data.source import Batch

# Exit code after Ctrl-C, as in shells.
STOPPED = 130

# Exit code after a scheduler's signal or a time limit, EX_TEMPFAIL in sysexits.h: the command can
# be continued.
PREEMPTED = 75

# Names, then aliases, that olvae.devices.precision_name takes, which imports torch.
PRECISION_NAMES = ("fp16", "bf16", "tf32", "32", "16", "float16", "bfloat16", "float32")

Callback = Callable[[typer.CallbackParam, str | None], str | None]


def _checked(is_valid: Callable[[str], Any], choices: str) -> Callback:
    """Make a callback for ``typer.Option`` that refuses other values."""

    def check(param: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and not is_valid(value):
            raise ConfigError(f"{param.opts[0]} {value}: choose {choices}")
        return value

    return check


check_device = _checked(
    re.compile(r"(cpu|mps)(:0)?|cuda(:\d+)?").fullmatch, "cpu, cuda, cuda:N, or mps"
)
check_precision = _checked(PRECISION_NAMES.__contains__, f"from {', '.join(PRECISION_NAMES[:4])}")


def memory_option(param: typer.CallbackParam, value: float | None) -> float | None:
    """Refuse values of --memory that typer takes for numbers, but are not GiB: 0, nan, inf."""
    if value is not None and not 0 < value < 2**20:
        raise ConfigError(f"{param.opts[0]} {value}: give a number of GiB, for example 2")
    return value


def check_applies(option: str, given: bool, to: str, there: bool) -> None:
    """Raise ConfigError if an option is given without the other one that it applies to."""
    if given and not there:
        raise ConfigError(f"{option} applies to {to}: give both, or neither")


def comma_list(names: Sequence[str], aliases: Sequence[str] = ()) -> Callback:
    """Take names separated by commas; ``aliases`` are accepted, but not shown in the message."""
    accepted = {*names, *aliases}
    return _checked(
        lambda text: accepted.issuperset(split_commas(text) or [""]), f"from {', '.join(names)}"
    )


def split_commas(text: str) -> list[str]:
    """Split a list at its commas; each name once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


# Arguments and flags that several commands share.
TARGET_HELP = (
    "A run (folder, name, or last), checkpoint, export, olvae:NAME, id of the hub, or "
    "diffusers:ID_OR_FOLDER, or timm:NAME (a vision encoder)."
)
TargetArgument = Annotated[str, typer.Argument(metavar="TARGET", help=TARGET_HELP)]

CONFIG_HELP = "Config of a checkpoint, a file or a recipe; a run folder has its own."
ConfigFile = Annotated[Path | None, typer.Option(metavar="CFG", help=CONFIG_HELP)]

ConfigBase = Annotated[
    Path | None,
    typer.Option("--config_base", "--config-base", metavar="DIR", help="Find a run's config here."),
]

Raw = Annotated[
    bool, typer.Option("--raw", help="Use the weights as trained, not the averaged ones (EMA).")
]

AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch",
        help="Load weights even if only some of them fit; the others are listed.",
    ),
]

Device = Annotated[
    str | None,
    typer.Option(callback=check_device, help="cpu, cuda or mps; by default a GPU if there is one."),
]

# Signals that have ended the command, each with its time.
_received: list[tuple[int, float]] = []

# Signals whose echoes alone are awaited: the command ends.
_echoes: list[int] = []

# Flags of the running command, by the names of their settings.
_flags: dict[str, str] = {}


def end_on(*numbers: int) -> None:
    """Let these signals end the command as Ctrl-C does, with the exit code :data:`PREEMPTED`.

    Ctrl-C is among them, with its own code. An echo of the first signal does not disturb what is
    tidied up. SIGHUP under nohup, and Ctrl-C for a command in a script's background, stay ignored.
    """
    _received.clear()

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (Python's signature)
        now = time.monotonic()
        if _received and now - _received[0][1] < ECHO_S:
            return
        _received.append((number, now))
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return  # no other thread may set handlers
    for number in (*numbers, signal.SIGINT):
        may_stay = SIGNALS[number] in ("SIGHUP", "Ctrl-C")
        if not (may_stay and signal.getsignal(number) is signal.SIG_IGN):
            signal.signal(number, end)


def ignore_echoes(code: int) -> None:
    """Let signals do nothing for :data:`ECHO_S`, and then end the process with this code.

    The ones that are ignored stay so, as SIGHUP under nohup.
    """
    begun = time.monotonic()

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (Python's signature)
        if time.monotonic() - begun > ECHO_S:
            os._exit(code)

    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, end)
                _echoes.append(number)


@atexit.register
def _keep_code() -> None:
    """Ignore echoes for good.

    Python takes handlers away before it has ended, and then a signal would be the exit code. This
    is called last of such functions, because libraries are imported later.
    """
    for number in _echoes:
        signal.signal(number, signal.SIG_IGN)


def shell_word(path: Path) -> str:
    """Write a path as one word of a command line: of POSIX shells, or of PowerShell and cmd."""
    return subprocess.list2cmdline([str(path)]) if ON_WINDOWS else shlex.quote(str(path))


def stop_code() -> int:
    """Return the exit code of a command that was interrupted, by the signal that came first."""
    return PREEMPTED if _received and _received[0][0] != signal.SIGINT else STOPPED


def loading() -> Status:
    """Show "loading" on a terminal inside the ``with`` block, which imports torch."""
    return Console(stderr=True).status("loading")


def check_paths(*targets: str, data: str | None = None) -> None:
    """Raise FileNotFoundError for a missing target or source of data, before slow imports."""
    for target in targets:
        check_target(target)
    # Patterns, URLs, data sets and files that are looked for later.
    no_path = r"[:*?\[{]|\.(ya?ml|tar|tgz|gz)$|^(samples|-)$"
    if data is not None and not re.search(no_path, data) and not Path(data).expanduser().exists():
        what = "list of images" if data.lower().endswith(".txt") else "folder"
        raise FileNotFoundError(f"{data}: no such {what}{nearest_path(data)}")


def name_flags(command: Any, arguments: Sequence[str]) -> None:
    """Remember the flags of the command that the arguments call, for :func:`in_flags`."""
    _flags.clear()
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument, command)
    for parameter in command.params:
        flag = max(parameter.opts, key=len)
        if flag.startswith("--"):
            _flags[parameter.name] = flag
            _flags[flag.removeprefix("--").replace("-", "_")] = flag


def in_flags(text: str) -> str:
    """Write settings as this command's flags: "`precision` 64" becomes "--precision 64"."""
    return re.sub(r"`(\w+)`", lambda match: _flags.get(match[1], match[0]), text)


# Seconds between lines of progress without a terminal.
LINE_EVERY_S = 15.0


def print_rows(
    title: str, rows: Mapping[str, Mapping[str, str]], names: str, stderr: bool = False
) -> None:
    """Print cells by heading, a row for each of the ``names``, in the columns of the terminal."""
    from olvae.evaluation.cells import texts
    from olvae.evaluation.report import print_grid

    print_grid(Console(stderr=stderr), title, texts(rows), names=names)


class ProgressBar:
    """Show progress on standard error, inside a ``with`` block; the bar disappears at its end.

    The bar and its thread start with the first count, because worker processes have to be forked
    before. The total may be unknown; ``enabled`` is False for ranks other than the first.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        enabled: bool = True,
        unit: str = "images",
    ) -> None:
        self.description = description
        self.total = total
        self.enabled = enabled
        self.unit = unit
        self.done = 0.0

        # A bar on a terminal, lines elsewhere.
        self._line_at = time.monotonic() + LINE_EVERY_S
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _RateColumn(unit),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(description, total=total)

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
        if total is not None:
            self.total = total
        self.done = done if self.total is None else min(done, self.total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total)
            self._bar.start()
        # Without a terminal, a line now and then.
        elif self.enabled and time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + LINE_EVERY_S
            of_total = ""
            if self.total is not None:
                of_total = f" of {self.total:.0f}"
            typer.echo(f"{self.description}: {int(self.done)}{of_total} {self.unit}", err=True)

    def print(self, line: str) -> None:
        """Print a line to standard error, above the bar if there is one."""
        if self._bar is None:
            typer.echo(line, err=True)
        else:
            self._bar.console.print(line, soft_wrap=True, markup=False, highlight=False)


class _RateColumn(ProgressColumn):
    """Units a second; rich's own column is for bytes."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        digits = 0 if speed >= 10 else 1
        return Text(f"{speed:,.{digits}f} {self.unit}/s")


def with_progress(
    description: str, batches: "Iterable[Batch]", total: int | None
) -> "Iterator[Batch]":
    """Show progress over batches, in the first process; each process has as many images."""
    from olvae.launcher import check_others, this_process

    # Other processes go on at the same pace: count their images with each batch here.
    rank, world = this_process()
    with ProgressBar(description, total, enabled=rank == 0) as bar:
        for batch in batches:
            yield batch
            bar.advance(len(batch["image"]) * world)
            check_others()
