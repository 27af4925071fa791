import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from olvae.config import ConfigError
from olvae.evaluation.baselines import Bicubic
from olvae.evaluation.observers.cross import Cross, Crossed
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.results import Row
from olvae.evaluation.round_trip import Cost
from olvae.models.loading.from_diffusers import DiffusersAutoencoder
from tests.conftest import tiny
from tests.evaluation.peers import kl, seen
from tests.models.loading.classes import make

COST = Cost(1, 2, 3, None, None, None, 4, "a GPU")
KEYS = [f"image{i}" for i in range(7)]

same = partial(assert_close, rtol=1e-4, atol=1e-5)


def observed(teacher, student, size=7, order=None) -> Cross:
    observer = Cross()
    observer.derive({name: Subject(Bicubic(8)) for name in ("teacher", "student")})
    order = order or list(range(len(teacher)))
    for i in range(0, len(order), size):
        part = order[i : i + size]
        for target, latents in (("teacher", teacher), ("student", student)):
            observer.update(seen(target, [KEYS[j] for j in part], latents=latents[part]))
    return observer


def found(observer: Cross) -> dict:
    return observer.result("student", 0)


def test_crossing_takes_two_targets():
    assert list(Cross().conflicts(["a", "b"], [], [])) == []
    for targets in ([], ["a"], ["a", "b", "c"]):
        (line,) = Cross().conflicts(targets, [], [])
        assert line == f"`cross` takes two targets, TEACHER STUDENT, and got {len(targets)}"


def test_latent_error_by_hand():
    """The teacher's values are 0 and 2, so their deviation is 1;
    the student is wrong by 1 once in two positions.
    """
    one = found(observed(torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[1.0, 2.0]]]])))
    assert one["teacher"] == "teacher"
    assert one["teacher_std"] == [1.0]
    assert one["per_channel"] == [0.5**0.5]
    assert one["rmse"] == pytest.approx(0.5**0.5)


def test_latent_error_is_numpys_whatever_batches_and_processes():
    teacher = (
        torch.randn(7, 3, 4, 5) * torch.tensor([1.0, 0.1, 30.0]).view(3, 1, 1)
        + torch.randn(7, 3, 1, 1)
        + 5.0
    )
    student = teacher + torch.randn(7, 3, 4, 5) * torch.tensor([0.5, 0.5, 1.0]).view(3, 1, 1)
    a, b = (x.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1) for x in (teacher, student))
    expected = np.sqrt(((b - a) ** 2).mean(1)) / a.std(1)
    one = found(observed(teacher, student))
    assert one["per_channel"] == pytest.approx(list(expected), rel=1e-9)
    assert one["teacher_std"] == pytest.approx(list(a.std(1)), rel=1e-9)
    assert one["rmse"] == pytest.approx(np.sqrt((expected**2).mean()), rel=1e-9)

    # 3 in both.
    halves = (
        observed(teacher, student, order=[0, 1, 2, 3]),
        observed(teacher, student, order=[6, 5, 4, 3]),
    )
    halves[0].merge(pickle.loads(pickle.dumps(halves[1].state())))
    for other in (
        observed(teacher, student, 1),
        observed(teacher, student, 2, [6, 5, 4, 3, 2, 1, 0]),
        halves[0],
    ):
        assert found(other)["per_channel"] == pytest.approx(one["per_channel"], rel=1e-12)


def test_a_constant_channel_of_the_teacher_has_no_error():
    teacher = torch.full((2, 2, 4, 4), 0.3)
    teacher[:, 1] = torch.randn(2, 4, 4)
    one = found(observed(teacher, teacher + 1.0))
    assert one["per_channel"][0] is None
    assert one["rmse"] == one["per_channel"][1] > 0
    # But for the rounding of float32, whose steps at 10,000 are 2^-10; and black.
    rounded = torch.full((2, 1, 4, 4), 1e4)
    rounded[0] += 2.0**-10
    for channel in (teacher[:, :1], rounded, torch.zeros(2, 1, 4, 4)):
        nothing = found(observed(channel, channel + 1.0))
        assert (nothing["rmse"], nothing["per_channel"]) == (None, [None])


def test_a_line_has_the_errors_of_latents():
    entry = {"teacher": "a", "rmse": 0.5, "per_channel": [0.25, None]}
    rows = [Row("a", 1, {}), Row("b", 1, {}, observed={"latents": entry})]
    (line,) = Cross().lines(rows)
    assert line == (
        "latents of b: RMS error 0.500 in standard deviations of a; per channel 0.250, -"
    )


def test_crossed_rows_are_the_encoder_of_one_and_the_decoder_of_the_other():
    a, b = tiny(use_quant=True), kl()
    observer = Cross()
    subjects = observer.derive({"a": Subject(a), "b": Subject(b)})
    assert list(subjects) == ["a", "b", "a's encoder, b's decoder", "b's encoder, a's decoder"]
    ab, ba = (subject.model for subject in list(subjects.values())[2:])
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(ab(x)[0], b.decode(a.encode(x).mode()))
        assert torch.equal(ba(x)[0], a.decode(b.encode(x).mode()))
    rows = [observer.complete(Row(name, 1, {}, cost=COST), {}) for name in subjects]
    assert [row.cost for row in rows] == [COST, COST, None, None]


def test_latents_in_a_diffusion_models_units_are_converted():
    """TAESD's have scaling and shift applied already."""
    teacher = tiny().set_for_diffusion({"scaling_factor": 0.5, "shift_factor": 0.25})
    student = make("AutoencoderTiny")
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    for order in (1, -1):
        given = {"teacher": Subject(teacher), "student": Subject(DiffusersAutoencoder(student))}
        models = {
            name: one.model
            for name, one in Cross().derive(dict(list(given.items())[::order])).items()
        }
        with torch.no_grad():
            z = student.encode(x).latents / 0.5 + 0.25
            same(models["student"].encode(x).mean, z)
            same(models["student's encoder, teacher's decoder"](x)[0], teacher.decode(z))
            expected = student.decode((teacher.encode(x).mode() - 0.25) * 0.5).sample
            same(models["teacher's encoder, student's decoder"](x)[0], expected)
            same(models["student"](x)[0], student.decode(student.encode(x).latents).sample)


def test_crossing_latents_of_other_shapes_is_refused():
    with pytest.raises(ConfigError, match=r"^a has 4 .*f8, b 5 at f8"):
        Cross().derive({"a": Subject(tiny()), "b": Subject(kl(5))})
    larger = Bicubic(8)
    larger.enlarge = 2
    with pytest.raises(ConfigError, match=r"^a .*1x, b .*2x"):
        Cross().derive({"a": Subject(Bicubic(8)), "b": Subject(larger)})


def test_the_only_side_of_images_is_that_of_either_half():
    whole, half = Bicubic(8), Bicubic(8)
    half.side = 64
    assert [Crossed(*pair).side for pair in ((whole, half), (half, whole))] == [64, 64]
