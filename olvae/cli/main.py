"""Run the command ``olvae``: collect the commands, print errors in one line, exit with a code."""

import contextlib
import io
import itertools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from olvae import __version__
from olvae.cli import bench, configs, data, encode, evaluate, export, latents, reconstruct, train
from olvae.cli.options import (
    PREEMPTED,
    STOPPED,
    end_on,
    ignore_echoes,
    in_flags,
    name_flags,
    stop_code,
)
from olvae.config import ConfigError, key_places, missing_package
from olvae.config.reading import YAML
from olvae.data.places import load
from olvae.files import SIGNALS, printable

app = typer.Typer(
    name="olvae",
    help="Train, evaluate and inspect LiteVAE autoencoders for latent diffusion.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its panels cut names of options off at 80 columns
    epilog="Errors are one line; add --debug to any command for the traceback.",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.command,
    "bench": bench.command,
    "evaluate": evaluate.command,
    "reconstruct": reconstruct.command,
    "app": reconstruct.app_command,
    "latents": latents.command,
    "encode": encode.command,
    "decode": encode.decode_command,
    "export": export.command,
    "validate": configs.validate_command,
    "tables": bench.tables_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)

app.add_typer(data.app, name="data")
app.add_typer(configs.recipes_app, name="recipes")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"olvae {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    pass


PACKAGE = Path(__file__).parent.parent
PYTHONS_FORMAT = warnings.formatwarning

# Options that take several values after one flag, as in latent-diffusion's commands.
MANY_VALUES = ("--base", "-b")

# Options that name one input: a second one would replace the first.
ONE_INPUT = ("--data", "--fit", "--from", "--teacher")

# Options that may stand without a value, and the value that they have then.
ALONE = {"--zoo": evaluate.ALL}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with 2 for wrong usage, 1 for a failure, 130 or 75 if it was stopped.

    Ctrl-C stops with 130, SIGTERM with 75, and so does Ctrl-Break on Windows. There is a traceback
    only with ``--debug``.
    """
    # How to stop, and where messages go; --debug is no option of any command.
    end_on(*(number for number, name in SIGNALS.items() if name in ("SIGTERM", "SIGBREAK")))
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    warnings.formatwarning = _format_warning
    # A pipe on Windows has a code page, without most letters of files' names.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    # diffusers imports bitsandbytes, which warns about a kernel that nobody needs here.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)

    # Run; every error but one of --debug ends as a line and a code.
    try:
        arguments = repeat_flags([argument for argument in given if argument != "--debug"])
        _check_inputs(arguments)
        command = make_command()
        name_flags(command, arguments)
        _check_quotes(arguments)
        code = command(args=arguments, prog_name="olvae", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = STOPPED
    except Exception as error:
        if stop_code() == PREEMPTED:
            # A library's import turned KeyboardInterrupt into another error.
            code = STOPPED
        elif debug:
            raise
        else:
            code = print_error(error, given)

    # typer turns Ctrl-C into this code. A command that has printed more raises SystemExit.
    if code == STOPPED:
        code = stop_code()
        ignore_echoes(code)
        typer.echo("stopped", err=True)
        # If the interrupt came through code that was compiled from text, as dataclasses' is,
        # `python -m` would end by SIGINT, without this code. Python forgets it at the next text.
        exec("")
    sys.exit(code if isinstance(code, int) else 0)


@cache
def make_command() -> Any:
    """Make what typer runs, with examples that can be copied; once in a process."""
    command = typer.main.get_command(app)
    _keep_examples(command)
    return command


def _keep_examples(command: Any) -> None:
    """Keep each example of a help on one line, to be copied, however narrow the terminal is."""
    command.help = re.sub("^Example: ", "\b\nExample: ", command.help or "", flags=re.MULTILINE)
    for inner in getattr(command, "commands", {}).values():
        _keep_examples(inner)


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format this package's warnings in one line, and others as Python does, with their place."""
    if Path(filename).is_relative_to(PACKAGE):
        return f"warning: {printable(in_flags(str(message)))}\n"
    return PYTHONS_FORMAT(message, category, filename, lineno, line)


