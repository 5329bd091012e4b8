"""The reference backend: plain PyTorch on any device. The other backends are compared with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..options import RowOptions
from ..reference import (
    NOTHING,
    Clip,
    Rest,
    RowGradient,
    RowWeights,
    StudentState,
    TeacherState,
    clip_of,
    finish,
    first_top1,
    leaves,
    own_element,
    recalibrated,
    row_weights,
    student_element,
    student_fold,
    teacher_fold,
    teacher_inverse,
)
from ..rows.call import Rows, State, coefficients, columns_of, compute_dtype, recalibrates, vector_dtype
from ..rows.vectors import check_vectors, divisors_of
from ..targets.calibration import Projected, project, refuse_relaxed

Whole = StudentState | TeacherState
"""State of rows with a target, or without one."""


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


def mark(rows: Rows, options: RowOptions) -> Marks:
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


def temperature_of(rows: Rows, dtype: torch.dtype) -> Tensor:
    """The temperature of rows (N,)."""
    if rows.temperature is not None:
        return rows.temperature.to(dtype)
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


def _student_state(rows: Rows, options: RowOptions, marks: Marks, dtype: torch.dtype) -> StudentState:
    s, t = _flat(rows.logits, rows, dtype), _target(rows, marks, dtype)
    m_t, m_s = t.amax(-1), s.amax(-1)
    k = first_top1(t)
    tau = temperature_of(rows, dtype)
    inv_t, inv_s = teacher_inverse(tau, options), 1 / tau
    ds = _centre(s, m_s)
    sums = student_fold(_centre(t, m_t), ds, _column(inv_t), _column(inv_s), rows.class_weight)
    t_y, s_y = (torch.where(marks.labelled, x.gather(-1, marks.column).squeeze(-1), NOTHING) for x in (t, s))
    m_q = torch.full_like(m_t, torch.inf)
    state = StudentState(
        m_t=m_t, s_k=s.gather(-1, _column(k)).squeeze(-1), m_s=m_s, t_y=t_y, s_y=s_y, m_q=m_q, k=k, **sums._asdict()
    )
    if not recalibrates(rows, options):
        return state
    clip = clip_of(state, marks.labelled, options)
    t = without(t, marks.column, k)
    m_r = t.amax(-1)
    sums = student_fold(_centre(t, m_r), ds, _column(inv_t), _column(inv_s))
    return recalibrated_where(state, clip, Rest(m_r, sums.z_tau, sums.a), inv_t, inv_s, dtype)


def without(t: Tensor, label: Tensor, k: Tensor) -> Tensor:
    """Teacher logits (N, V) with -inf in the columns of the label (N, 1) and of the top-1 (N,)."""
    return t.scatter(-1, label, NOTHING).scatter(-1, _column(k), NOTHING)


def recalibrated_where(
    state: StudentState, clip: Clip, rest: Rest, inv_t: Tensor, inv_s: Tensor, dtype: torch.dtype
) -> StudentState:
    """The states of rows whose top-1 leaves are those of the calibrated target; the others stay as they are."""
    new, there = recalibrated(state, clip, rest, inv_t, inv_s, dtype), leaves(state, clip, inv_t, inv_s)
    names = ("m_q", "z_tau", "a", "impossible")
    return state._replace(**{name: torch.where(there, getattr(new, name), getattr(state, name)) for name in names})


def _teacher_state(rows: Rows, marks: Marks, dtype: torch.dtype) -> TeacherState:
    s = _flat(rows.logits, rows, dtype)
    m = s.amax(-1)
    s_y = torch.where(marks.labelled, s.gather(-1, marks.column).squeeze(-1), NOTHING)
    return TeacherState(m_s=m, s_y=s_y, **teacher_fold(_centre(s, m), rows.class_weight)._asdict())


def placed(index: Tensor, first: int | Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Columns of classes in [first, first + width): a valid column, and whether the class is in that range."""
    inside = (index >= first) & (index < first + width)
    return torch.where(inside, index - first, 0), inside


