import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from olvae.config import ConfigError
from olvae.data.pixels.size_and_range import PixelRange
from olvae.evaluation.observers import half_precision as module
from olvae.evaluation.observers.half_precision import (
    Activations,
    HalfPrecision,
    InPrecision,
    stage_of,
)
from olvae.evaluation.observers.observer import Subject
from olvae.evaluation.results import Row
from olvae.evaluation.round_trip import Cost, RoundTrip
from olvae.models.autoencoder import Autoencoder
from olvae.modules.distributions import Deterministic
from tests.conftest import tiny
from tests.evaluation.peers import kl

KEYS = ["white", "black"]


def one(weight: float, bias: float = 0.0) -> nn.Conv2d:
    conv = nn.Conv2d(1, 1, kernel_size=1)
    nn.init.constant_(conv.weight, weight)
    nn.init.constant_(conv.bias, bias)
    return conv


class Tiny(Autoencoder):
    """z = 3 x + 1, then two factors."""

    in_channels, downscale, latent_channels = 1, 1, 1

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.encoder = one(3.0, 1.0)
        self.decoder = nn.Sequential(one(first), one(second))

    def encode(self, x):
        return Deterministic(self.encoder(x))

    def decode(self, z):
        return self.decoder(z)


@pytest.fixture
def images():
    """The first has three white pixels, the rest of both is black; as floats 1 and -1."""
    x = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    x[0, 0, 0, :3] = 255
    return x


class Trip:
    """Reconstructs in one precision, watched by the observer."""

    def __init__(self, model: Autoencoder, precision: str) -> None:
        self.observer = HalfPrecision(["fp16", "bf16", "bf16-autocast"])
        self.name = "mine" if precision == "32" else f"mine, {precision}"
        self.subject = self.observer.derive({"mine": Subject(model)})[self.name]
        self.reconstruct = RoundTrip(self.subject.model, name=self.name)

    def __call__(self, keys, x) -> torch.Tensor:
        with self.observer.watch(self.name, 0, self.subject, keys):
            return self.reconstruct(keys, x).images

    def found(self) -> dict:
        return self.observer.result(self.name, 0)

    def judged(self, psnr: list[float], full: list[float]) -> dict:
        """By the PSNR of each image, here and in float32."""
        rows = {}
        for name, values in (("mine", full), (self.name, psnr)):
            mean = np.mean([value for value in values if value < math.inf] or math.inf)
            found, per_image = {"precision": self.found()}, {"psnr": dict(enumerate(values))}
            rows[name] = Row(name, len(values), {"psnr": mean}, observed=found, per_image=per_image)
        return self.observer.complete(rows[self.name], rows).observed["precision"]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "32"])
def test_the_largest_activations_by_hand(images, precision):
    """White is 4 in the latent, 8 after the first factor, 2 at the end; black is -2, -4 and -1."""
    reconstruct = Trip(Tiny(2.0, 0.25), precision)
    y = reconstruct(KEYS, images)
    assert set(y[0, 0, 0, :3].tolist()) == {255}
    assert set(y[1].flatten().tolist()) == {0}
    found = reconstruct.found()
    assert found["largest"] == {"encoder": 4.0, "decoder.0": 8.0, "decoder.1": 2.0, "decoder": 2.0}
    assert (found["largest_name"], found["largest_value"]) == ("decoder.0", 8.0)
    assert found["non_finite"] == {"images": 0, "values": 0, "first": None}
    assert (
        found["limit"]
        == {"fp16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127, "32": (2 - 2**-23) * 2.0**127}[
            precision
        ]
    )


def test_fp16_overflow_is_counted_and_its_stage_named(images):
    """White is 4 * 30,000 after the first factor, beyond fp16; black is -2 * 30,000, within."""
    model = Tiny(3e4, 2.0**-13)
    reconstruct = Trip(model, "fp16")
    y = reconstruct(KEYS, images)
    assert set(y[0, 0, 0, :3].tolist()) == {255}
    found = reconstruct.found()
    assert found["largest"]["decoder.0"] == found["largest_value"] == pytest.approx(6e4, rel=1e-3)
    lost = 3 * 4  # white pixels; both factors, their sequence, the reconstruction
    assert found["non_finite"] == {"images": 1, "values": lost, "first": "decoder.0"}

    for precision in ("bf16", "32"):
        other = Trip(model, precision)
        assert set(other(KEYS, images)[0, 0, 0, :3].tolist()) == {255}
        found = other.found()
        assert found["largest_value"] == pytest.approx(12e4, rel=1e-2)
        assert found["non_finite"]["first"] is None


