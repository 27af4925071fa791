"""What each backward pass sends over processes: one process of a gloo group, whose communication
hook counts.
"""

import gc
import os
from itertools import repeat

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
)

from olvae.models.updates import ddp
from olvae.models.updates.ddp import PlayersStrategy
from olvae.modules.counting import count_parameters
from olvae.modules.patchgan import PatchGAN
from tests.forks import fork_each
from tests.models.steps import (
    PATCHGAN,
    WITHOUT_KL,
    against,
    assert_same,
    build_shallow,
    snapshot,
    trainer,
)
from tests.training.conftest import torchrun


@pytest.fixture(autouse=True)
def _leaves_nothing():
    """Lightning's launcher gives this process all cores, a process group,
    and variables that children would inherit.
    """
    before, threads = dict(os.environ), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()  # or a loader's process would, as in fork_each


class Counting(PlayersStrategy):
    """Counts the bytes that each player's reducer sends, by the step of the autoencoder."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.sent: list[tuple[str, int]] = []
        for name, reducer in self.reducers.items():
            reducer.register_comm_hook(name, self._count)

    def _count(self, name, bucket):
        self.sent.append((name, bucket.buffer().nbytes))
        return allreduce_hook(None, bucket)


def train(strategy, adversary=None, batches: int = 2, **model):
    module = build_shallow(adversary, **model)
    batch = {"image": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}
    quiet = {"limit_val_batches": 0, "log_every_n_steps": 0}
    trainer(-1, max_epochs=1, devices=1, strategy=strategy, **quiet).fit(
        module, repeat(batch, batches)
    )
    return module


def totals(strategy: Counting) -> dict[str, int]:
    return {name: sum(size for n, size in strategy.sent if n == name) for name in strategy.reducers}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_ddp_sends_each_players_gradients_once_an_update(accumulated):
    strategy = Counting(gradient_as_bucket_view=True)
    module = train(strategy, against(), accumulate_grad_batches=accumulated)
    updates = 2 // accumulated
    trained = {"autoencoder": module.autoencoder, "discriminator": module.adversary.discriminator}
    assert totals(strategy) == {
        name: updates * 4 * count_parameters(part) for name, part in trained.items()
    }


def test_ddp_sends_the_discriminators_alone_in_further_updates_and_warm_up():
    strategy = Counting()
    module = train(strategy, against(updates_per_step=2, warmup_updates=2), batches=3)
    bytes_of = {name: 4 * count_parameters(player) for name, player in module.players.items()}
    assert module.global_step == 2  # the first batch is the warm-up's
    assert totals(strategy) == {
        "autoencoder": 2 * bytes_of["autoencoder"],
        "discriminator": 6 * bytes_of["discriminator"],
    }


def test_ddp_does_not_send_a_frozen_half(monkeypatch):
    """Nor signals, before each batch."""
    quiet = []
    monkeypatch.setattr(ddp, "leave_signals_alone", quiet.append)
    strategy = Counting()
    module = train(strategy, lossconfig=WITHOUT_KL, freeze_encoder=True, batches=1)
    assert quiet == [module.trainer]
    assert totals(strategy) == {"autoencoder": 4 * count_parameters(module.decoder)}


class Unused(PatchGAN):
    """Has a parameter that no step uses."""

    def __init__(self, **params) -> None:
        super().__init__(**params)
        self.unused = torch.nn.Parameter(torch.zeros(3))


def test_ddp_names_find_unused_parameters():
    adversary = against({**PATCHGAN, "target": f"{__name__}.Unused"})
    with pytest.raises(RuntimeError, match="find_unused_parameters"):
        train(PlayersStrategy(), adversary, batches=2)
    assert (
        train(PlayersStrategy(find_unused_parameters=True), adversary, batches=2).global_step == 2
    )


@pytest.mark.parametrize(
    ("name", "hook", "unused"),
    [
        ("auto", None, False),
        ("ddp", None, False),
        ("ddp_bf16", bf16_compress_hook, False),
        ("ddp_find_unused_parameters_true", None, True),
    ],
)
def test_ddps_settings_by_its_names(monkeypatch, name, hook, unused):
    monkeypatch.setattr(ddp, "PlayersStrategy", dict)
    assert ddp.players_strategy(name, timeout=5) == {
        "ddp_comm_hook": hook,
        "find_unused_parameters": unused,
        "gradient_as_bucket_view": True,
        "timeout": 5,
    }


def test_ddp_bf16_hook_halves_the_bytes_of_both_players():
    """As `ddp_bf16`, whose sums are of bfloat16."""
    sent = []

    def hook(state, bucket):
        assert state is None
        sent.append(bucket.buffer().numel())
        return bf16_compress_hook(None, bucket)

    module = train(PlayersStrategy(ddp_comm_hook=hook), against(), batches=1)
    assert sum(sent) == count_parameters(module.autoencoder) + count_parameters(
        module.adversary.discriminator
    )
    plain = snapshot(train("auto", against(), batches=1))
    for name, p in snapshot(module).items():
        # Adam's first step is of the rate, 1e-4.
        torch.testing.assert_close(p, plain[name], rtol=0, atol=2.5e-4)


def test_bfloat16_on_the_wire_of_two_processes_is_the_mean_but_for_its_rounding(updates):
    """Both players' gradients as Adam sees them, the same in both processes; images differ."""
    hooks = (None, lambda state, bucket: bf16_compress_hook(state, bucket))

    def work(rank: int) -> None:
        os.environ.update(torchrun(rank, per_node=2))
        batch = {"image": torch.full((2, 3, 16, 16), 200 * rank, dtype=torch.uint8)}
        for hook in hooks:
            strategy = PlayersStrategy(ddp_comm_hook=hook)
            trainer(1, devices=2, strategy=strategy, limit_val_batches=0).fit(
                build_shallow(against()), repeat(batch, 1)
            )
        found = [
            torch.cat([g.flatten() for u in half for g in u.gradients])
            for half in (updates[:2], updates[2:])
        ]
        both = [torch.empty_like(found[1]) for _ in range(2)]
        torch.distributed.all_gather(both, found[1])
        assert torch.equal(*both)
        assert not torch.equal(*found)
        apart = (found[0] - found[1]).norm() / found[0].norm()
        assert 1e-4 < apart < 2**-7

    fork_each(work)


def test_weights_with_ddp_are_those_without():
    assert_same(snapshot(train(Counting(), against())), snapshot(train("auto", against())))