def finished_rows(
    rows: Rows,
    options: RowOptions,
    marks: Marks,
    state: Whole,
    divisors: Tensor,
    upstream: Tensor | None,
    first: int | Tensor = 0,
) -> tuple[Tensor, Tensor | None]:
    """Loss (N,) of every row, and the gradient (N, V) for `upstream` (N,) or () when that is given.

    With `first`, rows.logits contain only the classes [first, first + V), and the state is that of all classes.
    """
    dtype = state.m_s.dtype
    tau = temperature_of(rows, dtype)
    shares = RowWeights(*(_share(weight, divisor, dtype) for weight, divisor in zip(marks.weights, divisors)))
    own = coefficients(rows, options).to(dtype)
    end = finish(state, marks.labelled, tau, options, shares, own, upstream)
    if upstream is None:
        return end.value, None
    c = RowGradient(*map(_column, end.gradient))
    s_one, log_z = _column(state.s_one), _column(end.log_z)
    ds = _flat(rows.logits, rows, dtype) - _column(state.m_s)
    weights = 1.0 if rows.class_weight is None else rows.class_weight.to(dtype)
    if isinstance(state, StudentState) and options.distils:
        centre, clip = end.target.centre, end.target.clip
        dt = _centre(_target(rows, marks, dtype), centre)
        clipped = _column(marks.labelled & (clip.r > 0))
        for index, new in ((_column(state.k), clip.t_k), (marks.column, clip.t_y)):
            at, inside = placed(index, first, rows.classes)
            moved = _column(new + (state.m_t - centre))
            dt = dt.scatter(-1, at, torch.where(clipped & inside, moved, dt.gather(-1, at)))
        inv_t, inv_s = _column(teacher_inverse(tau, options)), _column(1 / tau)
        g = student_element(c, dt, ds, inv_t, inv_s, s_one, log_z, weights)
    else:
        g = own_element(c, ds, s_one, log_z, weights)
    at, inside = placed(marks.column, first, rows.classes)
    at_label = torch.where(_column(marks.labelled & (state.s_y > NOTHING)) & inside, _column(end.gradient.label), 0)
    return end.value, torch.where(_column(end.counts), g.scatter_add(-1, at, at_label), 0)


def _write(rows: Rows, marks: Marks, values: Tensor, gradient: Tensor) -> None:
    """values (N, V) into gradient (..., >= V): exactly 0 in ignored rows and in padding."""
    counted = torch.where(_column(marks.weights.rows == 0), 0, values)
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
    options: RowOptions,
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
    whole = _teacher_state(rows, marks, dtype) if rows.target is None else _student_state(rows, options, marks, dtype)
    value, g = finished_rows(rows, options, marks, whole, divisors, upstream)
    state = packed(rows, options, whole, divisors)
    if rows.constraints is not None:
        extra, top1 = _extra(rows, marks, dtype)
        state = state._replace(sums=torch.cat([state.sums, torch.stack(extra, -1)], -1), top1=top1)
    if gradient is not None and g is not None:
        _write(rows, marks, g, gradient)
    loss = value if options.reduction == "none" else value.sum()
    return loss, state if keep else None


def packed(rows: Rows, options: RowOptions, whole: Whole, divisors: Tensor) -> State:
    """The packed form of a state, without the columns of a projection."""
    columns = columns_of(rows._replace(constraints=None), options)
    sums = torch.stack([getattr(whole, name) for name in columns], -1)
    top1 = whole.k if isinstance(whole, StudentState) else torch.empty(0, dtype=torch.int64, device=sums.device)
    return State(sums, top1, divisors)


def unpacked(rows: Rows, options: RowOptions, state: State, dtype: torch.dtype) -> Whole:
    """Inverse of `packed`, of a state in any form."""
    columns = dict(zip(columns_of(rows, options), state.sums.to(dtype).unbind(-1)))
    if rows.target is None:
        return TeacherState(**{name: columns.get(name) for name in TeacherState._fields})  # type: ignore[arg-type]
    columns["k"] = state.top1
    return StudentState(**{name: columns.get(name) for name in StudentState._fields})  # type: ignore[arg-type]


def row_gradient(
    rows: Rows,
    options: RowOptions,
    state: State,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """See `cudfast.rows.call.Backend`."""
    check_vectors(rows, options)
    marks = mark(rows, options)
    whole = unpacked(rows, options, state, state.sums.dtype)
    _, g = finished_rows(rows, options, marks, whole, state.divisors, upstream)
    assert g is not None
    _write(rows, marks, g, gradient)
