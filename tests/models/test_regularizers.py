import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from olvae.models.autoencoder import LiteVAE
from olvae.models.regularizers import SCALES, ActivationBound, Anchor, transform_alike
from tests.conftest import tiny_config


def build(seed: int = 0, use_quant: bool = False, **encoder) -> LiteVAE:
    torch.manual_seed(seed)
    params = tiny_config()["model"]["params"]
    node = params["encoder_config"]
    node = {**node, "params": {**node["params"], **encoder}}
    return LiteVAE.from_config(node, params["decoder_config"], embed_dim=4, use_quant=use_quant)


def anchor_of(vae: LiteVAE) -> Anchor:
    return Anchor(vae.encoder, vae.quantizer)


def drift(vae: LiteVAE) -> None:
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("use_quant", [False, True])
def test_the_distance_is_zero_at_first_and_then_that_of_the_means(use_quant):
    vae = build(use_quant=use_quant)
    anchor, x = anchor_of(vae), torch.rand(3, 3, 16, 16)
    old = vae.encode(x).mean.detach()
    assert anchor(x, vae.encode(x)).item() == 0.0
    drift(vae)
    posterior = vae.encode(x)
    by_hand = ((posterior.mean - old).double() ** 2).sum() / (3 * 4 * 2 * 2)  # (B, n_z, h, w)
    assert by_hand > 1e-4
    assert anchor(x, posterior).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_gradients_reach_the_encoder_and_not_the_copy():
    vae = build(use_quant=True)
    anchor, x = anchor_of(vae), torch.rand(2, 3, 16, 16)
    drift(vae)
    anchor(x, vae.encode(x)).backward()
    for name, p in [*vae.encoder.named_parameters(), *vae.quantizer.quant_conv.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in anchor.parameters())
    assert all(p.grad is None for p in vae.decoder.parameters())


def test_a_step_against_the_gradient_brings_the_means_back():
    vae = build()
    anchor, x = anchor_of(vae), torch.rand(2, 3, 16, 16)
    drift(vae)
    before = anchor(x, vae.encode(x))
    before.backward()
    norm = torch.stack([p.grad.norm() for p in vae.encoder.parameters()]).norm()
    with torch.no_grad():
        for p in vae.encoder.parameters():
            p.sub_(1e-2 * p.grad / norm)
    assert anchor(x, vae.encode(x)) < before


@pytest.mark.parametrize("use_quant", [False, True])
def test_it_is_a_copy_that_set_renews(use_quant):
    vae, other = build(0, use_quant=use_quant), build(1, use_quant=use_quant)
    anchor, x = anchor_of(vae), torch.rand(2, 3, 16, 16)
    far = anchor(x, other.encode(x))
    assert far > 1e-4
    drift(vae)
    torch.testing.assert_close(anchor(x, other.encode(x)), far)
    anchor.set(other.encoder, other.quantizer)
    assert anchor(x, other.encode(x)).item() == 0.0
    drift(other)
    assert anchor(x, other.encode(x)).item() > 1e-4


def test_it_is_saved():
    vae, other = build(0, use_quant=True), build(1, use_quant=True)
    anchor, loaded = anchor_of(vae), anchor_of(other)
    moments = sum(t.numel() for t in [*vae.encoder.parameters(), *vae.quantizer.quant_conv.parameters()])
    assert sum(t.numel() for t in anchor.state_dict().values()) == moments
    loaded.load_state_dict(anchor.state_dict())
    x = torch.rand(1, 3, 16, 16)
    assert loaded(x, vae.encode(x)).item() == 0.0


def test_an_encoder_of_another_shape():
    anchor = anchor_of(build())
    wider = build(aggregate_channels=16)
    with pytest.raises(RuntimeError, match="size mismatch"):
        anchor.set(wider.encoder, wider.quantizer)
    quantized = build(use_quant=True, latent_dim=8)  # the encoder fits, what is after it does not
    with pytest.raises(ValueError, match="argument 2 is longer"):  # zip's own words
        anchor.set(quantized.encoder, quantized.quantizer)


