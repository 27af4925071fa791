"""Beside what evaluation/test_latent_report.py and export/test_encoding.py test of moments."""

import json

import torch

from olvae.modules.moments import Moments


def test_moments_state_through_json_loses_no_digit():
    moments = Moments.of(torch.randn(5, 4, 6, 7), torch.rand(5, 4, 6, 7))
    again = Moments.from_state(*json.loads(json.dumps(moments.state())))
    assert torch.equal(again.std, moments.std)
    assert again.factors() == moments.factors()
