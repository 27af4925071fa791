"""Run the tests of the files that git says changed, and the contracts.

python scripts/changed_tests.py -n 2

Files count as changed against the branch `main`, where there is another one, and else against the
last commit. Of olvae/data/image.py the tests are tests/data/test_image.py and test_image_*.py.
Arguments are pytest's.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

CONTRACTS = (
    "tests/test_house.py",
    "tests/test_library_internals.py",
    "tests/config/test_nodes.py",
    "tests/data/test_source_contract.py",
    "tests/models/parts/test_part.py",
    "tests/docs/test_guarantees.py",
)
"""What holds for every file, and for every class behind an interface."""

WHOLE = {"docs": "docs", "README.md": "docs", "examples": "examples", "study": "study"}
"""Of a changed file below the first, all tests in the second."""


def git(*arguments: str) -> list[str]:
    """Return the lines that git prints; none if it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.splitlines()


def changed() -> set[str]:
    """Return the changed and the new files, relative to the repository."""
    (base,) = git("merge-base", "HEAD", "main") or ["HEAD"]
    return {*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")}


def tests_of(name: str) -> Iterator[Path]:
    """Yield the test files and folders that mirror a file."""
    path = Path(name)
    first = path.parts[0]
    if first == "tests" and path.name.startswith("test_") and path.suffix == ".py":
        yield ROOT / path
    elif path.parts[:2] == ("olvae", "recipes"):
        yield ROOT / "tests" / "configs"
    elif first == "olvae" and path.suffix == ".py":
        folder = ROOT / "tests" / Path(*path.parts[1:-1])
        # Of a package's own file, those with the package's name.
        source = path.parent.name if path.stem == "__init__" else path.stem
        yield from folder.glob(f"test_{source}.py")
        yield from folder.glob(f"test_{source}_*.py")
    elif first in WHOLE:
        yield ROOT / "tests" / WHOLE[first]


def main() -> int:
    """Run pytest; return its exit code."""
    tests = {str(path.relative_to(ROOT)) for name in changed() for path in tests_of(name)}
    chosen = sorted({name for name in tests if (ROOT / name).exists()} | {*CONTRACTS})
    print(*chosen, sep="\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *sys.argv[1:], *chosen], cwd=ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