def print_error(error: Exception, arguments: Sequence[str] = ()) -> int:
    """Print one line, or one for each mistake of a config; return the exit code."""
    # Wrong usage: an error of click, or of typer's copy of it. Several lines are a help.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        text = error.format_message().replace("Value error, ", "")
        if arguments[:1] == ["train"] and hasattr(error, "option_name"):
            text += _as_setting(error.option_name, arguments)
        if "\n" not in text:
            text = f"error: {text}"
        typer.echo(text, err=True)
        return int(error.exit_code)

    # A package that using a model does not need may not be there.
    missing = missing_package(error)
    if missing is not None:
        error = ConfigError(f"this command {missing}")

    # A loader's process that was killed shows as one of many errors.
    if isinstance(error, RuntimeError | ConnectionError | EOFError | TypeError):
        from olvae.data.read_errors import worker_death

        death = worker_death(error)
        if death is not None:
            error = ChildProcessError(death)

    # The system's own errors have the file apart. A loader's process sends its whole traceback,
    # whose last line is the error. An unexpected error is printed with its type.
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if text.startswith("Caught ") and "Original Traceback" in text:
        last = text.splitlines()[-1]
        text = last.partition(": ")[2] or last
    if isinstance(error, NotImplementedError) and "PYTORCH_ENABLE_MPS_FALLBACK" in text:
        operator = text.partition("'")[2].partition("'")[0]
        text = (
            f"{operator}: torch can't compute it on a Mac's GPU: set the environment variable "
            "PYTORCH_ENABLE_MPS_FALLBACK=1, which computes it on the CPU, or choose the CPU: "
            "--device cpu, or olvae train --gpus 0"
        )
    elif not isinstance(error, ValueError | OSError | ArithmeticError):
        text = f"{type(error).__name__}: {text.splitlines()[0]} (--debug shows where)"

    # Names of files may hold a terminal's commands.
    for line in text.splitlines():
        typer.echo(f"error: {printable(in_flags(line))}", err=True)
    return 2 if isinstance(error, ConfigError) else 1


def _as_setting(option: str, arguments: Sequence[str]) -> str:
    """End the message on an unknown option of ``olvae train``: how to write a config's setting."""
    name = option.lstrip("-").rpartition(".")[2].replace("-", "_")
    places: dict[str, str] = {}
    with contextlib.suppress(ConfigError):
        words = pairwise(repeat_flags([*arguments]))
        places = key_places(load([word for flag, word in words if flag in MANY_VALUES]))
    written = "KEY=VALUE, as in lightning.trainer.max_steps=20"
    if name in places:
        written = f"{places[name]}=..."
    return f"; settings of the config are written without dashes: {written}"


def repeat_flags(arguments: list[str]) -> list[str]:
    """Turn ``--base a b`` into ``--base a --base b`` for click, and ``--zoo`` into ``--zoo all``.

    Overrides (key=value) end the list.
    """
    out: list[str] = []
    flag: str | None = None  # whose values these are
    following = [*arguments, "-"][1:]
    for argument, follows in zip(arguments, following, strict=True):
        if argument in MANY_VALUES:
            flag = argument
            if follows.startswith("-") or _is_override(follows):
                raise typer.BadParameter(f"{flag} needs one or more config files")
        elif flag is not None and not argument.startswith("-") and not _is_override(argument):
            out += [flag, argument]
        else:
            flag = None
            out.append(argument)
            if argument in ALONE and follows.startswith("-"):
                out.append(ALONE[argument])
    return out


def _check_inputs(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an empty value, or two inputs of one option.

    An empty text would be the current folder, or as good as no option; of two inputs click would
    drop the first in silence.
    """
    for flag, value in pairwise([*arguments, "end"]):
        if flag.startswith("--") and (not value or re.fullmatch(r"--[\w-]+=", flag)):
            raise ConfigError(
                f"{flag.rstrip('=')} is empty: give a value, or leave it out; "
                "a variable of the shell is not set, perhaps"
            )
    for flag in ONE_INPUT:
        given = []
        for argument, follows in pairwise([*arguments, ""]):
            if argument == flag:
                given.append(follows)
            elif argument.startswith(f"{flag}="):
                given.append(argument.partition("=")[2])
        if len(given) > 1:
            hint = ""
            if flag in ("--data", "--fit"):
                hint = "; a .txt list may name images of several folders"
            raise ConfigError(f"{flag} is given twice, {', '.join(given)}: give one{hint}")


def _check_quotes(arguments: Sequence[str]) -> None:
    """Refuse ``--data a.png b.png``, which a shell makes of a pattern without quotes."""
    if "--data" not in arguments:
        return
    following = arguments[arguments.index("--data") + 1 :]
    kind = Path(following[0]).suffix if following else ""
    alike = itertools.takewhile(lambda name: Path(name).suffix == kind, following)
    files = [name for name in alike if os.path.isfile(name)]  # noqa: PTH113  # of any length
    if kind not in ("", ".txt", *YAML) and len(files) > 1:
        pattern = Path(files[0]).with_name(f"*{kind}")
        raise ConfigError(
            f"--data: {len(files)} files, of a pattern without quotes perhaps, which the shell "
            f"expands: quote it, --data '{pattern}'"
        )


def _is_override(argument: str) -> bool:
    """Whether this is KEY=VALUE, and not a path with "=" in the name of a file."""
    return "=" in argument and not re.search(r"[/\\]", argument.partition("=")[0])


if __name__ == "__main__":
    main()
