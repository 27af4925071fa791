"""Self-attention by distance: Lipschitz-continuous where the dot product is not (Kim et al. 2021)."""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olvae.modules.precision import island, no_autocast
from olvae.modules.spectral import SpectralConv2d

__all__ = ["TransformerBlock", "l2_attention"]


def l2_attention(qk: Tensor, v: Tensor) -> Tensor:
    """softmax_j(-|q_i - q_j|^2 / sqrt(D)) v_j, queries and keys being the same vectors.

    In float32, autocast off. |q_i|^2 is the same for all j, so it leaves the softmax as it is and is left out;
    distances do not depend on the origin, so the mean is taken off first, which keeps the differences exact.

    Args:
        qk: (..., N, D), the queries, which are the keys as well.
        v: (..., N, E).

    Returns:
        (..., N, E), in float32 (float64 for float64).
    """
    with no_autocast(qk):
        q = island(qk)
        q = q - q.mean(dim=-2, keepdim=True)
        square = q.square().sum(dim=-1).unsqueeze(-2)  # (..., 1, N), of the keys
        logits = (2.0 * (q @ q.mT) - square) / sqrt(q.shape[-1])  # (..., N, N)
        return logits.softmax(dim=-1) @ island(v)


class TransformerBlock(nn.Module):
    """L2-distance attention, then a gated feed-forward network; LayerNorm before, the input added after, each.

    The projection that makes queries and keys has no bias, for a distance would not see it; that of the values
    has none, for the output's bias does its work. The feed-forward network is W3 (GELU(W1 x) * W2 x), with a
    hidden width of four times the channels.

    Args:
        channels: of the feature map.
        heads, head_channels: of the attention.
        checkpoint_attention: compute the attention again in the backward pass instead of keeping its
            (heads, H W, H W) weights. Only the weights are recomputed, not the layers with spectral norm around
            them, so that their power iterations run once per pass and the gradients are the same.
    """

    def __init__(
        self, channels: int, heads: int = 8, head_channels: int = 64, checkpoint_attention: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.checkpoint_attention = checkpoint_attention
        inner = heads * head_channels
        self.attention_norm = nn.LayerNorm(channels)
        self.to_qk = SpectralConv2d(channels, inner, kernel_size=1, bias=False)
        self.to_v = SpectralConv2d(channels, inner, kernel_size=1, bias=False)
        self.to_out = SpectralConv2d(inner, channels, kernel_size=1)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.gate_and_value = SpectralConv2d(channels, 8 * channels, kernel_size=1)
        self.feed_forward_out = SpectralConv2d(4 * channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape; every pixel attends to every other."""
        h = _channel_norm(x, self.attention_norm)
        qk, v = self._split_heads(self.to_qk(h)), self._split_heads(self.to_v(h))  # (B, heads, H W, D)
        if self.checkpoint_attention and torch.is_grad_enabled():
            attended = checkpoint(l2_attention, qk, v, use_reentrant=False, preserve_rng_state=False)
        else:
            attended = l2_attention(qk, v)
        attended = attended.mT.flatten(1, 2).unflatten(-1, x.shape[-2:])  # (B, heads D, H, W)
        x = x + self.to_out(attended.to(v.dtype))

        gate, value = self.gate_and_value(_channel_norm(x, self.feed_forward_norm)).chunk(2, dim=1)
        out: Tensor = x + self.feed_forward_out(F.gelu(gate) * value)
        return out

    def _split_heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.flatten(2).unflatten(1, (self.heads, -1))
        return heads.mT  # (B, heads, H W, D)


def _channel_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm over the channels of (B, C, H, W)."""
    normed: Tensor = norm(x.movedim(1, -1))
    return normed.movedim(-1, 1)
