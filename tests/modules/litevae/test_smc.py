import pytest
import torch
import torch.nn.functional as F

from olvae.modules.litevae.smc import SMC, fold_smc
from tests.reference import assert_parity, fill, parity_case, recipe_input


def randomise(module: torch.nn.Module) -> None:
    for p in module.parameters():
        torch.nn.init.normal_(p)


def test_smc_parity_with_the_reference():
    case = parity_case("smc")
    assert_parity(fill(SMC(**case["config"]))(recipe_input(case["input"])), case["output"])


def test_smc_is_equation_3_in_float64():
    smc = SMC(3, 4, 3).double()
    randomise(smc)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    weight = torch.empty_like(smc.conv.weight)
    for o in range(4):
        scaled = [
            [
                [(smc.scales[i] * smc.conv.weight[o, i, a, b]).item() for b in range(3)]
                for a in range(3)
            ]
            for i in range(3)
        ]
        norm = sum(v * v for plane in scaled for row in plane for v in row) + 1e-8
        weight[o] = smc.gain.item() * torch.tensor(scaled, dtype=torch.float64) / norm**0.5
    torch.testing.assert_close(
        smc(x), F.conv2d(x, weight, smc.conv.bias, padding=1), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_smc_folds_into_an_ordinary_convolution(kernel_size):
    smc = SMC(5, 7, kernel_size)
    randomise(smc)
    folded = smc.fold()
    assert type(folded) is torch.nn.Conv2d
    assert (folded.in_channels, folded.out_channels) == (5, 7)
    x = torch.randn(2, 5, 8, 9)
    torch.testing.assert_close(folded(x), smc(x), rtol=1e-5, atol=1e-5)


def test_smc_folding_leaves_the_original_alone():
    net = torch.nn.Sequential(SMC(3, 4), torch.nn.Sequential(SMC(4, 3)))
    randomise(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded = fold_smc(net)
    assert not any(isinstance(m, SMC) for m in folded.modules())
    assert isinstance(fold_smc(net[0]), torch.nn.Conv2d)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_smc_of_small_filters_in_half_precision():
    """Their size does not matter, but its square is 0 in float16."""
    smc = SMC(3, 4, 3)
    randomise(smc)
    smc.conv.weight.data *= 1e-3
    smc.conv.weight.data[0] = 0
    (whole, _), (half, _) = smc.derive([smc])[0], smc.half().derive([smc])[0]
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), whole, rtol=2e-2, atol=1e-3)


def test_smc_refuses_even_kernels():
    with pytest.raises(ValueError, match="odd kernel_size"):
        SMC(3, 3, 4)


def test_smc_and_its_derived_weight_have_the_same_gradients_bit_for_bit():
    """Training casts weights in groups under autocast, and computes them one by one without."""
    smc = SMC(5, 7, 3).to(memory_format=torch.channels_last)
    randomise(smc)
    x = torch.randn(2, 5, 8, 9).to(memory_format=torch.channels_last)
    gradients = []
    for run in (smc, lambda x: smc._conv_forward(x, *smc.derive([smc])[0])):
        smc.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in smc.parameters()])
    assert all(map(torch.equal, *gradients))


def test_weights_of_several_layers_are_each_ones_own():
    """Of one shape together; others, and frozen ones, apart; all in their order."""
    layers = [SMC(5, 7), SMC(5, 4), SMC(5, 7), SMC(5, 7), SMC(5, 7, eps=0.5)]
    for layer in layers:
        randomise(layer)
    layers[3].requires_grad_(False)
    for layer, (weight, bias) in zip(layers, SMC.derive(layers), strict=True):
        torch.testing.assert_close(weight, layer.fold().weight, rtol=1e-6, atol=1e-7)
        assert bias is layer.conv.bias
        assert weight.requires_grad == (layer is not layers[3])