def test_non_finite_values_become_pixels_as_in_a_pipeline(images):
    """There infinities are clamped, to white and black, and a NaN becomes a 0;
    in float32 they stay an error.
    """
    values = torch.tensor([math.inf, -math.inf, math.nan, 1.0])

    class Broken(Tiny):
        def decode(self, z):
            return values.to(z.dtype).expand(z.shape)

    decoded = InPrecision(Broken(1.0, 1.0), "fp16").decode(torch.zeros(1, 1, 4, 4))
    assert decoded[0, 0].tolist() == [[1.0, -1.0, -1.0, 1.0]] * 4
    reconstruct = Trip(Broken(1.0, 1.0), "fp16")
    assert reconstruct(KEYS, images)[:, 0, 0].tolist() == [[255, 0, 0, 255]] * 2
    assert reconstruct.found()["non_finite"] == {
        "images": 2,
        "values": 2 * 4 * 3,
        "first": "reconstruction",
    }
    with pytest.raises(ArithmeticError, match=r"mine: .*white .*finite"):
        Trip(Broken(1.0, 1.0), "32")(KEYS, images)


def test_an_overflow_inside_counts_though_the_output_is_finite(images):
    """1 / inf is 0."""

    class Inverse(Tiny):
        def decode(self, z):
            return 1.0 / self.decoder(z)

    reconstruct = Trip(Inverse(3e4, 100.0), "fp16")
    reconstruct(KEYS, images)
    assert reconstruct.found()["non_finite"]["first"] == "decoder.0"
    assert not reconstruct.judged([20.0], [20.0])["safe"]


def test_half_precision_of_two_processes_is_that_of_one(images):
    model = Tiny(3e4, 2.0**-13)
    whole, first, second = (Trip(model, "fp16") for _ in range(3))
    whole(KEYS, images)
    first(KEYS[:1], images[:1])
    second(KEYS[::-1], images.flip(0))  # "white" was seen by both
    merged = HalfPrecision(["fp16"])
    merged.derive({"mine": Subject(model)})
    for part in (first, second, second):
        merged.merge(pickle.loads(pickle.dumps(part.observer.state())))
    assert merged.result("mine, fp16", 0) == whole.observer.result("mine, fp16", 0)


@pytest.mark.parametrize("make", [tiny, kl])
def test_autocast_leaves_weights_as_they_are(make):
    model, x = make(), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    reconstruct = Trip(model, "bf16-autocast")
    y = reconstruct(KEYS, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.decode(model.encode(x.float() / 127.5 - 1.0).mode().float()).float()
    assert torch.equal(y, expected.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8))
    assert reconstruct.subject.model.model is model
    assert not torch.equal(y, Trip(model, "32")(KEYS, x))
    found = reconstruct.found()
    assert (found["dtype"], found["autocast"], found["limit"]) == (
        "bf16",
        True,
        (2 - 2**-7) * 2.0**127,
    )
    assert reconstruct.judged([20.0], [20.0])["safe"]


@pytest.mark.parametrize("make", [tiny, kl])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_networks_run_as_in_a_pipeline(make, precision):
    model, x = make(), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    reconstruct = Trip(model, precision)
    y = reconstruct(KEYS, x)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        images = x.float() / 127.5 - 1.0
        posterior = half.encode(images.to(dtype))
        expected = half.decode(posterior.mode()).float()
        lowered = reconstruct.subject.model.encode(images)
    assert torch.equal(y, expected.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8))
    assert lowered.mean.dtype == lowered.std.dtype == torch.float32
    assert torch.equal(lowered.mean, posterior.mean.float())
    assert not any(module._forward_hooks for module in reconstruct.subject.model.modules())
    found = reconstruct.found()
    assert found["non_finite"]["images"] == 0
    assert {"encoder", "decoder", "decoder.conv_in"} <= found["largest"].keys()


