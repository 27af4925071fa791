from olvae.bench.train import TwoForwards, bench_train
from tests.conftest import tiny_config


def params() -> dict:
    adversary = {
        "target": "olvae.models.adversary.Adversary",
        "params": {
            "discriminator_config": {
                "target": "olvae.modules.discriminators.patchgan.PatchGAN",
                "params": {"n_layers": 1, "base_channels": 4},
            }
        },
    }
    return tiny_config(adversary_config=adversary)["model"]["params"]


def test_the_other_step_runs_forward_twice(monkeypatch):
    calls = []
    forward = TwoForwards.encode

    def count(self, x):
        calls.append(type(self).__name__)
        return forward(self, x)

    monkeypatch.setattr("olvae.models.liteautoencoder.LiteAutoencoderKL.encode", count)
    result = bench_train(params(), size=16, batch_size=2, steps=2, rounds=1, device="cpu")
    assert calls.count("LiteAutoencoderKL") == 3
    assert result["one_forward_images_per_s"] == 2 / result["one_forward_s"]
    assert result["speedup"] == result["two_forwards_s"] / result["one_forward_s"]
