"""The checks of a call's arguments, and their error messages: each function takes an argument as the caller passed it
and returns it in the form that the sweeps read, or raises."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..classes.sets import ClassSets
from ..targets.projection import BOUNDS, Projection
from .call import Constraints, Rows, vector_dtype
from .fields import NUMBERS, TEMPERATURES
from .layout import DTYPES, row_count, row_layout
from .tensors import addressable, direct, local
from .vectors import check_items

if TYPE_CHECKING:
    from .call import Call
    from .shard import Shard

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def logits_of(value: object, name: str, *, empty: bool = False) -> Tensor:
    """Logits (..., V); empty: V may be 0."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of logits (..., V), got {type(value).__name__}")
    value = local(value, name)
    if value.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} has dtype {value.dtype}: expected one of {known}")
    shape = value.shape
    if not shape or (shape[-1] == 0 and not empty):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected (..., V) with at least one class")
    return value


def classes_of(
    student: Tensor,
    teacher: Tensor | None,
    num_classes: int | None,
    names: tuple[str, str],
    shard: Shard | None = None,
) -> int:
    """Number of leading columns that are classes; for a shard, all columns, until its first class is known."""
    width = student.shape[-1]
    if shard is not None:
        if teacher is not None and teacher.shape[-1] != width:
            raise ValueError(
                f"{names[0]} has {width} classes on this rank and {names[1]} has {teacher.shape[-1]}: expected both "
                "cut at the same classes; cudfast.distributed.reshard moves one of them to where the other is"
            )
        return width
    if num_classes is None and (teacher is None or teacher.shape[-1] == width):
        return width
    widths = {names[0]: width}
    if teacher is not None:
        widths[names[1]] = teacher.shape[-1]
    if num_classes is not None:
        for name, columns in widths.items():
            if num_classes > columns:
                raise ValueError(f"num_classes={num_classes} is more than the {columns} classes of {name}")
        return num_classes
    first, second = widths.values()
    raise ValueError(
        f"{names[0]} has {first} classes and {names[1]} has {second}: expected the same width. If one of them is "
        f"padded, pass num_classes={min(first, second)} (the number of real classes)"
    )


def labels_of(labels: object, logits: Tensor, name: str) -> Tensor | None:
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a torch.Tensor of class indices (...), got {type(labels).__name__}")
    labels = local(labels, "labels")
    if labels.dtype not in _INTEGERS:
        raise TypeError(
            f"labels has dtype {labels.dtype}: expected int64 class indices (class probabilities belong to the teacher)"
        )
    if labels.shape != logits.shape[:-1] or labels.device != logits.device:
        raise _misplaced(labels, "labels", logits, name)
    if labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    return labels if labels.dim() == 1 and labels.is_contiguous() else labels.reshape(-1).contiguous()


def _misplaced(vector: Tensor, name: str, logits: Tensor, logits_name: str) -> ValueError:
    shape = logits.shape
    if logits_name.endswith("logits") and len(shape) > 2 and vector.shape == shape[:1] + shape[2:]:
        return ValueError(
            f"{name} has shape {tuple(vector.shape)} and {logits_name} {tuple(shape)}, with its classes along axis 1, "
            f"as in nn.CrossEntropyLoss: expected classes last, pass {logits_name}.movedim(1, -1) (and likewise every "
            "other logits)"
        )
    if vector.shape != shape[:-1]:
        hint = ""
        if logits_name.endswith("logits") and vector.shape == shape[1:]:
            hint = f"; if its classes are the first axis, pass {logits_name}.movedim(0, -1)"
        return ValueError(
            f"{name} has shape {tuple(vector.shape)}: expected {tuple(shape[:-1])}, that of {logits_name} without its "
            f"last axis{hint}"
        )
    return ValueError(f"{name} is on {vector.device} and {logits_name} on {logits.device}: move them to one device")


def vector_of(vector: Tensor, name: str, logits: Tensor, logits_name: str) -> Tensor:
    """(N,) f64 from a tensor of the rows' shape: floating point, integers, or a bool mask."""
    vector = local(vector, name)
    if vector.dtype.is_complex:
        raise TypeError(f"{name} has dtype {vector.dtype}: expected real numbers")
    if vector.requires_grad:
        raise ValueError(f"{name} requires grad, and no gradient flows to it: pass {name}.detach()")
    if vector.shape != logits.shape[:-1] or vector.device != logits.device:
        raise _misplaced(vector, name, logits, logits_name)
    return vector.reshape(-1).to(vector_dtype(logits.device)).contiguous()


