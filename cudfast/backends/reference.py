"""The reference backend: plain PyTorch on any device. The other backends are compared with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..options import CUDOptions, DUSOptions
from ..reference import (
    NOTHING,
    RowWeights,
    StudentGradient,
    StudentState,
    TeacherGradient,
    TeacherState,
    first_top1,
    row_weights,
    student_coefficients,
    student_element,
    student_finish,
    student_fold,
    teacher_coefficients,
    teacher_element,
    teacher_finish,
    teacher_fold,
)
from ..rows.call import STUDENT_COLUMNS, Rows, State, compute_dtype, vector_dtype
from ..rows.vectors import check_vectors, divisors_of
from ..targets.calibration import Projected, project, refuse_relaxed


def _flat(logits: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """(N, V) in the compute dtype."""
    return logits[..., : rows.classes].reshape(rows.n, rows.classes).to(dtype)


def _column(values: Tensor) -> Tensor:
    return values.unsqueeze(-1)


class Marks(NamedTuple):
    ignored: Tensor  # (N,) bool
    labelled: Tensor  # (N,) bool
    column: Tensor  # (N, 1) int64, a valid column even if there is no label
    weights: RowWeights


def mark(rows: Rows, options: CUDOptions | DUSOptions) -> Marks:
    device = rows.logits.device
    weight = rows.weight
    if weight is None:
        weight = torch.ones(rows.n, dtype=vector_dtype(device), device=device)
    ignored = weight == 0
    labelled = torch.zeros_like(ignored)
    index = torch.zeros(rows.n, dtype=torch.int64, device=device)
    if rows.labels is not None:
        ignored = ignored | (rows.labels == options.ignore_index)
        labelled = rows.labels != options.ignore_index
        if options.unlabeled_index is not None:
            labelled = labelled & (rows.labels != options.unlabeled_index)
        index = torch.where(labelled, rows.labels, 0)
    return Marks(ignored, labelled, _column(index), row_weights(ignored, labelled, weight))


def _share(weight: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(divisor > 0, weight / divisor, 0).to(dtype)


def _values(rows: Rows, dtype: torch.dtype) -> Tensor:
    """(N,) temperature or alpha."""
    if rows.per_row is not None:
        return rows.per_row.to(dtype)
    return torch.full((rows.n,), rows.scalar, dtype=dtype, device=rows.logits.device)


def _centre(logits: Tensor, m: Tensor) -> Tensor:
    return logits - _column(torch.where(m == NOTHING, 0, m))


def _projected(rows: Rows, marks: Marks, dtype: torch.dtype) -> Projected:
    assert rows.target is not None
    assert rows.constraints is not None
    found = project(_flat(rows.target, rows, dtype), marks.labelled, marks.column.squeeze(-1), rows.constraints)
    refuse_relaxed(rows, found)
    return found


def _target(rows: Rows, marks: Marks, dtype: torch.dtype) -> Tensor:
    """(N, V) teacher logits; calibrated if the calibration is a projection."""
    assert rows.target is not None
    return _flat(rows.target, rows, dtype) if rows.constraints is None else _projected(rows, marks, dtype).logits


def _extra(rows: Rows, marks: Marks, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The projected columns of a packed state, and the teacher's own top-1."""
    assert rows.target is not None
    found, t = _projected(rows, marks, dtype), _flat(rows.target, rows, dtype)
    k = first_top1(t)
    p, q = t.softmax(-1), found.logits.softmax(-1)
    zero = torch.zeros_like(found.beta)
    at = [x.gather(-1, column).squeeze(-1) for x, column in ((p, _column(k)), (p, marks.column), (q, marks.column))]
    return [found.beta, zero, zero, zero, zero, *at, found.moved, found.relaxed.any(-1).to(dtype)], k


def _student_state(rows: Rows, marks: Marks, dtype: torch.dtype) -> StudentState:
    s, t = _flat(rows.logits, rows, dtype), _target(rows, marks, dtype)
    m_t, m_s = t.amax(-1), s.amax(-1)
    k = first_top1(t)
    sums = student_fold(_centre(t, m_t), _centre(s, m_s), _column(1 / _values(rows, dtype)))
    at_label = [torch.where(marks.labelled, x.gather(-1, marks.column).squeeze(-1), NOTHING) for x in (t, s)]
    return StudentState._make(
        (m_t, s.gather(-1, _column(k)).squeeze(-1), m_s, *sums[:5], *at_label, sums.impossible, k)
    )


def _teacher_state(rows: Rows, marks: Marks, dtype: torch.dtype) -> TeacherState:
    z = _flat(rows.logits, rows, dtype)
    m = z.amax(-1)
    z_y = torch.where(marks.labelled, z.gather(-1, marks.column).squeeze(-1), NOTHING)
    return TeacherState(m, *teacher_fold(_centre(z, m)), z_y)


