"""The names that flags can be are those that the registries know; a wrong one is told in their words."""

import pytest

from olvae.cli import choices
from olvae.evaluation.protocol import PROTOCOLS
from olvae.export import decode, encode
from olvae.metrics.registry import METRICS
from olvae.modules import precision


def test_they_are_the_registries():
    assert tuple(METRICS) == choices.METRICS
    assert tuple(PROTOCOLS) == choices.PROTOCOLS
    assert tuple(precision.PRECISIONS) == choices.PRECISIONS
    assert tuple(precision.PRECISION_SYNONYMS) == choices.SYNONYMS
    assert tuple(precision.DTYPES) == choices.DTYPES
    assert choices.LATENT_FORMATS == encode.FORMATS
    assert tuple(decode.FORMATS) == choices.PICTURES


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("evaluate", "x", "--metrics", "psnr,fid"), "--metrics psnr,fid: choose from all, psnr, ssim, "),
        (("evaluate", "x", "--metrics", ","), "--metrics ,: choose from all, psnr, "),
        (("evaluate", "x", "--protocol", "ours"), "--protocol ours: choose from open-litevae, latent-diffusion, "),
        (("evaluate", "x", "--precision", "fp16,fp8"), "--precision fp16,fp8: choose from fp16, bf16, 32\n"),
        (("evaluate", "x", "--posterior", "mean"), "--posterior mean: choose from mode, sample\n"),
        (("latents", "x", "--device", "gpu"), "--device gpu: choose cpu, cuda, or cuda:N\n"),
        (("encode", "x", "--data", "y", "--out", "z", "--format", "npz"), "--format npz: choose from shards, "),
        (("encode", "x", "--data", "y", "--out", "z", "--dtype", "half"), "--dtype half: choose from float16, "),
        (
            ("encode", "x", "--data", "y", "--out", "z", "--precision", "8"),
            "--precision 8: choose from fp16, bf16, 32\n",
        ),
        (("decode", "x", "y", "--out", "z", "--format", "gif"), "--format gif: choose from png, jpg\n"),
    ],
)
def test_wrong_values(olvae, command, told):
    code, out, err = olvae(*command)
    assert code == 2
    assert err.startswith(f"error: {told}")
    assert not out
