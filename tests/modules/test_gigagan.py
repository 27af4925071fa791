import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from olvae.losses.adversarial import r1_penalty
from olvae.modules.gigagan import GigaGAN, TransformerBlock, l2_attention
from olvae.modules.unetgan import SpectralConv2d


def _small(**options: object) -> GigaGAN:
    torch.manual_seed(0)
    return GigaGAN(**{"image_size": 64, "base": 256, "max_channels": 16, "heads": 2, "head_channels": 8} | options)


def _nudge(net: torch.nn.Module) -> None:
    """Away from the start, where orthogonal weights and small position embeddings hide differences."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))


def test_parameters_and_macs_are_the_readmes(meta: None):
    net = GigaGAN()
    assert sum(p.numel() for p in net.parameters()) == 14_378_498  # README: 14.38 M
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 256, 256))
    assert counter.get_total_flops() / 2 == pytest.approx(3.23e9, rel=0.02)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"predictors": "all"}, 14_722_310),
        ({"image_size": 64}, 14_407_938),
        ({"image_size": 512}, 14_377_026),
    ],
)
def test_parameters_of_other_layouts(meta: None, options: dict[str, object], expected: int):
    assert sum(p.numel() for p in GigaGAN(**options).parameters()) == expected


def test_layout_at_256(meta: None):
    net = GigaGAN()
    assert [level.conv2.weight.shape[0] for level in net.levels] == [32, 64, 128, 256, 256, 256]
    assert {k: len(t.blocks) for k, t in net.transformers.items()} == {"3": 2, "4": 2}  # 16 and 8 px
    assert list(net.predictors) == ["0"]
    plain = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear | torch.nn.BatchNorm2d)]
    assert all(isinstance(m, SpectralConv2d) for m in plain)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("predictors", ["ends", "all"])
def test_outputs(size: int, predictors: str):
    net = _small(image_size=size, predictors=predictors)
    logits = net(torch.randn(2, 3, size, size))
    sizes = [size // 2] if predictors == "ends" else [size >> i for i in range(1, size.bit_length() - 3)]
    assert [t.shape for t in logits] == [*((2, 1, s, s) for s in sizes), (2, 1)]
    assert net.num_outputs == len(logits)
    assert all(t.isfinite().all() for t in logits)


@torch.no_grad()
def test_every_level_reads_the_image_at_its_own_size_without_aliasing():
    net = _small(in_channels=1).eval()
    seen: list[Tensor] = []
    for level in net.levels:
        level.image_stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    column = torch.arange(64.0)
    stripes = torch.cos(2 * math.pi * 0.375 * column)  # finer than 32 pixels can show
    net((column + stripes).expand(1, 1, 64, 64))
    assert [tuple(t.shape[-2:]) for t in seen] == [(s, s) for s in (32, 16, 8, 4)]
    inner = seen[0][0, 0, 8, 4:-4]
    ramp = 2 * torch.arange(32.0)[4:-4] + 0.5  # at the new centres
    assert (inner - ramp).abs().max() < 0.1  # the mean of 2x2 pixels would leave 0.38


@pytest.mark.parametrize("level", range(4))
def test_small_images_matter_at_every_level(level: int):
    net = _small().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = net(x)[-1].clone()
        net.levels[level].image_stem.bias.add_(1.0)
        assert not torch.allclose(net(x)[-1], before)


def _naive_attention(q: list[list[float]], v: list[list[float]]) -> list[list[float]]:
    out = []
    for qi in q:
        weights = [math.exp(-sum((a - b) ** 2 for a, b in zip(qi, kj, strict=True)) / math.sqrt(len(qi))) for kj in q]
        out.append([sum(w * vj[e] for w, vj in zip(weights, v, strict=True)) / sum(weights) for e in range(len(v[0]))])
    return out


def test_l2_attention_against_loops():
    torch.manual_seed(0)
    q, v = torch.randn(2, 3, 7, 5, dtype=torch.float64), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    expected = torch.tensor(
        [[_naive_attention(q[b, h].tolist(), v[b, h].tolist()) for h in range(3)] for b in range(2)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(l2_attention(q, v), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(l2_attention(q.float(), v.float()).double(), expected, rtol=1e-5, atol=1e-6)


def test_l2_attention_far_from_the_origin_and_under_autocast():
    """A common offset changes no distance, and half precision around it changes nothing at all."""
    torch.manual_seed(0)
    q, v = torch.randn(1, 2, 16, 64), torch.randn(1, 2, 16, 8)
    near = l2_attention(q, v)
    torch.testing.assert_close(l2_attention(q + 1000.0, v), near, rtol=0, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(l2_attention(q, v), near)
        half = l2_attention(q.bfloat16(), v.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, l2_attention(q.bfloat16().float(), v.bfloat16().float()))


def test_l2_attention_extremes():
    v = torch.tensor([[1.0], [2.0], [6.0]])
    torch.testing.assert_close(l2_attention(torch.ones(3, 4), v), torch.full((3, 1), 3.0))  # no distance: the mean
    apart = 100.0 * torch.eye(3)
    torch.testing.assert_close(l2_attention(apart, v), v)  # far apart: everybody for himself


@torch.no_grad()
def test_transformer_block_by_hand():
    torch.manual_seed(0)
    block = TransformerBlock(6, heads=2, head_channels=3).double().eval()
    _nudge(block)
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    tokens = x[0].flatten(1).T  # (6 positions, 6 channels)

    def linear(layer: torch.nn.Conv2d, t: Tensor) -> Tensor:
        return t @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)

    h = block.attention_norm(tokens)
    q, v = linear(block.to_qk, h), linear(block.to_v, h)
    heads = [
        torch.tensor(_naive_attention(q[:, s].tolist(), v[:, s].tolist()), dtype=torch.float64)
        for s in (slice(0, 3), slice(3, 6))
    ]
    tokens = tokens + linear(block.to_out, torch.cat(heads, 1))
    gate, value = linear(block.gate_and_value, block.feed_forward_norm(tokens)).split(24, dim=1)
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    tokens = tokens + linear(block.feed_forward_out, gelu * value)
    torch.testing.assert_close(block(x)[0].flatten(1).T, tokens)


def test_checkpointing_gives_the_same_logits_gradients_and_power_iterations():
    x = torch.randn(2, 3, 64, 64)
    results = []
    for checkpoint in (False, True):
        net = _small(checkpoint_attention=checkpoint)
        torch.manual_seed(1)
        _nudge(net)
        logits = net(x)
        sum(t.square().mean() for t in logits).backward()
        results.append((logits, [p.grad for p in net.parameters()], list(net.buffers())))
    for plain, checkpointed in zip(*results, strict=True):
        for a, b in zip(plain, checkpointed, strict=True):
            assert torch.equal(a, b)


def test_checkpointing_keeps_no_attention_weights():
    """What the graph holds for the backward pass: the (N, N) weights, or not."""
    for checkpoint in (False, True):
        block = TransformerBlock(8, heads=2, head_channels=4, checkpoint_attention=checkpoint)
        saved: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(tuple(t.shape)), t)[1], lambda t: t):
            block(torch.randn(1, 8, 5, 5, requires_grad=True))
        assert any(shape[-2:] == (25, 25) for shape in saved) is not checkpoint


@pytest.mark.parametrize("checkpoint", [False, True])
def test_can_be_differentiated_twice(checkpoint: bool):
    net = _small(checkpoint_attention=checkpoint)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    penalty = r1_penalty(net(x), x)
    penalty.backward()
    gradients = [p.grad for n, p in net.named_parameters() if not n.endswith("bias") and p.grad is not None]
    assert penalty > 0
    assert all(g.isfinite().all() for g in gradients)
    assert net.transformers["1"].blocks[0].to_qk.parametrizations.weight.original.grad.abs().max() > 0


@pytest.mark.parametrize("predictors", ["ends", "all"])
def test_every_parameter_gets_a_gradient(predictors: str):
    net = _small(predictors=predictors)
    _nudge(net)
    sum(t.square().mean() for t in net(torch.randn(2, 3, 64, 64))).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_spectral_norm_bounds_the_largest_singular_value():
    net = _small()
    layers = [m for m in net.modules() if isinstance(m, SpectralConv2d)]
    with torch.no_grad():
        for layer in layers:
            original = layer.parametrizations.weight.original
            original.mul_(5).add_(torch.randn_like(original))
        for _ in range(60):
            net(torch.randn(1, 3, 64, 64))
    for layer in layers:
        assert 0.999 < torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item() < 1.05


def test_bf16_is_close_to_float32():
    net = _small(predictors="all").eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    for half, full in zip(logits, expected, strict=True):
        assert (half.float() - full).abs().max() < 0.05 * max(t.abs().max() for t in expected)


def test_trains_under_bf16():
    """The hinge loss falls on a task that is easy to tell: images of noise, with and without a blur.

    It halves within 15 steps; at a higher rate it does so with peaks, whose places are a matter of rounding.
    """
    net = _small()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4, betas=(0.5, 0.9))
    losses = []
    for _ in range(16):
        real = torch.randn(4, 3, 64, 64)
        fake = torch.nn.functional.avg_pool2d(real, 3, stride=1, padding=1)
        with torch.autocast("cpu", torch.bfloat16):
            r, f = net(real), net(fake)
        loss = sum((1 - a.float()).relu().mean() + (1 + b.float()).relu().mean() for a, b in zip(r, f, strict=True)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(v) for v in losses)
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]


def test_errors_name_the_remedy():
    net = _small()
    for shape in ((1, 3, 128, 128), (1, 3, 64, 128), (1, 3, 96, 96)):
        with pytest.raises(ValueError, match=r"takes images \(B, C, 64, 64\).*power of two from 64, as image_size"):
            net(torch.empty(shape))
    for size in (32, 96, 0):
        with pytest.raises(ValueError, match=f"power of two from 64, got {size}"):
            GigaGAN(image_size=size)
    with pytest.raises(ValueError, match=r"levels of \[32, 16, 8, 4\] px: attention cannot be at \[64\]"):
        GigaGAN(image_size=64, attention=(8, 64))
    with pytest.raises(ValueError, match="base at least image_size = 64"):
        GigaGAN(image_size=64, base=32)
    with pytest.raises(ValueError, match='"ends" or "all"'):
        GigaGAN(predictors="some")  # type: ignore[arg-type]