def biased(logits: Tensor | None, bias: object) -> Tensor:
    """The teacher's logits plus a bias (V,), in the wider dtype of both."""
    if logits is None:
        raise TypeError("bias was given without a teacher: it is added to the teacher's logits")
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a torch.Tensor (V,) of the teacher's classes, got {type(bias).__name__}")
    bias = local(bias, "bias")
    if bias.shape != logits.shape[-1:] or bias.dtype not in DTYPES:
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)}: expected floating point ({logits.shape[-1]},), one value for "
            "each of the teacher's classes"
        )
    if bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("bias requires grad, and no gradient flows to the teacher: pass bias.detach()")
    if bias.device != logits.device:
        raise ValueError(f"bias is on {bias.device} and the teacher's logits on {logits.device}: move them together")
    return logits + bias


def weight_of(weight: object, logits: Tensor, name: str) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a torch.Tensor with one weight per row, got {type(weight).__name__}")
    return vector_of(weight, "weight", logits, name)


def temperature_of(temperature: object, default: float, logits: Tensor, name: str) -> tuple[float, Tensor | None]:
    """One temperature for all rows, and (N,) f64 if each row has its own."""
    if temperature is None:
        return default, None
    if isinstance(temperature, Tensor):
        if temperature.dim() == 0 and logits.dim() != 1:
            temperature = temperature.expand(logits.shape[:-1])
        return default, vector_of(temperature, "temperature", logits, name)
    if isinstance(temperature, bool) or not isinstance(temperature, NUMBERS):
        raise TypeError(f"temperature: expected a number or a tensor (...), got {type(temperature).__name__}")
    if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
        raise ValueError(f"temperature={temperature}: expected a number in [{TEMPERATURES[0]:g}, {TEMPERATURES[1]:g}]")
    return float(temperature), None


def num_items_of(num_items: object) -> float | Tensor | None:
    if num_items is None:
        return None
    if isinstance(num_items, Tensor):
        num_items = local(num_items, "num_items")
        if num_items.numel() != 1 or num_items.dtype == torch.bool:
            raise ValueError(f"num_items is {num_items.dtype} {tuple(num_items.shape)}: expected one number")
        if not num_items.is_cpu or not direct(num_items):
            return num_items.detach().reshape(())
        num_items = num_items.item()
    if isinstance(num_items, bool) or not isinstance(num_items, NUMBERS):
        raise TypeError(f"num_items: expected a number or a tensor of one, got {type(num_items).__name__}")
    if torch.compiler.is_compiling():
        return num_items  # type: ignore[return-value]  # symbolic; its value is looked at when the graph runs
    if not (math.isfinite(num_items) and num_items >= 0):
        raise ValueError(f"num_items={num_items}: expected a finite number >= 0")
    return float(num_items)


def check_call(rows: Rows, name: str, call: Call) -> None:
    """Checks that concern more than one argument: the mode that the call runs in, and the memory of its gradient."""
    check_mode(rows.logits, rows.target)
    items = rows.num_items
    host = isinstance(items, float) and not torch.compiler.is_compiling()
    if host and items == 0 and direct(rows.logits, rows.labels, rows.weight):
        check_items(rows, call.options)
    if call.grad_out is None and not call.options.inplace:
        return
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "inplace=True and grad_out do not work under torch.compile, which owns the memory of a graph: "
            "leave them out there"
        )
    if not direct(rows.logits):
        raise RuntimeError(f"inplace=True and grad_out cannot be used with {name}, {_NO_MEMORY}: leave them out there")
    _check_gradient_memory(rows.logits, name, rows.target, call)


_NO_MEMORY = "which has no memory of its own (a fake, meta or functional tensor, a wrapper, or the negative of another)"


