import pytest
import torch
from torch import Tensor

from olvae.losses.cutmix import _inside, cutmix, cutmix_consistency, cutmix_loss


def test_cutmix_takes_every_pixel_from_where_the_mask_says():
    real, fake = torch.full((8, 3, 20, 30), 1.0), torch.full((8, 3, 20, 30), -1.0)
    mixed, mask = cutmix(real, fake)
    assert mask.shape == (8, 1, 20, 30)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(mixed, (2 * mask - 1).expand_as(mixed))


def _is_rectangle(mask: Tensor) -> bool:
    return torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None, :])


def test_cutmix_mask_is_a_rectangle_or_its_complement():
    _, masks = cutmix(torch.zeros(200, 1, 24, 16), torch.zeros(200, 1, 24, 16))
    real = masks[:, 0].bool()
    assert all(_is_rectangle(mask) or _is_rectangle(~mask) for mask in real)
    assert 0.3 < sum(_is_rectangle(mask) for mask in real) / len(real) < 0.9  # both kinds occur


def test_cutmix_share_of_real_pixels_is_uniform_and_places_are_alike():
    """The share of real pixels is uniform, and no place is more often real than another."""
    n = 20_000
    _, mask = cutmix(torch.zeros(n, 1, 32, 32), torch.zeros(n, 1, 32, 32))
    share = mask.mean((1, 2, 3)).sort().values
    uniform = (torch.arange(n) + 0.5) / n
    # Kolmogorov-Smirnov, plus half a pixel's rounding of each side.
    assert (share - uniform).abs().max() < 0.035
    assert share.mean().item() == pytest.approx(0.5, abs=0.01)
    assert share.var().item() == pytest.approx(1 / 12, rel=0.03)
    per_pixel = mask.mean((0, 1))
    assert (per_pixel - 0.5).abs().max() < 5 * 0.5 / n**0.5


def test_cutmix_consistency_by_hand():
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    real = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    fake = torch.tensor([[[[-1.0, -2.0], [-3.0, -4.0]]]])
    mixed = torch.tensor([[[[1.0, -1.0], [-3.0, 2.0]]]])  # the mix of the logits is 1, -2, -3, 4
    assert cutmix_consistency(mixed, real, fake, mask).item() == pytest.approx((0 + 1 + 0 + 4) / 4)


def test_cutmix_loss_by_hand():
    """Three fake pixels and one real one, and the image's logit, labelled fake: a sum of both."""
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
    pixels = torch.tensor([[[[0.25, -0.5], [0.5, 2.0]]]], dtype=torch.float64)
    image = torch.tensor([[0.4]], dtype=torch.float64)
    on_pixels = ((1 - 0.25) + (1 - 0.5) + (1 + 0.5) + (1 + 2.0)) / 4
    assert cutmix_loss("hinge", [pixels], mask).item() == pytest.approx(on_pixels, rel=1e-12)
    both = on_pixels + (1 + 0.4)
    assert cutmix_loss("hinge", [pixels, image], mask).item() == pytest.approx(both, rel=1e-12)


def test_cutmix_image_logit_is_labelled_real_only_without_a_fake_pixel():
    mask = torch.stack([torch.full((1, 4, 4), share, dtype=torch.float64) for share in (1, 0, 1)])
    mask[2, 0, 0, 0] = 0
    image = torch.tensor([[0.3], [0.3], [0.3]], dtype=torch.float64, requires_grad=True)
    pixels = torch.where(mask > 0.5, 1.0, -1.0)  # no loss on pixels
    loss = cutmix_loss("hinge", [pixels, image], mask)
    assert loss.item() == pytest.approx(((1 - 0.3) + 2 * (1 + 0.3)) / 3, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, image)
    torch.testing.assert_close(
        gradient, torch.tensor([[-1.0], [1.0], [1.0]], dtype=torch.float64) / 3
    )


def test_cutmix_rectangles_reach_both_ends():
    rows = _inside(4, torch.full((300, 1), 0.5), torch.rand(300, 1))
    assert set(map(tuple, rows.int().tolist())) == {(1, 1, 0, 0), (0, 1, 1, 0), (0, 0, 1, 1)}


def test_cutmix_refuses_shapes_that_differ_and_a_single_tensor():
    with pytest.raises(ValueError, match="one shape"):
        cutmix(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match="single tensor"):
        cutmix_loss("logistic", torch.randn(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
