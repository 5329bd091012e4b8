"""The losses in plain PyTorch: the mirror of csrc/row and the backend of last resort.

Every function here has a twin of the same name in csrc/row (`student_merge` is `merge` of StudentState there), in the
same order and under the same equation tags; tests/test_mirrors.py walks them pair by pair. Tensors are (N,) where the
C++ has a scalar and (N, V) where it has a sweep. Nothing here is differentiated: gradients are written out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import TEMPERATURES, CUDOptions, DUSOptions
from .rows import Rows, State, compute_dtype, refuse_label, refuse_value, vector_dtype

NOTHING = -torch.inf

# ---- csrc/row/state.h ----


class StudentState(NamedTuple):
    """State of rows, or of some of their columns, in the student loss.                             [state-student]"""

    m_t: Tensor  # (N,) teacher maximum
    s_k: Tensor  # (N,) student logit at the teacher's top-1
    m_s: Tensor  # (N,) student maximum
    z_tau: Tensor  # (N,) sum exp((t - m_t) / tau)
    s_tau: Tensor  # (N,) sum exp((s - m_s) / tau)
    a: Tensor  # (N,) sum exp((t - m_t) / tau) * ((t - m_t) - (s - m_s)) / tau
    s_one: Tensor  # (N,) sum exp(s - m_s)
    z_one: Tensor  # (N,) sum exp(t - m_t)
    t_y: Tensor  # (N,) teacher logit of the label
    s_y: Tensor  # (N,) student logit of the label
    impossible: Tensor  # (N,) 1 when some class has t finite and s = -inf
    k: Tensor  # (N,) int64, teacher's top-1


class StudentSums(NamedTuple):
    """What a sweep accumulates around known maxima."""

    z_tau: Tensor
    s_tau: Tensor
    a: Tensor
    s_one: Tensor
    z_one: Tensor
    impossible: Tensor


def student_fold(dt: Tensor, ds: Tensor, inv_tau: Tensor) -> StudentSums:
    """Sums over the last axis of dt = t - m_t and ds = s - m_s (N, V); inv_tau (N, 1)."""
    x, w = dt * inv_tau, ds * inv_tau
    teacher, student = x.exp(), w.exp()
    both = (x > NOTHING) & (w > NOTHING)
    excess = torch.where(both, x - w, 0)
    impossible = ((x > NOTHING) & ~(w > NOTHING)).any(-1)
    return StudentSums(
        teacher.sum(-1),
        student.sum(-1),
        (teacher * excess).sum(-1),
        ds.exp().sum(-1),
        dt.exp().sum(-1),
        impossible.to(dt.dtype),
    )


def _down(m: Tensor, to: Tensor) -> Tensor:
    """Distance from a part's maximum to the new one; an empty part has nothing to rescale."""
    return torch.where(m == NOTHING, 0, m - to)


def student_merge(left: StudentState, right: StudentState, inv_tau: Tensor) -> StudentState:
    """State of the union of two disjoint sets of columns.                                           [merge-student]"""
    m_t, m_s = torch.maximum(left.m_t, right.m_t), torch.maximum(left.m_s, right.m_s)
    sums: list[Tensor] = []
    for part in (left, right):
        down_t, down_s = _down(part.m_t, m_t), _down(part.m_s, m_s)
        teacher, student = (down_t * inv_tau).exp(), (down_s * inv_tau).exp()
        a = teacher * (part.a + part.z_tau * ((down_t - down_s) * inv_tau))
        moved = (teacher * part.z_tau, student * part.s_tau, a, down_s.exp() * part.s_one, down_t.exp() * part.z_one)
        sums = [old + new for old, new in zip(sums, moved)] if sums else list(moved)
    from_left = torch.where(left.m_t == right.m_t, left.k <= right.k, left.m_t > right.m_t)
    return StudentState._make(
        (
            m_t,
            torch.where(from_left, left.s_k, right.s_k),
            m_s,
            *sums,
            torch.maximum(left.t_y, right.t_y),
            torch.maximum(left.s_y, right.s_y),
            torch.maximum(left.impossible, right.impossible),
            torch.where(from_left, left.k, right.k),
        )
    )