def check_mode(*tensors: Tensor | None) -> None:
    """Raises in the modes of autograd that the losses do not support: torch.func, torch.jit.trace and forward mode."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "cudfast losses do not work inside torch.func transforms (vmap, grad, jvp, jacrev, ...): use "
            "loss.backward() or torch.autograd.grad, and pass a batch as one tensor instead of mapping over it"
        )
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "cudfast losses are not recorded by torch.jit.trace, which would return unwritten memory: use "
            "torch.compile or torch.export, or trace the model without its loss"
        )
    if forward_ad._current_level >= 0 and any(x is not None and _has_tangent(x) for x in tensors):
        raise RuntimeError(
            "an input carries a tangent of forward-mode AD, for which cudfast losses have no derivative: use "
            "loss.backward() or torch.autograd.grad, or pass forward_ad.unpack_dual(x).primal"
        )


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _check_gradient_memory(logits: Tensor, name: str, teacher: Tensor | None, call: Call) -> None:
    """Raises if `inplace` or `grad_out` would overwrite a tensor that autograd or the caller still needs."""
    out = call.grad_out
    if call.options.inplace:
        if out is not None:
            raise ValueError("inplace=True and grad_out were both given: the gradient can go to one place only")
        if logits.requires_grad and logits.is_leaf and torch.is_grad_enabled():
            raise ValueError(
                f"inplace=True would overwrite {name}, a leaf that requires grad (a parameter or an input you keep): "
                "use inplace=False, or pass the output of a layer"
            )
        out, out_name = logits, name
    elif out is not None:
        if not isinstance(out, Tensor):
            raise TypeError(f"grad_out: expected a torch.Tensor, got {type(out).__name__}")
        if not addressable(out):
            raise TypeError(f"grad_out is a {type(out).__name__} {_NO_MEMORY}: expected a plain torch.Tensor")
        if out.shape != logits.shape or out.dtype != logits.dtype or out.device != logits.device:
            raise ValueError(
                f"grad_out is {out.dtype} {tuple(out.shape)} on {out.device}: expected {logits.dtype} "
                f"{tuple(logits.shape)} on {logits.device}, as {name}"
            )
        if out.requires_grad:
            raise ValueError("grad_out requires grad: expected plain memory, e.g. torch.empty_like(logits)")
        out_name = "grad_out"
        if _overlap(out, logits):
            raise ValueError(f"grad_out shares memory with {name}: use inplace=True to write the gradient over it")
    assert isinstance(out, Tensor)
    if row_layout(out) is None or _overlaps_itself(out):
        raise ValueError(
            f"{out_name} has shape {tuple(out.shape)} and strides {out.stride()}: expected rows that are dense and do "
            "not overlap, to write a gradient into; call .contiguous() first"
        )
    if teacher is not None and _overlap(out, teacher):
        raise ValueError(f"{out_name} shares memory with teacher_logits, which would be overwritten: clone one of them")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share an address: the stride of some axis is less than the span of the axes inside."""
    span = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1):
        if stride < span:
            return True
        span = stride * size
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors overlap."""

    def span(x: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    (a_begin, a_end), (b_begin, b_end) = span(a), span(b)
    return a_begin < b_end and b_begin < a_end


def constraints_of(projection: Projection, logits: Tensor, classes: int, name: str) -> Constraints:
    """The constraints of a projection for the rows of `logits`."""
    count, dtype = row_count(logits), vector_dtype(logits.device)

    def column(bound: str) -> Tensor:
        value = getattr(projection, bound)
        if not isinstance(value, Tensor):
            return logits.new_full((count,), torch.nan if value is None else value, dtype=dtype)
        if value.dim() > 0:
            return vector_of(value, f"Projection({bound}=...)", logits, name)
        return value.to(logits.device, dtype).expand(count)

    bounds = torch.stack([column(bound) for bound in BOUNDS], -1)
    wrong = projection.wrong if isinstance(projection.wrong, ClassSets) else None
    for what, sets in (("near", projection.near), ("wrong", wrong)):
        if sets is None:
            continue
        if sets.num_classes != classes:
            raise ValueError(
                f"Projection({what}=...) has sets for {sets.num_classes} classes: expected {classes}, as {name}"
            )
        if sets.indices.device != logits.device:
            raise ValueError(
                f"Projection({what}=...) is on {sets.indices.device} and {name} on {logits.device}: "
                f"use {what}.to({str(logits.device)!r})"
            )
    return Constraints(
        projection.near,
        wrong,
        projection.wrong is not None and wrong is None,
        bounds,
        projection.on_infeasible == "relax",
        not (projection.min_entropy is None and projection.max_entropy is None),
    )
