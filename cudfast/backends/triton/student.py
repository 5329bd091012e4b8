"""The kernels of the student loss. A row is folded and mapped by one program, or by several if rows are few and long.

Offsets are int64. The first pass over a row reads with the cache hint evict_last, the second with evict_first: if the
rows in flight fit in L2, forward and backward cost two reads and one write of N V.
"""

from __future__ import annotations

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
    heard,
    largest_of_both,
    marks,
    replaced,
    row_of,
    scale_of,
    shares_of,
    stored,
    temperature_of,
    unless,
)
from .row import (
    E_S,
    LEAVES,
    LOG2E,
    NOTHING,
    StudentState,
    below,
    leaves,
    recalibrated,
    student_fold,
    student_move,
    summed,
)
from .terms import clip_of_row, finish, student_coefficients, student_target

COLUMNS = tl.constexpr(11)  # of a packed state, before e_s
PART = tl.constexpr(10)  # values of a part of a row


@triton.jit
def student_block(s, t, start, first, state, base, P: tl.constexpr, ONES: tl.constexpr):
    """One block of columns: maxima first, then the sums relative to them. `first`: start of the block with m_t."""
    m_t, m_s, z_tau, s_tau, a, s_one, z_one, e_one, e_s, impossible = state
    high_t, high_s = largest_of_both(t, s)
    if (high_t > m_t) | (high_s > m_s):
        new_t = tl.maximum(m_t, high_t)
        new_s = tl.maximum(m_s, high_s)
        down_t = below(m_t, new_t)
        down_s = below(m_s, new_s)
        z_tau, s_tau, a, s_one, z_one, _, e_s = student_move(
            z_tau, s_tau, a, s_one, z_one, 0.0, e_s, down_t, down_s, base, 1.0
        )
        first = tl.where(high_t > m_t, start, first)
        m_t = new_t
        m_s = new_s
    z_tau, s_tau, a, s_one, z_one, _, e_s, impossible = student_fold(
        z_tau, s_tau, a, s_one, z_one, 0.0, e_s, impossible, t - centre(m_t), s - centre(m_s), base, P, ONES
    )
    return first, StudentState(m_t, m_s, z_tau, s_tau, a, s_one, z_one, e_one, e_s, impossible)


