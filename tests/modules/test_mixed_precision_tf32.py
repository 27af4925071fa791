"""Convolutions that must not be TF32's, by their dtypes on a fake GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from olvae.losses.terms import gaussian_loss
from olvae.modules.wavelet import wavedec2, waverec2
from tests.models.test_liteautoencoder_on_fake_cuda import _guard  # noqa: F401  (a fixture)

CONVOLUTION = torch.ops.aten.convolution.default


class Convolved(TorchDispatchMode):
    """Notes the dtype of each convolution."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is CONVOLUTION:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def there_and_back(wavelet):
    return lambda x: waverec2(wavedec2(x, wavelet), wavelet)


@pytest.mark.parametrize(
    ("function", "convolutions"),
    [
        (there_and_back("db2"), 12),
        (there_and_back("haar"), 0),
        (lambda x: gaussian_loss(x, torch.zeros_like(x)), 2),
    ],
    ids=["db2", "haar", "blur"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "exact"), [("cuda", torch.float64), ("cpu", torch.float32)])
def test_wavelets_and_blur_convolve_in_float64_on_cuda(
    function, convolutions, dtype, device, exact
):
    """A backward pass has its forward pass's dtype, whatever the settings of TF32 are by then."""
    with FakeTensorMode(), Convolved() as convolved:
        out = function(torch.empty(2, 3, 32, 48, device=device, dtype=dtype))
    assert convolved.dtypes == convolutions * [exact]
    assert (out.device.type, out.dtype) in {(device, dtype), (device, torch.float32)}
