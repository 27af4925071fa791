"""What a dry run finds and says, by hand: kinds of steps, launches, messages, too few images."""

import re
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import Sides
from olvae.models.adversary import Adversary
from olvae.models.footprint import Footprint
from olvae.models.large.tiling import GIB
from olvae.training.dry_run import RankStep, _Recorder, check_data, dry_run, kinds_of_steps
from tests.models.steps import PATCHGAN, against
from tests.training.test_dry_run import config, one_step, record  # noqa: F401

module = import_module("olvae.training.dry_run")


def tables(updates: int) -> list[str]:
    """Rare terms at the last update that is looked at, and after it."""
    return {8: ["R1"], 3 + 5 + 16 - 1: ["CutMix", "R1"], 3 + 5 + 16: ["too late"]}.get(updates, [])


@pytest.mark.parametrize(
    ("start", "warm_up", "kinds"),
    [
        (0, 0, {"both": 0, "both, R1": 8, "both, logged": 0}),
        (7, 0, {"autoencoder alone": None, "both": 0, "both, R1": 8, "both, logged": 0}),
        (
            0,
            3,
            {
                "discriminator alone": 2,
                "both": 3,
                "both, R1": 8,
                "both, CutMix, R1": 23,
                "both, logged": 3,
            },
        ),
    ],
)
def test_a_step_of_each_kind_is_found_by_hand(start, warm_up, kinds):
    adversary: Any = SimpleNamespace(
        start_step=start, warmup_updates=warm_up, ramp_steps=5, r1_every=2, rare_terms=tables
    )
    assert kinds_of_steps(adversary) == kinds
    assert kinds_of_steps(None) == {"a step": None, "a step, logged": None}


def test_the_next_kind_of_step_is_brought_about_before_each_update():
    recorder = _Recorder({"a": None, "b": 5, "b, logged": 0})
    trainer: Any = SimpleNamespace()
    model: Any = SimpleNamespace(update_is_complete=True, adversary=SimpleNamespace())
    found = []
    for whole in (True, False, True, True):
        model.update_is_complete = whole
        recorder.begin(trainer, model)
        adversary = model.adversary
        found.append((trainer.log_every_n_steps, adversary.start_step, adversary.updates))
    assert found == [(0, sys.maxsize, 0), (0, sys.maxsize, 0), (0, 0, 5), (1, 0, 0)]
    assert list(recorder.steps) == ["a", "b", "b, logged"]
    assert recorder.step is recorder.steps["b, logged"]
    plain: Any = SimpleNamespace(update_is_complete=True, adversary=None)
    _Recorder({"a": None}).begin(trainer, plain)


class Operation(SimpleNamespace):
    """An operation of torch, as a mode gets it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def __str__(self) -> str:
        return self.name


def test_views_allocations_and_pythons_own_are_no_launches():
    recorder = _Recorder({})
    x = torch.ones(2, 3)
    with recorder:
        y = x.view(3, 2)
        torch.empty(3)
        z = y.mul(2).add(1)
    assert torch.equal(z, torch.full((3, 2), 3.0))
    launches = 2  # the product and the sum
    assert recorder.step.launches == launches
    prim = Operation(name="prim.device.default", namespace="prim", is_view=False)
    assert recorder.__torch_dispatch__(prim, (), (x,)) == ((x,), {})
    assert recorder.step.launches == launches
    assert (recorder.step.messages, recorder.step.nbytes) == ([], 0)


def test_a_message_has_its_operation_shapes_and_bytes():
    recorder = _Recorder({})
    sends = Operation(name="c10d.gather_.default", namespace="c10d", is_view=False)
    tensors = [torch.zeros(2, 3), torch.zeros(5, dtype=torch.bfloat16)]
    assert recorder.__torch_dispatch__(sends, (), (tensors,), {"async": True}) == (
        (tensors,),
        {"async": True},
    )
    assert recorder.step == RankStep(["gather of 2x3 float32, 5 bfloat16"], 24 + 10, 0)


def source_of(**changes: Any) -> Any:
    numbers = {"batch_size": 2, "samples_per_epoch": 8, "val_images": 4, "size": Sides(16, 16)}
    calls = {"describe": lambda: "some images", "check_processes": lambda ranks: None}
    return SimpleNamespace(**{**numbers, **calls, **changes})


def test_as_many_images_as_ranks_need_are_enough():
    asked: list[int] = []
    enough = source_of(check_processes=asked.append)
    assert check_data(enough, 4) == ["data: some images"]
    assert asked == [4]
    endless = source_of(samples_per_epoch=None, val_images=None)
    assert check_data(endless, 4) == ["data: some images"]
    few = check_data(source_of(samples_per_epoch=7, val_images=3), 4)
    assert [re.findall(r"\d+", note) for note in few] == [[], ["8", "7"], ["3", "1"]]


def test_what_follows_from_the_steps_is_by_hand(monkeypatch):
    """Of the kind of step with most launches among those without logging; sizes by default."""
    recorded, described = [], []

    def recorded_steps(*given: Any) -> dict[str, RankStep]:
        recorded.append(given[1:])
        launches = {"first step": 9000, "one": 3000, "other": 2000, "one, logged": 8000}
        return {name: RankStep(["a message"], 4, number) for name, number in launches.items()}

    monkeypatch.setattr(module, "record_steps", recorded_steps)
    monkeypatch.setattr(module, "quieten", lambda: recorded.append("quiet"))
    monkeypatch.setattr(module, "describe_step", lambda *given: described.append(given) or "time")
    needs = Footprint(2 * GIB, GIB // 2, flop=7)
    monkeypatch.setattr(module, "footprint", lambda _, size, precision: needs)
    node = config(accumulate_grad_batches=2)
    node["data"] = {"target": f"{__name__}.gone"}
    steps, notes = dry_run(node, 4)
    assert recorded == [
        "quiet",
        *((1, Sides(256, 256), "32", "auto", rank, 4) for rank in (3, 0)),
    ]
    assert list(steps) == ["one", "other", "one, logged"]
    assert described == [(7, 1, 495.0, False, 6e-6 * 3000 / 2, "an H100")]
    numbers = [re.findall(r"\d+(?:\.\d+)?", note) for note in notes]
    assert numbers[1] == ["8", "1", "2", "4", "256", "256"]
    assert numbers[3] == ["2.5", "32", "0.5", "15"]
    assert numbers[5] == ["0", "3"]
    dry_run(node, 4, "bf16")
    assert recorded[-1][2] == "bf16"


def gone() -> None:
    raise OSError("elsewhere")


def test_a_step_that_asks_for_a_value_is_a_mistake_of_the_config(one_step, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Adversary, "updated", lambda self: torch.zeros(3).sum().item())
    with pytest.raises(ConfigError, match="asks for a value"):
        record(config(against(PATCHGAN)), "32")
    assert not dist.is_initialized()
