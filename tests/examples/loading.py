"""Import the scripts in examples/ and scripts/, which are in no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load_example(name: str) -> ModuleType:
    """Run a script of examples/ as a module, anew in every call."""
    return _load(ROOT / "examples" / f"{name}.py")


def load_script(name: str) -> ModuleType:
    """The same for a script of scripts/."""
    return _load(ROOT / "scripts" / f"{name}.py")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