class TeacherState(NamedTuple):
    """State of rows in the teacher loss.                                                           [state-teacher]"""

    m: Tensor  # (N,) maximum
    z: Tensor  # (N,) sum exp(z_j - m)
    e: Tensor  # (N,) sum exp(z_j - m) * (z_j - m)
    z_y: Tensor  # (N,) logit of the label


class TeacherSums(NamedTuple):
    z: Tensor
    e: Tensor


def teacher_fold(x: Tensor) -> TeacherSums:
    """Sums over the last axis of x = z - m (N, V)."""
    p = x.exp()
    return TeacherSums(p.sum(-1), (p * torch.where(x > NOTHING, x, 0)).sum(-1))


def teacher_merge(left: TeacherState, right: TeacherState) -> TeacherState:
    """e' = e^(m - m') (e + z (m - m'))                                                              [merge-teacher]"""
    m = torch.maximum(left.m, right.m)
    z, e = torch.zeros_like(m), torch.zeros_like(m)
    for part in (left, right):
        down = _down(part.m, m)
        z = z + down.exp() * part.z
        e = e + down.exp() * (part.e + part.z * down)
    return TeacherState(m, z, e, torch.maximum(left.z_y, right.z_y))


# ---- csrc/row/target.h ----


class Clip(NamedTuple):
    """W-Clip of rows.                                                                                       [clip]"""

    r: Tensor  # (N,) moved mass times Z1; 0 when nothing moves
    t_k: Tensor  # (N,) new teacher logit of the top-1, minus m_t
    t_y: Tensor  # (N,) new teacher logit of the label, minus m_t


def wclip(u: Tensor, budget: float, margin: float) -> Clip:
    """r = min(budget, -margin * expm1(u)), u = t_y - m_t."""
    below_one = torch.expm1(u)
    r = torch.clamp(-margin * below_one, max=budget)
    moves = r > 0
    return Clip(r, torch.where(moves, torch.log1p(-r), 0), torch.where(moves, torch.log((1 + below_one) + r), u))


class TargetSums(NamedTuple):
    z_tau: Tensor
    a: Tensor
    impossible: Tensor


def replace(state: StudentState, clip: Clip, inv_tau: Tensor) -> TargetSums:
    """The teacher's sums after the clip: two contributions leave, two come in.                           [replace]"""
    moves = clip.r > 0
    w_k, w_y = (state.s_k - state.m_s) * inv_tau, (state.s_y - state.m_s) * inv_tau
    blocked = moves & ((w_k == NOTHING) | (w_y == NOTHING))
    changes = moves & ~blocked
    new_k, new_y = clip.t_k * inv_tau, clip.t_y * inv_tau
    old_y = (state.t_y - state.m_t) * inv_tau
    had_mass = state.t_y > NOTHING
    dz = (new_k.exp() - 1) + new_y.exp()
    da = (new_k.exp() * (new_k - w_k) + w_k) + new_y.exp() * (new_y - w_y)
    dz = dz - torch.where(had_mass, old_y.exp(), 0)
    da = da - torch.where(had_mass, old_y.exp() * (old_y - w_y), 0)
    return TargetSums(
        state.z_tau + torch.where(changes, dz, 0),
        state.a + torch.where(changes, da, 0),
        torch.where(blocked, 1, state.impossible),
    )


# ---- csrc/row/terms.h ----


class RowWeights(NamedTuple):
    kd: Tensor  # (N,) 0 where the row counts for nothing
    ce: Tensor  # (N,) 0 where the row has no label


