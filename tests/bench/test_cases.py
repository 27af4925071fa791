import pytest
import torch

from olvae.bench.cases import EVERY, STEP_OPTIONS, TwoForwards, time_steps
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import tiny_config
from tests.models.steps import against


def params() -> dict:
    return tiny_config(adversary_config=against())["model"]["params"]


def test_rows_are_near_what_was_published(network_rows):
    rows = network_rows
    assert {row.name for row in rows if row.group == "encoder"} == {"S", "B", "M", "L", "sd"}
    assert {row.name for row in rows if row.group == "decoder"} == {"open_litevae", "paper_smc", "sd"}
    unets = {f"UNetGAN-{scale}" for scale in "SML"}
    assert {row.name for row in rows if row.group == "discriminator"} == {"PatchGAN", "GigaGAN", *unets}
    assert {row.variant for row in rows if row.group == "encoder"} == {"open_litevae", "paper", "sd"}
    for row in rows:
        if row.published_params is not None:
            assert row.params == pytest.approx(row.published_params, rel=0.01), row
        if row.published_macs is not None:
            assert row.macs == pytest.approx(row.published_macs, rel=0.02), row


def test_the_peer_of_a_step_runs_forward_twice(monkeypatch):
    calls = []
    encode = LiteAutoencoderKL.encode
    monkeypatch.setattr(LiteAutoencoderKL, "encode", lambda self, x: calls.append(0) or encode(self, x))
    for kind, passes in ((LiteAutoencoderKL, 1), (TwoForwards, 2)):
        calls.clear()
        assert len(time_steps(kind(**params()), 16, 2, 2, "cpu")) == 2
        assert len(calls) == 3 * passes


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
