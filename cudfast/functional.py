"""The losses as functions: they check and flatten their arguments, and choose the path of the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor

from .autograd.node import evaluate
from .distributed.dtensors import localized
from .distributed.group import telling
from .options import CUDOptions, DUSOptions, RowOptions
from .rows.arguments import rows_of
from .rows.call import Call
from .rows.checks import (
    biased,
    check_call,
    classes_of,
    constraints_of,
    labels_of,
    logits_of,
)
from .rows.shard import Shard
from .rows.tensors import is_dtensor
from .statistics import (
    Evaluated,
    RowStatistics,
    StudentStatistics,
    TeacherStatistics,
    row_statistics,
    student_statistics,
    teacher_statistics,
)
from .targets.projection import Projection


@overload
def cud_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = ...,
    options: CUDOptions = ...,
    *,
    weight: Tensor | None = ...,
    temperature: float | Tensor | None = ...,
    bias: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    return_stats: Literal[False] = ...,
    grad_out: Tensor | None = ...,
    shard: Shard | None = ...,
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
    bias: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    return_stats: Literal[True],
    grad_out: Tensor | None = ...,
    shard: Shard | None = ...,
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
    bias: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    return_stats: bool,
    grad_out: Tensor | None = ...,
    shard: Shard | None = ...,
) -> Tensor | tuple[Tensor, StudentStatistics]: ...


def cud_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    options: CUDOptions = CUDOptions(),  # noqa: B008 (frozen)
    *,
    weight: Tensor | None = None,
    temperature: float | Tensor | None = None,
    bias: Tensor | None = None,
    num_items: float | Tensor | None = None,
    return_stats: bool = False,
    grad_out: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor | tuple[Tensor, StudentStatistics]:
    """Student loss of Calibrated Uncertainty Distillation, Eq. 9. See `cudfast.CUDLoss` for the meaning of the terms.

    Args:
        student_logits: (..., V) float32, float64, bfloat16 or float16. Any row stride; the last axis dense.
        teacher_logits: (..., V), its own dtype; must not require grad. None is allowed when kd_weight is 0.
        labels: (...) integer class indices, `ignore_index` or `unlabeled_index`; None: every row is unlabelled.
        options: the settings of the loss; see `CUDOptions`.
        weight: (...) one weight per row, finite and >= 0, or a bool mask; a row of weight 0 is excluded.
        temperature: overrides options.temperature: a number, or (...) one value per row, in [1e-4, 1e4]. It is the
            teacher's temperature, too, unless options.teacher_temperature is given.
        bias: (V,) added to the teacher's logits before its calibration: at temperature 1, before the soft targets are
            tempered. The sum is stored once per call, (..., V).
        num_items: replaces both divisors of reduction="mean" (and divides the other reductions): a number or a tensor
            with one element, as trainers with gradient accumulation pass it. On a CPU, 0 is an error unless every row
            is excluded.
        return_stats: also return `StudentStatistics` of every row, from the same pass.
        grad_out: (..., V) memory for the gradient, in the student's dtype. Without
            it, large CPU gradients come from a pool (see `cudfast.empty_cache`).
        shard: `cudfast.distributed.Shard.of(group)` if the classes are sharded over a process group. V is then the
            number of classes of this rank; all other arguments refer to all classes. See `cudfast.CUDLoss`.

    Returns:
        The loss: () or, for reduction="none", (...); float32, or float64 if any logits that the loss uses are float64.
        With return_stats, a pair.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the error for a label out
            of range names its row. RuntimeError: an unavailable backend, a second derivative, a torch.func transform.

    Example:
        >>> student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
        >>> loss = cud_loss(student, teacher, torch.tensor([1, 2, -1, -100]), CUDOptions(temperature=4.0))
        >>> loss.backward()
        >>> student.grad[3].abs().sum().item()  # the ignored row
        0.0
    """
    if not isinstance(options, CUDOptions):
        raise TypeError(f"options: expected CUDOptions, got {type(options).__name__}")
    plain = options.kd_weight == 0 and not return_stats  # cross-entropy needs one matrix and one exponential
    needed = "" if plain else "unless kd_weight=0 and return_stats=False"
    loss, found = _distilled(
        student_logits,
        teacher_logits,
        labels,
        options.alone if plain else options.rows,
        needed,
        weight=weight,
        temperature=temperature,
        num_items=num_items,
        statistics=return_stats,
        grad_out=grad_out,
        shard=shard,
        bias=bias,
    )
    return (loss, student_statistics(found)) if return_stats else loss


def _distilled(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    options: RowOptions,
    needed: str,
    *,
    weight: Tensor | None,
    temperature: float | Tensor | None,
    num_items: float | Tensor | None,
    statistics: bool,
    grad_out: Tensor | None,
    shard: Shard | None,
    term_weights: Mapping[str, float | Tensor] | None = None,
    per_class: Mapping[str, Tensor] | None = None,
    smoothing: float | Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Evaluated]:
    """The loss of the options' terms, and what its statistics are computed from.

    needed: when the teacher may be left out, in words for an error; "": a teacher is checked, but not read.
    """
    if is_dtensor(student_logits):
        logits, vectors, shard = localized(
            {"student_logits": student_logits, "teacher_logits": teacher_logits}, (labels, weight, temperature), shard
        )
        (student_logits, teacher_logits), (labels, weight, temperature) = logits, vectors
    with telling(shard):
        student = logits_of(student_logits, "student_logits", empty=shard is not None)
        teacher = None if teacher_logits is None else _teacher_of(teacher_logits, student, shard)
        if teacher is None and needed:
            raise TypeError(f"teacher_logits is None: expected logits (..., V), {needed}")
        if bias is not None:
            teacher = biased(teacher, bias)
        classes = classes_of(student, teacher, options.num_classes, ("student_logits", "teacher_logits"), shard)
        flat_labels = labels_of(labels, student, "student_logits")
        constraints = None
        if isinstance(options.calibration, Projection) and flat_labels is not None:
            in_all = classes
            if shard is not None and (sets := options.calibration.sets):
                in_all = sets[0].num_classes
                shard = shard.of_all(in_all)
            constraints = constraints_of(options.calibration, student, in_all, "student_logits")
        rows, options, scales, shard = rows_of(
            student,
            "student_logits",
            teacher if needed else None,
            flat_labels,
            options,
            classes,
            shard,
            weight=weight,
            num_items=num_items,
            temperature=temperature,
            term_weights=term_weights,
            per_class=per_class,
            smoothing=smoothing,
            constraints=constraints,
        )
        call = Call(options, statistics, grad_out, shard)
        check_call(rows, "student_logits", call)
    loss, state = evaluate(rows, call)
    if options.reduction == "none":
        loss = loss.reshape(student.shape[:-1])
    return loss, Evaluated(rows, options, state, scales)


def _teacher_of(teacher_logits: Tensor, student: Tensor, shard: Shard | None) -> Tensor:
    if isinstance(teacher_logits, Tensor) and not (teacher_logits.is_floating_point() or teacher_logits.is_complex()):
        raise TypeError(
            f"teacher_logits has dtype {teacher_logits.dtype}: expected floating point logits (..., V); class indices "
            "are labels: pass labels="
        )
    teacher = logits_of(teacher_logits, "teacher_logits", empty=shard is not None)
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_logits requires grad, and no gradient flows to the teacher: run the teacher under "
            "torch.no_grad(), or pass teacher_logits.detach()"
        )
    if teacher.shape != student.shape and teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"student_logits has shape {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)}: "
            "expected the same leading shape"
        )
    if teacher.device != student.device:
        raise ValueError(
            f"student_logits is on {student.device} and teacher_logits on {teacher.device}: move them to one device"
        )
    return teacher


def composed_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    options: RowOptions,
    *,
    weight: Tensor | None = None,
    temperature: float | Tensor | None = None,
    term_weights: Mapping[str, float | Tensor] | None = None,
    smoothing: float | Tensor | None = None,
    bias: Tensor | None = None,
    per_class: Mapping[str, Tensor] | None = None,
    num_items: float | Tensor | None = None,
    return_stats: bool = False,
    grad_out: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """The loss of a sum of terms. See `cudfast.Loss`, whose `options` these are.

    Args:
        student_logits: (..., V), as in `cud_loss`.
        teacher_logits: (..., V), as in `cud_loss`; may be None if no term distils.
        labels: (...), as in `cud_loss`; None: every row is unlabelled.
        options: `Loss(...).options`.
        weight: (...) one weight per row, as in `cud_loss`.
        temperature: of the distillation terms, as in `cud_loss`.
        term_weights: names of terms to factors of their coefficients: a number, or a tensor () or (...).
        smoothing: label smoothing of the cross-entropies, instead of their own: a number or a tensor () or (...) in
            [0, 1].
        bias: (V,) added to the teacher's logits before its calibration, as in `cud_loss`.
        per_class: names of terms to tensors (V,): alpha > 0 of a focal term, class weights >= 0 of a cross-entropy.
        num_items: replaces every divisor of reduction="mean", as in `cud_loss`.
        return_stats: also return `RowStatistics`.
        grad_out: (..., V) memory for the gradient.
        shard: as in `cud_loss`.

    Returns:
        The loss: () or, for reduction="none", (...), as `cud_loss`. With return_stats, a pair.

    Raises:
        TypeError, ValueError, RuntimeError: as `cud_loss`.

    Example:
        >>> from cudfast import CrossEntropy, Loss
        >>> composed_loss(torch.zeros(2, 4), None, torch.tensor([0, 1]), Loss(CrossEntropy()).options).item()
        1.3862943649291992
    """
    if not isinstance(options, RowOptions):
        raise TypeError(f"options: expected Loss(...).options, got {type(options).__name__}")
    if labels is None and not options.whole:
        raise TypeError("labels is None: every term of this loss needs a label")
    loss, found = _distilled(
        student_logits,
        teacher_logits,
        labels,
        options,
        "unless no term distils" if options.distils else "",
        weight=weight,
        temperature=temperature,
        num_items=num_items,
        statistics=return_stats,
        grad_out=grad_out,
        shard=shard,
        term_weights=term_weights,
        per_class=per_class,
        smoothing=smoothing,
        bias=bias,
    )
    return (loss, row_statistics(found)) if return_stats else loss


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
    shard: Shard | None = ...,
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
    shard: Shard | None = ...,
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
    shard: Shard | None = ...,
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
    shard: Shard | None = None,
) -> Tensor | tuple[Tensor, TeacherStatistics]:
    """Teacher loss of Calibrated Uncertainty Distillation, Eq. 3. See `cudfast.DUSLoss` for the meaning of the terms.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16. Any row stride; the last axis dense.
        labels: (...) integer class indices, or `ignore_index`.
        options: the settings of the loss; see `DUSOptions`.
        alpha: (V,) focal scale per class, > 0; overrides options.alpha.
        weight: (...) one weight per row, finite and >= 0.
        num_items: replaces the divisor of reduction="mean" (and divides the other reductions).
        return_stats: also return `TeacherStatistics` of every row, from the same pass.
        grad_out: (..., V) memory for the gradient, in the logits' dtype.
        shard: as in `cud_loss`; alpha has one value for each of all classes.

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
    if is_dtensor(logits):
        (logits,), (labels, weight), shard = localized({"logits": logits}, (labels, weight), shard)
    with telling(shard):
        logits = logits_of(logits, "logits", empty=shard is not None)
        if labels is None:
            raise TypeError("labels is None: the teacher loss needs a label (or ignore_index) for every row")
        classes = classes_of(logits, None, options.num_classes, ("logits", ""), shard)
        flat_labels = labels_of(labels, logits, "logits")
        assert flat_labels is not None
        rows, row_options, scales, shard = rows_of(
            logits,
            "logits",
            None,
            flat_labels,
            options.rows,
            classes,
            shard,
            weight=weight,
            num_items=num_items,
            per_class=options.per_class(alpha),
        )
        call = Call(row_options, return_stats, grad_out, shard)
        check_call(rows, "logits", call)
    loss, state = evaluate(rows, call)
    if options.reduction == "none":
        loss = loss.reshape(logits.shape[:-1])
    if not return_stats:
        return loss
    return loss, teacher_statistics(Evaluated(rows, row_options, state, scales))
