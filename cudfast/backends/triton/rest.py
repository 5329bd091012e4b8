"""The two sweeps over the rest of a row: the classes besides the near and wrong ones, which are summed separately."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .element import student_element
from .pieces import centre, clear, f64, heard, largest_of_both, replaced, stored, unless
from .row import E_ONE, E_S, LOG2E, NOTHING, StudentState, below, student_fold, student_move, summed
from .sets import apart, in_thread, member, zero_beside


class Lines(NamedTuple):
    """The target's logits are beta (t - top) + offset, with a top and an offset for each set: scalars in f64."""

    beta: Any
    near_top: Any
    near_offset: Any
    wrong_top: Any
    wrong_offset: Any
    rest_top: Any
    rest_offset: Any


@triton.jit
def projected_block(
    s, x, start, s_row, top, k, state, base,
    RUN: tl.constexpr, P: tl.constexpr, ONES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns. x: teacher logits, -inf in columns that are summed separately. RUN: so is the top-1.

    Sums are (BLOCK / WIDTH,): each thread adds its columns first, which saves registers.
    """
    lanes = tl.arange(0, BLOCK)
    WIDTH: tl.constexpr = 2 if x.dtype == tl.float64 else 8
    m_t, m_s, z_tau, s_tau, a, s_one, z_one, e_one, e_s, impossible = state
    high_t, high_s = largest_of_both(x, s)
    if (high_t > m_t) | (high_s > m_s):
        joins = tl.full((), float("-inf"), x.dtype)
        s_joins = tl.zeros((), x.dtype)
        if RUN:
            if high_t > top:  # the top-1 so far is one of the rest
                joins = top
                s_joins = tl.load(s_row + tl.maximum(k, 0)).to(x.dtype)
                at = tl.min(tl.where(x == high_t, lanes, BLOCK), 0)
                x = tl.where(lanes == at, NOTHING, x)
                top = high_t
                k = start + at.to(tl.int64)
                high_t = tl.maximum(tl.max(x, 0), joins)
        new_t = tl.maximum(m_t, high_t)
        new_s = tl.maximum(m_s, high_s)
        z_tau, s_tau, a, s_one, z_one, e_one, e_s = student_move(
            z_tau, s_tau, a, s_one, z_one, e_one, e_s, below(m_t, new_t), below(m_s, new_s), base, 1.0
        )
        m_t = new_t
        m_s = new_s
        if RUN:
            dt = tl.where(tl.arange(0, BLOCK // WIDTH) == 0, joins - centre(m_t), NOTHING)
            z_tau, _, a, _, z_one, e_one, _, impossible = student_fold(
                z_tau, s_tau, a, s_one, z_one, e_one, e_s, impossible, dt, s_joins - centre(m_s), base, P, ONES
            )
    zero = zero_beside(base)
    at_t, at_s, excess, one_s, one_t, x_t, x_s, holes = student_fold(
        zero, zero, zero, zero, zero, zero, zero, NOTHING, x - centre(m_t), s - centre(m_s), base, P, ONES
    )
    z_tau += in_thread(at_t, BLOCK, WIDTH)
    s_tau += in_thread(at_s, BLOCK, WIDTH)
    a += in_thread(excess, BLOCK, WIDTH)
    s_one += in_thread(one_s, BLOCK, WIDTH)
    z_one += in_thread(one_t, BLOCK, WIDTH)
    if E_ONE & ONES:
        e_one += in_thread(x_t, BLOCK, WIDTH)
    if E_S & ONES:
        e_s += in_thread(x_s, BLOCK, WIDTH)
    impossible = tl.maximum(impossible, tl.max(tl.reshape(holes, (BLOCK // WIDTH, WIDTH)), 1))
    return top, k, StudentState(m_t, m_s, z_tau, s_tau, a, s_one, z_one, e_one, e_s, impossible)


@triton.jit
def projected_fold_columns(
    s_row, t_row, V, members, beta, middle, tau,
    R: tl.constexpr, RUN: tl.constexpr, P: tl.constexpr, ONES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """State of the rest in f64 for teacher logits beta (t - middle), and the top-1 that RUN has kept out of it."""
    near, near_at, near_end, wrong, wrong_at, wrong_end, alone = members
    lanes = tl.arange(0, BLOCK)
    WIDTH: tl.constexpr = 2 if R == tl.float64 else 8
    base = (f64(LOG2E) / tau).to(R)
    b = beta.to(R)
    c = middle.to(R)
    top = tl.full((), float("-inf"), R)
    k = tl.full((), -1, tl.int64)
    zero = tl.zeros((BLOCK // WIDTH,), R)
    impossible = tl.full((BLOCK // WIDTH,), float("-inf"), R)
    state = StudentState(top, top, zero, zero, zero, zero, zero, zero, zero, impossible)
    near_column = member(near, near_at, near_end)
    wrong_column = tl.where(alone >= 0, alone, member(wrong, wrong_at, wrong_end))
    whole = V - V % BLOCK
    for start in range(0, whole, BLOCK):
        t = tl.load(t_row + start + lanes, eviction_policy="evict_last").to(R)
        s = tl.load(s_row + start + lanes, eviction_policy="evict_last").to(R)
        x = t if RUN else (t - c) * b
        x, near_at, near_column = apart(x, t, start, near, near_at, near_end, near_column, 0.0, NOTHING, 1.0, BLOCK)
        x, wrong_at, wrong_column = apart(
            x, t, start, wrong, wrong_at, wrong_end, wrong_column, 0.0, NOTHING, 1.0, BLOCK
        )
        top, k, state = projected_block(s, x, start, s_row, top, k, state, base, RUN, P, ONES, BLOCK)
    if whole < V:
        inside = whole + lanes < V
        t = tl.load(t_row + whole + lanes, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(R)
        s = tl.load(s_row + whole + lanes, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(R)
        x = t if RUN else (t - c) * b
        x, near_at, near_column = apart(x, t, whole, near, near_at, near_end, near_column, 0.0, NOTHING, 1.0, BLOCK)
        x, wrong_at, wrong_column = apart(
            x, t, whole, wrong, wrong_at, wrong_end, wrong_column, 0.0, NOTHING, 1.0, BLOCK
        )
        top, k, state = projected_block(s, x, whole, s_row, top, k, state, base, RUN, P, ONES, BLOCK)
    return summed(state, tau), top.to(tl.float64), k


@triton.jit
def projected_map_columns(
    pointers, columns, members, target, m_s, tau, coefficients, label,
    R: tl.constexpr, P: tl.constexpr, ONES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a row, and zeros in the columns from V on; `label` is the element of the label's column."""
    s_row, t_row, g_row = pointers
    V = columns.classes
    near, near_at, near_end, wrong, wrong_at, wrong_end, alone = members
    beta, near_top, near_offset, wrong_top, wrong_offset, rest_top, rest_offset = target
    quiet = coefficients.quiet
    y, g_y = label
    lanes = tl.arange(0, BLOCK)
    base = (f64(LOG2E) / tau).to(R)
    t_row = unless(quiet, t_row, s_row)
    b = beta.to(R)
    c_s = centre(m_s).to(R)
    one = coefficients.student_tau.to(R)
    two = coefficients.teacher_tau.to(R)
    three = coefficients.student_one.to(R)
    four = coefficients.student_log.to(R)
    lost = coefficients.log_z.to(R)
    near_column = member(near, near_at, near_end)
    wrong_column = tl.where(alone >= 0, alone, member(wrong, wrong_at, wrong_end))
    whole = V - V % BLOCK
    for start in range(0, whole, BLOCK):
        t = tl.load(t_row + start + lanes, eviction_policy="evict_first").to(R)
        s = tl.load(s_row + start + lanes, eviction_policy="evict_first").to(R)
        t = heard(t, quiet, rest_top.to(R), t_row, s_row)
        dt = (t - rest_top.to(R)) * b + rest_offset.to(R)
        dt, near_at, near_column = apart(
            dt, t, start, near, near_at, near_end, near_column, near_top.to(R), near_offset.to(R), b, BLOCK
        )
        dt, wrong_at, wrong_column = apart(
            dt, t, start, wrong, wrong_at, wrong_end, wrong_column, wrong_top.to(R), wrong_offset.to(R), b, BLOCK
        )
        g = replaced(student_element(one, two, three, four, lost, dt, s - c_s, base, P, ONES), start, y, g_y, BLOCK)
        tl.store(g_row + start + lanes, stored(g, g_row))
    if whole < V:
        column = whole + lanes
        t = tl.load(t_row + column, mask=column < V, other=0.0, eviction_policy="evict_first").to(R)
        s = tl.load(s_row + column, mask=column < V, other=0.0, eviction_policy="evict_first").to(R)
        t = heard(t, quiet, rest_top.to(R), t_row, s_row)
        dt = (t - rest_top.to(R)) * b + rest_offset.to(R)
        dt, near_at, near_column = apart(
            dt, t, whole, near, near_at, near_end, near_column, near_top.to(R), near_offset.to(R), b, BLOCK
        )
        dt, wrong_at, wrong_column = apart(
            dt, t, whole, wrong, wrong_at, wrong_end, wrong_column, wrong_top.to(R), wrong_offset.to(R), b, BLOCK
        )
        g = replaced(student_element(one, two, three, four, lost, dt, s - c_s, base, P, ONES), whole, y, g_y, BLOCK)
        tl.store(g_row + column, stored(g, g_row), mask=column < V)
    clear(g_row, V, columns.padded, BLOCK)
