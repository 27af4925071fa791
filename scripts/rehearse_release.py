"""Rehearse a release on this machine: from a tag to an export that another installation loads.

    python scripts/rehearse_release.py        # or: make rehearse

The last commit is cloned and tagged, sdist and wheel are built and checked, and an index on this
machine offers them. Two empty environments install the package from there, and all that it needs
from where pip is set to look. One exports a shipped model, the other loads the export: both have to
compute the same picture, bit for bit. Set PIP_EXTRA_INDEX_URL to an index of PyTorch's builds for
CPUs, or Linux gets CUDA's, twice.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).parent.parent

PICTURE = """
import hashlib, sys, torch
from olvae import LiteVAE
vae = LiteVAE.from_pretrained(sys.argv[1]).eval()
x = torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
with torch.no_grad():
    y = vae.decode(vae.encode(x).mode())
print(tuple(y.shape), hashlib.sha256(y.numpy().tobytes()).hexdigest())
"""

REQUESTS: list[str] = []


class Index(SimpleHTTPRequestHandler):
    """A folder in the layout of PEP 503; what is asked of it is in ``REQUESTS``."""

    def log_message(self, *parts: Any) -> None:
        REQUESTS.append(str(parts))


def run(*words: object, **options: Any) -> str:
    """Run a command, show it and what it prints, and return that."""
    print("$", shlex.join(map(str, words)), flush=True)
    done = subprocess.run(
        [str(word) for word in words], check=True, stdout=subprocess.PIPE, text=True, **options
    )
    print(done.stdout, end="", flush=True)
    return done.stdout


def rehearse(folder: Path) -> None:
    """Build, offer, install, export and load; CalledProcessError or SystemExit if a step fails."""
    # The tag, in a clone: nothing that is not committed gets in.
    clone = folder / "clone"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, clone)
    text = (clone / "olvae" / "__init__.py").read_text(encoding="utf-8")
    version = re.findall(r'^__version__ = "(.+)"$', text, re.M)[0]
    run("git", "-C", clone, "tag", "--force", f"v{version}")
    run("git", "-C", clone, "checkout", "--quiet", f"v{version}")

    # sdist, and the wheel from it, as `publish` makes and checks them.
    dist = folder / "index" / "simple" / "open-litevae"
    run(sys.executable, "-m", "build", "--outdir", dist, clone, stderr=subprocess.DEVNULL)
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    run(Path(sys.executable).with_name("check-wheel-contents"), *dist.glob("*.whl"), cwd=clone)
    shutil.rmtree(clone)

    # Two installations, outside of any checkout.
    os.chdir(folder)
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *request: Index(*request, directory=str(folder / "index"))
    )
    Thread(target=server.serve_forever, daemon=True).start()
    others = os.environ.get("PIP_EXTRA_INDEX_URL", "")
    index = f"http://127.0.0.1:{server.server_port}/simple"
    environment = {**os.environ, "PIP_EXTRA_INDEX_URL": f"{index} {others}"}
    environment.pop("PYTHONPATH", None)
    for name, extra in (("writer", "[train]"), ("reader", "")):  # an export needs the base alone
        run(sys.executable, "-m", "venv", name)
        pip = (f"{name}/bin/python", "-m", "pip", "install", "--quiet")
        run(*pip, f"open-litevae{extra}=={version}", env=environment)
    server.shutdown()
    if not any(".whl" in request for request in REQUESTS):
        sys.exit(f"error: the wheel was not taken from {index}, but from another index")

    # The export.
    shown = run("writer/bin/olvae", "--version", env=environment)
    if shown.split()[-1] != version:
        sys.exit(f"error: {shown.strip()}, and {version} was to be released")
    run("writer/bin/olvae", "export", "olvae:photos-f8c12", "--out", "vae", env=environment)
    made = run("writer/bin/python", "-c", PICTURE, "olvae:photos-f8c12", env=environment)
    read = run("reader/bin/python", "-c", PICTURE, "vae", env=environment)
    if made != read:
        sys.exit("error: the export does not compute what the shipped model computes")
    print(f"open-litevae {version} can be released")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        rehearse(Path(scratch))
