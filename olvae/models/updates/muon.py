"""Muon: an optimizer that changes matrices by orthogonal matrices, and the rest like Adam."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam as adam_update

from olvae.library_internals import add_each, copy_each

ITERATION = (3.4445, -4.7750, 2.0315)  # K. Jordan, Muon (2024)
STEPS = 5
# Inputs and outputs: a smaller matrix, as at an image's channels, has hardly a spectrum.
SMALLEST_MATRIX = 8
# Of an update's entries at a rate of 1: best on the demo (docs/demo.md) [D]; arXiv 2502.16982, 2.2,
# has .2.
RMS = 0.6
# Values in a stack of matrices, at most: larger matrices keep a device busy one by one.
STACKED = 2**22


class Muon(torch.optim.Optimizer):
    """Muon for weights with two dimensions or more, and 8 or more inputs and outputs; else Adam.

    The momentum of a weight's gradient, as a matrix (outputs, inputs x kernel), becomes the nearest
    orthogonal one: all its singular values become about 1, so that directions that gradients seldom
    show are learned as fast as the others. It keeps one moment, Adam two. torch's own Muon takes
    matrices only, one at a time, in bfloat16.

    Args:
        params: parameters.
        lr: learning rate, Adam's too; a matrix changes about twice as much as with Adam at betas of
            (.9, .99).
        betas: Adam's; the first is the momentum's too.

    Like Adam with fused kernels it skips an update for ``found_inf`` without waiting for the
    device.
    """

    # torch.amp.GradScaler then sets found_inf and grad_scale, and does not wait.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]
    ) -> None:
        parameters = list(params)
        others = [p for p in parameters if not is_matrix(p)]
        matrices = [p for p in parameters if is_matrix(p)]
        # "fused", so that the steps of a loaded state come to their device.
        defaults = {"lr": lr, "betas": betas, "fused": True}
        super().__init__([{"params": others}, {"params": matrices}], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        scale = getattr(self, "grad_scale", None)
        others, matrices = self.param_groups

        # Adam for the others.
        trained = [p for p in others["params"] if p.grad is not None]
        for p in trained:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        first = [self.state[p]["exp_avg"] for p in trained]
        second = [self.state[p]["exp_avg_sq"] for p in trained]
        steps = [self.state[p]["step"] for p in trained]
        beta1, beta2 = others["betas"]
        adam_update(
            trained, [p.grad for p in trained if p.grad is not None], first, second, [], steps,
            fused=True, grad_scale=scale, found_inf=found_inf, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=others["lr"], weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip

        # Matrices of one shape are stacked: few launches of larger products.
        alike: dict[torch.Size, list[Tensor]] = {}
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                alike.setdefault(parameter.shape, []).append(parameter)
        for shape, same in alike.items():
            at_once = max(1, STACKED // shape.numel())
            for i in range(0, len(same), at_once):
                self._step_matrices(same[i : i + at_once], matrices, found_inf, scale)
        return loss

    def _step_matrices(
        self,
        same: list[Tensor],
        group: dict[str, Any],
        found_inf: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        """Change weights of one shape, of this group."""
        beta = group["betas"][0]
        for p in same:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)

        # Gradients, without fp16's scale: (n, outputs, inputs x kernel), as the moment.
        moments = [self.state[p]["exp_avg"] for p in same]
        moment = torch.stack(moments).flatten(2)
        gradient = torch.stack([p.grad for p in same if p.grad is not None]).flatten(2)
        if scale is not None:
            gradient = gradient / scale
        if found_inf is not None:
            # With its moment for a gradient, a skipped update leaves the moment as it is.
            gradient = torch.where(found_inf > 0, moment, gradient)

        # Nesterov's momentum, made orthogonal, at the rate.
        moment.lerp_(gradient, 1 - beta)
        update = orthogonalize(gradient.lerp(moment, beta))
        update *= -group["lr"] * RMS * max(update.shape[1:]) ** 0.5
        if found_inf is not None:
            update *= 1 - found_inf
        shape = (len(same), *same[0].shape)
        copy_each(moments, moment.view(shape).unbind())
        add_each(same, update.view(shape).unbind())


def is_matrix(weight: Tensor) -> bool:
    """Whether Muon changes a weight by orthogonal matrices."""
    return weight.ndim > 1 and min(weight.shape[:2]) >= SMALLEST_MATRIX


def orthogonalize(x: Tensor) -> Tensor:
    """The orthogonal factor of matrices' polar decompositions, roughly: (n, rows, columns).

    In float32. A Newton-Schulz iteration brings singular values of .0015 to 1 of the Frobenius norm
    to .68 to 1.2.
    """
    a, b, c = ITERATION
    wide = x.shape[1] <= x.shape[2]
    with torch.autocast(x.device.type, enabled=False):
        x = x.float() if wide else x.float().mT
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(STEPS):
            # a x + (b s + c s^2) x with s = x x^T
            square = x @ x.mT
            polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if wide else x.mT.contiguous()
