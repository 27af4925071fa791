"""What a source's loader does to its processes; what it reads is the sources' own tests'."""

import subprocess
import sys
import warnings

from olvae.data.mapped.picture_folder import FolderSource

SCRIPT = """
import sys
from olvae.data.mapped.picture_folder import FolderSource

source = FolderSource(sys.argv[1], 16, 2, num_workers=1)
kept = [iter(source.test_loader()), iter(source.train_loader(0))]
print([len(next(batches)["key"]) for batches in kept])
"""


def test_python_ends_while_loaders_have_processes(image_folder):
    """They survive the one SIGTERM that multiprocessing sends before it waits for them."""
    command = [sys.executable, "-c", SCRIPT, str(image_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[2, 2]\n", "")


def test_more_processes_than_cores_are_no_warning_of_torch(image_folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = iter(FolderSource(str(image_folder), 16, 2, num_workers=2).test_loader())
        assert len(next(batches)["key"]) == 2
