"""Pack what study/gpu.py needs into a folder, for a machine without a network.

    python -m study.bundle gpu-bundle        # here: wheels, the checkout, the study's photographs
    sh gpu-bundle/study/gpu.sh --minutes 9   # there: installs what is missing, and measures

PyTorch is left out, because it is gigabytes and has to fit the machine's driver; so is torchvision,
which has to fit PyTorch. Python's own modules alone.
"""

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORPUS = Path("study", "corpus-out")
TESTS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "lpips", "scikit-image")
OF_PYTORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.*")
SOURCE_ALONE = "antlr4-python3-runtime==4.9.*"
"""omegaconf's, of which PyPI has no wheel."""

PLATFORMS = [f"manylinux_2_{version}_x86_64" for version in (28, 27, 26, 24, 17)]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def make(out: Path, python: str | None, have: Collection[str]) -> None:
    """Fill ``out`` with the checkout, the study's photographs if they are there, and wheels.

    Wheels are for this Python and system, or with ``python`` for that version on Linux, x86-64;
    without the packages of ``have`` and PyTorch's.
    """
    # The files that git knows, as they are now.
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listing.stdout.decode().split("\0"):
        source, target = ROOT / name, out / name
        if name and (source.is_file() or source.is_symlink()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    if (ROOT / CORPUS).is_dir():
        shutil.copytree(ROOT / CORPUS, out / CORPUS)

    # Wheels: the versions that pip would install here, less what is there.
    wheels = out / "wheels"
    pip("wheel", "--no-deps", "--wheel-dir", str(wheels), SOURCE_ALONE)
    links = ["--find-links", str(wheels)]
    target = [*links]
    if python is not None:
        target += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        target += [f"--platform={platform}" for platform in PLATFORMS]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        asked = [f"{ROOT}[train]", *TESTS, "--target", folder]
        pip("install", "--dry-run", "--ignore-installed", f"--report={report}", *links, *asked)
        installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = {plain(item["metadata"]["name"]): item["metadata"]["version"] for item in installed}
    wanted = [
        f"{name}=={version}"
        for name, version in found.items()
        if not OF_PYTORCH.fullmatch(name) and name not in {"open-litevae", *map(plain, have)}
    ]
    pip("download", "--no-deps", "--dest", str(wheels), *target, *wanted)
    size = sum(path.stat().st_size for path in wheels.iterdir()) / 1e6
    print(f"{wheels}: {len(list(wheels.iterdir()))} wheels, {size:.0f} MB")


def install(wheels: Path, site: Path) -> None:
    """Install the wheels of packages that this Python lacks into ``site``, without a network.

    A wheel that does not fit this Python is named and left out.
    """
    there = {plain(found.name) for found in importlib.metadata.distributions()}
    if site.is_dir():
        there |= {plain(found.name) for found in importlib.metadata.distributions(path=[str(site)])}
    missing = [
        str(path)
        for path in sorted(wheels.glob("*.whl"))
        if plain(path.name.partition("-")[0]) not in there
    ]
    arguments = ["install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    if not missing:
        return
    try:
        pip(*arguments, *missing)
    except subprocess.CalledProcessError:
        for wheel in missing:
            try:
                pip(*arguments, "--upgrade", wheel)
            except subprocess.CalledProcessError:
                print(f"left out, because it does not fit this Python: {wheel}", file=sys.stderr)


def plain(name: str) -> str:
    """A package's name as PyPI compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(*arguments: str) -> None:
    subprocess.run([*PIP, *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the bundle; or where --install puts packages")
    parser.add_argument("--python", metavar="VERSION", help="of the machine there, as in 3.12")
    parser.add_argument(
        "--have", nargs="*", default=(), metavar="PACKAGE", help="packages that are there"
    )
    parser.add_argument(
        "--install", type=Path, metavar="WHEELS", help="install what is missing from this folder"
    )
    options = parser.parse_args()
    if options.install is None:
        make(options.out, options.python, options.have)
    else:
        install(options.install, options.out)


if __name__ == "__main__":
    main()
