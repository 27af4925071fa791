"""Linear paths beside networks, and their closed form against NumPy's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from olvae.data.pixels.size_and_range import (
    EIGHT_BITS,
    PixelRange,
    Sides,
    from_uint8,
    to_uint8,
)
from olvae.data.source import Sample
from olvae.metrics.metric import psnr
from olvae.models import linear_code
from olvae.models.autoencoder import LiteVAE
from olvae.models.linear_code import (
    LEAST_VARIANCE,
    LinearDecoder,
    LinearEncoder,
    _set,
    _windows,
    crops_and_means,
    least_squares,
    mean_and_covariance,
    principal_components,
    start_linearly,
)
from olvae.modules.base import HALVES, last_convolution
from olvae.modules.litevae.decoder_model import LiteVAE_Decoder
from olvae.modules.litevae.encoder_model import LiteVAE_Encoder
from olvae.modules.sdvae import SDDecoder, SDEncoder

DEEP = PixelRange((0.0,), (1000.0,))
SD = {"channels": 8, "channel_mult": (1, 1), "num_res_blocks": 0, "norm_groups": 4}

ENCODERS = {
    "lite": lambda **more: LiteVAE_Encoder(
        6, "S", dct_levels=1, extractor_resblocks=1, aggregate_resblocks=1, **more
    ),
    "paper": lambda **more: LiteVAE_Encoder(6, "S", "paper", dct_levels=1, **more),
    "packets": lambda **more: LiteVAE_Encoder(6, "S", dct_levels=1, packets=True, **more),
    "sd": lambda **more: SDEncoder(6, **SD, **more),
}
DECODERS = {
    variant: lambda variant=variant, **more: LiteVAE_Decoder(8, 3, 3, (1, 1), 0, variant, **more)
    for variant in ("open_litevae", "paper_smc", "group_norm")
} | {
    "wavelet": lambda **more: LiteVAE_Decoder(8, 3, 3, (1, 1), 0, output="wavelet", **more),
    "packets": lambda **more: LiteVAE_Decoder(8, 3, 3, (1, 1), 0, output="packets", **more),
    "sd": lambda **more: SDDecoder(**SD, z_channels=3, **more),
}


def samples(p: int, q: int = 0, n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated samples with means, in two parts of different sizes."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, p, generator=rng) @ torch.randn(p, p, generator=rng) + 3.0
    return x, x @ torch.randn(p, q, generator=rng) + torch.randn(n, q, generator=rng) - 1.0


def components(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return principal_components(*mean_and_covariance(x.split(150)), count)


def fitted(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return least_squares(*mean_and_covariance(torch.cat((x, y), dim=1).split(150)), y.shape[1])


def test_principal_components_are_numpys():
    x, _ = samples(7)
    weight, bias = components(x, 3)
    variances, axes = np.linalg.eigh(np.cov(x.double().numpy(), rowvar=False, bias=True))
    expected = (axes / np.sqrt(variances))[:, ::-1][:, :3].T
    expected *= np.sign(expected[np.arange(3), np.abs(expected).argmax(1)])[:, None]
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-9, atol=1e-12)
    codes = x.double() @ weight.T + bias
    np.testing.assert_allclose(np.cov(codes.numpy(), rowvar=False, bias=True), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(codes.mean(0).numpy(), np.zeros(3), atol=1e-9)


def test_least_squares_of_dependent_inputs_is_the_smallest_solution():
    x, y = samples(3, 2)
    twice = torch.cat((x, x), dim=1)
    weight, _ = fitted(twice, y)
    torch.testing.assert_close(weight[:, :3], weight[:, 3:])
    torch.testing.assert_close(weight[:, :3] * 2, fitted(x, y)[0])


def test_principal_components_of_rounding_noise_are_not_enlarged():
    """A grey picture has one channel's worth of components; the others stay small, and finite."""
    x = torch.randn(500, 1).expand(-1, 3)
    weight, _ = components(x, 3)
    assert weight.isfinite().all()
    assert weight.abs().max() <= LEAST_VARIANCE**-0.5


