"""PAE's priors on structure and semantics by hand, whom they train, and what contradicts them."""

from types import SimpleNamespace

import pytest
import torch

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import from_uint8
from olvae.losses.terms import semantics_loss, structure_loss
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.conftest import parts
from tests.models.steps import WITHOUT_KL, build, fit, metrics, moved, snapshot, source

pytest.importorskip("timm")


def with_priors(vit: str, priors: dict | None = None, **model) -> LiteAutoencoderKL:
    given = {"encoder": "test_vit", "weights": vit, **(priors or {})}
    target = "olvae.models.parts.features.prior_alignment.PriorAlignment"
    nodes = {"priors": {"target": target, "params": given}, **model.pop("parts", {})}
    return build(parts=nodes, **{"initial_logvar": -4.0, "learning_rate": 1e-3, **model})


def test_structure_and_semantics_by_hand():
    torch.manual_seed(0)
    z, projected, features = (torch.randn(2, c, 2, 3, dtype=torch.float64) for c in (4, 7, 7))

    def cos(a, b):
        return (a @ b / a.norm() / b.norm()).item()

    structure, whole, each = 0.0, 0.0, 0.0
    for image in range(2):
        zs, ps, fs = (t[image].flatten(1).T for t in (z, projected, features))
        for i in range(6):
            for j in range(6):
                structure += (cos(zs[i], zs[j]) - cos(fs[i], fs[j])) ** 2 / 72
            each += (1 - cos(ps[i], fs[i])) / 12
        whole += (1 - cos(ps.mean(0), fs.mean(0))) / 2
    assert structure_loss(z, features).item() == pytest.approx(structure, rel=1e-9)
    assert semantics_loss(projected, features).item() == pytest.approx(whole + each, rel=1e-9)
    assert structure_loss(3 * features, features).item() == pytest.approx(0, abs=1e-12)


def test_priors_are_added_with_their_weights_and_train_encoder_and_projection(vit, image_folder):
    weights = {"structure_weight": 0.3, "semantics_weight": 2.0}
    model = with_priors(vit, weights).train()
    x = from_uint8(next(iter(source(image_folder).train_loader()))["image"])
    step = SimpleNamespace(encoded=model.encode(x), images=x)
    part = model.parts["priors"]
    losses = part.losses(model, step)
    z = step.encoded.mean
    features = part.features(x, z.shape[-2:])
    assert part.projection.kernel_size == (1, 1)
    assert losses["structure"][0] == structure_loss(z, features)
    assert losses["semantics"][0] == semantics_loss(part.projection(z), features)
    assert [weight for _, weight in losses.values()] == [0.3, 2.0]

    sum(weight * loss for loss, weight in losses.values()).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "parts.priors.projection.weight" in got
    assert any(name.startswith("encoder.") for name in got)
    assert not any(name.startswith("decoder.") for name in got)
    assert not any(p.requires_grad for p in part.features.network.parameters())

    before = snapshot(model)
    values = metrics(fit(model, image_folder, 2))
    assert values["train/structure"] > 0
    assert "parts.priors.projection.weight" in moved(before, snapshot(model))
    assert [name for name in model.state_dict() if name.startswith("parts.")] == [
        "parts.priors.projection.weight"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_encoder": True, "lossconfig": WITHOUT_KL}, r"can't change \(freeze_encoder\)"),
        ({"parts": parts(anchor={})}, r"can't change \(parts.anchor\)"),
        ({"priors": {"structure_weight": -1}}, "structure_weight must not be negative, got -1"),
    ],
)
def test_priors_refuse_what_contradicts_them(vit, settings, message):
    with pytest.raises(ConfigError, match=message):
        with_priors(vit, **settings)


def test_priors_name_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"params\.weights .*file"):
        with_priors("/nowhere.pt")
