"""Signals and the time limit: which stop training, when, and what the command is told."""

import math
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from olvae.training.callbacks import GracefulStop


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, in a list, so that a test can move it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def leave(number: int, _) -> None:
    sys.exit(100 + number)


def returns(*_) -> None: ...


@pytest.mark.parametrize(
    ("number", "handler", "ending"),
    [
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
        (signal.SIGINT, returns, KeyboardInterrupt),
        (signal.SIGTERM, leave, SystemExit),
        (signal.SIGTERM, signal.SIG_DFL, KeyboardInterrupt),
    ],
)
def test_a_signal_counts_again_after_a_second(now, capsys, number, handler, ending):
    """Then the handler that was there before ends the process, with its exit code.

    If there was none, or it does not, training ends as by Ctrl-C.
    """
    signal.signal(number, handler)
    stop = GracefulStop()
    assert not stop.preempted
    with stop.listening():
        for pause in (0.0, 0.9):
            now[0] += pause
            signal.raise_signal(number)
        now[0] = 101.0
        with pytest.raises(ending) as caught:
            signal.raise_signal(number)
    if handler is leave:
        assert caught.value.code == 100 + number
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{stop.reason}: ")
    assert signal.getsignal(number) is handler
    assert stop.reason == signal.Signals(number).name or number == signal.SIGINT
    assert stop.preempted == (number == signal.SIGTERM)


def test_a_closed_terminal_does_not_stop_a_training_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop = GracefulStop()
    with stop.listening():
        signal.raise_signal(signal.SIGHUP)
        assert stop.reason is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_no_other_thread_listens_for_signals():
    before = signal.getsignal(signal.SIGTERM)
    failed = []

    def listen() -> None:
        try:
            GracefulStop().on_train_start()
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert failed == []
    assert signal.getsignal(signal.SIGTERM) is before


def after_batch(stop: GracefulStop, step: int, complete: bool = True) -> tuple[bool, object]:
    """Whether training stops after a batch, and how many batches it validates then."""
    trainer = SimpleNamespace(
        global_step=step, max_steps=5, should_stop=False, limit_val_batches=1.0
    )
    stop.on_train_batch_end(trainer, SimpleNamespace(update_is_complete=complete), None)
    return trainer.should_stop, trainer.limit_val_batches


@pytest.mark.parametrize("limit", [None, 10.0])
def test_a_time_limit_ends_a_whole_update_and_the_last_step_is_validated(now, limit):
    stop = GracefulStop(limit)
    assert stop._end == (math.inf if limit is None else 110.0)
    assert after_batch(stop, 1) == (False, 1.0)
    assert after_batch(stop, 5) == (True, 1.0)
    now[0] = 109.9
    assert after_batch(stop, 2) == (False, 1.0)
    now[0] = 110.0
    assert after_batch(stop, 3, complete=False) == (False, 1.0)
    assert stop.reason is None
    assert after_batch(stop, 3) == ((False, 1.0) if limit is None else (True, 0))
    assert stop.reason == (None if limit is None else "the time limit")
    assert stop.agreed == stop.preempted == (limit is not None)
    assert not stop.requeues


@pytest.mark.parametrize(("number", "requeues"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_scheduler_asks_for_a_requeue_by_one_signal(number, requeues):
    stop = GracefulStop()
    stop.on_train_start()
    signal.raise_signal(number)
    stop.teardown()
    stop.on_train_end()
    assert stop.agreed
    assert stop.requeues == requeues
    assert after_batch(stop, 1) == (True, 0)


def test_a_first_signal_is_not_replaced_by_a_time_limit(now):
    stop = GracefulStop(1.0)
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
    now[0] = 200.0
    assert after_batch(stop, 1) == (True, 0)
    assert not stop.preempted


def test_processes_agree_without_a_wait_but_at_the_end(monkeypatch):
    """On the highest request: 2 for a requeue, 1 for a stop, 0 for none."""
    stop, asked = GracefulStop(), []
    monkeypatch.setattr(
        stop._agreement, "any_asked", lambda number, wait: asked.append((number, wait)) or 0
    )
    for reason in (None, "SIGTERM", "SIGUSR1"):
        stop.reason = reason
        assert after_batch(stop, 1) == (False, 1.0)
    stop.on_train_end()
    assert asked == [(0, False), (1, False), (2, False), (2, True)]
    assert (stop.agreed, stop.requeues) == (False, False)
