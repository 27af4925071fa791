"""PatchGAN by hand; two processes give the numbers of one with the whole batch, R1's too."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olvae.launcher import join, leave
from olvae.losses.gan_losses import r1_penalty
from olvae.modules import patchgan
from olvae.modules.base import mean_over_processes
from olvae.modules.patchgan import PatchGAN
from tests.forks import fork_ranks


@pytest.fixture
def small() -> PatchGAN:
    torch.manual_seed(0)
    return PatchGAN(base_channels=8)


def test_patchgan_layers_by_hand(small: PatchGAN):
    """The function written out from the state dict: five convolutions, three batch norms."""
    w = small.state_dict()
    x = torch.randn(2, 3, 48, 64)
    h = F.leaky_relu(F.conv2d(x, w["first.weight"], w["first.bias"], stride=2, padding=1), 0.2)
    for i, stride in enumerate((2, 2, 1)):
        h = F.conv2d(h, w[f"layers.{i}.conv.weight"], stride=stride, padding=1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, unbiased=False)
        scale, shift = (w[f"layers.{i}.norm.{k}"].view(1, -1, 1, 1) for k in ("weight", "bias"))
        h = F.leaky_relu((h - mean) / (var + 1e-5).sqrt() * scale + shift, 0.2)
    expected = F.conv2d(h, w["last.weight"], w["last.bias"], padding=1)
    (logits,) = small(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_patchgan_logit_sees_70_by_70_pixels():
    torch.manual_seed(0)
    net = PatchGAN(base_channels=4).eval()
    x = torch.randn(1, 3, 160, 160, requires_grad=True)
    (logits,) = net(x)
    logits[0, 0, 9, 9].backward()
    seen = x.grad[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70
    assert columns.max() - columns.min() + 1 == 70


def network() -> PatchGAN:
    torch.manual_seed(0)
    return PatchGAN(base_channels=4, n_layers=2).double()


def images() -> Tensor:
    return torch.randn(
        6, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def measured(x: Tensor) -> dict[str, Tensor]:
    """Losses, their gradients by parameters and images, and buffers,
    after two passes in training and one after it.
    """
    net, x = network(), x.requires_grad_()
    logits = net(x)
    loss = logits[0].square().mean() + r1_penalty(logits, x)
    net(2 * x.detach() + 1)
    loss.backward()
    assert x.grad is not None
    found = {
        name: mean_over_processes(p.grad)
        for name, p in net.named_parameters()
        if p.grad is not None
    }
    found |= dict(net.named_buffers(), loss=mean_over_processes(loss.detach()))
    return found | {"image": x.grad, "evaluated": net.eval()(x.detach())[0].detach()}


def half(out: Path) -> None:
    rank, _ = join()
    torch.save(measured(images().chunk(2)[rank].clone()), out / f"{rank}.pt")
    leave()


def test_patchgan_of_two_processes_is_that_of_one(tmp_path):
    fork_ranks(half, tmp_path)
    whole, halves = measured(images()), [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in ("image", "evaluated"):
        both = torch.cat([part.pop(name) for part in halves])
        scale = 2 if name == "image" else 1  # a process' loss is the mean over its own images
        torch.testing.assert_close(both, scale * whole.pop(name), rtol=1e-9, atol=1e-12)
    assert len(whole) == len(dict(network().named_parameters())) + 6 + 1
    for part in halves:
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-12)


def test_patchgan_norm_in_one_process_is_torchs_batch_norm_bit_for_bit():
    net, other = network(), network()
    for layer in other.layers:
        torchs = nn.BatchNorm2d(layer.norm.num_features).double()
        torchs.load_state_dict(layer.norm.state_dict())
        layer.norm = torchs
    for _ in range(2):
        assert torch.equal(net(images())[0], other(images())[0])
    for one, two in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(net.eval()(images())[0], other.eval()(images())[0])


def test_sync_batchnorm_conversion_leaves_patchgan_alone():
    assert not any(
        isinstance(m, nn.SyncBatchNorm)
        for m in nn.SyncBatchNorm.convert_sync_batchnorm(network()).modules()
    )


def test_shared_statistics_are_batch_norms_where_the_mean_is_far_from_0(monkeypatch):
    """Of two processes with equal images: the variance is no difference of squares."""
    ours = patchgan.PatchGAN(base_channels=4, n_layers=1).layers[0].norm
    plain = nn.BatchNorm2d(ours.num_features)
    plain.load_state_dict(ours.state_dict())
    x = 300.0 + 0.005 * torch.randn(4, ours.num_features, 8, 8)
    expected = plain(x)
    monkeypatch.setattr(patchgan.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(patchgan.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(patchgan, "mean_over_processes", lambda values: values)
    torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-2)


def test_patchgans_weights_begin_from_narrow_gaussians():
    """Around 0, and BatchNorm's around 1, with a deviation of 0.02; biases are 0."""
    torch.manual_seed(0)
    net = PatchGAN()
    for name, tensor in net.named_parameters():
        if name.endswith("bias"):
            assert not tensor.any(), name
        else:
            centre = 1.0 if "norm" in name else 0.0
            margin = 4 * 0.02 / tensor.numel() ** 0.5
            assert tensor.mean().item() == pytest.approx(centre, abs=margin), name
            assert tensor.std().item() == pytest.approx(0.02, abs=margin), name


def test_patchgan_doubles_its_width_up_to_eight_times():
    net = PatchGAN(in_channels=2, base_channels=3, n_layers=5)
    assert [layer.conv.out_channels for layer in net.layers] == [6, 12, 24, 24, 24]
    assert [layer.conv.stride[0] for layer in net.layers] == [2, 2, 2, 2, 1]
    assert (net.first.in_channels, net.last.in_channels, net.min_size) == (2, 24, 128)
    least = PatchGAN(base_channels=2, n_layers=1)
    assert least(torch.rand(1, 3, 8, 9))[0].shape == (1, 1, 2, 2)
    for sides in ((7, 8), (8, 7)):
        with pytest.raises(ValueError, match="8x8"):
            least(torch.rand(1, 3, *sides))
    with pytest.raises(ValueError, match="PatchGAN"):
        least(torch.rand(3, 8, 8))


def test_patchgan_has_the_published_number_of_parameters(meta):
    assert sum(p.numel() for p in PatchGAN().parameters()) == 2_765_633  # README: 2.77 M
    with pytest.raises(ValueError, match="n_layers must be at least 1"):
        PatchGAN(n_layers=0)


def test_statistics_of_two_processes_are_batch_norms_of_both(monkeypatch):
    """By what the other process would send: its mean, and its variance around both's mean."""
    ours = patchgan.PatchGAN(base_channels=2, n_layers=1).layers[0].norm.double()
    torch.nn.init.normal_(ours.bias)
    plain = nn.BatchNorm2d(ours.num_features).double()
    plain.load_state_dict(ours.state_dict())
    x, other = (s * torch.randn(3, 4, 2, 5, dtype=torch.float64) + s for s in (1, 3))
    both = torch.cat((x, other))
    mean = both.mean((0, 2, 3))
    var, own = torch.var_mean(other, dim=(0, 2, 3), correction=0)
    sent = iter((own, var + (own - mean).square()))
    monkeypatch.setattr(patchgan.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(patchgan.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(patchgan, "mean_over_processes", lambda values: (values + next(sent)) / 2)
    torch.testing.assert_close(ours(x), plain(both)[:3])
    for one, two in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, two)
