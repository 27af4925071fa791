import pytest
import torch

from olvae.models.anchor import Anchor
from olvae.models.autoencoder import LiteVAE
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
