"""The student loss with a target that meets bounds on its mass and entropy, as in csrc/projected.h.

The classes of a row are divided into three sets: near, wrong and the rest. The sweep over the rest masks the other two
out, so that its mass is never a difference; those two are short lists, whose logits are gathered. The target is then
one factor per set. If the wrong class is the teacher's top-1, it is unknown until the sweep ends: the largest logit so
far is kept out of the sums, and is added to them when a larger one is found.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .element import student_element
from .pieces import (
    Element,
    Pointers,
    StudentGradient,
    centre,
    clear,
    f64,
    fp64,
    marks,
    row_of,
    scale_of,
    shares_of,
    temperature_of,
)
from .rest import Lines, projected_fold_columns, projected_map_columns
from .row import E_ONE, E_S, LOG2E, NOTHING, S_ONE, Z_ONE, TemperedState, below, entropy, log_add, masses, student_move
from .search import COLUMNS as PROJECTED
from .search import MISSES, OUT_OF_REACH, TEMPERED, entropy_tolerance
from .sets import FAR, Members, bounds_of_row, holds, set_sums, set_top, sets_of_row
from .student import COLUMNS, student_pack
from .terms import finish, forward_kl, student_coefficients


class ProjectedSweep(NamedTuple):
    """What a launch of `projected_rows` does, a constant of the kernel: see there."""

    fold: bool
    again: bool
    map: bool
    entropy: bool  # of some rows is bounded, and has to be compared with the bounds
    top1: bool  # is the wrong class


@triton.jit
def single(top, s_k, m_s, tau):
    """(z, a, impossible) of one class relative to its own logit; z is the same at every temperature."""
    there = top > NOTHING
    can = s_k > NOTHING
    a = tl.where(there & can, -(s_k - m_s) / tau, 0.0)
    return there.to(tl.float64), a, (there & (can == 0)).to(tl.float64)


@triton.jit
def log_of_sum(at, z):
    return tl.where(z == 0, NOTHING, at + tl.log(tl.where(z == 0, 1.0, z)))


@triton.jit
def factor(log_m, mass, total, at):
    """Log of the target at a set's maximum; -inf for a set without mass."""
    there = mass > NOTHING
    return tl.where(there, at + (log_m - (tl.where(there, mass, 0.0) - total)), NOTHING)


@triton.jit
def lowered(z_tau, a, offset, base, tau):
    """A set's sums times its factor; 0 if the factor is 0."""
    there = offset > NOTHING
    zero = tl.zeros_like(z_tau)
    z, _, a, _, _, _, _ = student_move(
        z_tau, zero, a, zero, zero, zero, zero, tl.where(there, offset, 0.0), zero, base, tau
    )
    return tl.where(there, z, 0.0), tl.where(there, a, 0.0)


@triton.jit
def joined(m_t, z_tau, a, z_one, e_one, impossible, top, s_top, m_s, base, tau):
    """The rest and one more class, with logits top and s_top."""
    new_t = tl.maximum(m_t, top)
    zero = tl.zeros_like(z_tau)
    one, a_one, blocked = single(top, s_top, m_s, tau)
    z_tau, _, a, _, z_one, e_one, _ = student_move(
        z_tau, zero, a, zero, z_one, e_one, zero, below(m_t, new_t), zero, base, tau
    )
    z_2, _, a_2, _, one_2, e_2, _ = student_move(
        one, zero, a_one, zero, one, zero, zero, below(top, new_t), zero, base, tau
    )
    return new_t, z_tau + z_2, a + a_2, z_one + one_2, e_one + e_2, tl.maximum(impossible, blocked)


