"""Change the package at random places, one at a time, and count the changes that tests see.

python scripts/mutants.py --seed 7 --number 100 --files 'olvae/losses/*' --out mutants.jsonl

A mutant is killed by the tests with its file's name, or else by the others that import its module.
A copy of the repository holds it; results in --out are kept, so a repeated command continues.
tests/equivalent_mutants.txt names those that change nothing observable, with the reason.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from changed_tests import ROOT, tests_of
from mutations import Mutant, mutants

CORE = (
    "modules",
    "losses",
    "metrics",
    "models",
    "data",
    "config",
    "training",
    "evaluation",
    "export",
    "checkpoint",
)
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.txt"
SECONDS = 120  # that the tests of a mutant may take: beyond them it hangs, which kills it
OTHERS = 6  # files of tests that import the module, the smallest first


def other_tests(file: str, mirrors: list[str]) -> list[str]:
    """Find the tests that import a file's module, the smallest files first."""
    module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    package, _, name = module.rpartition(".")
    imports = re.compile(rf"{module}\b|from {package} import [^\n]*\b{name}\b")
    found = [p for p in ROOT.glob("tests/**/test_*.py") if imports.search(p.read_text("utf-8"))]
    names = [str(p.relative_to(ROOT)) for p in sorted(found, key=lambda p: p.stat().st_size)]
    return [name for name in names if name not in mirrors][:OTHERS]


def killer(mutant: Mutant, tree: Path) -> str:
    """Name the tests that see a mutant: `mirror`, `others` or `nobody`."""
    place = tree / mutant.file
    text = place.read_bytes()
    place.write_bytes(text[: mutant.start] + mutant.text.encode() + text[mutant.end :])
    try:
        mirrors = [str(path.relative_to(ROOT)) for path in tests_of(mutant.file)]
        if mirrors and fails(tree, mirrors):
            return "mirror"
        others = other_tests(mutant.file, mirrors)
        return "others" if others and fails(tree, others) else "nobody"
    finally:
        place.write_bytes(text)


def fails(tree: Path, tests: list[str]) -> bool:
    """Whether a test fails, in a process of its own, which has imported the libraries before."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tree, tests))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode != 0


def run_tests(tree: Path, tests: list[str]) -> None:
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(tree)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    import pytest

    options = ["-x", "-q", "-n", "0", "-p", "no:randomly", "-p", "no:cacheprovider"]
    os._exit(pytest.main([*options, *tests]) not in (0, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=100, help="of mutants")
    parser.add_argument("--files", default="*", help="pattern of the files")
    parser.add_argument("--out", type=Path, default=ROOT / "mutants.jsonl")
    options = parser.parse_args()

    # The sample: the first of all mutants, in an order that the seed fixes.
    files = sorted(path.relative_to(ROOT) for path in ROOT.glob("olvae/**/*.py"))
    core = [path for path in files if path.parts[1].removesuffix(".py") in CORE]
    all_of_core = [m for path in core for m in mutants(ROOT / path, str(path))]
    equivalent = {line.partition(" # ")[0] for line in EQUIVALENT.read_text("utf-8").splitlines()}
    for name in sorted(equivalent - {m.name for m in all_of_core}):
        print(f"{EQUIVALENT.name}: there is no such mutant: {name}")
    every = [m for m in all_of_core if fnmatch(m.file, options.files)]
    random.Random(options.seed).shuffle(every)
    sample = every[: options.number]
    options.out.touch()
    done = dict(json.loads(line) for line in options.out.read_text("utf-8").splitlines())

    # Run what is left; a process that is forked has the libraries.
    for library in ("torch", "lightning", "diffusers", "torchmetrics", "torchvision", "pytest"):
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        left_out = shutil.ignore_patterns(".*", "runs", "site")
        shutil.copytree(ROOT, tree, ignore=left_out, symlinks=True)
        for mutant in sample:
            if mutant.name in done or mutant.name in equivalent:
                continue
            done[mutant.name] = by = killer(mutant, tree)
            with options.out.open("a", encoding="utf-8") as file:
                print(json.dumps([mutant.name, by]), file=file)
            print(f"{by:7} {mutant.file}:{mutant.line} {mutant.old} -> {mutant.text}", flush=True)

    # The table by file.
    print("\n| file | mutants | equivalent | by its tests | by others | by none |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in [*sorted({mutant.file for mutant in sample}), "all"]:
        found = [m.name for m in sample if name in (m.file, "all")]
        by = Counter("equivalent" if n in equivalent else done[n] for n in found)
        cells = [len(found), *(by[how] for how in ("equivalent", "mirror", "others", "nobody"))]
        print(f"| {name} | {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