def test_recording_changes_no_pixel_and_gives_no_speed():
    model, x = tiny(), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    recorded, plain = Trip(model, "32"), RoundTrip(model)
    assert torch.equal(recorded(KEYS, x), plain(KEYS, x).images)
    cost = Cost(1, 2, 3, 4.0, 5.0, 6, 7, "CPU")
    rows = [Row("mine", 2, {"psnr": 20.0}, cost=cost, observed={"precision": recorded.found()})]
    rows += [Row("baseline", 2, {}, cost=cost)]
    first, second = (
        recorded.observer.complete(row, {row.target: row for row in rows}) for row in rows
    )
    assert (first.cost, second.cost) == (Cost(1, 2, 3, None, None, None, 7, "CPU"), cost)
    assert first.observed["precision"]["safe"]


@pytest.mark.parametrize(
    ("psnr", "full", "lost", "safe"),
    [
        ([25.0], [25.05], 0.05, True),
        ([25.05], [25.0], -0.05, True),
        ([25.0], [25.25], 0.25, False),
        ([math.inf], [math.inf], 0.0, True),
        ([25.0], [math.inf], None, False),
        ([25.0, 70.0], [25.05, math.inf], 0.05, True),  # a blank page, exact in float32
    ],
)
def test_safe_verdict_by_lost_psnr_and_overflow(images, psnr, full, lost, safe):
    reconstruct = Trip(Tiny(2.0, 0.25), "fp16")
    reconstruct(KEYS, images)
    verdict = reconstruct.judged(psnr, full)
    assert verdict["psnr_lost"] == (None if lost is None else pytest.approx(lost))
    assert verdict["safe"] == safe


def test_a_loss_of_psnr_at_the_limit_is_safe(images, monkeypatch):
    monkeypatch.setattr(module, "SAFE_DB", 0.25)
    reconstruct = Trip(Tiny(2.0, 0.25), "fp16")
    reconstruct(KEYS, images)
    for psnr, safe in ((25.0, True), (25.5, True), (24.75, False), (25.75, False)):
        assert reconstruct.judged([psnr], [25.25])["safe"] == safe


ENTRY = {
    "dtype": "fp16",
    "largest_name": "decoder.0",
    "largest_value": 8.0,
    "limit": 65504.0,
    "non_finite": {"images": 0, "values": 0, "first": None},
    "psnr_lost": 0.05,
    "safe": True,
}
LOST = {"images": 1, "values": 12, "first": "decoder.1"}
FULL_ENTRY = {**ENTRY, "dtype": "32", "largest_value": 12e4, "limit": (2 - 2**-23) * 2.0**127}


@pytest.mark.parametrize(
    ("entries", "lines"),
    [
        (
            [FULL_ENTRY, {**ENTRY, "non_finite": LOST, "psnr_lost": 7.5, "safe": False}],
            [
                "largest activation 120,000 at decoder.0; fp16 ends at 65,504",
                "largest activation 120,000 at decoder.0 in float32, beyond 65,504; "
                "1 of 9 images non-finite, first at decoder.1; PSNR -7.500 dB: not safe",
            ],
        ),
        (
            [FULL_ENTRY, {**ENTRY, "psnr_lost": -0.0625}],
            [
                "largest activation 120,000 at decoder.0; fp16 ends at 65,504",
                "largest activation 8.00 at decoder.0; PSNR +0.062 dB: safe",
            ],
        ),
        (
            [{**ENTRY, "non_finite": LOST, "largest_value": 65504.0, "psnr_lost": None}],
            [
                "largest activation 65,504 at decoder.0; "
                "1 of 9 images non-finite, first at decoder.1: safe"
            ],
        ),
    ],
)
def test_verdicts_in_words(entries, lines):
    """Only float32 knows the value that overflows."""
    rows = [Row("other", 9, {})]
    for number, entry in enumerate(entries):
        rows.append(Row(f"row {number}", 9, {}, observed={"precision": entry}))
    found = list(HalfPrecision().lines(rows))
    assert found == [f"row {number}: {line}" for number, line in enumerate(lines)]


def test_non_finite_values_are_of_an_image_where_the_shape_tells():
    """Heads of attention are split into the batch; of other shapes they count for all."""
    watched = SimpleNamespace(
        model=nn.ModuleDict({"m": nn.Identity()}), reconstruction=nn.Identity()
    )
    nan = math.nan
    for output, images, values, largest in (
        (torch.tensor([[1.0], [nan]]), 1, 1, 1.0),
        (torch.tensor([1.0, 2.0, nan, nan]), 1, 2, 2.0),
        (torch.tensor([0.0, nan, nan]), 2, 4, 0.5),
        (torch.tensor(nan), 2, 2, 0.5),
        (torch.tensor([1, 2]), 0, 0, 0.5),
        (torch.tensor([-3.0, 2.0]), 0, 0, 3.0),
    ):
        activations = Activations()
        with activations.recorded(watched, ["a", "b"]):
            watched.model["m"](torch.tensor([-0.5, 0.25]))
            watched.model["m"](output)
        found = activations.compute("fp16")
        assert (found["non_finite"]["images"], found["non_finite"]["values"]) == (images, values)
        assert found["largest"] == {"m": largest}
        merged = Activations()
        merged.merge(activations)
        assert merged.compute("fp16") == found


