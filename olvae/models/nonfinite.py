"""Skip updates with non-finite losses or gradients, without a host-device sync."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

MAX_PENDING = 10_000  # steps that are remembered if nobody collects them
GRADIENT = "gradient of the "  # begins terms; alone infinite under fp16, it means that the loss scale was too large


class BadStep(NamedTuple):
    """A step that changed nothing."""

    step: int  # of the autoencoder; several updates of the discriminator's warm-up have the same
    term: str  # the first non-finite one in the order of computation: a loss, or a player's gradient
    keys: list[str]  # of the images of the micro-batch with that term, in this process; of all if it is a gradient
    overflow: bool  # fp16's gradients were too large for their scale, which is lowered for that: expected now and then


@dataclass
class _Record:
    """One step, most of it on the device."""

    step: int = 0
    keys: list[list[str]] = field(default_factory=list)  # by micro-batch
    terms: list[tuple[str, int, Tensor]] = field(default_factory=list)  # name, micro-batch and value
    finite: Tensor = field(init=False)  # by term
    bad: Tensor = field(init=False)  # 1.0 or 0.0
    scale: Tensor | None = None  # of fp16's losses

    def read(self) -> BadStep:
        term, batch, _ = self.terms[self.finite.tolist().index(False)]
        scaled = self.scale is not None and float(self.scale) >= 1  # a lower one is no matter of half precision
        is_gradient = term.startswith(GRADIENT)
        keys = [key for keys in self.keys for key in keys] if is_gradient else self.keys[batch]
        return BadStep(self.step, term, keys, scaled and is_gradient)


class NonFiniteGuard:
    """Observe the losses and gradients of each step on the device, and undo a step that has a non-finite one.

    The optimizers of a bad step get ``found_inf``, by which torch's fused kernels skip an update. Buffers that the
    forward passes changed, such as BatchNorm's and LeCam's, are put back. Only :meth:`collect` waits for the device.
    """

    def __init__(self, modules: Iterable[nn.Module | None]) -> None:
        self._modules = [module for module in modules if module is not None]
        self._buffers: list[list[Tensor]] = []  # by dtype
        self._before: list[Tensor] = []  # their values before the step
        self._record = _Record()
        self._records: deque[_Record] = deque(maxlen=MAX_PENDING)
        self.good: Tensor | float = 1.0  # 0.0 if the last update changed nothing: on the device

    @torch.no_grad()
    def begin_step(self) -> None:
        self._record = _Record()
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in (b for module in self._modules for b in module.buffers()):
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())
        self._before = [torch.cat([b.flatten() for b in same]) for same in self._buffers]

    def begin_micro_batch(self, keys: Sequence[str]) -> None:
        """Begin a micro-batch of images with these keys."""
        self._record.keys.append(list(keys))

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Note scalars, in the order of their computation."""
        batch = len(self._record.keys) - 1
        self._record.terms += [(name, batch, value.detach().float()) for name, value in terms.items()]

    @staticmethod
    def propagate(loss: Tensor) -> Tensor:
        """Return the loss; a non-finite one gets gradients of NaN, in every parameter and so in every process."""
        finite = loss.detach().isfinite().float()
        return loss * (finite / finite)

    def is_bad(self, norms: Mapping[str, Tensor]) -> Tensor:
        """Decide from the players' gradient norms, over all processes: 1.0 or 0.0, on the device.

        A finite gradient may be bad: Adam's moments would keep an infinite square for good, and freeze the weights.
        """
        squares = {f"{GRADIENT}{player}": norm.square() for player, norm in norms.items()}
        self.observe(squares)
        return 1.0 - torch.stack(list(squares.values())).isfinite().all().float()

    @staticmethod
    def skip_if(bad: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        """Let the optimizer's next step change nothing if ``bad`` is 1.0; its kernels have to be fused."""
        if scaler is None:
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            return
        for found in scaler._found_inf_per_device(optimizer).values():
            found.copy_(torch.maximum(found, bad))

    @torch.no_grad()
    def end_step(self, step: int, updates: Sequence[Tensor], scaler: torch.amp.GradScaler | None) -> None:
        """End a step of these updates, by :meth:`is_bad`, an autoencoder's first; put buffers back if one was bad."""
        self.good = 1.0 - updates[0]
        bad = torch.stack(list(updates)).amax()
        for buffers, before in zip(self._buffers, self._before, strict=True):
            now = torch.cat([b.flatten() for b in buffers])
            kept = torch.where(bad > 0, before, now).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [value.view_as(b) for value, b in zip(kept, buffers, strict=True)])
        scale = None if scaler is None else scaler._get_scale_async()
        self._record.step, self._record.bad = step, bad
        self._record.finite = torch.stack([value for *_, value in self._record.terms]).isfinite()
        self._record.scale = None if scale is None else scale.clone()
        self._records.append(self._record)

    @property
    def pending(self) -> int:
        """Steps that were not collected yet."""
        return len(self._records)

    def collect(self) -> list[BadStep | None]:
        """Return the steps since the last call, None for a good one; this waits for the device.

        Collective under fp16: a step in which any process had a non-finite loss is an overflow in none.
        """
        records, self._records = self._records, deque(maxlen=MAX_PENDING)
        flags = torch.stack([record.bad for record in records]).tolist() if records else []
        steps = [record.read() if flag else None for flag, record in zip(flags, records, strict=True)]
        if not dist.is_initialized() or not records or records[0].scale is None:
            return steps
        spoilt = [step is not None and not step.overflow for step in steps]
        agreed = torch.tensor(spoilt, dtype=torch.uint8, device=records[0].bad.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return [s and s._replace(overflow=not flag) for s, flag in zip(steps, agreed.tolist(), strict=True)]
