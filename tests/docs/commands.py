"""Whether a command that a document names exists, with the flags and arguments that it is given."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

from torch.distributed.run import get_args_parser
from typer.main import get_command

from olvae.cli.main import app
from olvae.config import validate
from olvae.data.places import load
from tests.docs.markdown import ROOT

OLVAE = get_command(app)
FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


def every_command(group: Any = OLVAE, name: str = "olvae") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, groups left out."""
    for part, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


def flags_of(command: Any) -> set[str]:
    options = (parameter for parameter in command.params if parameter.param_type_name == "option")
    return {
        "-h",
        "--help",
        "--debug",
        *(flag for o in options for flag in (*o.opts, *o.secondary_opts)),
    }


@cache
def known_flags() -> set[str]:
    return set().union(*(flags_of(command) for _, command in every_command()))


def find(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words after ``olvae`` name, and the words that are left for it."""
    command = OLVAE
    while hasattr(command, "commands"):
        if command is OLVAE and words[:1] == ["--version"]:
            break
        if (
            command.invoke_without_command
            and command is not OLVAE
            and (not words or words[0].startswith("-"))
        ):
            break  # it does something of its own
        assert words, f"a command of {', '.join(command.commands)} is missing"
        assert words[0] in command.commands, (
            f"no command {words[0]}; there are {', '.join(command.commands)}"
        )
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check(words: list[str]) -> None:
    """Raises if the command would be refused for what it is called with.

    Nothing is run but the parser.

    Paths are relative to the repository, the working directory.
    """
    program, *rest = words
    if program == "olvae":
        _check_olvae(rest)
    elif program in ("python", "python3"):
        _check_python(rest)
    elif program == "torchrun":
        launch = get_args_parser().parse_args(rest)
        assert not launch.module or launch.training_script == "olvae"
        prefix = ["-m"] if launch.module else []
        _check_python([*prefix, launch.training_script, *launch.training_script_args])
    elif program == "srun":
        check(list(dropwhile(lambda word: word.startswith("--"), rest)))
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = {word for word in rest if "=" not in word}
        assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.M)), (
            f"make has no target {rest}"
        )
    elif program == "pip":
        _check_pip(rest)
    else:
        assert program in (".", "cd", "cp", "export", "git", "hf", "py"), (
            f"{program}: what kind of command is this?"
        )


def _check_olvae(words: list[str]) -> None:
    command, rest = find([word for word in words if word != "--debug"])
    parameters = command.make_context(command.name, rest).params
    for value in parameters.values():
        for path in value if isinstance(value, list | tuple) else [value]:
            place = str(path).removeprefix("diffusers:")
            is_here = not place.startswith("olvae/recipes") or (ROOT / place).exists()
            assert is_here, f"{path} does not exist"
    if parameters.get("base"):
        overrides = [*(parameters.get("overrides") or ())]
        files = [*parameters["base"], *(word for word in overrides if "=" not in word)]
        mistakes = validate(load(files, [word for word in overrides if "=" in word]))
        assert not mistakes, mistakes


def _check_python(words: list[str]) -> None:
    if words[0] == "-m":
        module, *rest = words[1:]
        if module == "pytest":
            for path in (word for word in rest if "/" in word):
                assert Path(path).exists(), f"{path} does not exist"
        elif module != "venv":
            assert module == "olvae", f"python -m {module}: what is this?"
            _check_olvae(rest)
        return
    script, *rest = words
    assert Path(script).is_file(), f"{script} does not exist"
    if script.startswith("examples/"):
        for flag in (word for word in rest if word.startswith("-")):
            known = re.search(rf'add_argument\(\s*"{flag}"', Path(script).read_text())
            assert known, f"{script} has no {flag}"
    else:
        _check_olvae(
            [{"train.py": "train", "scripts/compute_metrics.py": "evaluate"}[script], *rest]
        )


def _check_pip(words: list[str]) -> None:
    if "-r" in words:
        assert Path(words[words.index("-r") + 1]).is_file()
    project = (ROOT / "pyproject.toml").read_text()
    extras, groups = (
        re.findall(r"^(\w+) = \[", project.partition(f"[{table}]")[2].partition("\n[")[0], re.M)
        for table in ("project.optional-dependencies", "dependency-groups")
    )
    for flag, group in pairwise(words):
        assert flag != "--group" or group in groups, f"pip: no group {group}; there are {groups}"
    named = [
        extra
        for word in words
        for group in re.findall(r"\[(.+)\]", word)
        for extra in group.split(",")
    ]
    assert set(named) <= set(extras), f"pip: no extras {named}; there are {', '.join(extras)}"
