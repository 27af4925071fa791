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


def test_a_protocol_says_what_is_done_to_pixels_and_latents():
    plain = Protocol().as_dict()
    assert (plain["posterior"], plain["pixels"]) == ("mode", "clamped to [-1, 1], rounded to uint8")
    assert plain["images"] == Protocol().transform.describe()
    assert (plain["size"], plain["n"], plain["version"]) == (256, None, 2)
    assert (Protocol(seed=3).noise_seed, Protocol().columns) == (
        None,
        {"ssim": "ssim", "lpips": "lpips"},
    )
    other = Protocol(posterior="sample", seed=3, range="0 to 9, log1p", crops="tiles", n=5)
    said = other.as_dict()
    assert "seeded by 3" in said["posterior"]
    assert said["pixels"].startswith("clamped to 0 to 9, log1p;")
    assert (said["images"], said["n"], other.noise_seed) == ("tiles", 5, 3)
    llamagen = PROTOCOLS["llamagen"]
    assert (llamagen.columns["ssim"], llamagen.noise_seed) == ("ssim_uniform", 0)
    assert PROTOCOLS["dc-ae"].columns["lpips"] == "lpips_alex"


def test_protocols_keep_the_hashes_of_their_version():
    """Results that were measured under these name them: another word needs another version."""
    assert {name: protocol.hash() for name, protocol in PROTOCOLS.items()} == {
        "open-litevae": "5ca7c8fe70134266",
        "latent-diffusion": "e6a8a7ea06ce8ef1",
        "dc-ae": "223cf4bfb522e745",
        "llamagen": "744187beefe817d7",
        "va-vae": "60d7d99295a1311d",
    }


def test_protocol_presets_differ_in_what_they_say():
    assert len({protocol.hash() for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    assert PROTOCOLS["open-litevae"] == Protocol()
    assert "by averaging" in PROTOCOLS["dc-ae"].as_dict()["images"]
