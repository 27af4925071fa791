from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from olvae.losses.gan_losses import LeCam, r1_penalty


def test_r1_of_a_quadratic_discriminator():
    """D(x) = a |x|^2: the gradient is 2 a x, the penalty 2 a^2 E |x|^2,
    its derivative by a 4 a E |x|^2.
    """
    torch.manual_seed(0)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty([a * x.square().sum((1, 2, 3))], x)
    mean_square = x.square().sum((1, 2, 3)).mean().item()
    assert penalty.item() == pytest.approx(2 * 0.49 * mean_square, rel=1e-12)
    (gradient,) = torch.autograd.grad(penalty, a)
    assert gradient.item() == pytest.approx(4 * 0.7 * mean_square, rel=1e-12)


def test_r1_takes_the_sum_of_a_samples_logits():
    """Per pixel 3 x and per image 5 x_0: the sum of the logits has the gradient 3 everywhere, and
    5 more at x_0.
    """
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty([3 * x, 5 * x[:, 0, 0, :1]], x)
    assert penalty.item() == pytest.approx(0.5 * ((3 + 5) ** 2 + 15 * 3**2), rel=1e-12)


def test_lecam_by_hand():
    lecam = LeCam(num_outputs=2, decay=0.9)
    real = [torch.tensor([1.0, 3.0]), torch.tensor([[0.5]])]
    fake = [torch.tensor([-1.0, 0.0]), torch.tensor([[-0.5]])]
    # The first call starts the anchors at the means: real 2 and 0.5, fake -0.5 and -0.5.
    first = ((1.5**2 + 3.5**2) / 2 + (3**2 + 2**2) / 2) / 2 + (1.0**2 + 1.0**2) / 2
    assert lecam(real, fake).item() == pytest.approx(first)
    # The second moves them a tenth of the way: real 2 -> 2.1 (mean 3), fake -0.5 -> -0.35 (mean 1).
    penalty = lecam([torch.tensor([3.0]), real[1]], [torch.tensor([1.0]), fake[1]])
    torch.testing.assert_close(lecam.real_anchors, torch.tensor([2.1, 0.5]))
    torch.testing.assert_close(lecam.fake_anchors, torch.tensor([-0.35, -0.5]))
    assert penalty.item() == pytest.approx(
        ((3 + 0.35) ** 2 + (1 - 2.1) ** 2) / 2 + (1.0**2 + 1.0**2) / 2
    )


def test_lecam_has_anchors_for_every_output():
    real = [torch.tensor([float(number)]) for number in range(3)]
    fake = [-10.0 - logits for logits in real]
    lecam = LeCam(num_outputs=3)
    # Each is at its anchor, and the other's anchor is as far away as the two are.
    assert lecam(real, fake).item() == pytest.approx(2 * (10**2 + 12**2 + 14**2) / 3)
    torch.testing.assert_close(lecam.real_anchors, torch.arange(3.0))


def test_lecam_stands_still_in_evaluation_and_is_saved():
    lecam = LeCam()
    lecam([torch.tensor([1.0])], [torch.tensor([-1.0])])
    lecam.eval()
    assert lecam([torch.tensor([5.0])], [torch.tensor([5.0])]).item() == pytest.approx(36 + 16)
    torch.testing.assert_close(lecam.real_anchors, torch.tensor([1.0]))
    loaded = LeCam()
    loaded.load_state_dict(lecam.state_dict())
    loaded([torch.tensor([2.0])], [torch.tensor([-1.0])])
    torch.testing.assert_close(loaded.real_anchors, torch.tensor([0.99 * 1 + 0.01 * 2]))


def _lecam_on_two_processes(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    lecam = LeCam(decay=0.5)
    for value in (1.0, 3.0):
        penalty = lecam([torch.tensor([value + rank])], [torch.tensor([-value - rank])])
    torch.save((lecam.real_anchors, lecam.fake_anchors, penalty), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_lecam_anchors_are_the_same_on_all_processes(tmp_path: Path):
    mp.start_processes(
        _lecam_on_two_processes, args=(str(tmp_path),), nprocs=2, start_method="fork"
    )
    lecam = LeCam(decay=0.5)  # one process with both halves of the batch
    for value in (1.0, 3.0):
        penalty = lecam([torch.tensor([value, value + 1])], [torch.tensor([-value, -value - 1])])
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for real_anchors, fake_anchors, _ in results:
        torch.testing.assert_close(real_anchors, lecam.real_anchors)
        torch.testing.assert_close(fake_anchors, lecam.fake_anchors)
    torch.testing.assert_close((results[0][2] + results[1][2]) / 2, penalty)


def test_lecam_as_published_by_hand():
    """Fakes beyond the real anchor, and reals below the fake one, cost nothing;
    in the paper's formula they do.
    """
    real, fake = torch.tensor([2.0, -3.0]).double(), torch.tensor([-1.0, 4.0]).double()
    for relu, expected in ((True, 1 / 2 + 16 / 2), (False, (1 + 16) / 2 + (16 + 1) / 2)):
        lecam = LeCam(relu=relu).double().eval()
        lecam.real_anchors.fill_(3.0)
        lecam.fake_anchors.fill_(1.0)
        assert lecam([real], [fake]).item() == pytest.approx(expected, rel=1e-12)


def test_r1_and_lecam_refuse_logits_that_do_not_fit():
    t, x = torch.zeros(1), torch.randn(2, 1, 4, 4)
    x.requires_grad_()
    for logits in (x[0], []):
        with pytest.raises(ValueError, match="list of"):
            r1_penalty(logits, x)
    with pytest.raises(ValueError, match=r"1 .*2: set num_outputs"):
        LeCam()([t, t], [t, t])
    with pytest.raises(ValueError, match=r"1 real .*2 fake"):
        LeCam()([t], [t, t])
    with pytest.raises(ValueError, match=r"decay must .*\[0, 1\), got 1"):
        LeCam(decay=1.0)
    assert LeCam(decay=0.0).decay == 0.0
