"""What the autograd nodes of the losses share, those from logits and those from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import CUDOptions, DUSOptions
from ..rows.call import Rows
from ..rows.tensors import addressable


def keeps_gradient(rows: Rows, options: CUDOptions | DUSOptions) -> bool:
    """Whether the gradient is made in forward. A float16 gradient made before the loss scale arrives rounds to 0."""
    if options.inplace and options.check_finite:  # the check comes before anything is overwritten
        return False
    if options.save == "auto":
        return options.reduction != "none" and rows.logits.dtype != torch.float16
    return options.save == "gradient"


class Once(torch.autograd.Function):
    """The gradient, with a second derivative that is an error."""

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
    """ctx.save_for_backward, which refuses what was made under torch.inference_mode: that has no version to check."""
    ctx.unversioned = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    if ctx.unversioned:
        tensors = tuple(None if i in ctx.unversioned else x for i, x in enumerate(tensors))
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[Any, ...]:
    """What `save` was given."""
    if not ctx.unversioned:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    return tuple(ctx.unversioned.get(i, x) for i, x in enumerate(ctx.saved_tensors))


def upstream_of(gradient: Tensor) -> Tensor:
    """An upstream gradient as kernels read it.

    Raises:
        RuntimeError: a batch of them.
    """
    if addressable(gradient):
        return gradient
    if torch._C._functorch.is_batchedtensor(gradient) or torch._C._functorch.is_legacy_batchedtensor(gradient):
        raise RuntimeError(
            "cudfast losses take one upstream gradient at a time: leave out is_grads_batched=True of "
            "torch.autograd.grad, and vectorize=True of torch.autograd.functional.jacobian"
        )
    gradient = gradient.clone()  # waits for a collective, and settles a negative bit
    if addressable(gradient):
        return gradient
    raise RuntimeError(
        f"the upstream gradient is a {type(gradient).__name__}, without memory of its own, and the loss was computed "
        "from ordinary tensors: call the loss and backward in the same mode"
    )
