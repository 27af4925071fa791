import numpy as np
import pytest
import pywt
import torch

from olvae.modules.wavelet import _images_at_a_time, dwt2, idwt2, wavedec2, waverec2
from tests.reference import assert_parity, parity_case, recipe_input

WAVELETS = ("haar", "db2", "db4", "sym4")


def reference(x: torch.Tensor, wavelet: str, levels: int) -> list[np.ndarray]:
    """PyWavelets, level by level, finest first, in our order of bands."""
    out = []
    low = x.double().numpy()
    for _ in range(levels):
        low, (along_height, along_width, diagonal) = pywt.dwt2(low, wavelet, mode="periodization")
        out.append(np.concatenate((low, along_width, along_height, diagonal), axis=1))
    return out


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(2, 5, 32, 48), (1, 2, 31, 17), (1, 1, 2, 6), (1, 3, 1, 1), (1, 1, 64, 33)]
)
def test_wavelet_levels_are_pywavelets(wavelet, dtype, shape):
    x = torch.randn(shape, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for ours, theirs in zip(wavedec2(x, wavelet, 4), reference(x, wavelet, 4), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(
            ours.double().numpy(), theirs, atol=tolerance * max(1, np.abs(theirs).max())
        )


def test_haar_levels_of_a_row_are_those_of_pywavelets_tests():
    """Of 1.8's test_wavedec: one row eight times, so that each level has a factor of sqrt 2."""
    row = torch.tensor([3.0, 7, 1, 1, -2, 5, 4, 6], dtype=torch.float64)
    details = ([-2.82842712, 0, -4.94974747, -1.41421356], [4, -3.5], [-0.35355339])
    levels = wavedec2(row.repeat(8, 1)[None, None], "haar", 3)
    for number, (level, detail) in enumerate(zip(levels, details, strict=True), start=1):
        low, along_width, along_height, diagonal = level[0]
        expected = torch.tensor(detail, dtype=torch.float64) * 2 ** (number / 2)
        torch.testing.assert_close(along_width, expected.expand_as(along_width), rtol=0, atol=1e-7)
        assert along_height.abs().max() < 1e-12
        assert diagonal.abs().max() < 1e-12
    assert low.item() == pytest.approx(8.83883476 * 2**1.5, abs=1e-7)


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("size", [(32, 48), (31, 17), (1, 1), (2, 6), (37, 50)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_wavelet_reconstruction_is_exact(wavelet, size, levels):
    x = torch.rand(2, 5, *size) * 2 - 1
    back = waverec2(wavedec2(x, wavelet, levels), wavelet, size)
    assert back.shape == x.shape
    assert (back - x).abs().max() < 5e-6


def test_dwt_parity_with_the_reference():
    case = parity_case("dwt_level1")
    assert_parity(dwt2(recipe_input(case["input"])), case["output"])


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_wavelet_transforms_pass_gradcheck(wavelet):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: dwt2(t, wavelet), x)
    assert torch.autograd.gradcheck(lambda t: idwt2(t, wavelet), y)
    assert torch.autograd.gradgradcheck(lambda t: dwt2(t, wavelet), x)


def test_wavelet_gradients_of_several_levels():
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    levels = [level.detach().requires_grad_() for level in wavedec2(x)]

    def decompose(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(wavedec2(image))

    def recompose(*coefficients: torch.Tensor) -> torch.Tensor:
        return waverec2(list(coefficients), size=(3, 4))

    for function, inputs in ((decompose, (x,)), (recompose, tuple(levels))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("shape", [(5, 3, 260, 180), (2, 5, 7, 9), (0, 3, 8, 8)])
def test_wavelets_in_parts_of_the_batch_equal_plain_operations(shape):
    """Function transforms, like graphs, have plain operations;
    eagerly the batch is transformed in parts.
    """

    def there_and_back(image: torch.Tensor) -> list[torch.Tensor]:
        levels = wavedec2(image)
        return [*levels, idwt2(levels[0]), waverec2(levels, size=shape[-2:])]

    x = torch.randn(shape)
    for ours, plain in zip(
        there_and_back(x), torch.func.vmap(there_and_back)(x[None]), strict=True
    ):
        assert torch.equal(ours, plain[0])


def test_wavelets_keep_channels_last():
    x = torch.randn(2, 3, 8, 6).contiguous(memory_format=torch.channels_last)
    assert dwt2(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dwt2(x), dwt2(x.contiguous()))
    for plain in (torch.randn(2, 1, 8, 6), torch.randn(2, 3, 6, 8).mT):
        assert dwt2(plain).is_contiguous()


def test_eagerly_haars_transform_has_a_backward_pass_of_its_own():
    x = torch.randn(1, 1, 4, 6, requires_grad=True)
    bands = dwt2(x)
    assert "HaarAnalysis" in bands.grad_fn.name()
    assert "HaarSynthesis" in idwt2(bands).grad_fn.name()


@pytest.mark.parametrize(
    ("shape", "device", "images"),
    [
        ((8, 3, 256, 128), "cpu", 2),
        ((4, 3, 512, 256), "cpu", 1),
        ((1, 1, 1, 1), "cpu", 2**18),
        ((0, 3, 8, 8), "cpu", 1),
        ((5, 3, 512, 512), "meta", 5),
        ((0, 3, 8, 8), "meta", 1),
    ],
)
def test_as_many_images_as_a_processors_cache_holds_are_transformed_at_a_time(
    shape, device, images
):
    assert _images_at_a_time(torch.empty(shape, device=device)) == images


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wavelets_of_half_precision_are_computed_in_float32(wavelet, dtype):
    x = torch.randn(1, 3, 16, 16).to(dtype)
    exact = dwt2(x.float(), wavelet)
    assert dwt2(x, wavelet).dtype == dtype
    assert torch.equal(dwt2(x, wavelet), exact.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dwt2(x, wavelet)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, exact)
        assert torch.equal(idwt2(exact, wavelet), idwt2(exact, wavelet).float())
    assert torch.equal(
        idwt2(exact.to(dtype), wavelet), idwt2(exact.to(dtype).float(), wavelet).to(dtype)
    )


def test_wavelets_of_integers_are_float32():
    assert dwt2(torch.full((1, 1, 2, 2), 200, dtype=torch.uint8)).flatten().tolist() == [
        400,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("wavelet", [pytest.param("haar", marks=pytest.mark.slow), "db2"])
def test_wavelets_export_with_dynamic_sizes(wavelet):
    """torch.export takes the transform whole, without a graph break,
    and the result holds for other sizes.
    """

    class Transform(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return idwt2(dwt2(x, wavelet), wavelet) + dwt2(x, wavelet).sum()

    half_h = torch.export.Dim("half_h", min=4, max=64)
    half_w = torch.export.Dim("half_w", min=4, max=64)
    program = torch.export.export(
        Transform(),
        (torch.randn(2, 3, 16, 24),),
        dynamic_shapes={"x": {2: 2 * half_h, 3: 2 * half_w}},
    )
    x = torch.randn(2, 3, 10, 32)
    assert torch.allclose(program.module()(x), Transform()(x), atol=1e-4)


@pytest.mark.parametrize("wavelet", [pytest.param("haar", marks=pytest.mark.slow), "db2"])
def test_wavelets_in_onnx(wavelet, tmp_path):
    import onnxruntime

    class Transform(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat(wavedec2(x, wavelet, 2)[1:], dim=1)

    path = tmp_path / "dwt.onnx"
    torch.onnx.export(
        Transform().eval(), (torch.randn(1, 3, 16, 24),), path, dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(1, 3, 16, 24)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, Transform()(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_wavelets_compile_without_a_graph_break(wavelet):
    compiled = torch.compile(
        lambda x: idwt2(dwt2(x, wavelet), wavelet), fullgraph=True, backend="eager"
    )
    x = torch.randn(1, 3, 8, 8)
    assert torch.allclose(compiled(x), x, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(compiled(x), x, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dwt2(torch.zeros(3, 8, 8)), "shape"),
        (lambda: dwt2(torch.zeros(1, 3, 8, 8), "haaar"), "unknown wavelet"),
        (lambda: dwt2(torch.zeros(1, 3, 8, 8), "bior2.2"), "not orthogonal"),
        (lambda: idwt2(torch.zeros(1, 6, 8, 8)), "4C"),
        (lambda: idwt2(torch.zeros(1, 4, 8, 8), size=(13, 16)), "do not belong"),
        (lambda: wavedec2(torch.zeros(1, 3, 8, 8), levels=0), "at least 1"),
        (lambda: waverec2([]), "at least one level"),
    ],
)
def test_wavelets_refuse_wrong_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
