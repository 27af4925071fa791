import platform
import subprocess
import sys

import pytest
import torch

from olvae.cli.encode import own_device
from olvae.config import ConfigError
from olvae.devices import (
    autocast,
    full_float32,
    keep_freed_memory,
    resolve_device,
    resolve_devices,
    resolve_precision,
    tf32,
)
from olvae.files import counted
from olvae.training.processes import process_count


@pytest.fixture
def gpus(monkeypatch):
    def set_count(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_count


@pytest.mark.parametrize(
    ("gpus_wanted", "trainer", "there", "expected"),
    [
        ("0", {}, 4, ("cpu", 1)),
        ("0", {"accelerator": "cpu", "devices": 2}, 0, ("cpu", 2)),
        ("2", {}, 4, ("cuda", [0, 1])),
        ("1,3", {}, 4, ("cuda", [1, 3])),
        ("0,", {}, 4, ("cuda", [0])),
        (None, {}, 4, ("cuda", 4)),
        (None, {}, 0, ("cpu", 1)),
        (None, {"accelerator": "cpu", "devices": 2}, 4, ("cpu", 2)),
        (None, {"accelerator": "gpu", "devices": "auto"}, 3, ("gpu", 3)),
        (None, {"devices": 2}, 4, ("cuda", 2)),
        (None, {"accelerator": "auto", "devices": -1}, 2, ("cuda", 2)),
        (None, {"devices": "-1"}, 2, ("cuda", 2)),
        (None, {"devices": "0, 2"}, 4, ("cuda", [0, 2])),
        (None, {"devices": "1,"}, 4, ("cuda", [1])),
        (None, {"devices": "2"}, 4, ("cuda", 2)),
        (None, {"accelerator": "cpu", "devices": "2"}, 4, ("cpu", 2)),
    ],
)
def test_resolve_devices_of_gpus_and_trainer_settings(gpus, gpus_wanted, trainer, there, expected):
    gpus(there)
    assert tuple(resolve_devices(gpus_wanted, trainer).values()) == expected


@pytest.mark.parametrize(
    ("flag", "there", "message"),
    [
        ("1", 0, "this machine has no GPU"),
        ("2", 1, "this machine has 1 GPU;"),
        ("0,5", 2, "this machine has 2 GPUs"),
        ("two", 2, "give a number of GPUs"),
        ("-1", 2, "give a number of GPUs"),
        (",", 2, "give a number of GPUs"),
    ],
)
def test_resolve_devices_refuses_gpus_that_are_not_there(gpus, flag, there, message):
    gpus(there)
    with pytest.raises(ConfigError, match=message):
        resolve_devices(flag, {})
    with pytest.raises(ConfigError, match=r"trainer\.devices: '0,1': .*processes"):
        resolve_devices(None, {"accelerator": "cpu", "devices": "0,1"})
    gpus(2)
    with pytest.raises(ConfigError, match=r"trainer\.devices: 'two': .*GPUs"):
        resolve_devices(None, {"devices": "two"})


@pytest.fixture
def on_mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("gpus_wanted", "trainer", "expected"),
    [
        (None, {}, ("mps", 1)),
        ("1", {}, ("mps", [0])),
        ("0,", {}, ("mps", [0])),
        ("0", {}, ("cpu", 1)),
        (None, {"accelerator": "mps"}, ("mps", 1)),
        (None, {"accelerator": "gpu", "devices": 1}, ("mps", 1)),
        (None, {"accelerator": "cpu", "devices": 2}, ("cpu", 2)),
    ],
)
def test_a_mac_has_one_gpu(on_mac, gpus_wanted, trainer, expected):
    assert tuple(resolve_devices(gpus_wanted, trainer).values()) == expected


def test_what_a_mac_does_not_have_is_refused(on_mac):
    assert [resolve_device(name) for name in (None, "mps", "mps:0", "cpu")] == [
        *("mps", "mps", "mps:0", "cpu")
    ]
    with pytest.raises(ConfigError, match="`device` cuda: "):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match=r"`gpus` 2: .*1 GPU"):
        resolve_devices("2", {})
    with pytest.raises(ConfigError, match="accelerator: cuda: "):
        resolve_devices(None, {"accelerator": "cuda"})
    with pytest.raises(ConfigError, match=r"2 processes .*`gpus` 0"):
        process_count({"accelerator": "mps", "devices": 2})
    assert resolve_precision("fp16", "mps") == "16-mixed"
    assert own_device(None, "1") == ("mps:0", [0])


def test_a_machine_without_mps_refuses_it(gpus):
    gpus(2)
    with pytest.raises(ConfigError, match="`device` mps: "):
        resolve_device("mps")
    with pytest.raises(ConfigError, match=r"accelerator: mps: .*no mps"):
        resolve_devices(None, {"accelerator": "mps"})
    gpus(0)
    with pytest.raises(ConfigError, match=r"accelerator: mps: .*no GPU"):
        resolve_devices(None, {"accelerator": "mps"})


def settings():
    """Whether convolutions and products may be TF32's."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("precision", "allowed", "dtype"),
    [
        ("32", False, torch.float32),
        ("tf32", True, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("fp16", False, torch.float16),
    ],
)
def test_tf32_is_allowed_by_name_alone_and_restored(precision, allowed, dtype):
    before, x = settings(), torch.ones(2, 2)
    assert before == (True, False)  # torch's own
    with autocast("cpu", precision):
        assert settings() == (allowed, allowed)
        assert (x @ x).dtype == dtype
        with full_float32(x):
            assert settings() == (False, False)
            assert (x @ x).dtype == torch.float32
        assert settings() == (allowed, allowed)
        assert (x @ x).dtype == dtype
    assert settings() == before
    with pytest.raises(KeyError), autocast("cpu", precision), tf32(not allowed):
        raise KeyError
    assert settings() == before
    with full_float32(torch.empty(1, device="meta")):  # where there is no autocast
        assert settings() == (False, False)


def test_resolve_precision_of_names_and_accelerators():
    assert [resolve_precision(p, "cpu") for p in ("32", "bf16")] == ["32-true", "bf16-mixed"]
    assert [resolve_precision(p, "cuda") for p in ("16", "fp16", "float16")] == ["16-mixed"] * 3
    with pytest.raises(ConfigError, match="choose from fp16, bf16, tf32, 32"):
        resolve_precision("64", "cuda")
    with pytest.raises(ConfigError, match="needs a GPU"):
        resolve_precision("16", "cpu")


@pytest.mark.parametrize(
    ("gpus", "local", "expected"), [(0, "1", "cpu"), (1, "1", "cuda"), (4, "3", "cuda:3")]
)
def test_resolve_device_takes_each_process_its_own_gpu(monkeypatch, gpus, local, expected):
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device() == expected
    assert resolve_device("cpu") == "cpu"
    assert current == [expected] * (gpus > 1)
    if gpus > 2:
        assert resolve_device("cuda:2") == current[-1] == "cuda:2"
    else:
        with pytest.raises(ConfigError, match=f"has {counted(gpus, 'GPU')}"):
            resolve_device("cuda:2")


FAULTS = """
import resource, sys
import torch
from olvae.devices import keep_freed_memory

assert sys.argv[1] == "not" or keep_freed_memory()

def use():
    return torch.ones(2**24).sum()  # 64 MB

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are"
)
def test_keep_freed_memory_gives_a_tensor_the_pages_of_the_one_before():
    """By the system's count of pages that it had to supply."""
    keep, give = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, mode]))
        for mode in ("keep", "not")
    )
    assert keep < 16 < give  # 16384 pages, or 32 large ones


def test_keep_freed_memory_leaves_other_c_libraries_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
