"""The small diffusion transformer that the diffusion prior and the examples share."""

import pytest
import torch

from olvae.modules.others.denoiser import DiT


def test_a_fresh_diffusion_model_is_0_and_every_weight_learns():
    model = DiT((3, 4, 4), width=32, depth=2, patch=2)
    z, t = torch.randn(5, 3, 4, 4), torch.rand(5)
    seen: list[torch.Tensor] = []
    model.network.register_forward_pre_hook(lambda _, given: seen.extend(given))
    assert not any(module.training for module in model.modules())
    assert model.network.config.num_embeds_ada_norm == 1
    assert torch.equal(model(z, t), torch.zeros(5, 3, 4, 4))
    assert torch.equal(seen[1], 1000 * t)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    model(z, t).square().sum().backward()
    zero = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    assert not [name for name in zero if ".norm1.emb." not in name], zero


def test_training_drops_no_class_and_other_sides_are_taken():
    model = DiT((3, 4, 4), width=32, depth=1, patch=2).train()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    assert not any(module.training for module in model.modules())
    z, t = torch.randn(64, 3, 8, 8), torch.rand(64)
    assert torch.equal(model(z, t), model(z, t))
    assert model(z, t).shape == z.shape


@pytest.mark.parametrize(
    ("shape", "width", "patch", "message"),
    [
        ((4, 4, 6), 32, 2, "latents of 4x6: .* needs square ones"),
        ((4, 4, 4), 32, 3, "whose side a `patch` of 3 divides"),
        ((4, 4, 4), 40, 2, "`width` 40: give a multiple of 32"),
    ],
)
def test_dit_refuses_sizes_that_do_not_fit(shape, width, patch, message):
    with pytest.raises(ValueError, match=message):
        DiT(shape, width, 1, patch)
