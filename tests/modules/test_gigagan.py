import math

import pytest
import torch
import torch.nn.functional as F
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
    block = TransformerBlock(6, heads=2, head_channels=4).double().eval()
    assert block.to_qk.bias is block.to_v.bias is None
    nudge(block)
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    tokens = x[0].flatten(1).T  # (6 positions, 6 channels)

    def linear(layer: torch.nn.Conv2d, t: Tensor) -> Tensor:
        return t @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)

    h = block.attention_norm(tokens)
    q, v = linear(block.to_qk, h), linear(block.to_v, h)
    heads = [
        torch.tensor(_naive_attention(q[:, s].tolist(), v[:, s].tolist()), dtype=torch.float64)
        for s in (slice(0, 4), slice(4, 8))
    ]
    tokens = tokens + linear(block.to_out, torch.cat(heads, 1))
    gate, value = linear(block.gate_and_value, block.feed_forward_norm(tokens)).split(24, dim=1)
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    tokens = tokens + linear(block.feed_forward_out, gelu * value)
    torch.testing.assert_close(block(x)[0].flatten(1).T, tokens)


def _conv(layer: torch.nn.Conv2d, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution as sums over windows: (B, C, H, W)."""
    side = layer.weight.shape[-1]
    margin = (side - stride + 1) // 2
    windows = F.unfold(x, side, padding=margin, stride=stride)  # (B, C k k, N)
    y = torch.einsum("ok,bkn->bon", layer.weight.flatten(1), windows)
    if layer.bias is not None:
        y = y + layer.bias[:, None]
    return y.unflatten(2, [(s + 2 * margin - side) // stride + 1 for s in x.shape[-2:]])


def _leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def _mean_of_four(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def _half(x: Tensor) -> Tensor:
    """By a triangle of four pixels, 1 3 3 1, whose weights at the border are scaled to sum 1."""
    for axis in (-2, -1):
        n = x.shape[axis]
        matrix = torch.zeros(n // 2, n, dtype=x.dtype)
        for row in range(n // 2):
            for offset, weight in zip(range(-1, 3), (1, 3, 3, 1), strict=True):
                if 0 <= 2 * row + offset < n:
                    matrix[row, 2 * row + offset] = weight
        matrix /= matrix.sum(1, keepdim=True)
        x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)
    return x


def _predict(net: torch.nn.Module, x: Tensor) -> Tensor:
    h = _conv(net.conv1, _leaky(x))
    h = _conv(net.conv3, _leaky(_conv(net.conv2, _leaky(h))))
    return _conv(net.to_logit, _leaky(h + _conv(net.skip, x)))


@torch.no_grad()
def test_gigagan_function_by_hand():
    """Levels, image features, predictors and the last vector written out, without its blocks."""
    net = _small(predictors="all").double().eval()
    nudge(net)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    image, h, expected = x, _conv(net.stem, x), []
    for i, level in enumerate(net.levels):
        image = _half(image)
        z = _conv(level.down, _leaky(h), stride=2) + _conv(level.image_stem, image)
        z = _conv(level.conv2, _leaky(_conv(level.conv1, _leaky(z))))
        h = z + _mean_of_four(_conv(level.shortcut, h))
        if str(i) in net.transformers:
            blocks = net.transformers[str(i)]
            h = blocks.blocks(h + blocks.positions)
        if i + 1 < len(net.levels):
            expected.append(_predict(net.predictors[str(i)], h))
    vector = _conv(net.reduce, _leaky(h), stride=2).flatten(1)
    expected.append(_predict(net.last_predictor, vector[..., None, None]).flatten(1))
    found = net(x)
    assert len(found) == len(expected) == net.num_outputs
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_a_small_gigagans_levels_are_as_wide_as_base_and_limit_give():
    """Two channels at the least; the last level may be wider than the one before."""
    net = _small(base=64, attention=(), max_channels=99)
    assert [level.down.out_channels for level in net.levels] == [2, 4, 8, 16]
    assert [t.shape for t in net(torch.randn(1, 3, 64, 64))] == [(1, 1, 32, 32), (1, 1)]
    narrow = _small(attention=(), max_channels=2)
    assert [level.down.out_channels for level in narrow.levels] == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="at least 2, got 256 and 1"):
        _small(max_channels=1)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_transformer_blocks_stand_behind_positions_that_begin_small(blocks):
    net = _small(attention=(16, 8), blocks=blocks)
    found = [len(transformer.blocks) for transformer in net.transformers.values()]
    assert found == [blocks] * (2 if blocks else 0)
    for transformer in net.transformers.values():
        assert transformer.positions.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 14_378_498),  # 14.38 M
        ({"predictors": "all"}, 14_722_310),
        ({"image_size": 64}, 14_407_938),
        ({"image_size": 512}, 14_377_026),
    ],
)
def test_gigagan_has_the_published_number_of_parameters(meta, arguments, expected):
    assert sum(p.numel() for p in GigaGAN(**arguments).parameters()) == expected


@pytest.mark.parametrize("shape", [(1, 3, 128, 128), (1, 3, 64, 128), (1, 3, 128, 64), (3, 64, 64)])
def test_gigagan_refuses_images_of_another_size(shape):
    with pytest.raises(ValueError, match=r"takes images \(B, C, 64, 64\).*its image_size"):
        _small()(torch.empty(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"image_size": size}, f"power of two from 64, got {size}") for size in (32, 96, 0)),
        ({"attention": (8, 64)}, r"levels of \[32, 16, 8, 4\] px: attention .* at \[64\]"),
        ({"base": 32}, "base at least image_size = 64"),
        ({"predictors": "some"}, "predictors must be one of ends, all"),
    ],
)
def test_gigagan_refuses_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        _small(**arguments)
