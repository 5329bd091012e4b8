"""Statistics from the row states, one value per row: no second pass over the logits, no synchronisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends import reference as reference_rows
from .options import RowOptions, WClip
from .rows.call import Rows, State, columns_of
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


def row_statistics(rows: Rows, options: RowOptions, packed: State, scales: Mapping[str, Tensor]) -> RowStatistics:
    """The statistics of rows from the states of the first sweep. scales: (N,) focal scales of terms, by their names."""
    dtype = packed.sums.dtype
    state = reference_rows.unpacked(rows, options, packed._replace(sums=packed.sums.detach()), dtype)
    counts, labelled = masks(rows, options)
    tau = reference_rows.temperature_of(rows, dtype)
    at = reference.values_of(state, reference.distil(state, labelled, tau, options))
    shape = rows.logits.shape[:-1]
    found = {}
    for name, _, term in options.terms:
        value = term.evaluate(at).value
        if name in scales:
            value = value * scales[name].to(dtype)
        found[name] = torch.where(labelled if term.needs_label else counts, value, 0).reshape(shape)
    return RowStatistics(found)


def student_statistics(rows: Rows, options: RowOptions, packed: State) -> StudentStatistics:
    """The statistics of rows from the states of the first sweep."""
    columns = dict(zip(columns_of(rows, options), packed.sums.detach().unbind(-1)))
    state = reference_rows.unpacked(rows, options, packed._replace(sums=packed.sums.detach()), packed.sums.dtype)
    assert isinstance(state, reference.StudentState)
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


def teacher_statistics(rows: Rows, options: RowOptions, packed: State) -> TeacherStatistics:
    """The statistics of rows from the states of the first sweep."""
    state = reference_rows.unpacked(rows, options, packed._replace(sums=packed.sums.detach()), packed.sums.dtype)
    assert isinstance(state, reference.TeacherState)
    _, labelled = masks(rows, options)
    shape = rows.logits.shape[:-1]

    def where(value: Tensor) -> Tensor:
        return torch.where(labelled, value, torch.nan).reshape(shape)

    return TeacherStatistics(
        where((state.s_y - state.m_s).exp() / state.s_one),
        where(state.s_one.log() - state.e_s / state.s_one),
        where(1 / state.s_one),
        (labelled & (state.s_y == state.m_s)).reshape(shape),
    )