def test_principal_components_beyond_the_values_are_zero():
    x, _ = samples(3)
    weight, bias = components(x, 5)
    assert weight.shape == (5, 3)
    assert not weight[3:].any()
    assert not bias[3:].any()


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_starts_as_its_linear_path(kind):
    encoder, x = ENCODERS[kind](linear=True), torch.randn(2, 3, 8, 6)
    moments = encoder(x)
    around = F.pad(x, (1, 1, 1, 1), "replicate")  # patches of 4x4 pixels, 2 apart
    torch.testing.assert_close(
        moments[:, :3], F.conv2d(around, encoder.linear.weight, encoder.linear.bias, stride=2)
    )
    assert not moments[:, 3:].any()
    nn.init.normal_(last_convolution(encoder).weight)
    # The network adds to means and log-variances.
    assert (encoder(x) - moments).abs().mean(dim=(0, 2, 3)).min() > 0


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_starts_as_its_linear_path(kind):
    decoder, z = DECODERS[kind](linear=True), torch.randn(2, 3, 5, 4)
    image = decoder(z)
    patches = F.conv2d(
        F.pad(z, (1, 1, 1, 1), "replicate"), decoder.linear.weight, decoder.linear.bias
    )
    torch.testing.assert_close(
        image, patches.view(2, 3, 2, 2, 5, 4).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 10, 8)
    )
    nn.init.normal_(last_convolution(decoder).weight)
    assert (decoder(z) - image).abs().mean() > 0


@pytest.mark.parametrize("make", [*ENCODERS.values(), *DECODERS.values()])
def test_linear_paths_and_networks_both_learn(make):
    network = make(linear=True)
    shape = (1, 3, 8, 8)
    # From the second step on, gradients pass through the network's last convolution.
    for _ in range(2):
        network(torch.randn(shape)).square().sum().backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.01 * p.grad
    assert all(
        p.grad.abs().sum() > 0 for p in (*network.linear.parameters(), next(network.parameters()))
    )


@pytest.mark.parametrize("make", [*ENCODERS.values(), *DECODERS.values()])
def test_linear_path_changes_nothing_else_of_a_network(make):
    torch.manual_seed(0)
    plain = make().state_dict()
    torch.manual_seed(0)
    linear = make(linear=True)
    assert set(linear.state_dict()) - set(plain) == {"linear.weight", "linear.bias"}
    changed = {
        name for name, tensor in plain.items() if not tensor.equal(linear.state_dict()[name])
    }
    last = last_convolution(linear)
    assert changed == {
        name for name, p in linear.named_parameters() if p is last.weight or p is last.bias
    }


@pytest.mark.parametrize(("factor", "size"), [(2, 4), (3, 3), (8, 16), (16, 32), (32, 32)])
def test_linear_path_patches_are_twice_the_factor(factor, size):
    """Twice the factor, but where that has no middle or is very large;
    the latent is of the right size in any case.
    """
    encoder = LinearEncoder(4, 3, factor, 4 * factor)
    assert encoder.linear.kernel_size == (size, size)
    assert encoder(torch.rand(1, 3, 2 * factor, factor)).shape == (1, 4, 2, 1)


def test_linear_code_alone_is_an_encoder_and_a_decoder():
    encoder, decoder = LinearEncoder(8, 1, downscale=4), LinearDecoder(4, 1, upscale=4)
    moments = encoder(torch.rand(2, 1, 8, 12))
    assert moments.shape == (2, 8, 2, 3)
    assert (moments[:, 4:] == -30).all()
    assert decoder(moments[:, :4]).shape == (2, 1, 8, 12)


