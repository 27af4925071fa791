"""Compiled networks: whole graphs, equal results, plain names, launches;
and a machine without a compiler.
"""

import copy
import logging
from itertools import repeat

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch._subclasses.fake_tensor import FakeTensorMode

from olvae.data.places import load
from olvae.models.footprint import without_memory, without_weights
from olvae.modules.gigagan import GigaGAN
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.mixed_precision import compile_networks
from olvae.modules.sdvae import SDDecoder, SDEncoder
from olvae.modules.unetgan import UNetGAN, stop_power_iterations
from tests.conftest import TINY_ENCODER
from tests.models.steps import Each, against, build, build_shallow, fit, metrics, snapshot, trainer

NARROW = {"channels": 8, "z_channels": 4, "channel_mult": (1, 1), "num_res_blocks": 0}


def networks():
    """Those that no compiled training below has."""
    z, image = torch.randn(2, 4, 2, 2), torch.randn(2, 3, 16, 16)
    yield "encoder, paper", LiteVAE_Encoder(8, variant="paper", **TINY_ENCODER), image
    yield "encoder, db2", LiteVAE_Encoder(8, wavelet="db2", **TINY_ENCODER), image
    for variant in ("open_litevae", "paper_smc"):
        yield f"decoder, {variant}", LiteVAE_Decoder(**NARROW, variant=variant), z
    narrow = {"channels": 8, "channel_mult": (1, 1), "num_res_blocks": 0, "norm_groups": 4}
    yield "SD's encoder", SDEncoder(latent_dim=8, **narrow), image
    yield "SD's decoder", SDDecoder(z_channels=4, **narrow), z
    yield "UNetGAN", UNetGAN(base_channels=2, image_size=128), torch.randn(1, 3, 128, 128)
    yield (
        "GigaGAN",
        GigaGAN(
            image_size=64,
            base=256,
            max_channels=16,
            blocks=1,
            attention=(8,),
            heads=2,
            head_channels=8,
        ),
        torch.randn(1, 3, 64, 64),
    )


NETWORKS = {name: (network, x) for name, network, x in networks()}
SLOW = ("encoder, paper", "encoder, db2", "decoder, open_litevae", "GigaGAN")
"""Graphs of seconds: of its kind another one stays."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS],
)
def test_compiled_network_is_one_graph_and_gives_the_same(name):
    network, x = NETWORKS[name]
    stop_power_iterations(network)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=0, atol=0)


@pytest.fixture
def graphs(monkeypatch):
    """Everything that is compiled is one graph, run by plain torch; the graphs."""
    torch._dynamo.reset()  # it takes sizes that differ from an earlier test's for dynamic ones
    compiler, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **options: compiler(f, **options, backend=backend, fullgraph=True),
    )
    return graphs


SETTINGS = {
    "r1_weight": 1.0,
    "r1_every": 1,
    "lecam_weight": 0.1,
    "adaptive_weight": True,
    "updates_per_step": 2,
}


@pytest.mark.parametrize("precision", [pytest.param("32", marks=pytest.mark.slow), "bf16-mixed"])
def test_compiled_training_is_training(image_folder, graphs, precision):
    plain, compiled = (
        fit(
            build_shallow(against(**SETTINGS), compile=on),
            image_folder,
            2,
            batch_size=2,
            precision=precision,
        )
        for on in (False, True)
    )
    for graph in graphs[1:3]:  # encoder and decoder, after a trial of the compiler
        inputs = (
            node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"
        )
        half = [x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16]
        # Weights and biases, beside what comes in.
        assert (len(half) > 1) == (precision == "bf16-mixed")
    assert compiled.encoder._compiled_call_impl is not None
    assert compiled.adversary.discriminator._compiled_call_impl is not None
    assert metrics(compiled) == metrics(plain)
    assert snapshot(compiled).keys() == snapshot(plain).keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, compiled.state_dict()[name]), name
    assert copy.deepcopy(compiled).encoder._compiled_call_impl is None


class PartlyInFloat32(torch.nn.Sequential):
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self[1](self[0](x).float())


def test_a_network_that_turns_autocast_off_is_compiled_as_it_is(graphs):
    network = PartlyInFloat32(torch.nn.Conv2d(3, 2, 1), torch.nn.Conv2d(2, 3, 1))
    x = torch.randn(1, 3, 8, 8)
    compile_networks([network], x.device)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x), network.forward(x))


@pytest.mark.slow
def test_a_gradient_ratio_goes_through_a_graph_that_was_compiled_without_one(
    image_folder, monkeypatch
):
    """The first step's backward pass compiles; the second one reports a ratio before its own."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiler(f, **options, backend="aot_eager")
    )
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


ENCODER, DECODER = "model.params.encoder_config.params", "model.params.decoder_config.params"
NO_BLOCKS = [
    f"{ENCODER}.extractor_resblocks=0",
    f"{ENCODER}.aggregate_resblocks=0",
    f"{DECODER}.num_res_blocks=0",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "most"), [("A2", [], 2_150), ("B5", NO_BLOCKS, 1_780)]
)
def test_launches_of_compiled_steps(monkeypatch, name, overrides, most):
    """Whole steps in bfloat16 at full size, without LPIPS, on an H100.

    Forward and backward passes, and updates. B5's encoder and decoder, which are A2's, have no
    blocks here. Tensors are fake; GroupNorm is in float32.
    """
    # Here, because inductor takes a second to import.
    from tests.models.launches import Launches, on_an_h100

    compiler, launches, steps = torch.compile, Launches(), []
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiler(f, **options, backend=launches.compile)
    )
    # A GPU has it.
    monkeypatch.setattr("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True)
    without = ["model.params.lossconfig.params.lpips_weight=0", "model.params.val_metrics=[]"]
    node = load(
        [f"configs/imagenet/{name}.yaml"],
        [*without, "model.params.gradient_clip_val=1.0", *overrides],
    )
    model, size = without_weights(node["model"]), node["data"]["params"]["size"]
    with on_an_h100(monkeypatch), FakeTensorMode(), launches:
        fake = without_memory(model)
        fake.__dict__.update(dict.fromkeys(("to", "cpu"), lambda *_: fake))
        batch = {"image": torch.empty(4, 3, size, size, dtype=torch.uint8)}
        notes = {
            "callbacks": [Each(lambda _: steps.append(launches.count))],
            "log_every_n_steps": 0,
        }
        bf16 = MixedPrecision("bf16-mixed", "cpu")
        trainer(2, limit_val_batches=0, plugins=[bf16], **notes).fit(fake, repeat(batch, 2))
    assert most / 1.05 < steps[1] - steps[0] <= most


def test_a_machine_without_a_compiler_trains_uncompiled(image_folder, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    model = build_shallow()
    with caplog.at_level(logging.WARNING, "olvae"):
        assert not compile_networks([model.encoder], torch.device("cpu"))
    (record,) = caplog.records
    assert record.getMessage().endswith("because no compiler works here (no C++ compiler found)")
    assert model.encoder._compiled_call_impl is None
    assert fit(build_shallow(compile=True), image_folder, 1).trainer.global_step == 1