def row_weights(ignored: Tensor, labelled: Tensor, weight: Tensor) -> RowWeights:
    """How much a row counts in each term.                                                            [row-weights]"""
    kd = torch.where(ignored, 0, weight)
    return RowWeights(kd, torch.where(labelled, kd, 0))


class StudentLoss(NamedTuple):
    kd: Tensor  # (N,) tau^2 KL, without its weight
    ce: Tensor  # (N,) -log p_y at temperature 1, without its weight
    z_tau: Tensor
    clip: Clip
    impossible: Tensor


def kd_value(state: StudentState, target: TargetSums, tau: Tensor) -> Tensor:
    """tau^2 KL(q || p) = tau^2 (a / z + log(s / z)); rounding below 0 is 0.                                   [kd]"""
    kl = target.a / target.z_tau + (state.s_tau / target.z_tau).log()
    kl = torch.where(kl < 0, 0, tau * tau * kl)
    kl = torch.where(target.impossible > 0, torch.inf + 0 * (target.z_tau * state.s_tau), kl)
    return torch.where((state.m_t == NOTHING) | (state.m_s == NOTHING), torch.nan, kl)


def ce_value(s_one: Tensor, s_y: Tensor, m_s: Tensor) -> Tensor:
    """-log p_y = log S1 - (s_y - m_s)                                                                         [ce]"""
    return s_one.log() - (s_y - m_s)


class StudentGradient(NamedTuple):
    """Coefficients of dL/ds_j.                                                                  [student-gradient]"""

    student_tau: Tensor  # (N,)
    teacher_tau: Tensor  # (N,)
    student_one: Tensor  # (N,)
    label: Tensor  # (N,)


def student_finish(state: StudentState, labelled: Tensor, tau: Tensor, options: CUDOptions) -> StudentLoss:
    """What a row comes to: the calibrated target, then every term."""
    zero = torch.zeros_like(state.m_t)
    clip = Clip(zero, zero, zero)
    ce = zero
    if options.ce_weight > 0:
        ce = torch.where(labelled, ce_value(state.s_one, state.s_y, state.m_s), 0)
    if not options.kd_weight > 0:
        return StudentLoss(zero, ce, zero, clip, zero > 0)
    if options.calibration is not None:
        wrong = labelled & (state.t_y < state.m_t)
        found = wclip(state.t_y - state.m_t, options.calibration.budget, options.calibration.margin)
        clip = Clip(*(torch.where(wrong, value, 0) for value in found))
    target = replace(state, clip, 1 / tau)
    return StudentLoss(kd_value(state, target, tau), ce, target.z_tau, clip, target.impossible > 0)


def student_coefficients(
    state: StudentState, loss: StudentLoss, tau: Tensor, kd: Tensor, ce: Tensor
) -> StudentGradient:
    """kd and ce are the rows' weights in each term, upstream gradient and divisors included."""
    return StudentGradient(
        torch.where(kd != 0, kd * tau / state.s_tau, 0),
        torch.where(kd != 0, kd * tau / loss.z_tau, 0),
        torch.where(ce != 0, ce / state.s_one, 0),
        ce,
    )


class Term(NamedTuple):
    value: Tensor  # (N,)
    slope: Tensor  # (N,) with respect to log p_y


def focal(log_p: Tensor, gamma: float, alpha: Tensor) -> Term:
    """alpha (1 - p)^gamma (-log p)                                                                          [focal]"""
    a = -torch.expm1(log_p)
    a_gamma = a**gamma
    ratio = torch.where(a > 0, log_p / a, -1)
    lost = log_p == NOTHING
    return Term(
        torch.where(lost, torch.inf, -alpha * a_gamma * log_p),
        torch.where(lost, -alpha, alpha * a_gamma * (gamma * (1 - a) * ratio - 1)),
    )


