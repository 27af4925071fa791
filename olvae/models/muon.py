"""Muon: an optimizer that changes matrices of weights by orthogonal matrices, and everything else as Adam does."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam as adam_update

ITERATION = (3.4445, -4.7750, 2.0315)  # K. Jordan, Muon (2024): singular values of .001 to 1 come to .7 to 1.2 in five
STEPS = 5
SMALLEST = 8  # inputs and outputs: below, as at an image's channels, there is no spectrum to speak of
RMS = 0.6  # of an update's entries, as of Adam's, so that both have one rate (arXiv 2502.16982, eq. 4)


class Muon(torch.optim.Optimizer):
    """Muon for weights with two dimensions or more, and 8 or more inputs and outputs; Adam for the rest.

    The momentum of a weight's gradient, as a matrix (outputs, inputs x kernel), becomes the nearest orthogonal one: all
    its singular values are made about 1, so that directions that gradients seldom show are learned as fast as the
    others. One moment is kept where Adam keeps two. torch's own takes matrices only, one at a time, in bfloat16.

    Args:
        params: parameters.
        lr: learning rate; an update of a weight has Adam's size.
        betas: Adam's; the first is the momentum's too.

    Like Adam with fused kernels it skips an update for ``found_inf`` without waiting for the device.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets found_inf and grad_scale, and does not wait

    def __init__(self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]) -> None:
        parameters = list(params)
        groups = [{"params": [p for p in parameters if is_matrix(p) == kind]} for kind in (False, True)]
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        others, matrices = self.param_groups
        self._step_adam(others, found_inf, scale)
        alike: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
        for same in alike.values():
            self._step_matrices(same, matrices["lr"], matrices["betas"][0], found_inf, scale)
        return loss

    def _step_adam(self, group: dict[str, Any], found_inf: Tensor | None, scale: Tensor | None) -> None:
        trained = [p for p in group["params"] if p.grad is not None]
        for p in trained:
            if not self.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        kept = [[self.state[p][name] for p in trained] for name in ("exp_avg", "exp_avg_sq", "step")]
        beta1, beta2 = group["betas"]
        adam_update(
            trained, [p.grad for p in trained if p.grad is not None], kept[0], kept[1], [], kept[2],
            fused=True, grad_scale=scale, found_inf=found_inf, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip

    def _step_matrices(
        self, same: list[Tensor], rate: float, beta: float, found_inf: Tensor | None, scale: Tensor | None
    ) -> None:
        """Change weights that are matrices of one shape."""
        for p in same:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        moments = [self.state[p]["exp_avg"] for p in same]
        gradients = [p.grad if scale is None else p.grad / scale for p in same if p.grad is not None]
        if found_inf is not None:  # a skipped update leaves the moments as they are
            gradients = [torch.where(found_inf > 0, m, g) for g, m in zip(gradients, moments, strict=True)]
        torch._foreach_lerp_(moments, gradients, 1 - beta)
        ahead = torch._foreach_lerp(gradients, moments, beta)  # Nesterov's
        updates = orthogonalize(torch.stack([u.flatten(1) for u in ahead]))
        updates *= -rate * RMS * max(updates.shape[1:]) ** 0.5
        if found_inf is not None:
            updates *= 1 - found_inf
        torch._foreach_add_(same, [update.view_as(p) for p, update in zip(same, updates, strict=True)])


def is_matrix(weight: Tensor) -> bool:
    """Whether Muon changes a weight by orthogonal matrices."""
    return weight.ndim > 1 and min(weight.shape[:2]) >= SMALLEST


def orthogonalize(x: Tensor) -> Tensor:
    """The orthogonal factor of matrices' polar decompositions, roughly: (n, rows, columns), in float32.

    Five steps of a Newton-Schulz iteration bring singular values from a thousandth of the largest on to .7 to 1.2.
    """
    a, b, c = ITERATION
    wide = x.shape[1] <= x.shape[2]
    with torch.autocast(x.device.type, enabled=False):
        x = x.float() if wide else x.float().mT
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-20)
        for _ in range(STEPS):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.mT