@triton.jit
def projected_rows(
    student, teacher, gradient, given, scales, results, sets, columns, temperature: fp64,
    R: tl.constexpr, P: tl.constexpr, ONES: tl.constexpr, KINDS: tl.constexpr, SWEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row, program (row, 0).

    FOLD computes the state at T = 1. With ENTROPY it marks rows that miss a bound on the entropy: `search.temper_rows`
    finds their temperature, and AGAIN computes their state at that temperature. Without FOLD and AGAIN the state is
    read. MAP writes the gradient. N(y) are the columns near[near_offsets[y]:near_offsets[y + 1]], or without offsets
    the label alone, near[row].
    """
    FOLD: tl.constexpr = SWEEP.fold
    AGAIN: tl.constexpr = SWEEP.again
    MAP: tl.constexpr = SWEEP.map
    ENTROPY: tl.constexpr = SWEEP.entropy
    TOP1: tl.constexpr = SWEEP.top1
    bounds, near_offsets, near, wrong_offsets, wrong = sets
    V = columns.classes
    row = tl.program_id(0).to(tl.int64)
    ignored, labelled, y, in_rows, in_labelled = marks(row, given, V)
    s_row = row_of(row, student)
    t_row = row_of(row, teacher)
    tau = temperature_of(row, given, temperature)
    nothing = tl.full((), float("-inf"), tl.float64)
    zero = tl.zeros((), tl.float64)
    m_t, s_k, m_s, t_y, s_y = nothing, nothing, nothing, nothing, nothing
    z_tau, s_tau, a, s_one, z_one, e_s, impossible = zero, zero, zero, zero, zero, zero, zero
    beta = tl.full((), 1.0, tl.float64)
    middle = zero
    near_offset, wrong_offset, rest_offset = nothing, nothing, nothing
    confidence, prob, calibrated, moved, relaxed = zero, zero, zero, zero, zero
    near_top, wrong_top = nothing, nothing
    k = tl.zeros((), tl.int64)
    alone = tl.full((), -1, tl.int64)
    own, own_end, near_end, wrong_at, wrong_end, wants_top1 = sets_of_row(
        row, y, labelled & (ignored == 0), bounds, near_offsets, near, wrong_offsets, TOP1
    )
    STUDENT: tl.constexpr = COLUMNS + 1 if E_S & ONES else COLUMNS
    SUMS: tl.constexpr = S_ONE | Z_ONE | (E_S & ONES) | (E_ONE if FOLD and ENTROPY else 0)
    OF_SETS: tl.constexpr = Z_ONE | (E_ONE if FOLD else 0)
    at = results.sums + row * (STUDENT + PROJECTED)
    works = ignored == 0
    if AGAIN:
        if works:
            works = tl.load(at + STUDENT + 9) <= TEMPERED
    if works:
        base = f64(LOG2E) / tau
        if FOLD == False:  # noqa: E712 (a constexpr has no truth in the interpreter's `not`)
            k = tl.load(results.top1 + row)
            if wants_top1:
                if holds(near, own, own_end, k) == 0:
                    alone = k
        if AGAIN:
            beta = tl.load(at + STUDENT).to(tl.float64)
            middle = tl.load(at + STUDENT + 1).to(tl.float64)
        if FOLD or AGAIN:
            members = Members(near, own, near_end, wrong, wrong_at, wrong_end, alone)
            state, top, k_apart = projected_fold_columns(
                s_row, t_row, V, members, beta, middle, tau, R, FOLD, P, SUMS, BLOCK
            )
            m_t, m_s, z_tau, s_tau, a, s_one, z_one, e_one, e_s, impossible = state
            # Read again, so that it needs no register during the sweep.
            ignored, labelled, y, in_rows, in_labelled = marks(row, given, V)
            own, own_end, near_end, wrong_at, wrong_end, wants_top1 = sets_of_row(
                row, y, labelled, bounds, near_offsets, near, wrong_offsets, TOP1
            )
        near_top, near_k = set_top(t_row, near, own, near_end, R)
        wrong_top, wrong_k = set_top(t_row, wrong, wrong_at, wrong_end, R)
        if FOLD:
            best = tl.maximum(tl.maximum(near_top, wrong_top), top)
            k = tl.minimum(
                tl.where((top == best) & (k_apart >= 0), k_apart, FAR),
                tl.minimum(tl.where(near_top == best, near_k, FAR), tl.where(wrong_top == best, wrong_k, FAR)),
            )
            k = tl.where(k == FAR, 0, k)
            if wants_top1 & (k == k_apart):
                if holds(near, own, own_end, k) == 0:
                    alone = k
            if (alone < 0) & (top > NOTHING):
                s_top = tl.load(s_row + k_apart).to(tl.float64)
                m_t, z_tau, a, z_one, e_one, impossible = joined(
                    m_t, z_tau, a, z_one, e_one, impossible, top, s_top, m_s, base, tau
                )
        if alone >= 0:
            wrong_top = tl.load(t_row + k).to(tl.float64)
        has_near = near_end > own
        least, most = bounds_of_row(row, has_near, (wrong_end > wrong_at) | (alone >= 0), bounds)
        s_k = tl.load(s_row + k).to(tl.float64)
        if labelled:
            t_y = tl.load(t_row + y).to(tl.float64)
            s_y = tl.load(s_row + y).to(tl.float64)
        out_of_reach = tl.zeros((), tl.int1)
        if AGAIN:
            beta = tl.load(at + STUDENT).to(tl.float64)
            middle = tl.load(at + STUDENT + 1).to(tl.float64)
            confidence = tl.load(at + STUDENT + 5).to(tl.float64)
            prob = tl.load(at + STUDENT + 6).to(tl.float64)
            out_of_reach = tl.load(at + STUDENT + 9) == OUT_OF_REACH
        if FOLD or AGAIN:
            near_z, near_a, near_one, near_e, near_impossible = set_sums(
                s_row, t_row, near, own, near_end, near_top, beta, m_s, tau, base.to(R), R, P, OF_SETS
            )
            wrong_z, wrong_a, wrong_one, wrong_e, wrong_impossible = set_sums(
                s_row, t_row, wrong, wrong_at, wrong_end, wrong_top, beta, m_s, tau, base.to(R), R, P, OF_SETS
            )
            if alone >= 0:
                wrong_z, wrong_a, wrong_impossible = single(wrong_top, s_k, m_s, tau)
                wrong_one = wrong_z
            # The target: one factor per set; and its sums.
            at_near = beta * (centre(near_top) - middle)
            at_wrong = beta * (centre(wrong_top) - middle)
            mass_near = log_of_sum(at_near, near_one)
            mass_wrong = log_of_sum(at_wrong, wrong_one)
            mass_rest = log_of_sum(m_t, z_one)
            total = log_add(log_add(mass_near, mass_wrong), mass_rest)
            target = masses(mass_near, mass_wrong, mass_rest, least, most)
            misses = tl.zeros((), tl.int1)
            value = zero
            if FOLD and ENTROPY:
                value, _ = entropy(
                    TemperedState(at_near, near_one, near_e, zero),
                    TemperedState(at_wrong, wrong_one, wrong_e, zero),
                    TemperedState(centre(m_t), z_one, e_one, zero),
                    target,
                    beta,
                )
                if labelled:
                    misses = value < tl.load(bounds + row * 4 + 2) - entropy_tolerance(R)
                    misses = misses | (value > tl.load(bounds + row * 4 + 3) + entropy_tolerance(R))
            near_offset = factor(target.near, mass_near, total, at_near)
            wrong_offset = factor(target.wrong, mass_wrong, total, at_wrong)
            rest_offset = factor(target.rest, mass_rest, total, m_t)
            highest = centre(tl.maximum(tl.maximum(near_offset, wrong_offset), rest_offset))
            near_offset -= highest
            wrong_offset -= highest
            rest_offset -= highest
            near_z, near_a = lowered(near_z, near_a, near_offset, base, tau)
            wrong_z, wrong_a = lowered(wrong_z, wrong_a, wrong_offset, base, tau)
            z_tau, a = lowered(z_tau, a, rest_offset, base, tau)
            z_tau += near_z + wrong_z
            a += near_a + wrong_a
            impossible = tl.maximum(
                tl.where(rest_offset > NOTHING, impossible, 0.0),
                tl.maximum(
                    tl.where(near_offset > NOTHING, near_impossible, 0.0),
                    tl.where(wrong_offset > NOTHING, wrong_impossible, 0.0),
                ),
            )
            if (total > NOTHING) & (total < float("inf")):
                moved = tl.maximum(tl.exp(target.near) - tl.exp(mass_near - total), 0.0)
                moved += tl.maximum(tl.exp(target.wrong) - tl.exp(mass_wrong - total), 0.0)
                moved += tl.maximum(tl.exp(target.rest) - tl.exp(mass_rest - total), 0.0)
                relaxed = (target.no_near | target.all_wrong | out_of_reach).to(tl.float64)
                if t_y > NOTHING:
                    change = tl.where(has_near, target.near - mass_near, target.rest - mass_rest)
                    calibrated = tl.exp(beta * (t_y - middle) + change)
                if FOLD:
                    confidence = tl.exp(best - total)
                    prob = tl.exp(t_y - total)
                if misses:  # the start of the search; all other values follow once the temperature is known
                    relaxed = zero + MISSES
                    middle = centre(m_t)
                    near_offset = value
                m_t = centre(m_t)  # the rest may be empty although the row is not
            elif (total == NOTHING) == 0:
                z_tau = tl.full((), float("nan"), tl.float64)
                a = z_tau
        else:
            m_t = tl.load(at + 0).to(tl.float64)
            m_s = tl.load(at + 2).to(tl.float64)
            z_tau = tl.load(at + 3).to(tl.float64)
            s_tau = tl.load(at + 4).to(tl.float64)
            a = tl.load(at + 5).to(tl.float64)
            s_one = tl.load(at + 6).to(tl.float64)
            impossible = tl.load(at + 10).to(tl.float64)
            if E_S & ONES:
                e_s = tl.load(at + 11).to(tl.float64)
            beta = tl.load(at + STUDENT).to(tl.float64)
            middle = tl.load(at + STUDENT + 1).to(tl.float64)
            near_offset = tl.load(at + STUDENT + 2).to(tl.float64)
            wrong_offset = tl.load(at + STUDENT + 3).to(tl.float64)
            rest_offset = tl.load(at + STUDENT + 4).to(tl.float64)
    ignored, labelled, y, in_rows, in_labelled = marks(row, given, V)
    rows_share, labelled_share = shares_of(in_rows, in_labelled, scales)
    loss_of_row, counts, log_z, by_kl, one, log, label = finish(
        row, rows_share, labelled_share, given,
        forward_kl(m_t, m_s, s_tau, z_tau, a, impossible, tau), m_s, s_one, e_s, s_y, KINDS,
    )  # fmt: skip
    if FOLD or AGAIN:
        if works | FOLD:
            student_pack(at, m_t, s_k, m_s, z_tau, s_tau, a, s_one, z_one, t_y, s_y, impossible, e_s, ONES)
            tl.store(results.top1 + row, k)
            tl.store(at + STUDENT, beta)
            tl.store(at + STUDENT + 1, middle)
            tl.store(at + STUDENT + 2, near_offset)
            tl.store(at + STUDENT + 3, wrong_offset)
            tl.store(at + STUDENT + 4, rest_offset)
            tl.store(at + STUDENT + 5, confidence)
            tl.store(at + STUDENT + 6, prob)
            tl.store(at + STUDENT + 7, calibrated)
            tl.store(at + STUDENT + 8, moved)
            tl.store(at + STUDENT + 9, relaxed)
            tl.store(results.loss + row, loss_of_row)
    if MAP:
        g_row = row_of(row, gradient)
        by = scale_of(row, scales)
        if ignored | (counts == 0) | (by == 0):
            clear(g_row, 0, columns.padded, BLOCK)
        else:
            label = label * by
            student_tau, teacher_tau, student_one, student_log = student_coefficients(
                s_tau, s_one, z_tau, tau, by_kl * by, one * by, log * by
            )
            base = f64(LOG2E) / tau
            quiet = by_kl == 0
            near_top = centre(near_top)
            wrong_top = centre(wrong_top)
            rest_top = middle + centre(m_t) / beta
            if quiet:  # finite numbers in place of a teacher whose logits may not be
                beta = tl.full((), 1.0, tl.float64)
                near_top, wrong_top, rest_top = centre(m_s), centre(m_s), centre(m_s)
                near_offset, wrong_offset, rest_offset = zero, zero, zero
            in_near = beta * (t_y - near_top) + near_offset
            in_rest = beta * (t_y - rest_top) + rest_offset
            dt = tl.where(t_y == NOTHING, t_y, tl.where(near_end > own, in_near, in_rest))
            dt = tl.where(quiet, 0.0, dt)
            g_y = student_element(
                student_tau, teacher_tau, student_one, student_log, log_z, dt, s_y - centre(m_s), base, 0, ONES
            )
            g_y = tl.where(s_y == NOTHING, g_y, g_y + label)
            projected_map_columns(
                Pointers(s_row, t_row, g_row),
                columns,
                Members(near, own, near_end, wrong, wrong_at, wrong_end, alone),
                Lines(beta, near_top, near_offset, wrong_top, wrong_offset, rest_top, rest_offset),
                m_s,
                tau,
                StudentGradient(student_tau, teacher_tau, student_one, student_log, log_z, quiet),
                Element(tl.where(labelled, y, -1), g_y.to(R)),
                R,
                P,
                ONES,
                BLOCK,
            )
