"""Training, validation and evaluation on a fake GPU.

Tensors without memory say cuda, so that no mismatch, copy or wait needs a GPU to show.

Forward passes, losses and updates run as they are; backward passes are torch's own and need an
accelerator, so gradients are filled in.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from olvae.data.places import load
from olvae.evaluation.round_trip import RoundTrip
from olvae.models import footprint
from olvae.models.liteautoencoder import LiteAutoencoderKL
from tests.cuda_guard import stand_in_for_cuda_guard
from tests.models.test_liteautoencoder_synchronisation import WAITS

GPU = torch.device("cuda:0")
A = "model.params.adversary_config.params"
ATEN = torch.ops.aten
COUNTED = (ATEN.convolution.default, ATEN.convolution_backward.default, ATEN.mv.default)


@pytest.fixture(autouse=True, scope="module")
def _guard() -> None:
    stand_in_for_cuda_guard()


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """What torch.autocast("cuda") sets, which turns itself off without a GPU."""
    before = (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.is_autocast_cache_enabled(),
    )
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_cache_enabled(False)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.set_autocast_cache_enabled(before[2])


class Operations(TorchDispatchMode):
    """Counts what launches something, products by operation and dtype;
    notes copies between devices, and waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.products, self.found = 0, Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if str(func).startswith(WAITS):
            self.found.append(str(func))
        if func is torch.ops.aten._to_copy.default and args[0].device != out.device:
            self.found.append(f"a copy of {tuple(out.shape)} from {args[0].device} to {out.device}")
        if func in COUNTED:
            self.products[func.overloadpacket, args[0].dtype] += 1
        self.count += not (func.is_view or func.namespace == "prim" or "empty" in str(func))
        return out


