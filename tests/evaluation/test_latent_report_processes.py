"""Latents of several processes and of models that diverged: what the first process gets."""

import math

import pytest
import torch

from olvae.evaluation import latent_report
from olvae.evaluation.latent_report import encode_latents, image_key
from olvae.evaluation.observers.observer import Observation, Observer
from olvae.modules.distributions import Deterministic
from tests.evaluation.peers import numbers
from tests.evaluation.test_latent_report import Halves


class Watching(Observer):
    """Notes the images that it sees, and what other processes saw."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []
        self.merged: list[object] = []

    def update(self, seen: Observation) -> None:
        self.seen.append(seen)

    def state(self) -> object:
        return "own"

    def merge(self, state: object) -> None:
        self.merged.append(state)


def test_the_first_process_has_the_latents_of_all(monkeypatch):
    """An observer sees each batch in place of its reconstruction."""
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    batches = [{"image": part} for part in images.split(2)]
    model = Halves(2)
    whole = encode_latents({"a": model}, batches)["a"].compute()
    assert model.places == ["cpu"]
    theirs = encode_latents({"a": model}, batches[1:])
    sent: list = []

    def gather(own: tuple) -> list:
        sent.append(own)
        return [own, (theirs, "theirs")]

    monkeypatch.setattr(latent_report, "gather", gather)
    observer = Watching()
    got = encode_latents({"a": model}, batches[:1], observer=observer)
    assert dict(numbers(got["a"].compute())) == pytest.approx(dict(numbers(whole)))
    assert observer.merged == ["theirs"]
    assert sent == [(got, "own")]
    (seen,) = observer.seen
    assert (seen.target, seen.draw) == ("a", 0)
    assert seen.keys == [str(image_key(image)) for image in images[:2]]
    assert torch.equal(seen.x, images[:2])
    assert torch.equal(seen.y, images[:2])
    monkeypatch.setattr(latent_report, "gather", lambda own: None)
    assert encode_latents({"a": model}, batches) is None


def test_latents_that_are_not_finite_name_their_model():
    class Diverged(Halves):
        def encode(self, x: torch.Tensor) -> Deterministic:
            return Deterministic(x * math.nan)

    batch = {"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"^a: the latents are not finite"):
        encode_latents({"a": Diverged(2)}, [batch])
