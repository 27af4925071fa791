"""Arguments that several commands share, and the exit code of a stopped command."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["STOPPED", "AllowMismatch", "ConfigFile", "Device", "Raw", "TargetArgument"]

STOPPED = 130
"""The exit code after Ctrl-C, as in shells."""

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A run folder, checkpoint, export, id of the Hugging Face hub, or diffusers:ID_OR_FOLDER.",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option(metavar="CFG", help="The config of a checkpoint; a run folder has its own.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Use the weights as trained, not the averaged ones (EMA).")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Load weights even if only some of them fit; the others are listed.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")]
