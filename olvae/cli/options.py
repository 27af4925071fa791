"""What several commands share word for word: arguments, and the exit code of one that was stopped."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["STOPPED", "AllowMismatch", "ConfigFile", "Device", "Raw", "TargetArgument"]

STOPPED = 130
"""After Ctrl-C, as shells have it."""

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
Raw = Annotated[bool, typer.Option("--raw", help="The weights as trained, not the averaged ones (EMA).")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Load weights that fit only in part; what does not fit is listed.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")]
