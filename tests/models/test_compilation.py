"""Compiled networks: whole graphs, equal results, plain names; and a machine without a compiler."""

import copy
import logging

import pytest
import torch

from olvae.models.optimization import compile_networks
from olvae.modules.gigagan import GigaGAN
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.sdvae import SDDecoder, SDEncoder
from olvae.modules.unetgan import UNetGAN, stop_power_iterations
from tests.conftest import TINY_ENCODER
from tests.models.steps import against, build, fit, metrics, snapshot

NARROW = {"channels": 8, "z_channels": 4, "channel_mult": (1, 1, 1, 1), "num_res_blocks": 0}


def networks():
    z, image = torch.randn(2, 4, 2, 2), torch.randn(2, 3, 16, 16)
    """Those that no compiled training below has."""
    yield "encoder, paper", LiteVAE_Encoder(8, variant="paper", **TINY_ENCODER), image
    yield "encoder, db2", LiteVAE_Encoder(8, wavelet="db2", **TINY_ENCODER), image
    for variant in ("open_litevae", "paper_smc"):
        yield f"decoder, {variant}", LiteVAE_Decoder(**NARROW, variant=variant), z
    narrow = {"channels": 8, "channel_mult": (1, 1), "num_res_blocks": 1, "norm_groups": 4}
    yield "SD's encoder", SDEncoder(latent_dim=8, **narrow), image
    yield "SD's decoder", SDDecoder(z_channels=4, **narrow), z
    yield "UNetGAN", UNetGAN(base_channels=2, image_size=128), torch.randn(1, 3, 128, 128)
    yield (
        "GigaGAN",
        GigaGAN(image_size=64, base=256, max_channels=16, blocks=1, attention=(8,), heads=2, head_channels=8),
        torch.randn(1, 3, 64, 64),
    )


NETWORKS = {name: (network, x) for name, network, x in networks()}


SLOW = ("encoder, paper", "encoder, db2")  # graphs of half a minute on a slow machine


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS]
)
def test_a_network_is_one_graph_and_gives_the_same(name):
    network, x = NETWORKS[name]
    stop_power_iterations(network)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=0, atol=0)


@pytest.fixture
def graphs(monkeypatch):
    """Everything that is compiled is one graph, run by plain torch; the graphs."""
    compiler, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, **options, backend=backend, fullgraph=True))
    return graphs


SETTINGS = {"r1_weight": 1.0, "r1_every": 1, "lecam_weight": 0.1, "adaptive_weight": True, "updates_per_step": 2}


def test_compiled_training_is_training(image_folder, graphs):
    plain = fit(build(against(**SETTINGS)), image_folder, 2)
    compiled = fit(build(against(**SETTINGS), compile=True), image_folder, 2)
    assert compiled.encoder._compiled_call_impl is not None
    assert compiled.adversary.discriminator._compiled_call_impl is not None
    assert metrics(compiled) == metrics(plain)
    assert snapshot(compiled).keys() == snapshot(plain).keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, compiled.state_dict()[name]), name
    assert copy.deepcopy(compiled).encoder._compiled_call_impl is None


@pytest.mark.slow
def test_a_gradient_ratio_goes_through_a_graph_that_was_compiled_without_one(image_folder, monkeypatch):
    """The first step's backward pass compiles; the second one reports a ratio before its own."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, **options, backend="aot_eager"))
    model = fit(build(against(), compile=True), image_folder, 2, log_every_n_steps=2)
    assert "health/gradient_ratio" in metrics(model)


@pytest.mark.slow
def test_validation_is_not_compiled(graphs):
    model, x = build(compile=True), torch.randn(1, 3, 16, 16)
    model.on_fit_start()
    graphs.clear()
    model.on_validation_start()
    model(x)
    model.on_validation_end()
    assert not graphs
    model(x)
    assert len(graphs) == 2


def test_a_machine_without_a_compiler_trains_uncompiled(image_folder, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    model = build()
    with caplog.at_level(logging.WARNING, "olvae"):
        assert not compile_networks([model.encoder], torch.device("cpu"))
    (record,) = caplog.records
    assert record.getMessage().endswith("because no compiler works here (no C++ compiler found)")
    assert model.encoder._compiled_call_impl is None
    assert fit(build(compile=True), image_folder, 1).trainer.global_step == 1
