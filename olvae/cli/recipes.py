"""``olvae recipes`` and ``olvae recipes copy``: the configs that come with the package."""

import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

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
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to write over the recipe's.")
    ] = None,
) -> None:
    """Write a config of your own, which includes a recipe and overrides its settings.

    Example: olvae recipes copy phase_a mine.yaml data.params.root=photos
    """
    from omegaconf import OmegaConf

    from olvae.config import ConfigError, load, nearest_recipes, recipes
    from olvae.files import atomic_write

    settings = list(overrides or ())
    if file is not None and "=" in file.name:
        settings, file = [str(file), *settings], None
    known = recipes()
    if name not in known:
        raise ConfigError(f"{name}: no such recipe{nearest_recipes(name)}")
    file = file or Path(f"{Path(name).name}.yaml")
    if file.exists():
        raise ConfigError(f"{file}: exists: name another file, as in olvae recipes copy {name} my_{file.name}")
    if not file.parent.is_dir():
        raise ConfigError(f"{file.parent}: no such folder")
    text = f"# {_first_line(known[name])}\n# Settings below the include override the recipe's.\ninclude: {name}\n"
    if settings:
        text += OmegaConf.to_yaml(OmegaConf.create(load((), settings, resolve=False)))
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
    typer.echo(f"train with: olvae train --base {file}", err=True)


def _first_line(recipe: Path) -> str:
    """The first comment line, without the sources that it gives in brackets."""
    with recipe.open(encoding="utf-8") as file:
        return re.sub(r" \[[^\]]*\]", "", file.readline().removeprefix("# ").strip())