def test_stage_of_names_the_block_of_a_layer():
    for name, stage in {
        "encoder": "encoder",
        "encoder.extractors.0": "encoder.extractors.0",
        "encoder.extractors.0.down_blocks.1.0.conv1": "encoder.extractors.0",
        "decoder.conv_in": "decoder.conv_in",
        "decoder.mid.block_1.conv1": "decoder.mid",
        "decoder.up.2.block.0.conv1": "decoder.up.2",
        "encoder.model.down_blocks.0.resnets.1.norm1": "encoder.down_blocks.0",
        "model.decoder.up_blocks.3.resnets.0.conv2": "decoder.up_blocks.3",
        "model.quant_conv": "quant_conv",
    }.items():
        assert stage_of(name) == stage


def test_half_precision_names_of_precisions_and_rows():
    assert HalfPrecision().precisions == HalfPrecision(["float32"]).precisions == ("32",)
    assert HalfPrecision(["fp16", "bfloat16", "16"]).precisions == ("32", "fp16", "bf16")
    assert HalfPrecision(["32-autocast", "16-autocast"]).precisions == ("32", "fp16-autocast")
    assert HalfPrecision(["tf32-autocast", "tf32"]).precisions == ("32", "tf32")
    with pytest.raises(ConfigError, match="`precision` fp8: choose from fp16, bf16, tf32, 32"):
        HalfPrecision(["fp16", "fp8"])
    subject = Subject(Tiny(1.0, 1.0))
    assert HalfPrecision().derive({"a": subject}) == {"a": subject}
    derived = HalfPrecision(["fp16"]).derive({"a": subject, "b": subject})
    assert list(derived) == ["a", "a, fp16", "b", "b, fp16"]
    with pytest.raises(ConfigError, match=r"^a, fp16: .* another's row"):
        HalfPrecision(["fp16"]).derive({"a": subject, "a, fp16": subject})


def test_half_precision_needs_psnr_and_no_other_rows():
    half, full = HalfPrecision(["fp16"]), HalfPrecision()
    rows, none = SimpleNamespace(adds_rows="cross"), SimpleNamespace(adds_rows="")
    assert (half.adds_rows, full.adds_rows) == ("precision", "")
    assert [len([*each.conflicts([], ["ssim"], [each])]) for each in (half, full)] == [1, 0]
    assert list(half.conflicts([], ["psnr"], [half, none])) == []
    (line,) = half.conflicts([], ["psnr"], [none, half, rows])
    assert line.startswith("`cross` and `precision` ")
    assert list(full.conflicts([], ["psnr"], [full, rows])) == []


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_an_operator_that_torch_lacks_has_advice(direction, monkeypatch):
    """As torch says it; other errors stay as they are."""
    message = "\"linalg_inv_cpu\" not implemented for 'Half'"
    model = InPrecision(Tiny(1.0, 1.0), "fp16")

    def fail(_) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(model.model, direction, fail)
    with pytest.raises(ConfigError, match=r"^`precision` fp16: .*linalg_inv.*`device`"):
        getattr(model, direction)(torch.zeros(1, 1, 2, 2))
    message = "sizes differ"
    with pytest.raises(RuntimeError, match="sizes differ"):
        getattr(model, direction)(torch.zeros(1, 1, 2, 2))


def test_a_precision_keeps_range_size_and_the_names_of_weights():
    """So that images of more than 8 bits, or of one size, are measured as without it,
    and weights have their names.
    """
    model = Tiny(1.0, 1.0)
    model.side = 64
    model.pixel_range = PixelRange.from_node([0, 4095])
    for precision in ("32", "bf16", "bf16-autocast"):
        assert InPrecision(model, precision).pixel_range == model.pixel_range
        assert InPrecision(model, precision).side == 64
        assert InPrecision(model, precision).state_dict().keys() == model.state_dict().keys()
