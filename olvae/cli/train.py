"""``olvae train``, and ``python train.py``."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from olvae.cli.options import STOPPED

__all__ = ["command"]


def command(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override every file.")
    ] = None,
    base: Annotated[
        list[Path] | None,
        typer.Option("--base", "-b", metavar="CFG [CFG ...]", help="Config files; later override earlier."),
    ] = None,
    logdir: Annotated[Path, typer.Option(help="Where the run folder is made.")] = Path("runs"),
    precision: Annotated[str | None, typer.Option(metavar="{32,16,bf16}", help="Arithmetic; 32 by default.")] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="N_OR_LIST", help="How many GPUs, or which: 2, or 0,3. 0 is the CPU.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, data order and noise; 0 by default.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run; by default the first config file's.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Continue a run in its own folder.")] = None,
    actual_resume: Annotated[
        Path | None,
        typer.Option("--actual_resume", "--actual-resume", metavar="CKPT", help="Start a new run from weights."),
    ] = None,
) -> None:
    """Train an autoencoder.

    Example: python train.py --base configs/demo.yaml --logdir runs --gpus 0 lightning.trainer.max_steps=100
    """
    from olvae.training.run import TrainingStopped, TrainOptions, train

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # before the first step, it is as Ctrl-C: no run is left
    options = TrainOptions(
        base=base or (),
        overrides=overrides or (),
        logdir=logdir,
        name=name,
        precision=precision,
        gpus=gpus,
        seed=seed,
        resume=resume,
        actual_resume=actual_resume,
    )
    try:
        train(options)
    except TrainingStopped:
        # The first process of a machine tells it: one of the others that failed would have it killed at its curves.
        sys.exit(STOPPED if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
