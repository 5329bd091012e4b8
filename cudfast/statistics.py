"""Statistics from the row states, one value per row: no second pass over the logits, no synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends import reference as reference_rows
from .options import RowOptions, WClip
from .rows.call import Rows, State, columns_of
from .rows.coefficients import Scales
from .rows.vectors import masks


class StudentStatistics(NamedTuple):
    """Statistics of the student loss; every field has the labels' shape (...). Probabilities are at temperature 1.

    Ignored rows have NaN (top-1: -1, correct: False); unlabelled rows have NaN in the statistics that need a label.
    """

    teacher_top1: Tensor  #: int64 class
    teacher_confidence: Tensor  #: probability of that class
    moved_mass: Tensor  #: delta, the mass that calibration moved from the top-1 to the label, or between sets
    label_prob: Tensor  #: the teacher's probability of the label
    label_prob_calibrated: Tensor  #: the same after calibration
    student_nll: Tensor  #: -log p_y of the student, in nats
    student_confidence: Tensor  #: the student's largest probability
    student_correct: Tensor  #: bool, the label's logit is the student's largest
    relaxed: Tensor  #: bool, the target could not meet its bounds (`Projection` with on_infeasible="relax")


class TeacherStatistics(NamedTuple):
    """Statistics of the teacher loss; every field has the labels' shape (...). Ignored rows: NaN (correct: False)."""

    label_prob: Tensor  #: p_y
    entropy: Tensor  #: of p, in nats
    confidence: Tensor  #: largest probability
    correct: Tensor  #: bool, the label's logit is the largest


class RowStatistics(NamedTuple):
    """Statistics of a loss of terms; every tensor has the labels' shape (...), and no gradient.

    With reduction="none", the loss is the sum of coefficient times term: ``sum(c[name] * terms[name] for name in c)``.
    """

    terms: dict[str, Tensor]  #: the unweighted value of each term, by its name; 0 in rows that it does not count in
    values: dict[str, Tensor]  #: the values that the loss was asked for, by their names; NaN where there is none


class Evaluated(NamedTuple):
    """A call after its first sweep."""

    rows: Rows
    options: RowOptions  # of its rows
    packed: State | None  # None if no statistics are needed
    scales: Scales

    def state(self) -> reference.StudentState | reference.TeacherState:
        """The row states."""
        assert self.packed is not None
        sums = self.packed.sums.detach()
        return reference_rows.unpacked(self.rows, self.options, self.packed._replace(sums=sums), sums.dtype)


def row_statistics(call: Evaluated) -> RowStatistics:
    """The statistics of rows from the states of the first sweep."""
    rows, options, state = call.rows, call.options, call.state()
    dtype = state.m_s.dtype
    counts, labelled = masks(rows, options)
    tau = reference_rows.temperature_of(rows, dtype)
    at = reference.values_of(state, reference.distil(state, labelled, tau, options))
    shape = rows.logits.shape[:-1]
    found: dict[str, Tensor] = {}
    for piece, scale in zip(options.pieces, call.scales):
        value = piece.term.evaluate(at).value
        weight = value.new_full((1,), piece.factor) if scale is None else piece.factor * scale.to(dtype)
        inside = (labelled if piece.term.needs_label else counts) & (weight != 0)
        value = torch.where(inside, weight * value, 0).reshape(shape)
        found[piece.name] = found[piece.name] + value if piece.name in found else value
    values = {name: _VALUES[name](state) for name in options.values}
    for name, value in values.items():
        mask = labelled if name in ("label_log_prob", "brier") else counts
        values[name] = torch.where(mask, value, torch.nan).reshape(shape)
    return RowStatistics(found, values)


def _brier(state: reference.StudentState | reference.TeacherState) -> Tensor:
    """sum_j (p_j - 1[j = y])^2 = S2 / S1^2 - 2 p_y + 1"""
    assert state.s_two is not None
    return state.s_two / state.s_one**2 - 2 * (-reference.nll_of(state)).exp() + 1


def _entropy(z: Tensor, e: Tensor | None) -> Tensor:
    assert e is not None
    return z.log() - e / z


def _teacher_entropy(state: reference.StudentState | reference.TeacherState) -> Tensor:
    assert isinstance(state, reference.StudentState)
    return _entropy(state.z_one, state.e_t)


_VALUES: dict[str, Callable[[reference.StudentState | reference.TeacherState], Tensor]] = {
    "student_entropy": lambda state: _entropy(state.s_one, state.e_s),
    "teacher_entropy": _teacher_entropy,
    "lse": lambda state: state.m_s + state.s_one.log(),
    "label_log_prob": lambda state: -reference.nll_of(state),
    "brier": _brier,
}


def student_statistics(call: Evaluated) -> StudentStatistics:
    """The statistics of rows from the states of the first sweep."""
    rows, options, packed, state = call.rows, call.options, call.packed, call.state()
    assert packed is not None
    assert isinstance(state, reference.StudentState)
    columns = dict(zip(columns_of(rows, options), packed.sums.detach().unbind(-1)))
    counts, labelled = masks(rows, options)
    shape = rows.logits.shape[:-1]

    def where(mask: Tensor, value: Tensor) -> Tensor:
        return torch.where(mask, value, torch.nan).reshape(shape)

    if rows.constraints is not None:
        confidence, prob, moved = columns["confidence"], columns["prob"], columns["moved"]
        target, relaxed = columns["target"], columns["relaxed"] > 0
    else:
        u = state.t_y - state.m_t
        moved = torch.zeros_like(u)
        if isinstance(options.calibration, WClip):
            clip = reference.wclip(u, options.calibration.budget, options.calibration.margin)
            moved = torch.where(labelled & (u < 0), clip.r / state.z_one, 0)
        confidence, prob = 1 / state.z_one, u.exp() / state.z_one
        target, relaxed = prob + moved, torch.zeros_like(labelled)
    return StudentStatistics(
        torch.where(counts, packed.top1, -1).reshape(shape),
        where(counts, confidence),
        where(counts, moved),
        where(labelled, prob),
        where(labelled, target),
        where(labelled, reference.nll_of(state)),
        where(counts, 1 / state.s_one),
        (labelled & (state.s_y == state.m_s)).reshape(shape),
        (counts & relaxed).reshape(shape),
    )


def teacher_statistics(call: Evaluated) -> TeacherStatistics:
    """The statistics of rows from the states of the first sweep."""
    state = call.state()
    assert isinstance(state, reference.TeacherState)
    _, labelled = masks(call.rows, call.options)
    shape = call.rows.logits.shape[:-1]

    def where(value: Tensor) -> Tensor:
        return torch.where(labelled, value, torch.nan).reshape(shape)

    return TeacherStatistics(
        where((state.s_y - state.m_s).exp() / state.s_one),
        where(state.s_one.log() - state.e_s / state.s_one),
        where(1 / state.s_one),
        (labelled & (state.s_y == state.m_s)).reshape(shape),
    )
