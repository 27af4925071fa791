"""The memory that a process keeps, seen by the system's count of pages that it had to supply."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from olvae.devices import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def use():
    return torch.ones(2**24).sum()  # 64 MB

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_tensor_gets_the_pages_of_the_one_before() -> None:
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", FAULTS, mode], text=True)) for mode in ("keep", "not")
    }
    assert faults["keep"] < 16 < faults["not"]  # 16384 pages, or 32 large ones


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from olvae.devices import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
