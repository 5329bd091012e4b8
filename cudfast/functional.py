"""The losses as functions: every check and error message once, then shapes, masks and the choice of path."""

from __future__ import annotations

import functools
import math
from typing import Literal, overload

import torch
from torch import Tensor

from .autograd import Call, evaluate
from .options import NUMBERS, TEMPERATURES, CUDOptions, DUSOptions
from .rows import DTYPES, Rows, row_layout, vector_dtype
from .statistics import StudentStatistics, TeacherStatistics, student_statistics, teacher_statistics

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def _logits(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of logits (..., V), got {type(value).__name__}")
    if value.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} has dtype {value.dtype}: expected one of {known}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: expected a dense (strided) tensor; call .to_dense() first")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected (..., V) with at least one class")
    return value


def _classes(student: Tensor, teacher: Tensor | None, num_classes: int | None, names: tuple[str, str]) -> int:
    """How many leading columns are classes."""
    if num_classes is None and (teacher is None or teacher.shape[-1] == student.shape[-1]):
        return student.shape[-1]
    widths = {names[0]: student.shape[-1]}
    if teacher is not None:
        widths[names[1]] = teacher.shape[-1]
    if num_classes is not None:
        for name, width in widths.items():
            if num_classes > width:
                raise ValueError(f"num_classes={num_classes} is more than the {width} columns of {name}")
        return num_classes
    first, second = widths.values()
    raise ValueError(
        f"{names[0]} has {first} classes and {names[1]} has {second}: expected the same width. If one of them is "
        f"padded, pass num_classes={min(first, second)} (the number of real classes)"
    )


def _labels(labels: object, logits: Tensor, name: str) -> Tensor | None:
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a torch.Tensor of class indices (...), got {type(labels).__name__}")
    if labels.dtype not in _INTEGERS:
        raise TypeError(
            f"labels has dtype {labels.dtype}: expected int64 class indices (class probabilities belong to the teacher)"
        )
    _vector_shape(labels, "labels", logits, name)
    if labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    return labels if labels.dim() == 1 and labels.is_contiguous() else labels.reshape(-1).contiguous()


def _vector_shape(vector: Tensor, name: str, logits: Tensor, logits_name: str) -> None:
    if vector.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}: expected {tuple(logits.shape[:-1])}, that of {logits_name} "
            "without its last axis"
        )
    if vector.device != logits.device:
        raise ValueError(f"{name} is on {vector.device} and {logits_name} on {logits.device}: move them to one device")


def _vector(vector: Tensor, name: str, logits: Tensor, logits_name: str) -> Tensor:
    """(N,) f64 from a float tensor of the rows' shape."""
    if not vector.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {vector.dtype}: expected floating point")
    if vector.requires_grad:
        raise ValueError(f"{name} requires grad, and no gradient flows to it: pass {name}.detach()")
    _vector_shape(vector, name, logits, logits_name)
    return vector.reshape(-1).to(vector_dtype(logits.device)).contiguous()


def _weight(weight: object, logits: Tensor, name: str) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a torch.Tensor with one weight per row, got {type(weight).__name__}")
    return _vector(weight, "weight", logits, name)


def _num_items(num_items: object) -> float | Tensor | None:
    if num_items is None:
        return None
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.dtype == torch.bool:
            raise ValueError(f"num_items is {num_items.dtype} {tuple(num_items.shape)}: expected one number")
        if torch.compiler.is_compiling() or not num_items.is_cpu:
            return num_items.detach().reshape(())
        num_items = num_items.item()
    if isinstance(num_items, bool) or not isinstance(num_items, NUMBERS):
        raise TypeError(f"num_items: expected a number or a tensor of one, got {type(num_items).__name__}")
    if not (math.isfinite(num_items) and num_items >= 0):
        raise ValueError(f"num_items={num_items}: expected a finite number >= 0")
    return float(num_items)


