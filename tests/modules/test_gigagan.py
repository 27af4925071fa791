import math

import pytest
import torch
from torch import Tensor

from olvae.modules.gigagan import GigaGAN, TransformerBlock, l2_attention
from tests.modules.test_patchgan_unetgan_gigagan import GIGA, nudge


def _small(**options: object) -> GigaGAN:
    torch.manual_seed(0)
    return GigaGAN(**GIGA | options)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("predictors", ["ends", "all"])
def test_gigagan_outputs_at_every_level_and_for_the_image(size: int, predictors: str):
    net = _small(image_size=size, predictors=predictors)
    logits = net(torch.randn(2, 3, size, size))
    sizes = (
        [size // 2]
        if predictors == "ends"
        else [size >> i for i in range(1, size.bit_length() - 3)]
    )
    assert [t.shape for t in logits] == [*((2, 1, s, s) for s in sizes), (2, 1)]
    assert net.num_outputs == len(logits)
    assert all(t.isfinite().all() for t in logits)


@torch.no_grad()
def test_gigagan_levels_read_the_image_without_aliasing():
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


def _naive_attention(q: list[list[float]], v: list[list[float]]) -> list[list[float]]:
    out = []
    for qi in q:
        weights = [
            math.exp(-sum((a - b) ** 2 for a, b in zip(qi, kj, strict=True)) / math.sqrt(len(qi)))
            for kj in q
        ]
        out.append(
            [
                sum(w * vj[e] for w, vj in zip(weights, v, strict=True)) / sum(weights)
                for e in range(len(v[0]))
            ]
        )
    return out


def test_l2_attention_against_loops():
    torch.manual_seed(0)
    q = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    v = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    expected = torch.tensor(
        [
            [_naive_attention(q[b, h].tolist(), v[b, h].tolist()) for h in range(3)]
            for b in range(2)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(l2_attention(q, v), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        l2_attention(q.float(), v.float()).double(), expected, rtol=1e-5, atol=1e-6
    )


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


@torch.no_grad()
def test_transformer_block_by_hand():
    torch.manual_seed(0)
    block = TransformerBlock(6, heads=2, head_channels=3).double().eval()
    nudge(block)
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