def test_bf16_means_are_compared_in_float32():
    vae = build()
    anchor, x = anchor_of(vae), torch.rand(1, 3, 16, 16)
    drift(vae)
    with torch.autocast("cpu", torch.bfloat16):
        distance = anchor(x, vae.encode(x))
    assert distance.dtype == torch.float32
    assert distance.item() == pytest.approx(anchor(x, vae.encode(x)).item(), rel=0.1)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def by_pil(t: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bilinear filter, which is antialiased, plane by plane in float32."""
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((width, height), Image.Resampling.BILINEAR))
        for plane in t.flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).unflatten(0, t.shape[:2])


def test_latent_and_image_are_scaled_as_pillow_does_and_turned_alike():
    z, x = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 32, 32)
    seen = set()
    for seed in range(80):
        z_out, x_out = transform_alike(z, x, generator(seed))
        h, w = z_out.shape[-2:]
        assert x_out.shape == (2, 1, 4 * h, 4 * w)
        z_small, x_small = by_pil(z, h, w), by_pil(x, 4 * h, 4 * w)
        turns = [k for k in range(4) if torch.allclose(z_out, z_small.rot90(k, (2, 3)), atol=1e-5)]
        assert len(turns) == 1
        torch.testing.assert_close(x_out, x_small.rot90(turns[0], (2, 3)), atol=1e-5, rtol=0)
        seen.add((h / 8, turns[0]))
    assert seen == {(scale, turn) for scale in SCALES for turn in range(4)}


def test_scales_and_turns_are_uniform():
    z = torch.randn(1, 1, 8, 8)
    sizes = [transform_alike(z, z, generator(seed))[0].shape[-1] for seed in range(1000)]
    for size in (2, 4, 6, 8):
        assert 200 < sizes.count(size) < 300  # 250, and four standard deviations of 14


@pytest.mark.parametrize(
    ("side", "sizes"), [(1, {1}), (2, {1, 2}), (3, {3}), (4, {1, 2, 3, 4}), (6, {3, 6}), (12, {3, 6, 9, 12})]
)
def test_only_whole_latent_positions(side, sizes):
    z, x = torch.randn(1, 2, side, side), torch.randn(1, 3, 8 * side, 8 * side)
    seen = set()
    for seed in range(40):
        z_out, x_out = transform_alike(z, x, generator(seed))
        assert x_out.shape[-2:] == tuple(8 * s for s in z_out.shape[-2:])
        seen.add(z_out.shape[-1])
    assert seen == sizes


def test_oblong_images_turn_too():
    z, x = torch.randn(1, 1, 4, 2), torch.randn(1, 1, 16, 8)
    shapes = set()
    for seed in range(40):
        z_out, x_out = transform_alike(z, x, generator(seed))
        assert x_out.shape[-2:] == (4 * z_out.shape[-2], 4 * z_out.shape[-1])
        shapes.add(tuple(z_out.shape[-2:]))
    assert shapes == {(4, 2), (2, 4), (2, 1), (1, 2)}


def test_the_generator_decides_and_the_global_one_is_left_alone():
    z, x = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 64, 64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = transform_alike(z, x, generator(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = transform_alike(z, x, generator(5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_reach_the_latent_only():
    """Bilinear weights sum to 1: a sum over a quarter of the pixels has gradients that sum to a quarter."""
    for seed in range(20):
        z = torch.randn(1, 2, 8, 8, requires_grad=True)
        z_out, x_out = transform_alike(z, torch.randn(1, 3, 64, 64), generator(seed))
        assert not x_out.requires_grad
        (gradient,) = torch.autograd.grad(z_out.sum(), z)
        assert gradient.sum().item() == pytest.approx(z_out.numel(), rel=1e-5)


def test_half_precision_is_scaled_in_float32():
    z = torch.randn(1, 2, 8, 8).bfloat16()
    seed = next(s for s in range(99) if transform_alike(z, z, generator(s))[0].shape[-1] == 4)
    z_out, _ = transform_alike(z, z, generator(seed))
    assert z_out.dtype == torch.float32
    expected = F.interpolate(z.double(), size=(4, 4), mode="bilinear", antialias=True)
    turned = [expected.rot90(k, (2, 3)).float() for k in range(4)]
    assert any(torch.allclose(z_out, t, atol=1e-6) for t in turned)


class Pair(nn.Module):
    """An inner module with two outputs, of which none is watched."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 100 * x


class Small(nn.Module):
    """x -> 2x -> 6x, and a tuple on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.thrice, self.pair = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), Pair()
        with torch.no_grad():
            self.twice.weight.fill_(2.0)
            self.thrice.weight.fill_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.thrice(self.pair(self.twice(x))[0])
        return out


def test_the_excess_by_hand():
    """Activations 2 and -8 of ``twice``, 6 and -24 of ``thrice``, which are those of the whole too; the bound is 4."""
    network, bound = Small(), ActivationBound(4.0)
    x = torch.tensor([[1.0], [-4.0]])
    with bound.watch(network):
        y = network(x)
    assert y.flatten().tolist() == [6.0, -24.0]
    double, triple = (8 / 4 - 1) ** 2 / 2, ((6 / 4 - 1) ** 2 + (24 / 4 - 1) ** 2) / 2
    assert bound.penalty().item() == pytest.approx(double + 2 * triple, rel=1e-6)


def test_the_gradient_of_the_excess_by_finite_differences():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Conv2d(2, 1, 1)).double()
    weights = [p.detach().clone().requires_grad_() for p in network.parameters()]
    names = [name for name, _ in network.named_parameters()]
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    bound = ActivationBound(0.2)

    def penalty(*values: Tensor) -> Tensor:
        with bound.watch(network):
            torch.func.functional_call(network, dict(zip(names, values, strict=True)), (x,))
        return bound.penalty()

    assert penalty(*weights).item() > 0
    assert torch.autograd.gradcheck(penalty, weights)


def test_below_the_bound_nothing_is_lost():
    network, bound = Small(), ActivationBound(24.0)
    with bound.watch(network):
        network(torch.tensor([[4.0]]))
    penalty = bound.penalty()
    assert penalty.item() == 0.0
    penalty.backward()
    assert network.twice.weight.grad.abs().max() == 0


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def test_hooks_are_removed_after_an_error_too():
    network, bound = Small(), ActivationBound(4.0)
    with bound.watch(network):
        assert hooks(network) == 4
    assert hooks(network) == 0
    with pytest.raises(RuntimeError, match="mat1 and mat2"), bound.watch(network):
        network(torch.zeros(1, 2))
    assert hooks(network) == 0
    network(torch.tensor([[99.0]]))  # not watched
    with bound.watch(network):
        network(torch.tensor([[0.1]]))
    assert bound.penalty().item() == 0.0


def test_half_precision_is_compared_in_float32():
    network, bound = Small().half(), ActivationBound(1e-3)
    with bound.watch(network):
        network(torch.tensor([[100.0]]).half())
    penalty = bound.penalty()  # 600000 times the bound, squared: beyond fp16
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx((200 / 1e-3 - 1) ** 2 + 2 * (600 / 1e-3 - 1) ** 2, rel=1e-3)


def test_the_graph_goes_with_the_penalty():
    """A copy of the object, which averaging makes when training begins, can't hold one."""
    network, bound = Small(), ActivationBound(4.0)
    with bound.watch(network):
        network(torch.tensor([[1.0]]))
    bound.penalty().backward()
    assert copy.deepcopy(bound).bound == 4.0


@pytest.mark.parametrize("bound", [0.0, -1.0])
def test_a_bound_is_above_zero(bound):
    with pytest.raises(ValueError, match="activation_bound must be above 0, got"):
        ActivationBound(bound)
