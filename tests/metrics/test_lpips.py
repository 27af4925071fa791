import warnings

import lpips as reference
import pytest
import torch
import torchvision

from olvae.metrics.features import LPIPS_SIZE, LPIPSDistance
from olvae.metrics.metric import Unavailable
from olvae.modules.frozen import TRUNKS
from tests.metrics.conftest import pairs

PUBLISHED = {"vgg": torchvision.models.VGG16_Weights, "alex": torchvision.models.AlexNet_Weights}


@pytest.mark.parametrize("trunk", ["vgg", "alex"])
def test_equals_the_lpips_package(trunk, weights_dir, monkeypatch):
    """The package loads the same file its own way: through torchvision's loader."""
    path = weights_dir / TRUNKS[trunk].name
    state = torch.load(path, weights_only=True)
    monkeypatch.setattr(PUBLISHED[trunk], "get_state_dict", lambda *args, **kwargs: state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reference.LPIPS(net=trunk, verbose=False)
    ours = LPIPSDistance(trunk, path)
    _, x, y = pairs(3, 64)
    with torch.no_grad():
        values = ours(x, y)
        expected = theirs(*((image.float() / 127.5 - 1) for image in (x, y))).flatten()
        assert ours(x, x).tolist() == [0.0, 0.0, 0.0]
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert min(values) > 1e-3
    assert len({round(value, 6) for value in values.tolist()}) == 3

    least = torch.zeros(1, 3, LPIPS_SIZE[trunk], 64, dtype=torch.uint8)
    assert ours(least, least).item() == 0.0
    with pytest.raises(Unavailable, match=f"at least {LPIPS_SIZE[trunk]} pixels"):
        ours(least[:, :, 1:], least[:, :, 1:])
    with pytest.raises(Unavailable, match="3 channels, got 4"):
        ours(torch.zeros(1, 4, 64, 64, dtype=torch.uint8), torch.zeros(1, 4, 64, 64, dtype=torch.uint8))
