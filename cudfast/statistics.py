"""Statistics from the row states, one value per row: no second pass over the logits, no synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .options import CUDOptions, DUSOptions, WClip
from .rows.call import STUDENT_COLUMNS, Rows, State, columns_of
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


def student_statistics(rows: Rows, options: CUDOptions, packed: State) -> StudentStatistics:
    """The statistics of rows from the states of the first sweep."""
    columns = dict(zip(columns_of(rows, options), packed.sums.detach().unbind(-1)))
    fields = [*(columns[name] for name in STUDENT_COLUMNS), packed.top1]
    state = reference.StudentState(*fields)  # not ._make, which torch 2.8 cannot trace
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
        where(labelled, reference.ce_value(state.s_one, state.s_y, state.m_s)),
        where(counts, 1 / state.s_one),
        (labelled & (state.s_y == state.m_s)).reshape(shape),
        (counts & relaxed).reshape(shape),
    )


def teacher_statistics(rows: Rows, options: DUSOptions, packed: State) -> TeacherStatistics:
    """The statistics of rows from the states of the first sweep."""
    state = reference.TeacherState(*packed.sums.detach().unbind(-1))
    _, labelled = masks(rows, options)
    shape = rows.logits.shape[:-1]

    def where(value: Tensor) -> Tensor:
        return torch.where(labelled, value, torch.nan).reshape(shape)

    return TeacherStatistics(
        where((state.z_y - state.m).exp() / state.z),
        where(state.z.log() - state.e / state.z),
        where(1 / state.z),
        (labelled & (state.z_y == state.m)).reshape(shape),
    )
