"""Skip non-finite updates without a host-device sync."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olvae.library_internals import copy_each, found_inf_of, loss_scale_of

MAX_PENDING = 10_000  # steps that are remembered if nobody collects them

# Begins terms. Under fp16, if gradients alone are infinite, the loss scale was too large.
GRADIENT = "gradient of the "


class BadStep(NamedTuple):
    """A step that changed nothing, or only lost a further update of the discriminator."""

    step: int  # of the autoencoder; all updates of the discriminator's warm-up have the same
    # The first non-finite one in the order of computation: a loss, or a player's gradient.
    term: str
    # Of the images in this process' micro-batch with that term; of all if it is a gradient.
    keys: list[str]
    # fp16's gradients were too large for their scale, which is then lowered: expected now and then.
    overflow: bool
    # Whether the whole step changed nothing; else a further update of the discriminator did.
    whole: bool = True


@dataclass
class _Record:
    """What was observed of one step, most of it on the device."""

    step: int = 0
    keys: list[list[str]] = field(default_factory=list)  # by micro-batch
    terms: list[tuple[str, int, Tensor]] = field(default_factory=list)  # name, micro-batch, value
    finite: Tensor = field(init=False)  # by term
    bad: list[Tensor] = field(default_factory=list)  # 1.0 or 0.0, by update
    scale: Tensor | None = None  # of fp16's losses

    def read(self) -> BadStep:
        """Name the first non-finite term; this waits for the device."""
        term, batch, _ = self.terms[self.finite.tolist().index(False)]
        is_gradient = term.startswith(GRADIENT)
        if is_gradient:
            keys = [key for batch_keys in self.keys for key in batch_keys]
        else:
            keys = self.keys[batch]
        # A scale below 1 has been lowered so often that half precision is not the reason.
        scaled = self.scale is not None and float(self.scale) >= 1
        return BadStep(self.step, term, keys, scaled and is_gradient, bool(self.bad[0] > 0))


class NonFiniteGuard:
    """Observe the losses and gradients of each step on the device; undo a step with a bad one.

    The optimizers of a bad step get ``found_inf``, by which fused kernels and Muon skip an update.
    On mps, where kernels ignored it before torch 2.14, they lose their gradients as well. Buffers
    that the forward passes changed, such as BatchNorm's and LeCam's, are put back. After a bad
    first update the step's further ones are skipped; a bad further one is undone alone.

    Order of calls in a step:

    1. :meth:`begin_step`
    2. for each micro-batch: :meth:`begin_micro_batch`; for each loss: :meth:`observe`, and a
       backward pass of what :meth:`propagate` returns
    3. :meth:`is_bad` with the norms of all gradients; for each optimizer: :meth:`skip_if`, and its
       step; then :meth:`end_update`
    4. for each further update of the discriminator: :meth:`begin_update`; for each micro-batch
       again: :meth:`return_to`, then its losses as in 2; then 3
    5. :meth:`end_step`

    Between steps, when a wait for the device is acceptable: :meth:`collect`. Nothing else waits,
    but :meth:`skip_if` on mps.
    """

    def __init__(self, modules: Iterable[nn.Module | None]) -> None:
        self._modules = [module for module in modules if module is not None]
        self._buffers: list[list[Tensor]] = []  # by dtype
        self._before: list[Tensor] = []  # their values before the update, in one tensor a dtype
        self._batch = 0  # the micro-batch that is observed
        self._record = _Record()
        self._records: deque[_Record] = deque(maxlen=MAX_PENDING)
        self.good: Tensor | float = 1.0  # 0.0 if the last step changed nothing; on the device

    def begin_step(self) -> None:
        self._record = _Record()
        self.begin_update()

    @torch.no_grad()
    def begin_update(self) -> None:
        """Keep the buffers' values, in few launches: one for each dtype."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for module in self._modules:
            for buffer in module.buffers():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())
        self._before = [_joined(buffers) for buffers in self._buffers]

    def begin_micro_batch(self, keys: Sequence[str]) -> None:
        """Begin a micro-batch of images with these keys."""
        self.return_to(len(self._record.keys))
        self._record.keys.append(list(keys))

    def return_to(self, batch: int) -> None:
        """Observe the step's micro-batch of this number again, for a further update."""
        self._batch = batch

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Record scalars, in the order of their computation."""
        for name, value in terms.items():
            self._record.terms.append((name, self._batch, value.detach().float()))

    @staticmethod
    def propagate(loss: Tensor) -> Tensor:
        """Return the loss; a non-finite one gets NaN gradients in every parameter.

        So the averaged gradients are NaN in every process, and all of them skip the update.
        """
        finite = loss.detach().isfinite().float()
        return loss * (finite / finite)

    def is_bad(self, norms: Mapping[str, Tensor]) -> Tensor:
        """Decide from the players' gradient norms, over all processes: 1.0 or 0.0, on the device.

        A further update is bad if the step's first is. The square of a norm has to be finite, too:
        Adam's moments would keep an infinite square for good, and freeze the weights.
        """
        squares = {f"{GRADIENT}{player}": norm.square() for player, norm in norms.items()}
        self.observe(squares)
        bad = 1.0 - torch.stack(list(squares.values())).isfinite().all().float()
        if self._record.bad:
            bad = bad.maximum(self._record.bad[0])
        self._record.bad.append(bad)
        return bad

    @staticmethod
    def skip_if(
        bad: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> None:
        """Make the optimizer's next step a no-op if ``bad`` is 1.0; it must heed ``found_inf``.

        On mps an optimizer has to leave parameters without gradients alone, as torch's do.
        """
        if bad.device.type == "mps" and bad > 0:
            optimizer.zero_grad()
        if scaler is None:
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            return
        for found in found_inf_of(scaler, optimizer):
            found.copy_(found.maximum(bad))

    @torch.no_grad()
    def end_update(self) -> None:
        """Put buffers back if the last update was bad."""
        bad = self._record.bad[-1]
        for buffers, before in zip(self._buffers, self._before, strict=True):
            kept = torch.where(bad > 0, before, _joined(buffers))
            values = kept.split([buffer.numel() for buffer in buffers])
            shaped = [v.view_as(buffer) for v, buffer in zip(values, buffers, strict=True)]
            copy_each(buffers, shaped)

    def end_step(self, step: int, scaler: torch.amp.GradScaler | None) -> None:
        """Keep the step's record for :meth:`collect`."""
        record = self._record
        self.good = 1.0 - record.bad[0]
        record.step = step
        record.finite = torch.stack([value for *_, value in record.terms]).isfinite()
        if scaler is not None:
            scale = loss_scale_of(scaler)
            record.scale = None if scale is None else scale.clone()
        self._records.append(record)

    @property
    def pending(self) -> int:
        """Steps that were not collected yet."""
        return len(self._records)

    def collect(self) -> list[BadStep | None]:
        """Return the steps since the last call, None for a good one; this waits for the device.

        Collective under fp16: if any process had a non-finite loss, the step is no overflow in any.
        """
        records = self._records
        self._records = deque(maxlen=MAX_PENDING)
        if not records:
            return []
        flags = torch.stack([torch.stack(record.bad).amax() for record in records]).tolist()
        steps: list[BadStep | None] = []
        for flag, record in zip(flags, records, strict=True):
            steps.append(record.read() if flag else None)
        if not dist.is_initialized() or records[0].scale is None:
            return steps

        # Under fp16: a step is spoilt if a loss was not finite in any process.
        spoilt = [step is not None and not step.overflow for step in steps]
        agreed = torch.tensor(spoilt, dtype=torch.uint8, device=records[0].bad[0].device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        for i, (step, flag) in enumerate(zip(steps, agreed.tolist(), strict=True)):
            if step is not None:
                steps[i] = step._replace(overflow=not flag)
        return steps


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
