"""Heads on a vision encoder's features by hand, their augmentations, and whom they train."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olvae.config import ConfigError
from olvae.models.adversary import Adversary
from olvae.modules.dino_discriminator import DinoDiscriminator, diff_augment
from tests.models.steps import against, build, fit, moved, snapshot

timm = pytest.importorskip("timm")


def small(vit: str, **params) -> DinoDiscriminator:
    torch.manual_seed(0)
    given = {"image_size": 64, "heads": 3, **params}
    return DinoDiscriminator(**{"encoder": "test_vit", "weights": vit, **given})


def node(vit: str, **params) -> dict:
    given = {"encoder": "test_vit", "weights": vit, "image_size": 64, "heads": 2, **params}
    return {"target": "olvae.modules.dino_discriminator.DinoDiscriminator", "params": given}


# The logits


def head_by_hand(head, features: Tensor) -> Tensor:
    """In evaluation mode: single tokens, then nine of them around a circle."""

    def normed(layer, h: Tensor) -> Tensor:
        centred = h - layer.running_mean[:, None]
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        y = centred * scale[:, None] + layer.bias[:, None]
        return torch.where(y > 0, y, 0.2 * y)

    tokens = features.flatten(2)  # (B, C, N)
    h = torch.einsum("oc,bcn->bon", head.first.weight[:, :, 0, 0], tokens)
    h = normed(head.norm1, h)
    inner = torch.zeros_like(h)
    for place in range(9):
        kernel = head.second.weight[:, :, 0, place]
        inner = inner + torch.einsum("oc,bcn->bon", kernel, h.roll(4 - place, dims=2))
    h = (h + normed(head.norm2, inner)) / math.sqrt(2)
    return torch.einsum("oc,bcn->bon", head.last.weight[:, :, 0, 0], h) + head.last.bias[:, None]


def test_logits_by_hand(vit):
    """Of blocks 2, 4 and 6 of 6, without the last norm; the network sees 64 x 48 pixels."""
    net = small(vit, image_size=48).eval().double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    for head in net.heads:
        for norm in (head.norm1, head.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    x = torch.rand(2, 3, 128, 96, dtype=torch.float64) * 2 - 1

    theirs = timm.create_model("test_vit", checkpoint_path=vit, dynamic_img_size=True)
    theirs = theirs.eval().double()
    kept: list[Tensor] = []
    for block in (1, 3, 5):
        theirs.blocks[block].register_forward_hook(lambda _, __, y: kept.append(y))
    seen = F.interpolate(x, size=(64, 48), mode="bicubic", antialias=True)
    theirs.forward_features(seen)  # the model's own mean and deviation are 0.5

    logits = net(x)
    assert len(logits) == net.num_outputs == 3
    for found, head, tokens in zip(logits, net.heads, kept, strict=True):
        features = tokens[:, 1:].transpose(1, 2)[..., None]  # without the class, (B, C, 12, 1)
        assert found.shape == (2, 1, 4, 3)
        torch.testing.assert_close(found.flatten(2), head_by_hand(head, features))


def test_images_and_heads_get_gradients_and_the_encoder_none(vit):
    net = small(vit)
    x = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    sum(t.square().mean() for t in net(x)).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert {name.partition(".")[0] for name in net.state_dict()} == {"heads"}
    assert not any(p.requires_grad or p.grad is not None for p in net.features.network.parameters())
    assert not any(module.training for module in net.train().features.network.modules())


def test_logits_in_bf16_are_close_to_float32(vit):
    net = small(vit, augment=[]).eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    largest = max(t.abs().max() for t in expected)
    for half, full in zip(logits, expected, strict=True):
        assert (half.float() - full).abs().max() < 0.05 * largest


def test_dino_discriminator_of_rae_has_the_size_of_its_heads():
    with torch.device("meta"):
        net = DinoDiscriminator()
    head = 384**2 + 9 * 384**2 + 4 * 384 + 384 + 1
    assert sum(p.numel() for p in net.parameters()) == 4 * head == 5_905_924
    assert net.places == [2, 5, 8, 11]


def test_a_grid_has_one_row_or_column_at_the_least(vit):
    """Nine tokens are enough; and there may be a head for each block, or one."""
    net = small(vit, image_size=4, heads=6).eval()
    assert net.places == [0, 1, 2, 3, 4, 5]
    x = torch.rand(1, 3, 4, 144) * 2 - 1
    with torch.no_grad():
        assert [t.shape for t in net(x)] == [(1, 1, 1, 9)] * 6
        assert [t.shape for t in net(x.mT)] == [(1, 1, 9, 1)] * 6
    assert small(vit, image_size=1, heads=1).places == [5]


# The augmentations


def test_augmentations_are_for_training_only(vit):
    net = small(vit)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        plain = net.eval()(x)
        assert torch.equal(plain[0], net(x)[0])
        without = small(vit, augment=[]).eval()(x)
        assert torch.equal(plain[0], without[0])
        assert not torch.equal(net.train()(x)[0], net(x)[0])


def test_colours_by_hand():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    torch.manual_seed(3)
    found = diff_augment(x, ["colour"])
    torch.manual_seed(3)
    drawn = torch.rand(3, 2, 1, 1, 1).tolist()
    for i, image in enumerate(x):
        brightness, saturation, contrast = (drawn[kind][i][0][0][0] for kind in range(3))
        image = image + brightness - 0.5
        grey = image.sum(0) / 3
        image = grey + 2 * saturation * (image - grey)
        wanted = image.mean() + (0.5 + contrast) * (image - image.mean())
        torch.testing.assert_close(found[i], wanted)


def test_translation_moves_by_up_to_an_eighth_of_the_side():
    """Each image by its own numbers of pixels; every shift occurs, and zeros come in."""
    rows, columns = torch.meshgrid(torch.arange(1.0, 13), torch.arange(1.0, 29), indexing="ij")
    x = torch.stack((rows, columns)).expand(256, 2, 12, 28)
    torch.manual_seed(0)
    shifts = set()
    for image in diff_augment(x, ["translation"]):
        down = int(image[0, 6, 14] - x[0, 0, 6, 14])
        right = int(image[1, 6, 14] - x[0, 1, 6, 14])
        padded = F.pad(x[0], (4, 4, 2, 2))[:, 2 + down : 14 + down, 4 + right : 32 + right]
        assert torch.equal(image, padded)
        shifts.add((down, right))
    assert {down for down, _ in shifts} == set(range(-2, 3))
    assert {right for _, right in shifts} == set(range(-4, 5))


def test_cutout_removes_half_of_each_side_around_a_centre_anywhere():
    torch.manual_seed(0)
    holes = diff_augment(torch.ones(512, 1, 16, 8), ["cutout"]) == 0
    assert holes.shape == (512, 1, 16, 8)
    sides = []
    for axis, side in ((3, 16), (2, 8)):
        line = holes.any(axis)[:, 0].int()  # (512, side)
        first, length = line.argmax(1), line.sum(1)
        sides.append(length)
        # Cut by the border, of an image whose centre is near it.
        spans = {
            (max(0, c - side // 4), min(side, c + side // 4) - max(0, c - side // 4))
            for c in range(side + 1)
        }
        assert set(zip(first.tolist(), length.tolist(), strict=True)) == spans
    assert torch.equal(holes.sum((1, 2, 3)), sides[0] * sides[1])  # rectangles


def test_gradients_flow_through_augmentations():
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def augmented(image: Tensor) -> Tensor:
        torch.manual_seed(5)
        return diff_augment(image, ["colour", "translation", "cutout"])

    assert torch.autograd.gradcheck(augmented, x)


# A training against it


def test_training_against_it_moves_the_heads_alone(vit, image_folder):
    model = build(against(node(vit)))
    encoder = model.adversary.discriminator.features.network
    frozen = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    before = snapshot(model)
    fit(model, image_folder, 2, size=32)
    changed = moved(before, snapshot(model))
    assert "adversary.discriminator.heads.0.second.parametrizations.weight.original" in changed
    assert any(name.startswith("encoder.") for name in changed)
    assert not any(".features." in name for name in model.state_dict())
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, frozen[name])


def test_r1_with_it_is_the_gradient_at_the_images_and_trains_the_heads(vit):
    """Its attention is differentiated twice."""
    adversary = Adversary(node(vit, augment=[]), r1_weight=1.0)
    heads = adversary.discriminator.eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    _, logs = adversary.discriminator_loss(x, -x)

    image = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sum(t.sum() for t in heads(image)), image)
    wanted = 0.5 * gradient.square().sum() / 2
    torch.testing.assert_close(logs["r1"], wanted.detach(), rtol=1e-4, atol=0)

    total, _ = adversary.discriminator_loss(x, x)
    total.backward()
    assert all(p.grad.isfinite().all() for p in heads.parameters())


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"heads": 7}, ValueError, "heads: test_vit has 6 blocks, got 7 heads"),
        ({"heads": 0}, ValueError, "heads must be at least 1"),
        ({"augment": ["colour", "blur"]}, ValueError, "expected some of .*cutout, got blur"),
        (
            {"weights": "/nowhere.pt"},
            FileNotFoundError,
            "/nowhere.pt: no such file, and not an id.*; set discriminator_config.params.weights",
        ),
    ],
)
def test_dino_discriminator_refuses_wrong_arguments(vit, params, error, message):
    with pytest.raises(error, match=message):
        small(vit, **params)


def test_dino_discriminator_refuses_images_that_it_can_not_see(vit):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 1, 64, 64\)"):
        small(vit)(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"4 tokens: .*image_size"):
        small(vit, image_size=32)(torch.zeros(1, 3, 64, 64))


def test_cutmix_is_refused_with_it(vit):
    model = build(against(node(vit), cutmix_probability=0.5))
    with pytest.raises(ConfigError, match="cutmix_probability needs"):
        model.adversary.check_image(3, 64)
