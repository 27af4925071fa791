import pytest
import torch

from olvae.config import ConfigError
from olvae.training.devices import resolve_devices, resolve_precision


@pytest.fixture
def gpus(monkeypatch):
    def set_count(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_count


@pytest.mark.parametrize(
    ("flag", "there", "expected"),
    [
        ("0", 4, ("cpu", 1)),
        ("2", 4, ("cuda", [0, 1])),
        ("1,3", 4, ("cuda", [1, 3])),
        ("0,", 4, ("cuda", [0])),
        (None, 4, ("cuda", 4)),
        (None, 0, ("cpu", 1)),
    ],
)
def test_flag(gpus, flag, there, expected):
    gpus(there)
    assert tuple(resolve_devices(flag, {}).values()) == expected


@pytest.mark.parametrize(
    ("trainer", "there", "expected"),
    [
        ({"accelerator": "cpu", "devices": 2}, 4, ("cpu", 2)),
        ({"accelerator": "gpu", "devices": "auto"}, 3, ("gpu", 3)),
        ({"devices": 2}, 4, ("cuda", 2)),
        ({"accelerator": "auto", "devices": -1}, 2, ("cuda", 2)),
    ],
)
def test_config(gpus, trainer, there, expected):
    gpus(there)
    assert tuple(resolve_devices(None, trainer).values()) == expected


def test_processes_on_the_cpu(gpus):
    gpus(0)
    assert resolve_devices("0", {"accelerator": "cpu", "devices": 2}) == {"accelerator": "cpu", "devices": 2}


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
def test_mistakes(gpus, flag, there, message):
    gpus(there)
    with pytest.raises(ConfigError, match=message):
        resolve_devices(flag, {})


def test_precision():
    assert [resolve_precision(p, "cpu") for p in ("32", "bf16")] == ["32-true", "bf16-mixed"]
    assert resolve_precision("16", "cuda") == "16-mixed"
    with pytest.raises(ConfigError, match="choose one of 32, 16, bf16"):
        resolve_precision("64", "cuda")
    with pytest.raises(ConfigError, match="needs a GPU"):
        resolve_precision("16", "cpu")
