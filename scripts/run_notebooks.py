"""Run the notebooks of examples/ and store in them what they printed and showed.

python scripts/run_notebooks.py [NOTEBOOK ...]
"""

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
WIDEST = 800  # pixels of a stored picture

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # no terminal for the commands: their progress bars would be megabytes
    "TTY_COMPATIBLE": "0",
    # a hint about widgets, with a path of this machine
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder; it comes back with its outputs, and without this machine's
    versions and times.

    Raises nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, 4)
    written = dict(notebook.metadata)

    # Commands of the notebook are those beside this Python.
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, **ENVIRONMENT, "PATH": paths})

    notebook.metadata = nbformat.from_dict(written)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = output.text.replace("\r\n", "\n")
            if "image/png" in output.get("data", {}):
                shrink(output)
    return notebook


def shrink(output: nbformat.NotebookNode) -> None:
    """Keep one picture of an output, as a JPEG of at most 800 pixels' width."""
    with Image.open(io.BytesIO(base64.b64decode(output.data.pop("image/png")))) as picture:
        small = picture.convert("RGB")
    small.thumbnail((WIDEST, 10 * WIDEST), Image.Resampling.LANCZOS)
    stored = io.BytesIO()
    small.save(stored, "JPEG", quality=80)
    output.data["image/jpeg"] = base64.b64encode(stored.getvalue()).decode()


def main(arguments: list[str]) -> None:
    given = [Path(argument) for argument in arguments]
    for path in given or sorted(NOTEBOOKS.glob("*.ipynb")):
        print(path.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
