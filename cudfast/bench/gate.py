"""Results are compared with float64 before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Loss = Callable[..., Tensor]
Outcome = tuple[Tensor, Tensor]
"""Loss () and gradient (N, V)."""


def truth(loss: Loss, logits: Tensor, *others: Tensor) -> Outcome:
    """`loss` and its gradient (N, V) in float64, for a loss that is a mean over rows.

    Args:
        loss: differentiable in plain PyTorch.
        logits: (N, V).
        others: (N, V) or (N,), further arguments of the loss.
    """
    count, classes = logits.shape
    step = max(1, 2**24 // classes)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    gradient = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    for start in range(0, count, step):
        part = slice(start, start + step)
        x = logits[part].double().requires_grad_()
        value = loss(x, *(o[part].double() if o.is_floating_point() else o[part] for o in others))
        (slope,) = torch.autograd.grad(value, x)
        share = len(x) / count
        total += value.detach() * share
        gradient[part] = slope.mul_(share)
    return total, gradient


class Errors(NamedTuple):
    """Distances from the truth."""

    loss: float
    largest: float  # of the gradient, over its largest entry
    mean: float  # of the gradient, over its mean entry

    @classmethod
    def of(cls, got: Outcome, true: Outcome) -> Errors:
        distance = got[1].double().sub_(true[1]).abs_()
        size = true[1].abs()
        return cls(
            abs(float(got[0]) - float(true[0])),
            float(distance.max() / size.max()),
            float(distance.mean() / size.mean()),
        )


def gate(name: str, got: Outcome, true: Outcome, eager: Errors | None = None, temperature: float = 1.0) -> None:
    """Fails when `got` is further from the truth than both eager PyTorch and the rounding that float32 allows.

    A gradient in a shorter dtype may also be off by the rounding of its last bit.
    """
    value = abs(float(true[0]))
    rounding = max(2e-6, torch.finfo(got[1].dtype).eps / 2)
    allowed = Errors(2e-6 * max(1.0, temperature**2, value), rounding, rounding)
    errors = Errors.of(got, true)
    for what, error, bound, of_eager in zip(Errors._fields, errors, allowed, eager or allowed):
        if not error <= max(bound, of_eager):  # NaN fails, too
            raise AssertionError(f"{name}: {what} error {error:.2e}, allowed {bound:.2e}, of eager {of_eager:.2e}")