class Optimizer:
    """Lightning's wrapper, as far as a step sees it."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, trainer: SimpleNamespace, counts: bool
    ) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.zero_grad, self.trainer, self.counts = optimizer.zero_grad, trainer, counts

    def step(self) -> None:
        scaler = self.trainer.precision_plugin.scaler
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.trainer.global_step += self.counts


def on_gpu(model: LiteAutoencoderKL, monkeypatch, dtype: torch.dtype) -> LiteAutoencoderKL:
    """A model on the fake GPU, in the hands of a trainer; under a FakeTensorMode."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with GPU:
        model = footprint.without_memory(model)
    trainer = SimpleNamespace(
        global_step=0, global_rank=0, world_size=1, log_every_n_steps=2, max_steps=100
    )
    scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None
    trainer.precision_plugin, trainer.strategy, trainer.callbacks = (
        SimpleNamespace(scaler=scaler),
        None,
        model.configure_callbacks(),
    )
    trainer.state, loop = SimpleNamespace(fn=TrainerFn.FITTING), SimpleNamespace(_results={})
    trainer.fit_loop = SimpleNamespace(epoch_loop=loop)
    model.__dict__.update(_trainer=trainer, _device=GPU)

    def fill(loss: torch.Tensor) -> None:
        assert (loss.device, loss.dtype, loss.requires_grad) == (GPU, torch.float32, True)
        if scaler is not None:
            assert scaler.scale(loss).dtype == torch.float32
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.empty_like(p)

    optimizers, schedules = model.configure_optimizers()
    wrapped = [Optimizer(o, trainer, i == 0) for i, o in enumerate(optimizers)]
    logged = {}
    model.__dict__.update(
        optimizers=lambda: wrapped, lr_schedulers=lambda: schedules, manual_backward=fill
    )
    model.__dict__.update(log_dict=logged.update, logged=logged, log=logged.__setitem__)
    monkeypatch.setattr(
        "olvae.models.liteautoencoder.gradient_ratio", lambda *_: torch.empty((), device=GPU)
    )
    # A GPU has it.
    monkeypatch.setattr("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True)
    for average in trainer.callbacks:
        average.on_fit_start(trainer, model)
    model.on_train_start()
    return model


def validate(
    model: LiteAutoencoderKL, images: torch.Tensor, dtype: torch.dtype, monkeypatch
) -> None:
    """Validation, and an evaluation of images on the CPU:
    they go to the GPU once, and numbers alone come back.
    """
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: [0.5] * len(x))
    for name in (
        "synchronize",
        "reset_peak_memory_stats",
        "memory_allocated",
        "max_memory_allocated",
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    model.eval()
    model.on_validation_epoch_start()
    with Operations() as operations, autocast(dtype), torch.no_grad():
        model.validation_step({"image": images, "key": ["a", "b"]}, 0)
    assert operations.found == []
    assert operations.products[torch.ops.aten.convolution, dtype] > 10
    assert model.validation.metrics["val"].per_image().keys() == {"psnr", "ssim"}
    autoencoder = model.autoencoder
    monkeypatch.setattr(autoencoder, "to", lambda _: autoencoder, raising=False)  # it is there
    trip = RoundTrip(autoencoder, "cuda:0", seed=0)
    with Operations() as operations, torch.no_grad():
        done = RoundTrip.__call__.__wrapped__(
            trip, ["a", "b"], torch.empty_like(images, device="cpu")
        )
    assert (done.latents.device, done.images.device, done.images.dtype) == (
        GPU,
        torch.device("cpu"),
        torch.uint8,
    )
    assert len(operations.found) == 3, operations.found  # the images, their noise, the levels
    assert {of for _, of in operations.products} == {torch.float32}


def take_steps(
    config, monkeypatch, steps: int, dtype=torch.bfloat16
) -> tuple[LiteAutoencoderKL, list[Operations]]:
    """Steps of two images, of which every second one is logged; the others wait for nothing.

    Then a validation.
    """
    size, taken = config["data"]["params"]["size"], []
    # No downloads.
    config["model"]["params"] |= {
        "gradient_clip_val": 1.0,
        "learning_rate": 1e-4,
        "val_metrics": [],
    }
    without = footprint.without_weights(config["model"])
    with FakeTensorMode():
        model = on_gpu(without, monkeypatch, dtype)
        for number in range(steps):
            images = torch.empty(2, 3, size, size, dtype=torch.uint8, device=GPU)
            with Operations() as operations, autocast(dtype):
                model.training_step({"image": images, "key": ["a", "b"]}, number)
                for average in model.trainer.callbacks:
                    average.on_train_batch_end(model.trainer)
            taken.append(operations)
            if not model.reports:
                assert operations.found == []
        for optimizer in model.optimizers():
            for p, state in optimizer.optimizer.state.items():
                assert state["exp_avg"].stride() == p.stride()
                assert {value.device for value in state.values()} == {GPU}
        assert {v.device for v in model.logged.values() if isinstance(v, torch.Tensor)} == {GPU}
        validate(model, images, dtype, monkeypatch)
    assert model.trainer.global_step == steps
    return model, taken


LAUNCHES = 1_050
"""Ceiling of the operations of a step after the first, without its backward passes:
each is a launch at least.
"""


@pytest.mark.parametrize(
    ("optimizer", "more", "dtype"),
    [
        ("muon", 450, torch.bfloat16),
        pytest.param("muon", 450, torch.float16, marks=pytest.mark.slow),
        pytest.param("adam", 0, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("adam", 0, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_operations_of_half_precision_steps_on_fake_cuda(monkeypatch, dtype, optimizer, more):
    """Of both players, with LeCam and CutMix; Muon's matrices are many small products."""
    # Three seconds: a fake operation costs a hundred microseconds, and the steps have thousands.
    penalties = [
        f"model.params.optimizer={optimizer}",
        f"{A}.start_step=0",
        f"{A}.lecam_weight=0.1",
        f"{A}.cutmix_probability=1.0",
    ]
    _, steps = take_steps(load(["configs/demo_b.yaml"], penalties), monkeypatch, 2, dtype)
    assert max(step.count for step in steps[1:]) <= LAUNCHES + more
    products, convolution, vector = steps[0].products, torch.ops.aten.convolution, torch.ops.aten.mv
    assert products[convolution, dtype] > 10 * products[convolution, torch.float32]
    assert products[vector, torch.float32] > products[vector, dtype] == 0  # power iterations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("folder", 730),
        ("imagenet/A2", 1_560),
        ("imagenet/B1", 1_700),
        ("imagenet/B2", 2_960),
        ("imagenet/B5", 2_380),
        ("imagenet/VAE_b", 830),
        ("imagenet/paper_f8c12", 1_220),
        ("deep/f16c32_b", 1_970),
    ],
)
def test_operations_of_recipes_steps_on_fake_cuda(monkeypatch, name, launches):
    """Each discriminator and each kind of decoder, with LPIPS where the recipe has it;
    ceilings as above.
    """
    _, steps = take_steps(load([f"configs/{name}.yaml"]), monkeypatch, 2)
    assert steps[1].count <= launches
