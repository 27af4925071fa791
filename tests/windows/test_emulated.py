"""Windows as Linux can play it: sitecustomize.py takes away what is not there."""

import re
import sys
import tempfile

import pytest

from tests.windows.commands import python

if sys.platform != "linux":
    pytest.skip("only Linux can play Windows", allow_module_level=True)


def pytest_there(*arguments: str, timeout: float) -> None:
    """Run tests under the emulation: all pass, and nothing sends Ctrl-C by accident."""
    options = ["-n", "0", "-p", "no:cacheprovider", "--no-header", "-rA"]
    done = python("-m", "pytest", *options, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "WINDOWS:" not in done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 10 or "slow" in arguments


@pytest.mark.slow
def test_what_windows_does_otherwise_works():
    pytest_there("tests/windows/on_windows.py", timeout=280)


def test_the_emulation_takes_away():
    """Each line fails there, and passes here."""
    code = """
import os, signal, sys
def refused(act, *errors):
    try:
        act()
    except errors:
        return
    print("allowed", act, errors)
    sys.exit(1)
os.chdir(sys.argv[1])
refused(lambda: signal.SIGUSR1, AttributeError)
refused(lambda: os.fork(), AttributeError)
refused(lambda: os.kill(os.getpid(), 0), OSError)
refused(lambda: os.symlink("a", "b"), OSError)
refused(lambda: open("con.txt", "w"), OSError)
refused(lambda: open("x" * 256, "w"), OSError)
refused(lambda: os.mkdir("a:b"), OSError)
refused(lambda: os.makedirs("/".join(["x" * 100] * 3)), OSError)
refused(lambda: print("\\u4e2d"), UnicodeEncodeError)
refused(lambda: open("a", "w").write("\\u4e2d"), UnicodeEncodeError)
held = open("a", "rb")
for act in (lambda: os.remove("a"), lambda: os.replace("a", "b"), lambda: os.fsync(held.fileno())):
    refused(act, OSError)
held.close()
os.replace("a", "b")
"""
    with tempfile.TemporaryDirectory() as folder:
        done = python("-c", code, folder)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.slow
def test_a_killed_training_is_continued():
    pytest_there("tests/windows/on_windows.py", "-m", "slow", timeout=600)


@pytest.mark.slow
def test_the_quick_suite_of_ci_passes():
    pytest_there("@tests/quick.txt", timeout=1500)
