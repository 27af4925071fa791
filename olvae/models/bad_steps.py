"""A training step whose loss or gradients are not finite changes nothing, and no good step waits to find out."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["BadStep", "StepGuard"]

MOST = 10_000
"""Steps that are remembered where nobody looks."""

GRADIENT = "gradient of the "
"""In front of a player's name: what is seen last in a step, and alone under fp16 where only its scale was too large."""


class BadStep(NamedTuple):
    """A step that changed nothing.

    Args:
        step: of the autoencoder; several updates of the discriminator's warm-up have the same.
        term: what was not finite, the first in the order of computation: a loss, or a player's gradient.
        keys: of the images of the micro-batch with that term, in this process; of all if a gradient was the first.
        overflow: fp16's gradients were too large for their scale, which is lowered for that: expected now and then.
    """

    step: int
    term: str
    keys: list[str]
    overflow: bool


class _Record:
    """What one step leaves, most of it on the device."""

    def __init__(self) -> None:
        self.step = 0
        self.keys: list[list[str]] = []  # by micro-batch
        self.terms: list[tuple[str, int]] = []  # name and micro-batch
        self.values: list[Tensor] = []
        self.finite: Tensor | None = None  # (terms)
        self.bad: Tensor | None = None  # 1.0 or 0.0
        self.scale: Tensor | None = None  # of fp16's losses

    def described(self) -> BadStep:
        assert self.finite is not None
        term, batch = self.terms[self.finite.tolist().index(False)]
        scaled = self.scale is not None and float(self.scale) >= 1  # a lower one is no matter of half precision
        of_gradient = term.startswith(GRADIENT)
        keys = [key for keys in self.keys for key in keys] if of_gradient else self.keys[batch]
        return BadStep(self.step, term, keys, scaled and of_gradient)


class StepGuard:
    """Watches the losses and gradients of each step, on the device; only :meth:`look` waits for it.

    The optimizers of a bad step get ``found_inf``, by which torch's fused kernels skip an update. Buffers that the
    forward passes changed, such as BatchNorm's and LeCam's, are put back.

    Args:
        modules: whose buffers training changes.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._buffers: list[list[Tensor]] = []  # by dtype
        self._before: list[Tensor] = []  # their values before the step
        self._record = _Record()
        self._records: deque[_Record] = deque(maxlen=MOST)
        self.good: Tensor | float = 1.0
        """0.0 if the last update changed nothing, else 1.0: on the device."""

    def prepare(self) -> None:
        """Find the buffers, when the modules are on their device: not in every step."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in (b for module in self._modules for b in module.buffers()):
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())

    @torch.no_grad()
    def start(self) -> None:
        """Before the first micro-batch of a step."""
        self._record = _Record()
        self._before = [torch.cat([b.flatten() for b in same]) for same in self._buffers]

    def batch(self, keys: Sequence[str]) -> None:
        """At the beginning of a micro-batch."""
        self._record.keys.append(list(keys))

    def see(self, terms: Mapping[str, Tensor]) -> None:
        """Note scalars, in the order of their computation."""
        self._record.terms += [(name, len(self._record.keys) - 1) for name in terms]
        self._record.values += [value.detach().float() for value in terms.values()]

    @staticmethod
    def spread(loss: Tensor) -> Tensor:
        """The loss itself; one that is not finite gets gradients of nan, in every parameter and so on every rank."""
        finite = loss.detach().isfinite().float()
        return loss * (finite / finite)

    def judge(self, norms: Mapping[str, Tensor]) -> Tensor:
        """Whether an update is bad: 1.0 or 0.0, on the device. A finite gradient may be: Adam's moments would keep an
        infinite square for good, and freeze the weights.

        Args:
            norms: of each player's gradient, over all ranks.
        """
        squares = {f"{GRADIENT}{player}": norm.square() for player, norm in norms.items()}
        self.see(squares)
        return 1.0 - torch.stack(list(squares.values())).isfinite().all().float()

    @staticmethod
    def mask(optimizer: torch.optim.Optimizer, bad: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        """Let the optimizer's next step change nothing if it is bad. One without fused kernels waits to know."""
        if scaler is not None:
            for found in scaler._found_inf_per_device(optimizer).values():
                found.copy_(torch.maximum(found, bad))
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad  # type: ignore[attr-defined]
        elif bool(bad):
            optimizer.zero_grad()

    @torch.no_grad()
    def end(self, step: int, updates: Sequence[Tensor], scaler: torch.amp.GradScaler | None) -> None:
        """After a step, of whose updates each was judged.

        Args:
            step: of the autoencoder.
            updates: what :meth:`judge` returned; the first is that of the autoencoder, if it had one.
        """
        self.good = 1.0 - updates[0]
        bad = torch.stack(list(updates)).amax()
        for buffers, before in zip(self._buffers, self._before, strict=True):
            now = torch.cat([b.flatten() for b in buffers])
            kept = torch.where(bad > 0, before, now).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [value.view_as(b) for value, b in zip(kept, buffers, strict=True)])
        record = self._record
        record.step, record.bad = step, bad
        record.finite, record.values = torch.stack(record.values).isfinite(), []
        if scaler is not None:
            scale = scaler._get_scale_async()
            record.scale = None if scale is None else scale.clone()
        self._records.append(record)

    @property
    def unseen(self) -> int:
        """Steps since the last look."""
        return len(self._records)

    def look(self) -> list[BadStep | None]:
        """The steps since the last look, None for a good one."""
        records = list(self._records)
        self._records.clear()
        if not records:
            return []
        flags = torch.stack([record.bad for record in records if record.bad is not None]).tolist()
        return [record.described() if flag else None for flag, record in zip(flags, records, strict=True)]