def gate(log_p: Tensor, o: DUSOptions) -> Term:
    """w = 1{p < threshold} + scale (1 - p)^power                                                             [gate]"""
    a = -torch.expm1(log_p)
    value = (1 - a < o.gate_threshold).to(a.dtype) + o.gate_scale * a**o.gate_power
    if not o.gate_power > 0:
        return Term(value, torch.zeros_like(a))
    slope = -o.gate_scale * o.gate_power * a ** (o.gate_power - 1) * (1 - a)
    return Term(value, torch.where(a > 0, slope, 0))


class TeacherLoss(NamedTuple):
    value: Tensor  # (N,)
    entropy: Tensor  # (N,) nats
    slope: Tensor  # (N,) of the whole loss with respect to log p_y, the entropy held fixed
    weight: Tensor  # (N,) of -H
    log_z: Tensor  # (N,)


def teacher_finish(state: TeacherState, alpha: Tensor, o: DUSOptions) -> TeacherLoss:
    """Value and slopes of Eq. 3."""
    log_z = state.z.log()
    entropy = log_z - state.e / state.z
    log_p = (state.z_y - state.m) - log_z
    value, slope, weight = torch.zeros_like(log_p), torch.zeros_like(log_p), torch.zeros_like(log_p)
    if o.ce_weight > 0:
        value, slope = value - o.ce_weight * log_p, slope - o.ce_weight
    if o.focal_weight > 0:
        f = focal(log_p, o.gamma, alpha)
        value, slope = value + o.focal_weight * f.value, slope + o.focal_weight * f.slope
    if o.entropy_weight > 0:
        w = gate(log_p, o)
        weight = o.entropy_weight * w.value
        value = value - weight * entropy
        if o.differentiate_gate:
            slope = slope - o.entropy_weight * w.slope * entropy
    return TeacherLoss(value, entropy, slope, weight, log_z)


class TeacherGradient(NamedTuple):
    """dL/dz_j = p_j (one + log * log p_j) + label 1[j = y]                                      [teacher-gradient]"""

    one: Tensor  # (N,)
    log: Tensor  # (N,)
    label: Tensor  # (N,)


def teacher_coefficients(loss: TeacherLoss, scale: Tensor) -> TeacherGradient:
    """scale (N,): upstream gradient over divisor, 0 where the row does not count."""
    return TeacherGradient(scale * (loss.weight * loss.entropy - loss.slope), scale * loss.weight, scale * loss.slope)


# ---- csrc/row/element.h ----


def student_element(c: StudentGradient, dt: Tensor, ds: Tensor, inv_tau: Tensor) -> Tensor:
    """dL/ds_j without the label's share (N, V); coefficients and inv_tau (N, 1).                 [element-student]"""
    g = c.student_tau * (ds * inv_tau).exp() - c.teacher_tau * (dt * inv_tau).exp() + c.student_one * ds.exp()
    return torch.where(ds == NOTHING, 0 * (c.student_tau + c.student_one), g)  # NaN in a NaN row


def teacher_element(c: TeacherGradient, x: Tensor, inv_z: Tensor, log_z: Tensor) -> Tensor:
    """dL/dz_j without the label's share (N, V).                                                  [element-teacher]"""
    log_p = torch.where(x > NOTHING, x - log_z, 0)
    return x.exp() * inv_z * (c.one + c.log * log_p)


# ---- The backend ----