def _check_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "cudfast losses do not work inside torch.func transforms (vmap, grad, jvp, jacrev, ...): use "
            "loss.backward() or torch.autograd.grad, and pass a batch as one tensor instead of mapping over it"
        )


def _check_gradient_memory(logits: Tensor, name: str, teacher: Tensor | None, call: Call) -> None:
    """in-place and grad_out: what autograd or the caller would notice too late."""
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
    else:
        return
    if row_layout(out) is None or _overlaps_itself(out):
        raise ValueError(
            f"{out_name} has shape {tuple(out.shape)} and strides {out.stride()}: expected rows that are dense and do "
            "not overlap, to write a gradient into; call .contiguous() first"
        )
    if teacher is not None and _overlap(out, teacher):
        raise ValueError(f"{out_name} shares memory with teacher_logits, which would be overwritten: clone one of them")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may lie in one place: some axis steps by less than the axes inside it span."""
    span = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1):
        if stride < span:
            return True
        span = stride * size
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors meet."""

    def span(x: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    (a_begin, a_end), (b_begin, b_end) = span(a), span(b)
    return a_begin < b_end and b_begin < a_end


def _call(rows: Rows, name: str, options: CUDOptions | DUSOptions, statistics: bool, grad_out: Tensor | None) -> Call:
    _check_transforms()
    call = Call(options, statistics, grad_out)
    if options.inplace or grad_out is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "inplace=True and grad_out do not work under torch.compile, which owns the memory of a graph: "
                "leave them out there"
            )
        _check_gradient_memory(rows.logits, name, rows.target, call)
    return call


@overload
def cud_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = ...,
    options: CUDOptions = ...,
    *,
    weight: Tensor | None = ...,
    temperature: float | Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    return_stats: Literal[False] = ...,
    grad_out: Tensor | None = ...,
) -> Tensor: ...
@overload
def cud_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = ...,
    options: CUDOptions = ...,
    *,
    weight: Tensor | None = ...,
    temperature: float | Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    return_stats: Literal[True],
    grad_out: Tensor | None = ...,
) -> tuple[Tensor, StudentStatistics]: ...
@overload
def cud_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = ...,
    options: CUDOptions = ...,
    *,
    weight: Tensor | None = ...,
    temperature: float | Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    return_stats: bool,
    grad_out: Tensor | None = ...,
) -> Tensor | tuple[Tensor, StudentStatistics]: ...


