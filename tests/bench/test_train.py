import pytest
import torch

from olvae.bench.cases import EVERY, STEP_OPTIONS
from olvae.bench.train import TwoForwards, bench_train, time_steps
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import tiny_config
from tests.models.steps import against


def params() -> dict:
    return tiny_config(adversary_config=against())["model"]["params"]


def test_the_other_step_runs_forward_twice(monkeypatch):
    calls = []
    forward = TwoForwards.encode

    def count(self, x):
        calls.append(type(self).__name__)
        return forward(self, x)

    monkeypatch.setattr("olvae.models.liteautoencoder.LiteAutoencoderKL.encode", count)
    result = bench_train(params(), size=16, batch_size=2, steps=2, rounds=1, device="cpu")
    assert calls.count("LiteAutoencoderKL") == 3
    assert result["one_forward_images_per_s"] == 2 / result["one_forward_s"]
    assert result["speedup"] == result["two_forwards_s"] / result["one_forward_s"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 0.02)])
def test_a_step_with_every_option_has_the_same_losses(monkeypatch, precision, tolerance):
    losses = []
    backward = LiteAutoencoderKL.manual_backward

    def keep(self, loss, *args, **kwargs):
        losses.append(loss.item())
        backward(self, loss, *args, **kwargs)

    monkeypatch.setattr(LiteAutoencoderKL, "manual_backward", keep)
    monkeypatch.setattr("olvae.models.liteautoencoder.compile_networks", compile_eagerly)
    for options in (STEP_OPTIONS["plain"], STEP_OPTIONS[EVERY]):
        torch.manual_seed(0)
        time_steps(LiteAutoencoderKL(**params(), **options), 16, 2, 0, "cpu", precision)
    plain, every = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    assert len(plain) == 2  # the autoencoder's and the discriminator's
    assert every == pytest.approx(plain, rel=tolerance)


def compile_eagerly(networks, device):
    for network in networks:
        network.compile(backend="eager")
