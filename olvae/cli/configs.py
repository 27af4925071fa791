"""Run ``olvae validate``, ``olvae recipes`` and ``olvae recipes copy``: configs, their mistakes."""

import re
import shutil
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from omegaconf import OmegaConf

from olvae.cli.options import check_applies, check_precision, print_rows, shell_word
from olvae.config import ConfigError, recipes, validate
from olvae.config.reading import find_config, nearest_recipes
from olvae.data.places import load
from olvae.models.target_names import check_target
from olvae.runs import TEACHER, entry_of


def validate_command(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CFG|KEY=VALUE",
            help="Configs, each checked on its own, with these settings.",
        ),
    ],
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Also print the memory that a training step needs on a GPU; needs no GPU.",
        ),
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Also print what a training step on N GPUs sends."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(callback=check_precision, help="Precision for --ranks: 32, tf32, bf16, fp16."),
    ] = None,
) -> None:
    """List every mistake in a config's keys, types and targets at once, without building anything.

    Finds unknown and missing keys, wrong types, and targets that do not import. Exits with 1 if
    there is a mistake.

    Example: olvae validate mine.yaml imagenet/A2 data.params.size=512

    Example: olvae validate --ranks 64 --precision bf16 imagenet/large_batch
    """
    check_applies("--precision", precision is not None, "--ranks", ranks is not None)
    # A word with "=" is a setting, unless it is the name of a file.
    settings = [text for text in configs[1:] if "=" in text and not Path(text).is_file()]
    found = 0
    for path in [text for text in configs if text not in settings]:
        # A config that can't be loaded has its mistakes in the error.
        try:
            config = load([path], settings)
            mistakes = validate(config)
        except ConfigError as error:
            config, mistakes = {}, list(error.mistakes)

        # The autoencoders that a training would load.
        for place in ("model.from", TEACHER):
            target = entry_of(config, place)
            if target is None:
                continue
            try:
                check_target(str(target))
            except FileNotFoundError as error:
                mistakes.append(
                    f"{place}: {error}; name another TARGET, or go where this one is (a teacher "
                    "in olvae/recipes is in a clone of the repository, not in the package)"
                )
        # Numbers of the networks, which may come from an autoencoder that has to be loaded.
        if (memory or ranks is not None) and not mistakes:
            try:
                if config["model"].get("from") is not None:
                    from olvae.training.start_from import start_from

                    start_from(config)
                if memory:
                    _print_memory(config, path)
                if ranks is not None:
                    _print_steps(config, path, ranks, precision)
            except FileNotFoundError as error:
                mistakes.append(
                    f"its numbers need an autoencoder: {error}; without --memory and --ranks the "
                    "config alone is checked"
                )

        found += len(mistakes)
        for mistake in mistakes or ["no mistakes"]:
            line = mistake if mistake.startswith(path) else f"{path}: {mistake}"
            typer.echo(line, err=True)
    raise typer.Exit(int(found > 0))


def _print_memory(config: dict[str, Any], name: str) -> None:
    """Tabulate what a training step needs, by precision and checkpointing, at the config's size."""
    from olvae.data.pixels.size_and_range import Sides
    from olvae.models.footprint import MARGIN, footprint, without_weights
    from olvae.models.large.tiling import GIB

    model = without_weights(config["model"])
    size = Sides.of(entry_of(config, "data.params.size") or 256)
    images = entry_of(config, "data.params.batch_size") or 1
    rows = {}
    for precision in ("32", "bf16"):
        for checkpoint in (False, True):
            need = footprint(model, size, precision, checkpoint)
            rows[f"{precision}, model.params.checkpoint={str(checkpoint).lower()}"] = {
                "fixed": f"{need.fixed / GIB:.2f}",
                "per image": f"{need.per_image / GIB:.3f}",
                "total": f"{MARGIN * need.total(images) / GIB:.1f}",
                "TFLOP per image": f"{need.flop / 1e12:.4g}",
            }
    print_rows(f"{name}: GiB of a training step on a GPU, at {size} pixels", rows, "precision")
    typer.echo(
        "fixed: weights, gradients, optimizers and averages. per image: of a micro-batch. "
        f"total: a GPU for {images} images needs so much, with {MARGIN - 1:.0%} for workspaces."
    )


def _print_steps(config: dict[str, Any], name: str, ranks: int, precision: str | None) -> None:
    """Tabulate what a step of many ranks sends and launches, and print what follows from it."""
    from olvae.training.dry_run import dry_run

    steps, notes = dry_run(config, ranks, precision)
    rows = {
        kind: {
            "messages": f"{len(step.messages)}",
            "MB": f"{step.nbytes / 1e6:.2f}",
            "launches": f"{step.launches}",
        }
        for kind, step in steps.items()
    }
    print_rows(f"{name}: a step of each of {ranks} ranks", rows, "step")
    for note in notes:
        typer.echo(textwrap.fill(note, shutil.get_terminal_size().columns, subsequent_indent="  "))


recipes_app = typer.Typer()


@recipes_app.callback(invoke_without_command=True)
def show(context: typer.Context) -> None:
    """List the configs that come with this package, or copy one to edit.

    Use a name wherever a config file is expected: olvae train --base NAME. A file of that name,
    with .yaml or without, comes first.

    Example: olvae recipes
    """
    if context.invoked_subcommand is not None:
        return
    # Names in one column, descriptions in another, which is at least 20 wide.
    lines = {name: purpose_of(path) for name, path in recipes().items()}
    indent = 2 + max(map(len, lines))
    width = max(indent + 20, shutil.get_terminal_size().columns)
    for name, line in lines.items():
        described = f"{name:<{indent}}{line}"
        typer.echo(
            textwrap.fill(described, width, subsequent_indent=" " * indent, break_on_hyphens=False)
        )


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `olvae recipes` lists.")],
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="By default the name's last part and .yaml, here."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to write over the recipe's."),
    ] = None,
) -> None:
    """Write a config of your own, which includes a recipe and overrides its settings.

    Example: olvae recipes copy phase_a mine.yaml data.params.root=photos
    """
    # FILE may be left out before settings.
    settings = list(overrides or ())
    if file is not None and "=" in file:
        settings = [file, *settings]
        file = None
    known = recipes()
    if name not in known:
        raise ConfigError(f"{name}: no such recipe{nearest_recipes(name)}")
    place = Path(file or f"{Path(name).name}.yaml")
    found = find_config(name, place.parent, (place.resolve(),))
    if found.resolve() != known[name].resolve():
        raise ConfigError(
            f"{place}: would include {found} in place of the recipe: rename that, or copy elsewhere"
        )

    # The recipe's description, its include, and settings.
    text = (
        f"# {purpose_of(known[name])}\n"
        "# Settings below the include override the recipe's.\n"
        f"include: {name}\n"
    )
    if settings:
        text += OmegaConf.to_yaml(OmegaConf.create(load((), settings, resolve=False)))
    with place.open("x", encoding="utf-8") as new:  # an error if it exists
        new.write(text)
    typer.echo(f"train with: olvae train --base {shell_word(place)}", err=True)


def purpose_of(recipe: Path) -> str:
    """Return the first comment line, without the sources that it gives in brackets."""
    with recipe.open(encoding="utf-8") as file:
        return re.sub(r" \[[^\]]*\]", "", file.readline().removeprefix("# ").strip())
