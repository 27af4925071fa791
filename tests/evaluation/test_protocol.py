import dataclasses

from olvae.evaluation.protocol import PROTOCOLS, Protocol

CHOICES = {
    "range": "0 to 65535, linear",
    "version": 3,
    "size": 64,
    "resize": "adm",
    "resample": "bilinear",
    "posterior": "sample",
    "ssim": "uniform",
    "lpips": "alex",
    "crops": "tiles",
    "n": 5,
}


def test_protocol_hash_is_of_every_choice_and_of_nothing_else():
    changed = [Protocol(**{name: value}) for name, value in CHOICES.items()]
    changed += [Protocol(posterior="sample", seed=1)]
    assert len({protocol.hash() for protocol in [Protocol(), *changed]}) == len(changed) + 1
    assert CHOICES.keys() | {"name", "seed"} == {
        field.name for field in dataclasses.fields(Protocol)
    }
    assert Protocol(seed=1).hash() == Protocol().hash()  # the mode draws nothing
    assert Protocol("mine").hash() == Protocol().hash()
    assert Protocol(posterior="sample").hash() == PROTOCOLS["latent-diffusion"].hash()


def test_protocol_presets_differ_in_what_they_say():
    assert len({protocol.hash() for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    assert PROTOCOLS["open-litevae"] == Protocol()
    assert "by averaging" in PROTOCOLS["dc-ae"].as_dict()["images"]
