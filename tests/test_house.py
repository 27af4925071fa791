"""Hold the house to its sizes, names and words, by reading the source of the package."""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(ROOT.glob("olvae/**/*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

PACKAGE_AT_MOST = 12
FUNCTION_AT_MOST = 60
ARGUMENTS_AT_MOST = 16

LONG = {"training_step"}
"""Functions that may be longer: the training step is read from top to bottom."""

PUBLISHED = {"LiteVAE_Encoder", "LiteVAE_Decoder", "LiteAutoencoderKL", "AutoencoderLiteVAE"}
"""Classes with constructors fixed by open-LiteVAE's YAML or diffusers' config.json. Sources are flat in YAML, too."""

SPEAKS_OF_FLAGS = {"cli"}

FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
TRANSLATED = re.compile(r"\b(told|said|goes on|go on|of which|what is|to be had)\b", re.I)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def functions() -> Iterator[tuple[Path, Function]]:
    for path, tree in TREES.items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, Function))


def nothing(found: Iterable[str]) -> None:
    """Fail with one line for each thing found."""
    if lines := sorted(found):
        pytest.fail("\n".join(lines), pytrace=False)


def test_no_package_has_too_many_files():
    counts = Counter(path.parent for path in FILES)
    nothing(
        f"{folder.relative_to(ROOT)}: {count} files"
        for folder, count in counts.items()
        if count > PACKAGE_AT_MOST
    )


def test_no_two_files_have_one_name():
    """A command's file is named like the command; what it calls is named otherwise."""
    names = Counter(path.name for path in FILES if path.name != "__init__.py")
    nothing(str(path.relative_to(ROOT)) for path in FILES if names[path.name] > 1)


def is_command(function: Function) -> bool:
    """Whether typer reads the function's arguments as flags."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return function.name.endswith("command") or any(
        ".command(" in text or ".callback(" in text for text in decorators
    )


def test_functions_fit_on_a_screen():
    long = {
        f"{place(path, node)} {node.name}": node.end_lineno - node.lineno + 1
        for path, node in functions()
        if node.name not in LONG and not is_command(node)
    }
    nothing(f"{name}: {length} lines" for name, length in long.items() if length > FUNCTION_AT_MOST)


def test_constructors_take_few_arguments():
    found = {}
    for path, tree in TREES.items():
        for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            if cls.name in PUBLISHED or cls.name.endswith("Source"):
                continue
            for init in (
                node for node in cls.body if isinstance(node, Function) and node.name == "__init__"
            ):
                found[f"{place(path, init)} {cls.name}"] = (
                    len([*init.args.args, *init.args.kwonlyargs]) - 1
                )
    nothing(
        f"{name}: {count} arguments" for name, count in found.items() if count > ARGUMENTS_AT_MOST
    )


def test_the_library_does_not_speak_of_flags():
    """Messages name a setting in backticks; `olvae.cli.options.in_flags` writes it as a flag where it is one."""
    nothing(
        f"{place(path, node)}: {found[0]}"
        for path, tree in TREES.items()
        if path.relative_to(ROOT / "olvae").parts[0] not in SPEAKS_OF_FLAGS
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (found := FLAG.search(node.value))
    )


def test_public_names_are_listed_in_packages_alone():
    nothing(
        str(path.relative_to(ROOT))
        for path, tree in TREES.items()
        if path.name != "__init__.py"
        and any(ast.unparse(node).startswith("__all__ =") for node in tree.body)
    )


def test_docstrings_begin_as_one_would_say_it():
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nothing(
        f"{place(path, node)}: {line}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, documented)
        and TRANSLATED.search(line := (ast.get_docstring(node) or "").partition("\n")[0])
    )
