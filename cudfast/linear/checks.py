"""Checks of hidden states and of the weights of last layers, and their error messages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows.layout import DTYPES
from ..rows.tensors import direct, local

Layer = tuple[Tensor, Tensor | None]
"""Weight (V, D) and bias (V,)."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device_type: str) -> bool:  # torch 2.8 to 2.12 cannot trace this function of torch.amp
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Dtype of the torch.autocast region for this type of device; None outside of one."""
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(x: object) -> object:
    """The value as a linear layer reads it: under torch.autocast, float32 tensors are cast to the region's dtype."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None else x.to(dtype)


def hidden_of(value: object, name: str) -> Tensor:
    """Hidden states (..., D)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of hidden states (..., D), got {type(value).__name__}")
    value = _checked(value, name)
    if not value.shape or value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected (..., D) with at least one feature")
    return value


def _checked(value: Tensor, name: str) -> Tensor:
    value = local(value, name)
    if value.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} has dtype {value.dtype}: expected one of {known}")
    if value.numel() and direct(value) and not value.data_ptr():
        raise ValueError(
            f"{name} has no memory: its storage has been freed (as FSDP frees a parameter that it has not gathered); "
            "gather it, or call the loss inside the module that FSDP wraps"
        )
    return value


def check_gathered(
    value: Tensor | None,
    name: str,
    remedy: str = "call the loss and backward within deepspeed.zero.GatheredParameters([weight, bias]), or use CUDLoss "
    "or DUSLoss, which take logits",
) -> None:
    """Raises for a parameter that DeepSpeed's ZeRO-3 has partitioned and not gathered: its shape is (0,)."""
    if value is not None and value.dim() == 1 and value.shape[0] == 0:
        raise ValueError(
            f"{name} has shape (0,): DeepSpeed ZeRO-3 has partitioned this parameter and not gathered it here (FSDP "
            f"leaves the same of some); {remedy}"
        )


def layer_of(
    weight: object, bias: object, hidden: Tensor, names: tuple[str, str, str], *, empty: bool = False
) -> Layer:
    """Checked weight (V, D) and bias (V,) for hidden states (..., D). names: of weight, bias, hidden; empty: V may be
    0."""
    w_name, b_name, h_name = names
    if not isinstance(weight, Tensor):
        raise TypeError(f"{w_name}: expected a torch.Tensor (V, D), as nn.Linear has it, got {type(weight).__name__}")
    weight = _checked(weight, w_name)
    check_gathered(weight, w_name)
    if weight.dim() != 2 or (weight.shape[0] == 0 and not empty):
        raise ValueError(f"{w_name} has shape {tuple(weight.shape)}: expected (V, D) with at least one class")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{w_name} has shape {tuple(weight.shape)} and {h_name} {tuple(hidden.shape)}: expected (V, D) and "
            "(..., D) with the same D"
        )
    if 1 not in weight.stride() and weight.numel() > 1:
        raise ValueError(
            f"{w_name} has strides {weight.stride()}: expected dense rows or columns; call .contiguous() first"
        )
    if bias is None:
        pass
    elif not isinstance(bias, Tensor):
        raise TypeError(f"{b_name}: expected a torch.Tensor (V,) or None, got {type(bias).__name__}")
    elif (bias := local(bias, b_name)).shape != weight.shape[:1]:
        check_gathered(bias, b_name)
        raise ValueError(f"{b_name} has shape {tuple(bias.shape)}: expected {tuple(weight.shape[:1])}, as {w_name}")
    for name, x in ((w_name, weight), (b_name, bias)):
        if not isinstance(x, Tensor):
            continue
        if x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} and {h_name} {hidden.dtype}: expected the same; cast one of them, or call "
                "the loss under torch.autocast as the model"
            )
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} and {h_name} on {hidden.device}: move them to one device")
    return weight, bias


def check_frozen(names: dict[str, object]) -> None:
    """Raises for teacher tensors that require grad, since no gradient flows to the teacher."""
    for name, value in names.items():
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, and no gradient flows to the teacher: run the teacher under "
                f"torch.no_grad(), or pass {name}.detach()"
            )


def check_alike(hidden: Tensor, other: Tensor, names: tuple[str, str]) -> None:
    """Raises unless both sides have the same leading shape and device."""
    if other.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{names[0]} has shape {tuple(hidden.shape)} and {names[1]} {tuple(other.shape)}: expected the same "
            "leading shape"
        )
    if other.device != hidden.device:
        raise ValueError(f"{names[0]} is on {hidden.device} and {names[1]} on {other.device}: move them to one device")
