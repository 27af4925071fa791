"""Weights cast together under autocast: the values, the operations, and when it is not done."""

import copy
import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from olvae.modules import mixed_precision
from olvae.modules.gigagan import GigaGAN
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import OpenUNet, PaperUNet
from olvae.modules.litevae.smc import SMC
from olvae.modules.patchgan import PatchGAN
from olvae.modules.sdvae import SDDecoder, SDEncoder
from olvae.modules.unetgan import UNetGAN, stop_power_iterations
from tests.models.test_liteautoencoder_on_fake_cuda import Operations

cast = mixed_precision._cast_operands


NARROW = {"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}


SMALL_GIGAGAN = {
    "base": 256,
    "max_channels": 16,
    "blocks": 1,
    "attention": (8,),
    "heads": 2,
    "head_channels": 8,
}


CASTING = {
    "OpenUNet": (partial(OpenUNet, 4, 4, 8, (1, 2), 1), 4, 8),
    "PaperUNet": (partial(PaperUNet, 4, 4, 8, (1, 2), 1, 0.0), 4, 8),
    "decoder": (partial(LiteVAE_Decoder, z_channels=4, linear=True, **NARROW), 4, 8),
    "decoder with GroupNorm": (
        partial(LiteVAE_Decoder, z_channels=4, variant="group_norm", **NARROW),
        4,
        8,
    ),
    "SD's encoder": (partial(SDEncoder, latent_dim=8, norm_groups=4, **NARROW), 3, 16),
    "SD's decoder": (partial(SDDecoder, z_channels=4, norm_groups=4, **NARROW), 4, 8),
    "UNetGAN": (partial(UNetGAN, base_channels=2, image_size=64), 3, 64),
    "GigaGAN": (partial(GigaGAN, image_size=64, **SMALL_GIGAGAN), 3, 64),
    "PatchGAN": (partial(PatchGAN, base_channels=4), 3, 64),
}
"""Networks that cast their weights together; the input's channels and side."""


def passed(
    network: nn.Module, forward, x: torch.Tensor, dtype: torch.dtype
) -> tuple[list[torch.Tensor], int]:
    """The outputs and the parameters' gradients of two passes,
    and how many operations they took.
    """
    network.zero_grad()
    with Operations() as operations:
        with torch.autocast("cpu", dtype, cache_enabled=False):
            given = [forward(x), forward(x.flip(0) + 1)]
        outputs = [t for out in given for t in (out if isinstance(out, list) else [out])]
        torch.stack([t.float().square().mean() for t in outputs]).sum().backward()
    return [*outputs, *(p.grad for p in network.parameters())], operations.count


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in CASTING), ("decoder", torch.float16)]
)
def test_weights_cast_together_are_those_that_autocast_casts(name, dtype):
    make, channels, side = CASTING[name]
    network, x = make(), torch.randn(2, channels, side, side)
    stop_power_iterations(network)
    together, fewer = passed(network, network, x, dtype)
    alone, operations = passed(
        network, partial(type(network).forward.__wrapped__, network), x, dtype
    )
    assert all(t.isfinite().all() for t in alone)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert fewer < 0.9 * operations
    assert network.state_dict().keys() == make().state_dict().keys()


def decode(decoder: LiteVAE_Decoder, z: torch.Tensor, cached: bool = False) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        return decoder(z).float().square().mean()


@pytest.mark.parametrize("mode", ["checkpoint", "eval", "error", "pruned", "float64"])
def test_weights_are_left_to_autocast(mode, monkeypatch):
    """Where they are computed again, in evaluation, where they are no parameters;
    not after an error.
    """
    decoder = LiteVAE_Decoder(z_channels=4, **NARROW).train(mode != "eval")
    z, seen = torch.randn(1, 4, 8, 8), []
    monkeypatch.setattr(
        mixed_precision, "_cast_operands", lambda *given: seen.append(given[1]) or cast(*given)
    )
    if mode == "error":
        with pytest.raises(ValueError, match="expected latents"):
            decode(decoder, z[:, :1])
        decoder.mid[2].forward = lambda _: [][0]  # once weights are cast
        with pytest.raises(IndexError):
            decode(decoder, z)
        del decoder.mid[2].forward
        assert seen
    if mode == "checkpoint":
        decoder.checkpoint_steps()
    if mode == "pruned":
        for layer in (decoder.conv_in, decoder.up[0]["block"][0].nin_shortcut):
            prune.l1_unstructured(layer, "weight", 0.5)
    if mode == "float64":
        decoder, z = decoder.double(), z.double()
    before = [dict(m.__dict__) for m in decoder.modules()]
    for _ in range(2):
        decode(decoder, z).backward()
    assert [m.__dict__.keys() for m in decoder.modules()] == [
        attributes.keys() for attributes in before
    ]
    assert bool(seen) == (mode not in ("checkpoint", "eval"))
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in decoder.parameters())


