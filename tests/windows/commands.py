"""Commands on Windows: on the real one as they are, elsewhere as sitecustomize.py plays it."""

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """The variables with which Python, and its child processes, play Windows."""
    path = os.pathsep.join([str(ROOT / "tests" / "windows"), str(ROOT)])
    played = {"PYTHONPATH": path, "PLAYS_WINDOWS": uuid4().hex, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **played}


def python(*arguments: object, timeout: float = 250) -> subprocess.CompletedProcess[str]:
    """Run Python as on Windows."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="cp1252",
        timeout=timeout,
    )
