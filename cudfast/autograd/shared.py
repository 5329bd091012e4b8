"""Functions for the autograd nodes of both kinds of losses, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..options import RowOptions
from ..rows.call import Rows
from ..rows.tensors import addressable


def keeps_gradient(rows: Rows, options: RowOptions) -> bool:
    """Whether forward computes the gradient. In float16 it would round to 0 before it is multiplied by a loss scale."""
    if options.inplace and options.check_finite:  # the check comes before anything is overwritten
        return False
    if options.save == "auto":
        return options.reduction != "none" and rows.logits.dtype != torch.float16
    return options.save == "gradient"


class Once(torch.autograd.Function):
    """The gradient; differentiating it again raises an error."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, upstream: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "cudfast losses have no second derivative: the gradient was differentiated again (create_graph=True, a "
            "gradient penalty, a Hessian). Write the loss in plain PyTorch where that is needed."
        )


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """ctx.save_for_backward, also for tensors made under torch.inference_mode, which have no version to check."""
    ctx.unversioned = None
    for x in tensors:
        if x is not None and x.is_inference():
            ctx.unversioned = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
            tensors = tuple(None if i in ctx.unversioned else x for i, x in enumerate(tensors))
            break
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[Any, ...]:
    """The tensors that were passed to `save`."""
    if not ctx.unversioned:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    return tuple(ctx.unversioned.get(i, x) for i, x in enumerate(ctx.saved_tensors))


def grouped(tensors: Iterable[Any], *kinds: Any) -> tuple[Any, ...]:
    """Saved tensors as named tuples of these kinds, in their order, and a list of the rest."""
    rest = iter(tensors)
    return (*(kind(*islice(rest, len(kind._fields))) for kind in kinds), list(rest))


def upstream_of(gradient: Tensor) -> Tensor:
    """An upstream gradient in a form that kernels can read.

    Raises:
        RuntimeError: a batch of upstream gradients.
    """
    if addressable(gradient):
        return gradient
    if torch._C._functorch.is_batchedtensor(gradient) or torch._C._functorch.is_legacy_batchedtensor(gradient):
        raise RuntimeError(
            "cudfast losses take one upstream gradient at a time: leave out is_grads_batched=True of "
            "torch.autograd.grad, and vectorize=True of torch.autograd.functional.jacobian"
        )
    gradient = gradient.clone()  # waits for a collective, and resolves a negative bit
    if addressable(gradient):
        return gradient
    raise RuntimeError(
        f"the upstream gradient is a {type(gradient).__name__}, without memory of its own, and the loss was computed "
        "from ordinary tensors: call the loss and backward in the same mode"
    )
