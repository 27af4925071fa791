"""Steps that the backward pass computes again: in every network, equal bit for bit, and only where
it saves memory.
"""

import copy
from functools import partial

import pytest
import torch

from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.sdvae import SDDecoder, SDEncoder
from tests.conftest import TINY_ENCODER
from tests.models.steps import kept

WIDTHS = {**TINY_ENCODER, "dct_levels": 2}
SD = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
IMAGE, LATENT = (2, 3, 16, 16), (2, 4, 4, 4)


def decoder(**more) -> LiteVAE_Decoder:
    return LiteVAE_Decoder(8, 4, channel_mult=[1, 1, 2], num_res_blocks=1, **more)


NETWORKS = {
    "encoder": (lambda: LiteVAE_Encoder(8, **WIDTHS), IMAGE),
    "paper's encoder": (lambda: LiteVAE_Encoder(8, variant="paper", **WIDTHS), IMAGE),
    "decoder": (decoder, LATENT),
    "paper's decoder": (lambda: decoder(variant="paper_smc", output="wavelet"), LATENT),
    "SD encoder": (lambda: SDEncoder(8, image_size=16, **SD), IMAGE),
    "SD decoder": (lambda: SDDecoder(z_channels=4, **SD), LATENT),
}
WITH_DROPOUT = {
    "encoder with dropout": (
        lambda: LiteVAE_Encoder(8, variant="paper", dropout=0.5, **WIDTHS),
        IMAGE,
    ),
    "decoder with dropout": (lambda: decoder(dropout=0.5), LATENT),
}


def gradients(network, forward, shape) -> list[torch.Tensor]:
    """The output, the generator's state after it and after the backward pass,
    and every gradient.
    """
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    out = forward(x)
    states = [torch.get_rng_state()]
    out.square().mean().backward()
    return [
        out.detach(),
        *states,
        torch.get_rng_state(),
        x.grad,
        *(p.grad for p in network.parameters()),
    ]


@pytest.mark.parametrize(
    ("build", "shape"), (NETWORKS | WITH_DROPOUT).values(), ids=NETWORKS | WITH_DROPOUT
)
def test_recomputed_steps_have_the_same_gradients_bit_for_bit(build, shape):
    plain = build()
    again = copy.deepcopy(plain)
    again.checkpoint_steps()
    again = copy.deepcopy(again)  # a copy keeps its own steps
    for one, other in zip(
        gradients(plain, plain, shape), gradients(again, again, shape), strict=True
    ):
        assert torch.equal(one, other)
    assert list(again.state_dict()) == list(plain.state_dict())
    assert again.node == plain.node


@pytest.mark.parametrize(("build", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_recomputed_steps_keep_fewer_values_and_in_training_only(build, shape):
    plain = build()
    again = copy.deepcopy(plain)
    again.checkpoint_steps()
    x = torch.randn(shape)
    assert kept(partial(again, x), again) < 0.6 * kept(partial(plain, x), plain)
    assert kept(partial(again.eval(), x), again) == kept(partial(plain.eval(), x), plain)
    with torch.no_grad():
        assert kept(partial(again.train(), x), again) == 0


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "decoder" else pytest.mark.slow) for name in NETWORKS],
)
def test_recomputed_steps_compile_in_one_graph(name):
    """Without dropout: backends before Inductor draw other numbers the second time."""
    torch._dynamo.reset()
    build, shape = NETWORKS[name]
    plain = build()
    again = copy.deepcopy(plain)
    again.checkpoint_steps()
    compiled = torch.compile(again, fullgraph=True, backend="eager")
    for one, other in zip(
        gradients(plain, plain, shape), gradients(again, compiled, shape), strict=True
    ):
        assert torch.equal(one, other)