@triton.jit
def student_fold_columns(
    s_row, t_row, begin, end, tau, R: tl.constexpr, P: tl.constexpr, ONES: tl.constexpr, BLOCK: tl.constexpr
):
    """State of the columns [begin, end) in f64, as in csrc/row/state.h, and the first column whose logit is m_t."""
    lanes = tl.arange(0, BLOCK)
    base = (f64(LOG2E) / tau).to(R)
    nothing = tl.full((), float("-inf"), R)
    zero = tl.zeros((BLOCK,), R)
    impossible = tl.full((BLOCK,), float("-inf"), R)
    state = StudentState(nothing, nothing, zero, zero, zero, zero, zero, zero, zero, impossible)
    first = begin
    whole = end - (end - begin) % BLOCK
    for start in range(begin, whole, BLOCK):
        t = tl.load(t_row + start + lanes, eviction_policy="evict_last").to(R)
        s = tl.load(s_row + start + lanes, eviction_policy="evict_last").to(R)
        first, state = student_block(s, t, start, first, state, base, P, ONES)
    if whole < end:
        inside = whole + lanes < end
        t = tl.load(t_row + whole + lanes, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(R)
        s = tl.load(s_row + whole + lanes, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(R)
        first, state = student_block(s, t, whole, first, state, base, P, ONES)
    column = first + lanes
    t = tl.load(t_row + column, mask=column < end, other=float("nan")).to(R)
    k = tl.min(tl.where(t == state.m_t, column, end), 0)
    k = tl.where(k == end, begin, k)
    return summed(state, tau), k


@triton.jit
def rest_block(s, t, start, k, y, m, z, a, c_s, base, BLOCK: tl.constexpr):
    """One block of columns without the top-1 and the label: (m, z, a) of the teacher; `a` as in `student_fold`."""
    t = replaced(replaced(t, start, k, NOTHING, BLOCK), start, y, NOTHING, BLOCK)
    high = tl.max(t, 0)
    if high > m:
        down = below(m, high)
        scale = tl.exp2(down * base)
        z = scale * z
        a = scale * a + z * down
        m = high
    dt = t - centre(m)
    excess = dt - (s - c_s)
    teacher = tl.exp2(dt * base)
    return m, z + teacher, a + teacher * tl.where(tl.abs(excess) < float("inf"), excess, 0.0)


@triton.jit
def rest_columns(s_row, t_row, V, k, y, m_s, tau, R: tl.constexpr, BLOCK: tl.constexpr):
    """(m, z, a) in f64 of a row's teacher logits without columns k and y, and of the student's logits minus m_s."""
    lanes = tl.arange(0, BLOCK)
    base = (f64(LOG2E) / tau).to(R)
    c_s = centre(m_s).to(R)
    m = tl.full((), float("-inf"), R)
    z = tl.zeros((BLOCK,), R)
    a = tl.zeros((BLOCK,), R)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        t = tl.load(t_row + start + lanes, mask=inside, other=float("-inf")).to(R)
        s = tl.load(s_row + start + lanes, mask=inside, other=float("-inf")).to(R)
        m, z, a = rest_block(s, t, start, k, y, m, z, a, c_s, base, BLOCK)
    return m.to(tl.float64), tl.sum(z, 0).to(tl.float64), tl.sum(a, 0).to(tl.float64) / tau


@triton.jit
def student_pack(at, m_t, s_k, m_s, z_tau, s_tau, a, s_one, z_one, t_y, s_y, impossible, e_s, ONES: tl.constexpr):
    """Columns in the order of `cudfast.rows.call.STUDENT_COLUMNS`."""
    tl.store(at + 0, m_t)
    tl.store(at + 1, s_k)
    tl.store(at + 2, m_s)
    tl.store(at + 3, z_tau)
    tl.store(at + 4, s_tau)
    tl.store(at + 5, a)
    tl.store(at + 6, s_one)
    tl.store(at + 7, z_one)
    tl.store(at + 8, t_y)
    tl.store(at + 9, s_y)
    tl.store(at + 10, impossible)
    if E_S & ONES:
        tl.store(at + 11, e_s)


@triton.jit
def student_map_columns(
    pointers, columns, begin, end, m_t, m_s, tau, coefficients, label, clipped,
    R: tl.constexpr, P: tl.constexpr, ONES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the columns [begin, end), and zeros in the columns from V on if the part is the last.

    `label` and `clipped` are the elements of the label and of the top-1 that the clip changed.
    """
    s_row, t_row, g_row = pointers
    quiet = coefficients.quiet
    y, g_y = label
    k, g_k = clipped
    lanes = tl.arange(0, BLOCK)
    base = (f64(LOG2E) / tau).to(R)
    t_row = unless(quiet, t_row, s_row)
    c_t = centre(tl.where(quiet, m_s, m_t)).to(R)
    c_s = centre(m_s).to(R)
    one = coefficients.student_tau.to(R)
    two = coefficients.teacher_tau.to(R)
    three = coefficients.student_one.to(R)
    four = coefficients.student_log.to(R)
    lost = coefficients.log_z.to(R)
    whole = end - (end - begin) % BLOCK
    for start in range(begin, whole, BLOCK):
        t = tl.load(t_row + start + lanes, eviction_policy="evict_first").to(R)
        s = tl.load(s_row + start + lanes, eviction_policy="evict_first").to(R)
        t = heard(t, quiet, c_t, t_row, s_row)
        g = student_element(one, two, three, four, lost, t - c_t, s - c_s, base, P, ONES)
        g = replaced(replaced(g, start, y, g_y, BLOCK), start, k, g_k, BLOCK)
        tl.store(g_row + start + lanes, stored(g, g_row))
    if whole < end:
        column = whole + lanes
        t = tl.load(t_row + column, mask=column < end, other=0.0, eviction_policy="evict_first").to(R)
        s = tl.load(s_row + column, mask=column < end, other=0.0, eviction_policy="evict_first").to(R)
        t = heard(t, quiet, c_t, t_row, s_row)
        g = student_element(one, two, three, four, lost, t - c_t, s - c_s, base, P, ONES)
        g = replaced(replaced(g, whole, y, g_y, BLOCK), whole, k, g_k, BLOCK)
        tl.store(g_row + column, stored(g, g_row), mask=column < end)
    if end == columns.classes:
        clear(g_row, columns.classes, columns.padded, BLOCK)


@triton.jit
def student_rows(
    student, teacher, gradient, given, scales, results, columns, temperature: fp64,
    R: tl.constexpr, P: tl.constexpr, ONES: tl.constexpr, CLIP: tl.constexpr, KINDS: tl.constexpr,
    SWEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns [chunk i, chunk (i + 1)) of a row, program (row, i). FOLD computes the state, MERGE computes it from
    parts, otherwise it is read; MAP writes the gradient. With FOLD or MERGE, one program has the whole row.
    Groups of arguments: see launch.py; SWEEP: see `pieces.Sweep`."""
    FOLD: tl.constexpr = SWEEP.fold
    MERGE: tl.constexpr = SWEEP.merge
    MAP: tl.constexpr = SWEEP.map
    sums = results.sums
    V, padded, chunk = columns
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, V)
    ignored, labelled, y, in_rows, in_labelled = marks(row, given, V)
    s_row = row_of(row, student)
    t_row = row_of(row, teacher)
    tau = temperature_of(row, given, temperature)
    nothing = tl.full((), float("-inf"), tl.float64)
    zero = tl.zeros((), tl.float64)
    m_t, s_k, m_s, t_y, s_y = nothing, nothing, nothing, nothing, nothing
    z_tau, s_tau, a, s_one, z_one, e_s, impossible = zero, zero, zero, zero, zero, zero, zero
    k = tl.zeros((), tl.int64)
    m_q = tl.full((), float("inf"), tl.float64)
    at = sums
    WIDTH: tl.constexpr = (COLUMNS + 1 if E_S & ONES else COLUMNS) + (1 if CLIP == LEAVES else 0)
    if sums is not None:
        at = sums + row * WIDTH
    if ignored == 0:
        if FOLD:
            state, k = student_fold_columns(s_row, t_row, begin, end, tau, R, P, ONES, BLOCK)
            m_t, m_s, z_tau, s_tau, a, s_one, z_one, _, e_s, impossible = state
        elif MERGE:
            m_t, m_s, z_tau, s_tau, a, s_one, z_one, e_s, impossible, k = student_merge(
                results.parts, row, tl.cdiv(V, chunk), tau, ONES
            )
        else:
            m_t = tl.load(at + 0).to(tl.float64)
            s_k = tl.load(at + 1).to(tl.float64)
            m_s = tl.load(at + 2).to(tl.float64)
            z_tau = tl.load(at + 3).to(tl.float64)
            s_tau = tl.load(at + 4).to(tl.float64)
            a = tl.load(at + 5).to(tl.float64)
            s_one = tl.load(at + 6).to(tl.float64)
            t_y = tl.load(at + 8).to(tl.float64)
            s_y = tl.load(at + 9).to(tl.float64)
            impossible = tl.load(at + 10).to(tl.float64)
            if E_S & ONES:
                e_s = tl.load(at + 11).to(tl.float64)
            if CLIP == LEAVES:
                m_q = tl.load(at + WIDTH - 1).to(tl.float64)
            k = tl.load(results.top1 + row)
        if FOLD or MERGE:
            s_k = tl.load(s_row + k).to(tl.float64)
            if labelled:
                t_y = tl.load(t_row + y).to(tl.float64)
                s_y = tl.load(s_row + y).to(tl.float64)
            if CLIP == LEAVES:
                clip = clip_of_row(m_t, t_y, labelled, given)
                if leaves(z_tau, a, s_tau, m_t, m_s, s_k, t_y, s_y, clip, tau):
                    rest = rest_columns(s_row, t_row, V, k, y, m_s, tau, R, BLOCK)
                    m_q, z_tau, a, impossible = recalibrated(rest, m_t, m_s, s_k, s_y, impossible, clip, tau, R)
    if FOLD or MERGE:
        if sums is not None:
            student_pack(at, m_t, s_k, m_s, z_tau, s_tau, a, s_one, z_one, t_y, s_y, impossible, e_s, ONES)
            if CLIP == LEAVES:
                tl.store(at + WIDTH - 1, m_q)
            tl.store(results.top1 + row, k)
    divergence, target_z, clip = student_target(
        m_t, m_s, z_tau, s_tau, a, impossible, s_k, t_y, s_y, m_q, labelled, tau, given, CLIP
    )
    t_k = clip.t_k
    new_t_y = clip.t_y
    if CLIP == LEAVES:  # the gradient is relative to m_q
        if m_q < float("inf"):
            t_k += m_t - m_q
            new_t_y += m_t - m_q
            m_t = m_q
    rows_share, labelled_share = shares_of(in_rows, in_labelled, scales)
    value, counts, log_z, by_kl, one, log, label = finish(
        row, rows_share, labelled_share, given, divergence, m_s, s_one, e_s, s_y, KINDS
    )
    if FOLD or MERGE:
        tl.store(results.loss + row, value)
    if MAP:
        g_row = row_of(row, gradient)
        by = scale_of(row, scales)
        if ignored | (counts == 0) | (by == 0):
            clear(g_row, begin, tl.where(end == V, padded, end), BLOCK)
        else:
            label = label * by
            student_tau, teacher_tau, student_one, student_log = student_coefficients(
                s_tau, s_one, target_z, tau, by_kl * by, one * by, log * by
            )
            base = f64(LOG2E) / tau
            dt = tl.where(by_kl == 0, 0.0, tl.where(clip.r > 0, new_t_y, t_y - centre(m_t)))
            g_y = student_element(
                student_tau, teacher_tau, student_one, student_log, log_z, dt, s_y - centre(m_s), base, 0, ONES
            )
            g_y = tl.where(s_y == NOTHING, g_y, g_y + label)
            g_k = student_element(
                student_tau, teacher_tau, student_one, student_log, log_z, t_k, s_k - centre(m_s), base, 0, ONES
            )
            student_map_columns(
                Pointers(s_row, t_row, g_row),
                columns,
                begin,
                end,
                m_t,
                m_s,
                tau,
                StudentGradient(student_tau, teacher_tau, student_one, student_log, log_z, by_kl == 0),
                Element(tl.where(labelled, y, -1), g_y.to(R)),
                Element(tl.where(clip.r > 0, k, -1), g_k.to(R)),
                R,
                P,
                ONES,
                BLOCK,
            )


@triton.jit
def student_parts(
    student, teacher, given, parts, columns, temperature: fp64,
    R: tl.constexpr, P: tl.constexpr, ONES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """State of the columns [chunk i, chunk (i + 1)) of a row, program (row, i)."""
    V = columns.classes
    chunk = columns.chunk
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * chunk
    ignored = marks(row, given, V)[0]
    if ignored == 0:
        tau = temperature_of(row, given, temperature)
        state, k = student_fold_columns(
            row_of(row, student), row_of(row, teacher), begin, tl.minimum(begin + chunk, V), tau, R, P, ONES, BLOCK
        )
        at = parts + (row * tl.num_programs(1) + tl.program_id(1)) * PART
        tl.store(at + 0, state.m_t)
        tl.store(at + 1, state.m_s)
        tl.store(at + 2, state.z_tau)
        tl.store(at + 3, state.s_tau)
        tl.store(at + 4, state.a)
        tl.store(at + 5, state.s_one)
        tl.store(at + 6, state.z_one)
        tl.store(at + 7, state.impossible)
        tl.store(at + 8, k.to(tl.float64))  # exact: below 2^53
        if E_S & ONES:
            tl.store(at + 9, state.e_s)


@triton.jit
def student_merge(parts, row, count_of_parts, tau, ONES: tl.constexpr):
    """The state of a row from those of its parts, in their order: the lowest index of equal values is kept."""
    base = f64(LOG2E) / tau
    m_t = tl.full((), float("-inf"), tl.float64)
    m_s = tl.full((), float("-inf"), tl.float64)
    zero = tl.zeros((), tl.float64)
    z_tau, s_tau, a, s_one, z_one, e_s, impossible, k = zero, zero, zero, zero, zero, zero, zero, zero
    for part in range(0, count_of_parts):
        at = parts + (row * count_of_parts + part) * PART
        other_t = tl.load(at + 0)
        other_s = tl.load(at + 1)
        k = tl.where((other_t > m_t) | (part == 0), tl.load(at + 8), k)
        new_t = tl.maximum(m_t, other_t)
        new_s = tl.maximum(m_s, other_s)
        z_tau, s_tau, a, s_one, z_one, _, e_s = student_move(
            z_tau, s_tau, a, s_one, z_one, 0.0, e_s, below(m_t, new_t), below(m_s, new_s), base, tau
        )
        z_2, s_2, a_2, s_one_2, z_one_2, _, e_2 = student_move(
            tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), 0.0,
            tl.load(at + 9) if E_S & ONES else 0.0, below(other_t, new_t), below(other_s, new_s), base, tau,
        )  # fmt: skip
        z_tau, s_tau, a, s_one, z_one = z_tau + z_2, s_tau + s_2, a + a_2, s_one + s_one_2, z_one + z_one_2
        e_s += e_2
        impossible = tl.maximum(impossible, tl.load(at + 7))
        m_t = new_t
        m_s = new_s
    return m_t, m_s, z_tau, s_tau, a, s_one, z_one, e_s, impossible, k.to(tl.int64)
