"""Kernels read tensors with memory of their own, whose values are at `data_ptr()`. This module finds them.

The result of a functional collective is waited for. Fake, functional and meta tensors and wrapper subclasses are passed
to the torch.library ops, which PyTorch dispatches to the tensors inside. Masked, nested and sparse tensors raise an
error.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

_OWN = re.compile(r"ADInplaceOrView|AutogradOther|(Autograd|Autocast)?(CPU|CUDA|HIP|XPU|MPS|HPU|MTIA|PrivateUse1)")
_addressable: dict[int, bool] = {}  # by the bits of a dispatch key set

_MODES = torch._C._TorchDispatchModeKey
_TRACING = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor, by the name of its type: importing the type would load torch.distributed.tensor."""
    return type(value).__name__ == "DTensor"


def addressable(x: Tensor) -> bool:
    """Whether the values of x are at x.data_ptr(). Not under torch.compile."""
    keys = torch._C._dispatch_keys(x)
    bits = keys.raw_repr()
    found = _addressable.get(bits)
    if found is None:  # a key that is not listed changes the meaning of the memory, or the tensor has none
        names = str(keys).partition("(")[2].rstrip(")").split(", ")
        found = _addressable[bits] = all(_OWN.fullmatch(name) for name in names)
    return found


def direct(*tensors: Tensor | None) -> bool:
    """Whether kernels can read these tensors. If not, the call uses the torch.library ops."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING):
        return False
    keys, known = torch._C._dispatch_keys, _addressable  # in line: small batches are sensitive to every call
    for x in tensors:  # noqa: SIM110 (a generator costs more)
        if x is not None and not known.get(keys(x).raw_repr()) and not addressable(x):
            return False
    return True


class _Waited(torch.autograd.Function):
    """Waits for the result of a functional collective."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        there: Tensor = x.wait()
        return there.view_as(there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def waited(value: Any) -> Any:
    """The result of a functional collective after waiting for it; any other value is returned as it is."""
    return _Waited.apply(value) if hasattr(value, "trigger_wait") else value  # type: ignore[no-untyped-call]


def local(value: Tensor, name: str) -> Tensor:
    """A tensor argument that is not a DTensor, after waiting for a collective that writes it.

    Raises:
        TypeError: a DTensor if none is expected, or a masked, nested or sparse tensor.
    """
    if type(value) is not Tensor:
        if is_dtensor(value):
            raise TypeError(
                f"{name} is a DTensor, understood only where the logits (class weights, in a fused loss) are DTensors, "
                f"and of alpha, num_items and grad_out never: pass {name}.to_local(), or .full_tensor()"
            )
        if isinstance(value, torch.masked.MaskedTensor):
            raise TypeError(
                f"{name} is a MaskedTensor: pass {name}.to_tensor(value), where -inf in logits marks classes that "
                "cannot happen, and mask rows with ignore_index or weight"
            )
        value = waited(value)
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: pass the rows of all its parts as one tensor, {name}.values() of a jagged one"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: expected a dense (strided) tensor; call .to_dense() first")
    return value