def cud_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    options: CUDOptions = CUDOptions(),  # noqa: B008 (frozen)
    *,
    weight: Tensor | None = None,
    temperature: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    return_stats: bool = False,
    grad_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, StudentStatistics]:
    """Student loss of Calibrated Uncertainty Distillation, Eq. 9. See `cudfast.CUDLoss` for the meaning of the terms.

    Args:
        student_logits: (..., V) float32, float64, bfloat16 or float16. Any row stride; the last axis dense.
        teacher_logits: (..., V), its own dtype; must not require grad. None is allowed when kd_weight is 0.
        labels: (...) integer class indices, `ignore_index` or `unlabeled_index`; None: every row is unlabelled.
        options: what the loss is made of; see `CUDOptions`.
        weight: (...) one weight per row, finite and >= 0; a row of weight 0 counts for nothing.
        temperature: overrides options.temperature: a number, or (...) one value per row, in [1e-4, 1e4].
        num_items: replaces both divisors of reduction="mean" (and divides the other reductions): a number or a tensor
            of one, as trainers with gradient accumulation pass it.
        return_stats: also return `StudentStatistics` of every row, from the same pass.
        grad_out: (..., V) memory for the gradient, in the student's dtype. A fresh (N, V) allocation costs as much as
            the arithmetic.

    Returns:
        The loss: () or, for reduction="none", (...); float32, or float64 when the logits that count are. With
        return_stats, a pair.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; a label out of range names
            its row. RuntimeError: a backend that is not there, a second derivative, a torch.func transform.

    Example:
        >>> student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
        >>> loss = cud_loss(student, teacher, torch.tensor([1, 2, -1, -100]), CUDOptions(temperature=4.0))
        >>> loss.backward()
        >>> student.grad[3].abs().sum().item()  # the ignored row
        0.0
    """
    if not isinstance(options, CUDOptions):
        raise TypeError(f"options: expected CUDOptions, got {type(options).__name__}")
    student = _logits(student_logits, "student_logits")
    teacher = None
    if teacher_logits is not None:
        teacher = _logits(teacher_logits, "teacher_logits")
        if teacher.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "teacher_logits requires grad, and no gradient flows to the teacher: run the teacher under "
                "torch.no_grad(), or pass teacher_logits.detach()"
            )
        if teacher.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"student_logits has shape {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)}: expected "
                "the same leading shape"
            )
        if teacher.device != student.device:
            raise ValueError(
                f"student_logits is on {student.device} and teacher_logits on {teacher.device}: move them to one device"
            )
    elif options.kd_weight > 0 or return_stats:
        raise TypeError("teacher_logits is None: expected logits (..., V), unless kd_weight=0 and return_stats=False")
    classes = _classes(student, teacher, options.num_classes, ("student_logits", "teacher_logits"))
    flat_labels = _labels(labels, student, "student_logits")
    flat_weight = _weight(weight, student, "student_logits")
    items = _num_items(num_items)
    scalar, per_row = options.temperature, None
    if isinstance(temperature, Tensor) and temperature.dim() == 0 and student.dim() != 1:
        temperature = temperature.expand(student.shape[:-1])
    if isinstance(temperature, Tensor):
        per_row = _vector(temperature, "temperature", student, "student_logits")
    elif temperature is not None:
        if isinstance(temperature, bool) or not isinstance(temperature, NUMBERS):
            raise TypeError(f"temperature: expected a number or a tensor (...), got {type(temperature).__name__}")
        if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
            raise ValueError(
                f"temperature={temperature}: expected a number in [{TEMPERATURES[0]:g}, {TEMPERATURES[1]:g}]"
            )
        scalar = float(temperature)

    if options.kd_weight == 0 and not return_stats:  # plain cross-entropy needs one matrix and one exponential
        rows = Rows(student, None, flat_labels, flat_weight, None, 1.0, items, classes)
        call = _call(rows, "student_logits", _cross_entropy(options), False, grad_out)
    else:
        rows = Rows(student, teacher, flat_labels, flat_weight, per_row, scalar, items, classes)
        call = _call(rows, "student_logits", options, return_stats, grad_out)
    loss, state = evaluate(rows, call)
    if options.reduction == "none":
        loss = loss.reshape(student.shape[:-1])
    if not return_stats:
        return loss
    assert state is not None
    return loss, student_statistics(rows, options, state)


@functools.lru_cache(maxsize=64)
def _cross_entropy(options: CUDOptions) -> DUSOptions:
    """The teacher loss with cross-entropy alone is what is left of the student loss at kd_weight=0."""
    return DUSOptions(
        ce_weight=options.ce_weight,
        focal_weight=0.0,
        entropy_weight=0.0,
        ignore_index=options.ignore_index,
        unlabeled_index=options.unlabeled_index,
        reduction=options.reduction,
        save=options.save,
        inplace=options.inplace,
        backend=options.backend,
        check_finite=options.check_finite,
    )


@overload
def dus_loss(
    logits: Tensor,
    labels: Tensor,
    options: DUSOptions = ...,
    *,
    alpha: Tensor | None = ...,
    weight: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    return_stats: Literal[False] = ...,
    grad_out: Tensor | None = ...,
) -> Tensor: ...
@overload
def dus_loss(
    logits: Tensor,
    labels: Tensor,
    options: DUSOptions = ...,
    *,
    alpha: Tensor | None = ...,
    weight: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    return_stats: Literal[True],
    grad_out: Tensor | None = ...,
) -> tuple[Tensor, TeacherStatistics]: ...
@overload
def dus_loss(
    logits: Tensor,
    labels: Tensor,
    options: DUSOptions = ...,
    *,
    alpha: Tensor | None = ...,
    weight: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    return_stats: bool,
    grad_out: Tensor | None = ...,
) -> Tensor | tuple[Tensor, TeacherStatistics]: ...