def asked(pixel_range: PixelRange = EIGHT_BITS, moments: tuple[bool, ...] = (), **size: int):
    """How many crops are asked for, of a seed; and what comes of as many samples as ``moments``."""
    given = []
    sides = Sides(size.get("height", 64), size.get("width", 64))

    def first_samples(seed: int, count: int):
        given.append((seed, count))
        for number, known in enumerate(moments or (False,)):
            image = torch.full((1, 1, 1), float(number))
            both = torch.arange(12.0).view(6, 2, 1) + number
            yield Sample(image, "", moments=both if known else None)

    source = SimpleNamespace(
        size=sides,
        channels=size.get("channels", 3),
        pixel_range=pixel_range,
        first_samples=first_samples,
    )
    crops, means = crops_and_means(source, 7, size.get("factor", 8))
    ((seed, count),) = given
    assert seed == 7
    return count, crops, means


@pytest.fixture
def all_crops(monkeypatch):
    """The product's number, which quick trainings of the same session lower."""
    monkeypatch.setattr(linear_code, "CROPS", (256, 4096))


@pytest.mark.usefixtures("all_crops")
def test_as_many_crops_are_fitted_on_as_have_the_positions():
    """2^16 in all: 64 in a crop of 64x64 pixels at f8. From 256 to 4,096, and 256 MiB."""
    assert asked()[0] == 1024
    assert asked(height=128, width=32)[0] == 1024
    assert asked(factor=16)[0] == 4096
    assert asked(factor=32)[0] == 4096
    assert asked(height=256, width=128)[0] == 256
    # 2^28 bytes over 3 x 1,024 x 1,024, and over four times as many in float32.
    assert asked(height=1024, width=1024)[0] == 85
    assert asked(DEEP, height=1024, width=1024)[0] == 21
    assert asked(DEEP, height=1024, width=1024, channels=1)[0] == 64
    assert asked(height=2**15, width=2**14, channels=1)[0] == 1


@pytest.mark.usefixtures("all_crops")
def test_means_of_crops_are_known_where_all_have_them():
    count, crops, means = asked(moments=(True, True, True), height=16, width=16)
    assert count == 4096
    assert crops[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert means.shape == (3, 3, 2, 1)
    assert means[1].flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert asked(moments=(True, False, True))[2] is None
    assert asked(moments=(False, False))[2] is None


@pytest.mark.parametrize(
    ("teaches", "known", "fresh", "frozen", "by"),
    [
        (True, True, HALVES, ["encoder"], "moments"),
        (True, False, HALVES, ["encoder"], "teacher"),
        (True, True, HALVES, [], "path"),
        (False, True, HALVES, ["encoder"], "path"),
        (True, True, HALVES, ["decoder"], None),
        (True, True, ["encoder"], ["encoder"], None),
    ],
)
def test_a_start_is_measured_on_the_latents_that_training_will_decode(
    monkeypatch, teaches, known, fresh, frozen, by
):
    """Those of the data in place of a teacher that stands in for a frozen encoder."""
    model = LiteVAE(LinearEncoder(6, 1, 4), LinearDecoder(3, 1, 4))
    images = torch.randint(0, 256, (2, 1, 8, 12), dtype=torch.uint8)
    moments, z_of_teacher = torch.randn(2, 6, 2, 3), torch.randn(1, 3, 2, 3)
    samples = [Sample(None, "gone")]
    for image, own in zip(images, moments, strict=True):
        samples.append(Sample(image, "", moments=own if known else None))
    source = SimpleNamespace(pixel_range=EIGHT_BITS, validated=lambda: samples)
    teacher = (lambda x: z_of_teacher) if teaches else None
    asked, fits, moved = [], [], []
    found = (images, moments[:, :3] if known else None)
    monkeypatch.setattr(linear_code, "crops_and_means", lambda *a: asked.append(a) or found)
    monkeypatch.setattr(linear_code, "fit_linear_paths", lambda *a: fits.append(a))
    model.to = moved.append
    cpu = torch.device("cpu")
    mean, line = start_linearly(model, source, 3, cpu, teacher, fresh, frozen)
    assert (asked, moved) == ([(source, 3, 4)], [cpu])
    ((*first, taught, pixels, halves),) = fits
    assert first == [model, images]
    assert taught is (found[1] if known else teacher)
    assert (pixels, halves) == (EIGHT_BITS, fresh)
    if by is None:
        assert mean is None
        assert line.startswith("linear code: fitted on 2 ")
        return
    with torch.no_grad():
        z = {
            "moments": moments[:, :3],
            "teacher": z_of_teacher.expand(2, -1, -1, -1),
            "path": model.encoder.linear(from_uint8(images)),
        }[by]
        expected = psnr(images, to_uint8(model.decoder.linear_path(z)))
    assert mean == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("size", "stride"), [(4, 4), (8, 4), (3, 1), (5, 1)])
