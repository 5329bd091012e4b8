"""The kernels of rows without a target; see student.py.

Offsets are int64. The first pass over a row reads with the cache hint evict_last, the second with evict_first: if the
rows in flight fit in L2, forward and backward cost one read and one write of N V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .element import teacher_element
from .pieces import centre, clear, marks, replaced, row_of, scale_of, shares_of, stored
from .row import LOG2E, NOTHING, below, teacher_fold, teacher_move
from .terms import finish

LN2 = tl.constexpr(0.6931471805599453)
PART = tl.constexpr(3)  # values of a part of a row


@triton.jit
def teacher_block(z_j, m, z, e):
    high = tl.max(z_j, 0)
    if high > m:
        z, e = teacher_move(z, e, below(m, high), LOG2E)
        m = high
    z, e = teacher_fold(z, e, z_j - centre(m))
    return m, z, e


@triton.jit
def teacher_fold_columns(z_row, begin, end, R: tl.constexpr, BLOCK: tl.constexpr):
    """State of the columns [begin, end) in f64: (m, z, e)."""
    lanes = tl.arange(0, BLOCK)
    m = tl.full((), float("-inf"), R)
    z = tl.zeros((BLOCK,), R)
    e = tl.zeros((BLOCK,), R)
    whole = end - (end - begin) % BLOCK
    for start in range(begin, whole, BLOCK):
        z_j = tl.load(z_row + start + lanes, eviction_policy="evict_last").to(R)
        m, z, e = teacher_block(z_j, m, z, e)
    if whole < end:
        inside = whole + lanes < end
        z_j = tl.load(z_row + whole + lanes, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(R)
        m, z, e = teacher_block(z_j, m, z, e)
    return m.to(tl.float64), tl.sum(z, 0).to(tl.float64), tl.sum(e, 0).to(tl.float64) * LN2


@triton.jit
def teacher_map_columns(
    z_row, g_row, begin, end, V, padded, m, inv_z, log_z, one, log, y, g_y, R: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of the columns [begin, end), g_y in column y, and zeros from column V on in the last part."""
    lanes = tl.arange(0, BLOCK)
    c = centre(m).to(R)
    one, log, inv_z, log_z = one.to(R), log.to(R), inv_z.to(R), log_z.to(R)
    whole = end - (end - begin) % BLOCK
    for start in range(begin, whole, BLOCK):
        z_j = tl.load(z_row + start + lanes, eviction_policy="evict_first").to(R)
        g = replaced(teacher_element(one, log, z_j - c, inv_z, log_z), start, y, g_y, BLOCK)
        tl.store(g_row + start + lanes, stored(g, g_row))
    if whole < end:
        column = whole + lanes
        z_j = tl.load(z_row + column, mask=column < end, other=0.0, eviction_policy="evict_first").to(R)
        g = replaced(teacher_element(one, log, z_j - c, inv_z, log_z), whole, y, g_y, BLOCK)
        tl.store(g_row + column, stored(g, g_row), mask=column < end)
    if end == V:
        clear(g_row, V, padded, BLOCK)


@triton.jit
def teacher_rows(
    logits, gradient, given, scales, results, columns,
    R: tl.constexpr, KINDS: tl.constexpr, SWEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns [chunk i, chunk (i + 1)) of a row, program (row, i). See `student_rows`."""
    FOLD: tl.constexpr = SWEEP.fold
    MERGE: tl.constexpr = SWEEP.merge
    MAP: tl.constexpr = SWEEP.map
    sums = results.sums
    V, padded, chunk = columns
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, V)
    ignored, labelled, y, in_rows, in_labelled = marks(row, given, V)
    z_row = row_of(row, logits)
    m = tl.full((), float("-inf"), tl.float64)
    z_y = tl.full((), float("-inf"), tl.float64)
    z = tl.zeros((), tl.float64)
    e = tl.zeros((), tl.float64)
    if ignored == 0:
        if FOLD:
            m, z, e = teacher_fold_columns(z_row, begin, end, R, BLOCK)
        elif MERGE:
            m, z, e = teacher_merge(results.parts, row, tl.cdiv(V, chunk))
        else:
            at = sums + row * 4
            m = tl.load(at + 0).to(tl.float64)
            z = tl.load(at + 1).to(tl.float64)
            e = tl.load(at + 2).to(tl.float64)
            z_y = tl.load(at + 3).to(tl.float64)
        if FOLD or MERGE:
            if labelled:
                z_y = tl.load(z_row + y).to(tl.float64)
    if FOLD or MERGE:
        if sums is not None:
            at = sums + row * 4
            tl.store(at + 0, m)
            tl.store(at + 1, z)
            tl.store(at + 2, e)
            tl.store(at + 3, z_y)
    rows_share, labelled_share = shares_of(in_rows, in_labelled, scales)
    value, counts, log_z, _, one, log, label = finish(
        row, rows_share, labelled_share, given, tl.zeros((), tl.float64), m, z, e, z_y, KINDS
    )
    if FOLD or MERGE:
        tl.store(results.loss + row, value)
    if MAP:
        g_row = row_of(row, gradient)
        by = scale_of(row, scales)
        if ignored | (counts == 0) | (by == 0):
            clear(g_row, begin, tl.where(end == V, padded, end), BLOCK)
        else:
            one, log, label = one * by, log * by, label * by
            g_y = teacher_element(one, log, z_y - centre(m), 1.0 / z, log_z)
            g_y = tl.where(z_y == NOTHING, g_y, g_y + label)
            teacher_map_columns(
                z_row, g_row, begin, end, V, padded, m, 1.0 / z, log_z, one, log,
                tl.where(labelled & (label != 0), y, -1), g_y.to(R), R, BLOCK,
            )  # fmt: skip


@triton.jit
def teacher_parts(logits, given, parts, columns, R: tl.constexpr, BLOCK: tl.constexpr):
    """State of the columns [chunk i, chunk (i + 1)) of a row, program (row, i)."""
    V = columns.classes
    chunk = columns.chunk
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * chunk
    ignored = marks(row, given, V)[0]
    if ignored == 0:
        z_row = row_of(row, logits)
        m, z, e = teacher_fold_columns(z_row, begin, tl.minimum(begin + chunk, V), R, BLOCK)
        at = parts + (row * tl.num_programs(1) + tl.program_id(1)) * PART
        tl.store(at + 0, m)
        tl.store(at + 1, z)
        tl.store(at + 2, e)


@triton.jit
def teacher_merge(parts, row, count_of_parts):
    m = tl.full((), float("-inf"), tl.float64)
    z = tl.zeros((), tl.float64)
    e = tl.zeros((), tl.float64)
    for part in range(0, count_of_parts):
        at = parts + (row * count_of_parts + part) * PART
        other = tl.load(at + 0)
        new = tl.maximum(m, other)
        z, e = teacher_move(z, e, below(m, new), 1.0)
        z_2, e_2 = teacher_move(tl.load(at + 1), tl.load(at + 2), below(other, new), 1.0)
        z, e = z + z_2, e + e_2
        m = new
    return m, z, e