def _flat(logits: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """(N, V) in the compute dtype."""
    return logits[..., : rows.classes].reshape(rows.n, rows.classes).to(dtype)


def _column(values: Tensor) -> Tensor:
    return values.unsqueeze(-1)


class _Marks(NamedTuple):
    ignored: Tensor  # (N,) bool
    labelled: Tensor  # (N,) bool
    column: Tensor  # (N, 1) int64, a valid column even where there is no label
    weights: RowWeights


def _mark(rows: Rows, options: CUDOptions | DUSOptions) -> _Marks:
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
    _check(rows, options, index)
    return _Marks(ignored, labelled, _column(index), row_weights(ignored, labelled, weight))


def _check(rows: Rows, options: CUDOptions | DUSOptions, index: Tensor) -> None:
    """The vectors of a call, before any sweep. Reads them on the host: this backend is not the fast one."""

    def first(bad: Tensor) -> int | None:
        return int(bad.nonzero()[0]) if bool(bad.any()) else None

    if rows.labels is not None and (row := first((index < 0) | (index >= rows.classes))) is not None:
        raise refuse_label(rows, options, row, int(rows.labels[row]))
    low, high = TEMPERATURES if isinstance(options, CUDOptions) else (5e-324, torch.finfo(torch.float64).max)
    limits = {"weight": (0.0, torch.finfo(torch.float64).max), "per_row": (low, high)}
    for name, values in (("weight", rows.weight), ("per_row", rows.per_row)):
        if values is None:
            continue
        good = (values >= limits[name][0]) & (values <= limits[name][1])
        if (row := first(~good)) is not None:
            raise refuse_value(rows, options, name, row, float(values[row]))


def _divisors(rows: Rows, options: CUDOptions | DUSOptions, weights: RowWeights) -> Tensor:
    if rows.num_items is not None:
        items = torch.as_tensor(rows.num_items, dtype=weights.kd.dtype, device=weights.kd.device)
        return torch.stack([items, items])
    if options.reduction == "mean":
        return torch.stack([weights.kd.sum(), weights.ce.sum()])
    return torch.ones(2, dtype=weights.kd.dtype, device=weights.kd.device)


def _share(weight: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(divisor > 0, weight / divisor, 0).to(dtype)


def _values(rows: Rows, dtype: torch.dtype) -> Tensor:
    """(N,) temperature or alpha."""
    if rows.per_row is not None:
        return rows.per_row.to(dtype)
    return torch.full((rows.n,), rows.scalar, dtype=dtype, device=rows.logits.device)


def _centre(logits: Tensor, m: Tensor) -> Tensor:
    return logits - _column(torch.where(m == NOTHING, 0, m))


def _student_state(rows: Rows, marks: _Marks, dtype: torch.dtype) -> StudentState:
    assert rows.target is not None
    s, t = _flat(rows.logits, rows, dtype), _flat(rows.target, rows, dtype)
    m_t, m_s = t.amax(-1), s.amax(-1)
    k = (t == _column(m_t)).to(torch.int8).argmax(-1)  # the first of equals, on every device
    sums = student_fold(_centre(t, m_t), _centre(s, m_s), _column(1 / _values(rows, dtype)))
    at_label = [torch.where(marks.labelled, x.gather(-1, marks.column).squeeze(-1), NOTHING) for x in (t, s)]
    return StudentState._make(
        (m_t, s.gather(-1, _column(k)).squeeze(-1), m_s, *sums[:5], *at_label, sums.impossible, k)
    )


def _teacher_state(rows: Rows, marks: _Marks, dtype: torch.dtype) -> TeacherState:
    z = _flat(rows.logits, rows, dtype)
    m = z.amax(-1)
    z_y = torch.where(marks.labelled, z.gather(-1, marks.column).squeeze(-1), NOTHING)
    return TeacherState(m, *teacher_fold(_centre(z, m)), z_y)


def _student_rows(
    rows: Rows, options: CUDOptions, marks: _Marks, state: StudentState, divisors: Tensor, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Loss (N,) of every row, and the gradient (N, V) for `upstream` (N,) or () when that is given."""
    dtype = state.m_t.dtype
    tau = _values(rows, dtype)
    kd = options.kd_weight * _share(marks.weights.kd, divisors[0], dtype)
    ce = options.ce_weight * _share(marks.weights.ce, divisors[1], dtype)
    loss = student_finish(state, marks.labelled, tau, options)
    value = torch.where(kd != 0, kd * loss.kd, 0) + torch.where(ce != 0, ce * loss.ce, 0)
    if upstream is None:
        return value, None
    assert rows.target is not None
    s, t = _flat(rows.logits, rows, dtype), _flat(rows.target, rows, dtype)
    dt, ds = _centre(t, state.m_t), s - _column(state.m_s)
    clipped = _column(marks.labelled & (loss.clip.r > 0))
    for index, new in ((_column(state.k), loss.clip.t_k), (marks.column, loss.clip.t_y)):
        dt = dt.scatter(-1, index, torch.where(clipped, _column(new), dt.gather(-1, index)))
    c = student_coefficients(state, loss, tau, kd * upstream, ce * upstream)
    g = student_element(StudentGradient(*map(_column, c)), dt, ds, _column(1 / tau))
    at_label = torch.where(_column(marks.labelled & (state.s_y > NOTHING)), -_column(c.label), 0)
    g = g.scatter_add(-1, marks.column, at_label)
    return value, torch.where(_column((kd * upstream == 0) & (ce * upstream == 0)), 0, g)


def _teacher_rows(
    rows: Rows, options: DUSOptions, marks: _Marks, state: TeacherState, divisors: Tensor, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    dtype = state.m.dtype
    scale = _share(marks.weights.ce, divisors[1], dtype)
    loss = teacher_finish(state, _values(rows, dtype), options)
    value = torch.where(scale != 0, scale * loss.value, 0)
    if upstream is None:
        return value, None
    c = teacher_coefficients(loss, scale * upstream)
    x = _flat(rows.logits, rows, dtype) - _column(state.m)
    g = teacher_element(TeacherGradient(*map(_column, c)), x, _column(1 / state.z), _column(loss.log_z))
    at_label = torch.where(_column(marks.labelled & (state.z_y > NOTHING)), _column(c.label), 0)
    return value, torch.where(_column(scale * upstream == 0), 0, g.scatter_add(-1, marks.column, at_label))


def _write(rows: Rows, marks: _Marks, values: Tensor, gradient: Tensor) -> None:
    """values (N, V) into gradient (..., >= V): exactly 0 in rows that do not count and in padding."""
    counted = torch.where(_column(marks.weights.kd == 0), 0, values)
    gradient[..., : rows.classes].copy_(counted.reshape(*gradient.shape[:-1], rows.classes))
    gradient[..., rows.classes :].zero_()


def row_state(
    rows: Rows,
    options: CUDOptions | DUSOptions,
    *,
    statistics: bool,
    keep: bool,
    gradient: Tensor | None,
    fresh: bool,
) -> tuple[Tensor, State | None]:
    """See `cudfast.rows.Backend`. Statistics cost nothing more here; `fresh` says nothing to PyTorch."""
    dtype = compute_dtype(rows)
    marks = _mark(rows, options)
    divisors = _divisors(rows, options, marks.weights)
    upstream = None if gradient is None else torch.ones((), dtype=dtype, device=rows.logits.device)
    top1 = torch.empty(0, dtype=torch.int64, device=rows.logits.device)
    if isinstance(options, CUDOptions):
        student = _student_state(rows, marks, dtype)
        value, g = _student_rows(rows, options, marks, student, divisors, upstream)
        sums, top1 = torch.stack(student[:-1], -1), student.k
    else:
        teacher = _teacher_state(rows, marks, dtype)
        value, g = _teacher_rows(rows, options, marks, teacher, divisors, upstream)
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
    *,
    fresh: bool,
) -> None:
    """See `cudfast.rows.Backend`."""
    marks = _mark(rows, options)
    columns = state.sums.unbind(-1)
    if isinstance(options, CUDOptions):
        student = StudentState._make((*columns, state.top1))
        _, g = _student_rows(rows, options, marks, student, state.divisors, upstream)
    else:
        _, g = _teacher_rows(rows, options, marks, TeacherState(*columns), state.divisors, upstream)
    assert g is not None
    _write(rows, marks, g, gradient)