def test_windows_are_what_a_convolution_sees(size, stride):
    """And its weight and bias those of the windows' values, in the middle if there are fewer."""
    margin = (size - stride) // 2
    conv = nn.Conv2d(2, 3, size, stride, padding=margin, padding_mode="replicate").double()
    x = torch.randn(2, 2, 8, 12, dtype=torch.float64)
    windows = _windows(x, conv)
    assert windows.shape == (2, 2 * size**2, 8 // stride, 12 // stride)
    found = torch.einsum("op,bphw->bohw", conv.weight.flatten(1), windows)
    torch.testing.assert_close(found + conv.bias.view(3, 1, 1), conv(x))
    smaller = size - 2 if size > 4 else size
    weight, bias = torch.randn(3, 2 * smaller**2), torch.randn(3)
    _set(conv, weight, bias)
    around = (size - smaller) // 2
    inside = conv.weight[:, :, around : size - around, around : size - around]
    assert torch.equal(inside.flatten(1).float(), weight)
    total = conv.weight.square().sum().item()
    assert total == pytest.approx(weight.square().sum().item())
    assert torch.equal(conv.bias.float(), bias)


def test_means_and_covariances_of_batches_are_numpys():
    x, _ = samples(4)
    mean, covariance = mean_and_covariance(x.split(150))
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    expected = np.cov(x.double().numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9)
    with pytest.raises(ValueError, match="not finite"):
        mean_and_covariance([x, torch.full((1, 4), float("inf"))])


def test_least_squares_are_numpys():
    x, y = samples(5, 2)
    weight, bias = fitted(x, y)
    design = np.column_stack((x.double().numpy(), np.ones(len(x))))
    expected, *_ = np.linalg.lstsq(design, y.double().numpy(), rcond=None)
    np.testing.assert_allclose(weight, expected[:-1].T, rtol=1e-7)
    np.testing.assert_allclose(bias, expected[-1], rtol=1e-7)


def test_a_component_below_rounding_noise_has_its_deviation_of_rounding():
    """Of three, the second has less variance than 8 bits' rounding, the third none."""
    least = LEAST_VARIANCE
    assert least == pytest.approx((2 / 255) ** 2 / 12)
    covariance = torch.diag(torch.tensor([4.0, least / 2, 0.0], dtype=torch.float64))
    weight, bias = principal_components(torch.tensor([1.0, 2.0, 3.0]).double(), covariance, 3)
    assert weight.diag().tolist() == pytest.approx([0.5, least**-0.5, least**-0.5])
    assert bias.tolist() == pytest.approx([-0.5, -2 * least**-0.5, -3 * least**-0.5])


def test_linear_networks_are_their_paths():
    encoder, decoder = LinearEncoder(4, 3, 4), LinearDecoder(2, 3, 4, enlarge=2)
    assert encoder.image_size == 128
    assert LinearEncoder(4, 3, 4, 64).image_size == 64
    x, z = torch.rand(1, 3, 8, 8), torch.rand(1, 2, 3, 2)
    assert torch.equal(encoder(x)[:, :2], encoder.linear(x))
    assert torch.equal(decoder(z), decoder.linear_path(z))
    ((stage,),) = decoder.paths()
    assert (stage.reach, stage.scale) == (1, 8)
    assert torch.equal(stage.run(z), decoder(z))
