"""Trace a command through the package: list the files it runs, in order of their first calls.

python scripts/walk.py olvae export demo --out vae
"""

import inspect
import os
import runpy
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import olvae

PACKAGE = Path(olvae.__file__).parent
INSIDE = f"{PACKAGE}{os.sep}"


class Walk:
    """Files of the package, each with the first function called; without code of imports."""

    def __init__(self) -> None:
        self.first: dict[Path, str] = {}
        self._known: set[CodeType] = set()

    def __enter__(self) -> "Walk":
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        # Each code object counts once; this runs at every call of the traced command.
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(INSIDE) or code in self._known:
            return
        path = Path(code.co_filename)
        is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
        if path.suffix == ".py" and is_function and not _is_importing(frame):
            self._known.add(code)
            # co_qualname is new in Python 3.11.
            name = getattr(code, "co_qualname", code.co_name)
            self.first.setdefault(path.relative_to(PACKAGE.parent), name)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module of the package is being imported, other than the command itself."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and PACKAGE in Path(frame.f_code.co_filename).parents:
            return Path(frame.f_code.co_filename).name != "__main__.py"
        frame = frame.f_back
    return False


if __name__ == "__main__":
    # The command sees its own name and arguments.
    sys.argv = sys.argv[1:]
    walk = Walk()
    with walk:
        try:
            runpy.run_module("olvae", run_name="__main__", alter_sys=False)
        except SystemExit as leaving:
            print(f"exit code {leaving.code}")
    for path, function in walk.first.items():
        print(f"{path}  {function}")
    print(len(walk.first), "files")