def test_cast_weights_in_calls_by_keyword():
    decoder, z = LiteVAE_Decoder(z_channels=4, **NARROW), torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder(z=z), decoder(z))


def test_frozen_layers_take_no_backward_pass():
    """Of a decoder whose last layers are trained, through which no other one's gradient goes."""
    decoder, counts = LiteVAE_Decoder(z_channels=4, **NARROW), []
    trained = [decoder.conv_out, decoder.up[0]["block"][1]]
    decoder.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    for forward in (decoder, partial(type(decoder).forward.__wrapped__, decoder)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = forward(torch.randn(1, 4, 8, 8)).float().square().mean()
        with Operations() as operations:
            loss.backward()
        counts.append(operations.products[torch.ops.aten.convolution_backward, torch.bfloat16])
    assert counts[0] == counts[1] == 4
    assert [p.grad is not None for p in decoder.parameters()] == [
        p.requires_grad for p in decoder.parameters()
    ]


def test_gradients_are_ready_before_the_backward_pass_ends(monkeypatch):
    """DDP sends those of one group of layers while the next one's are computed."""
    decoder = LiteVAE_Decoder(z_channels=4, **NARROW)
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    ready = []
    monkeypatch.setattr(
        mixed_precision, "GROUP_BYTES", sum(p.nbytes for p in decoder.parameters()) // 4
    )
    for p in decoder.parameters():
        p.register_post_accumulate_grad_hook(lambda p: ready.append(p))
    before = []
    decoder.conv_in.register_full_backward_pre_hook(lambda *_: before.append(len(ready)))
    decode(decoder, z).backward()
    assert before[0] > 0.6 * len(ready) == 0.6 * len(list(decoder.parameters()))


def test_a_gradient_at_the_last_convolution_takes_no_other():
    """An adaptive weight measures two of them in a step."""
    decoder, counts = LiteVAE_Decoder(z_channels=4, **NARROW), []
    for length in (1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = decoder(torch.randn(1, 4, 8, 8)).float().square().mean()
        with Operations() as operations:
            torch.autograd.grad(loss, [decoder.conv_out.weight, decoder.conv_in.weight][:length])
        counts.append(operations.count)
    assert counts[0] < 12 < counts[1] / 4


class Small(nn.Module):
    """Three layers: the first one's bias is frozen, the last one is left to autocast."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 1)
        self.first.bias.requires_grad_(False)
        self.inner = nn.Sequential(nn.SiLU(), nn.Conv2d(3, 4, 1, bias=False))
        self.last = nn.Conv2d(4, 5, 1)

    @mixed_precision.casts_together
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))


@pytest.fixture
def compiled(monkeypatch):
    """Run graphs by plain torch; the dtypes of each call's inputs, by their shapes."""
    torch._dynamo.reset()
    compiler, calls = torch.compile, []

    def backend(graph, _):
        def run(*inputs):
            calls.append({tuple(t.shape): t.dtype for t in inputs})
            return graph(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", lambda f, **more: compiler(f, **more, backend=backend))
    return calls


def test_a_compiled_network_gets_copies_of_its_weights_in_half_precision(compiled):
    """In training under autocast; what it gives is autocast's, and its parameters are its own."""
    network, x = Small(), torch.randn(2, 2, 4, 4)
    plain = copy.deepcopy(network)
    own = dict(network.named_parameters())
    mixed_precision.compile_in_place(network)
    first, bias, inner, last = (3, 2, 1, 1), (3,), (4, 3, 1, 1), (5, 4, 1, 1)
    for training, half in ((True, True), (True, False), (False, True)):
        compiled.clear()
        results = []
        for each in (network, plain):
            each.train(training).zero_grad()
            forward = each if each is network else partial(Small.forward.__wrapped__, each)
            with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                y = forward(x)
            y.float().square().mean().backward()
            results.append([y, *(p.grad for p in each.parameters() if p.requires_grad)])
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert network.first.bias.grad is None
        (dtypes,) = compiled
        cast = torch.bfloat16 if training and half else torch.float32
        assert {dtypes[shape] for shape in (first, bias, inner)} == {cast}
        assert dtypes[last] == torch.float32
        assert all(p is own[name] for name, p in network.named_parameters())


class Modulated(nn.Module):
    """A layer that computes its weight, and one that leaves it to the next network to cast."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SMC(2, 3, 1)
        self.last = nn.Conv2d(3, 5, 1)

    @mixed_precision.casts_together
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def test_a_weight_that_is_computed_is_so_in_the_graph(compiled):
    """From float32; its bias is a copy in half precision."""
    network, x = Modulated(), torch.randn(2, 2, 4, 4)
    plain = copy.deepcopy(network)
    mixed_precision.compile_in_place(network)
    results = []
    for forward in (network, partial(Modulated.forward.__wrapped__, plain)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = forward(x)
        y.float().square().mean().backward()
        results.append(y)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    (dtypes,) = compiled
    assert dtypes[3, 2, 1, 1] == torch.float32
    assert dtypes[3,] == torch.bfloat16
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-2, atol=1e-3)


def test_a_compiled_network_has_its_weights_again_after_an_error(compiled):
    network = Small()
    own = dict(network.named_parameters())
    mixed_precision.compile_in_place(network)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        network(torch.randn(2, 7, 4, 4))
    assert all(p is own[name] for name, p in network.named_parameters())


@pytest.mark.parametrize(
    ("most", "sizes"), [(0, [1, 1, 1]), (8, [1, 1, 1]), (11, [1, 1, 1]), (12, [2, 1]), (99, [3])]
)
def test_groups_have_as_many_layers_as_fit(monkeypatch, most, sizes):
    """Of 8, 4 and 12 bytes; a layer that is larger is a group of its own."""
    monkeypatch.setattr(mixed_precision, "GROUP_BYTES", most)
    layers = [nn.Linear(n, 1, bias=False) for n in (2, 1, 3)]
    groups = [group.layers for group in mixed_precision._groups(layers)]
    assert [len(group) for group in groups] == sizes
    assert [layer for group in groups for layer in group] == layers


def test_a_group_is_filled_from_its_first_layer_on(monkeypatch):
    """Of 8, 8 and 4 bytes in 12: the second begins a group, and the third still fits."""
    monkeypatch.setattr(mixed_precision, "GROUP_BYTES", 12)
    layers = [nn.Linear(n, 1, bias=False) for n in (2, 2, 1)]
    groups = [group.layers for group in mixed_precision._groups(layers)]
    assert groups == [layers[:1], layers[1:]]


def test_precisions_of_a_tensor_by_autocast_and_dtype():
    x = torch.ones(2)
    assert not mixed_precision.autocast_enabled(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed_precision.autocast_enabled(x)
        assert not mixed_precision.autocast_enabled(x.to("meta"))
        with mixed_precision.no_autocast(x):
            assert not torch.is_autocast_enabled("cpu")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert mixed_precision.upcast(x.to(dtype)).dtype == torch.float32
        assert mixed_precision.in_float64(x.to(dtype)).dtype == torch.float64
    assert mixed_precision.upcast(x.double()).dtype == torch.float64
    assert mixed_precision.upcast(x) is x
    assert mixed_precision.in_float64(x.to("meta")).is_meta


def test_a_convolution_kept_in_float32_is_exact_under_autocast():
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(1, 2, 8, 8)
    expected = conv(x)
    mixed_precision.keep_in_float32(conv)
    mixed_precision.keep_in_float32(nn.ReLU())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), expected)
        assert conv(x.bfloat16()).dtype == torch.float32
    assert torch.equal(conv(x), expected)


class Unused(Small):
    """Its second layer's weight is cast, and has no part in the output."""

    @mixed_precision.casts_together
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        self.inner(h)
        return h


class Island(Small):
    """It turns autocast off for its second layer."""

    @mixed_precision.casts_together
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        with mixed_precision.no_autocast(h):
            return self.inner(h.float())


def test_a_layer_without_autocast_computes_in_float32():
    network, x = Island(), torch.randn(1, 2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x)
        expected = Island.forward.__wrapped__(network, x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_weight_without_a_part_in_the_loss_gets_no_gradient():
    network = Unused()
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(1, 2, 3, 3)).float().sum().backward()
    assert network.first.weight.grad is not None
    assert network.inner[1].weight.grad is None


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), (0, 1), (1, 0)])
def test_without_a_compiler_networks_stay_as_they_are(monkeypatch, caplog, rank, lines):
    """One process of several says so, in one line with the compiler's first."""

    def fails(*_, **__):
        raise OSError("no g++\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(mixed_precision.dist, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(mixed_precision.dist, "get_rank", lambda: rank)
    network = nn.Linear(1, 1)
    with caplog.at_level(logging.WARNING, "olvae"):
        assert not mixed_precision.compile_networks([network], torch.device("cpu"))
    assert [record.args for record in caplog.records] == lines * [("no g++",)]
    assert network._compiled_call_impl is None


def test_networks_are_compiled_in_place_where_a_compiler_works(monkeypatch):
    """Tried with static shapes; a graph's memory is kept for a second walk."""
    seen: list[object] = []

    def compiler(function, **settings):
        seen.append((function, settings))
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(mixed_precision, "compile_in_place", seen.append)
    monkeypatch.setattr(mixed_precision, "keep_graphs_memory", lambda: seen.append("kept"))
    networks = [nn.Linear(1, 1), nn.ReLU()]
    assert mixed_precision.compile_networks(networks, torch.device("cpu"))
    assert seen == [(torch.neg, {"dynamic": False}), "kept", *networks]
