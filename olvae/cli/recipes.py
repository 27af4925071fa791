"""``olvae recipes`` and ``olvae recipes copy``: the configs that come with the package."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

HELP = {"help_option_names": ["-h", "--help"]}
NARROWEST = 24  # columns of text beside a name

app = typer.Typer(context_settings=HELP)


@app.callback(invoke_without_command=True)
def show(context: typer.Context) -> None:
    """List the configs that come with this package, or copy one to edit.

    Their names stand wherever a config file is taken: olvae train --base NAME. A file of that name, with .yaml or
    without, comes first.

    Example: olvae recipes
    """
    if context.invoked_subcommand is not None:
        return
    from olvae.config import recipes

    lines = {name: _first_line(path) for name, path in recipes().items()}
    indent = 2 + max(map(len, lines))
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000  # a pipe gets a line each
    for name, line in lines.items():
        wrapped = textwrap.wrap(line, max(NARROWEST, columns - indent))
        typer.echo(f"{name:<{indent}}" + ("\n" + " " * indent).join(wrapped))


@app.command(context_settings=HELP)
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `olvae recipes` lists.")],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="By default the name's last part and .yaml, here.")
    ] = None,
) -> None:
    """Write a recipe to a file of your own, together with the recipes that it includes, comments kept.

    Example: olvae recipes copy phase_a mine.yaml
    """
    from olvae.config import ConfigError, nearest_recipes, recipes
    from olvae.files import atomic_write

    known = recipes()
    if name not in known:
        raise ConfigError(f"{name}: no such recipe{nearest_recipes(name)}")
    file = file or Path(f"{Path(name).name}.yaml")
    if file.exists():
        raise ConfigError(f"{file}: exists: name another file, as in olvae recipes copy {name} my_{file.name}")
    if not file.parent.is_dir():
        raise ConfigError(f"{file.parent}: no such folder")
    text = _in_one_file(known[name])
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
    typer.echo(f"train with: olvae train --base {file}", err=True)


def _first_line(recipe: Path) -> str:
    """The first comment line, without the sources that it gives in brackets."""
    with recipe.open(encoding="utf-8") as file:
        return re.sub(r" \[[^\]]*\]", "", file.readline().removeprefix("# ").strip())


def _in_one_file(recipe: Path) -> str:
    """The YAML of a recipe and of all it includes: what each says at its head, then the values with their comments."""
    import yaml

    from olvae.config import RECIPES, load

    head, values = _split(recipe)
    comments = _comments(values)
    place = recipe
    while included := yaml.safe_load(values).get("include"):
        place = (place.parent / included).resolve()
        name = place.relative_to(RECIPES.resolve()).with_suffix("").as_posix()
        head_below, values = _split(place)
        head += f"#\n# {name}, which it extends:\n{head_below}"
        comments = _comments(values) | comments
    if place == recipe:
        return head + values
    merged = yaml.safe_dump(load([recipe], resolve=False), sort_keys=False, default_flow_style=None, width=110)
    lines = merged.splitlines()
    for path, line in _keys(merged):
        if path in comments:
            lines[line] += f" # {comments[path]}"
    return head + "\n".join(lines) + "\n"


def _split(recipe: Path) -> tuple[str, str]:
    """The comment at the head of a file, and the rest."""
    text = recipe.read_text(encoding="utf-8")
    head = re.match(r"(#.*\n)*", text)
    assert head is not None
    return head[0], text[head.end() :]


def _comments(text: str) -> dict[tuple[str, ...], str]:
    """Comments at the ends of lines, by the last key on the line."""
    lines = text.splitlines()
    last = {line: path for path, line in _keys(text)}
    return {path: found[1] for line, path in last.items() if (found := re.search(r"\s# (.*)", lines[line]))}


def _keys(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every key of a file, with those above it, and its line from 0."""
    import yaml

    def below(node: Any, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                path = (*above, key.value)
                yield path, key.start_mark.line
                yield from below(value, path)

    yield from below(yaml.compose(text), ())