def dus_loss(
    logits: Tensor,
    labels: Tensor,
    options: DUSOptions = DUSOptions(),  # noqa: B008 (frozen)
    *,
    alpha: Tensor | None = None,
    weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    return_stats: bool = False,
    grad_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, TeacherStatistics]:
    """Teacher loss of Calibrated Uncertainty Distillation, Eq. 3. See `cudfast.DUSLoss` for the meaning of the terms.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16. Any row stride; the last axis dense.
        labels: (...) integer class indices, or `ignore_index`.
        options: what the loss is made of; see `DUSOptions`.
        alpha: (V,) focal scale per class, > 0; overrides options.alpha.
        weight: (...) one weight per row, finite and >= 0.
        num_items: replaces the divisor of reduction="mean" (and divides the other reductions).
        return_stats: also return `TeacherStatistics` of every row, from the same pass.
        grad_out: (..., V) memory for the gradient, in the logits' dtype.

    Returns:
        The loss: () or, for reduction="none", (...); float32, or float64 for float64 logits. With return_stats, a pair.

    Raises:
        TypeError, ValueError, RuntimeError: as `cud_loss`.

    Example:
        >>> logits = torch.randn(4, 10, requires_grad=True)
        >>> loss = dus_loss(logits, torch.tensor([1, 2, 3, -100]), DUSOptions(gamma=2.0))
        >>> loss.backward()
        >>> logits.grad.shape
        torch.Size([4, 10])
    """
    if not isinstance(options, DUSOptions):
        raise TypeError(f"options: expected DUSOptions, got {type(options).__name__}")
    logits = _logits(logits, "logits")
    if labels is None:
        raise TypeError("labels is None: the teacher loss needs a label (or ignore_index) for every row")
    classes = _classes(logits, None, options.num_classes, ("logits", ""))
    flat_labels = _labels(labels, logits, "logits")
    assert flat_labels is not None
    per_row = None
    if alpha is not None:
        per_row = _alpha(alpha, flat_labels, classes)
    rows = Rows(
        logits,
        None,
        flat_labels,
        _weight(weight, logits, "logits"),
        per_row,
        options.alpha,
        _num_items(num_items),
        classes,
    )
    loss, state = evaluate(rows, _call(rows, "logits", options, return_stats, grad_out))
    if options.reduction == "none":
        loss = loss.reshape(logits.shape[:-1])
    if not return_stats:
        return loss
    assert state is not None
    return loss, teacher_statistics(rows, options, state)


def _alpha(alpha: object, labels: Tensor, classes: int) -> Tensor:
    """(N,) focal scale of each row's label; 1 where there is none (a label out of range is refused later)."""
    if not isinstance(alpha, Tensor):
        raise TypeError(f"alpha: expected a torch.Tensor (V,) with one value per class, got {type(alpha).__name__}")
    if alpha.shape != (classes,) or not alpha.dtype.is_floating_point:
        raise ValueError(f"alpha is {alpha.dtype} {tuple(alpha.shape)}: expected floating point ({classes},)")
    if alpha.requires_grad:
        raise ValueError("alpha requires grad, and no gradient flows to it: pass alpha.detach()")
    if alpha.device != labels.device:
        raise ValueError(f"alpha is on {alpha.device} and labels on {labels.device}: move them to one device")
    inside = (labels >= 0) & (labels < classes)
    chosen = alpha.detach().to(vector_dtype(labels.device))[torch.where(inside, labels, 0)]
    return torch.where(inside, chosen, 1)
