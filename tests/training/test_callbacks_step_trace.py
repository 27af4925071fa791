"""`--profile`: a trace that other programs read."""

import json
from contextlib import suppress

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from olvae.training.callbacks import UNTRACED, StepTrace, count_kernels
from tests.conftest import plain_config


def test_profile_traces_steps(train_with, image_folder, capfd):
    """A traced step is an update, of two batches here."""
    run = train_with(
        "lightning.trainer.accumulate_grad_batches=2",
        f"lightning.trainer.max_steps={UNTRACED + 3}",
        config=plain_config(image_folder),
        profile=2,
    )
    events = json.loads((run.path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("Optimizer.step#Adam.step") == 2
    assert "aten::convolution" in (run.path / "trace.txt").read_text()
    assert f"2 steps traced in {run.path / 'trace.json'}" in capfd.readouterr().err


def test_too_few_steps_for_a_trace_are_a_warning(train_with, image_folder, capfd):
    settings = (
        "lightning.trainer.accumulate_grad_batches=2",
        f"lightning.trainer.max_steps={UNTRACED + 1}",
    )
    train_with(*settings, config=plain_config(image_folder), profile=2)
    assert f"{UNTRACED + 2} steps" in capfd.readouterr().err


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_no_trace_is_open_after_training(train_with, at_step, image_folder, error):
    """A process that exits within one crashes, with another code than the command's."""

    def interrupt() -> None:
        assert torch.autograd._profiler_enabled()
        if error is not None:
            raise error

    at_step(UNTRACED, interrupt)
    steps = f"lightning.trainer.max_steps={UNTRACED + 1}"
    with suppress(KeyboardInterrupt, SystemExit):
        train_with(steps, config=plain_config(image_folder), profile=9)
    assert not torch.autograd._profiler_enabled()


def test_step_trace_refuses_zero_steps():
    with pytest.raises(ValueError, match="at least 1"):
        StepTrace(0)


def test_copies_memsets_and_annotations_are_no_kernels():
    def event(name: str, number: int, **options) -> FunctionEvent:
        on = {"device_type": DeviceType.CUDA, "stack": [], **options}
        return FunctionEvent(number, name, 0, 10 * number, 10 * number + 5, **on)

    names = ("ampere_gemm", "ampere_gemm", "triton_red_fused_0", "Memcpy HtoD (Pinned -> Device)")
    events = [event(name, number) for number, name in enumerate((*names, "Memset (Device)"))]
    events.append(event("Optimizer.step#Adam.step", 5, is_user_annotation=True))
    events.append(event("aten::convolution", 6, device_type=DeviceType.CPU))
    traced = EventList(events, use_device="cuda")
    traced._build_tree()
    averages = traced.key_averages()
    assert len(averages) == 6
    assert count_kernels(averages) == 3