def placed(index: Tensor, first: int | Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Columns of classes in [first, first + width): a valid column, and whether the class is in that range."""
    inside = (index >= first) & (index < first + width)
    return torch.where(inside, index - first, 0), inside


def student_rows(
    rows: Rows,
    options: CUDOptions,
    marks: Marks,
    state: StudentState,
    divisors: Tensor,
    upstream: Tensor | None,
    first: int | Tensor = 0,
) -> tuple[Tensor, Tensor | None]:
    """Loss (N,) of every row, and the gradient (N, V) for `upstream` (N,) or () when that is given.

    With `first`, rows.logits contain only the classes [first, first + V), and the state is that of all classes.
    """
    dtype = state.m_t.dtype
    tau = _values(rows, dtype)
    kd = options.kd_weight * _share(marks.weights.kd, divisors[0], dtype)
    ce = options.ce_weight * _share(marks.weights.ce, divisors[1], dtype)
    loss = student_finish(state, marks.labelled, tau, options)
    value = torch.where(kd != 0, kd * loss.kd, 0) + torch.where(ce != 0, ce * loss.ce, 0)
    if upstream is None:
        return value, None
    s, t = _flat(rows.logits, rows, dtype), _target(rows, marks, dtype)
    dt, ds = _centre(t, state.m_t), s - _column(state.m_s)
    clipped = _column(marks.labelled & (loss.clip.r > 0))
    for index, new in ((_column(state.k), loss.clip.t_k), (marks.column, loss.clip.t_y)):
        at, inside = placed(index, first, rows.classes)
        dt = dt.scatter(-1, at, torch.where(clipped & inside, _column(new), dt.gather(-1, at)))
    c = student_coefficients(state, loss, tau, kd * upstream, ce * upstream)
    g = student_element(StudentGradient(*map(_column, c)), dt, ds, _column(1 / tau))
    at, inside = placed(marks.column, first, rows.classes)
    at_label = torch.where(_column(marks.labelled & (state.s_y > NOTHING)) & inside, -_column(c.label), 0)
    g = g.scatter_add(-1, at, at_label)
    return value, torch.where(_column((kd * upstream == 0) & (ce * upstream == 0)), 0, g)


def teacher_rows(
    rows: Rows,
    options: DUSOptions,
    marks: Marks,
    state: TeacherState,
    divisors: Tensor,
    upstream: Tensor | None,
    first: int | Tensor = 0,
) -> tuple[Tensor, Tensor | None]:
    """The same for the teacher loss."""
    dtype = state.m.dtype
    scale = _share(marks.weights.ce, divisors[1], dtype)
    loss = teacher_finish(state, _values(rows, dtype), options)
    value = torch.where(scale != 0, scale * loss.value, 0)
    if upstream is None:
        return value, None
    c = teacher_coefficients(loss, scale * upstream)
    x = _flat(rows.logits, rows, dtype) - _column(state.m)
    g = teacher_element(TeacherGradient(*map(_column, c)), x, _column(1 / state.z), _column(loss.log_z))
    at, inside = placed(marks.column, first, rows.classes)
    at_label = torch.where(_column(marks.labelled & (state.z_y > NOTHING)) & inside, _column(c.label), 0)
    return value, torch.where(_column(scale * upstream == 0), 0, g.scatter_add(-1, at, at_label))


def _write(rows: Rows, marks: Marks, values: Tensor, gradient: Tensor) -> None:
    """values (N, V) into gradient (..., >= V): exactly 0 in ignored rows and in padding."""
    counted = torch.where(_column(marks.weights.kd == 0), 0, values)
    gradient[..., : rows.classes].copy_(counted.reshape(*gradient.shape[:-1], rows.classes))
    gradient[..., rows.classes :].zero_()


def scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    """See `cudfast.rows.call.Backend`."""
    if upstream.dim():
        upstream = upstream.reshape(*gradient.shape[:-1], 1)
    elif upstream.is_cpu and upstream.item() == 1:
        return gradient
    if upstream.is_cpu and not bool(upstream.isfinite().all()):
        return gradient.copy_(torch.where(gradient == 0, 0, gradient * upstream))
    return gradient.mul_(upstream)


def row_state(
    rows: Rows,
    options: CUDOptions | DUSOptions,
    *,
    statistics: bool,
    keep: bool,
    gradient: Tensor | None,
) -> tuple[Tensor, State | None]:
    """See `cudfast.rows.call.Backend`. Statistics have no extra cost here."""
    dtype = compute_dtype(rows)
    check_vectors(rows, options)
    marks = mark(rows, options)
    divisors = divisors_of(rows, options)
    upstream = None if gradient is None else torch.ones((), dtype=dtype, device=rows.logits.device)
    top1 = torch.empty(0, dtype=torch.int64, device=rows.logits.device)
    if isinstance(options, CUDOptions):
        student = _student_state(rows, marks, dtype)
        value, g = student_rows(rows, options, marks, student, divisors, upstream)
        columns, top1 = list(student[:-1]), student.k
        if rows.constraints is not None:
            extra, top1 = _extra(rows, marks, dtype)
            columns += extra
        sums = torch.stack(columns, -1)
    else:
        teacher = _teacher_state(rows, marks, dtype)
        value, g = teacher_rows(rows, options, marks, teacher, divisors, upstream)
        sums = torch.stack(teacher, -1)
    if gradient is not None and g is not None:
        _write(rows, marks, g, gradient)
    loss = value if options.reduction == "none" else value.sum()
    return loss, State(sums, top1, divisors) if keep else None


def row_gradient(
    rows: Rows,
    options: CUDOptions | DUSOptions,
    state: State,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """See `cudfast.rows.call.Backend`."""
    check_vectors(rows, options)
    marks = mark(rows, options)
    columns = state.sums.unbind(-1)
    if isinstance(options, CUDOptions):
        student = StudentState._make((*columns[: len(STUDENT_COLUMNS)], state.top1))
        _, g = student_rows(rows, options, marks, student, state.divisors, upstream)
    else:
        _, g = teacher_rows(rows, options, marks, TeacherState(*columns), state.divisors, upstream)
    assert g is not None
    _write(rows, marks, g, gradient)
