"""Functions for the kernels of both losses: addresses of rows, the values of a row besides its logits, block maxima."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

from .row import NOTHING
from .settings import special
from .terms import row_weights

fp64 = tl.float64  # annotates arguments that must be passed in double precision
# The interpreter reduces pairs in Python, one element after the other.
PAIRS = tl.constexpr(not knobs.runtime.interpret)


class Sweep(NamedTuple):
    """What a launch of a row kernel does, a constant of the kernel."""

    fold: bool  # computes the state from the logits
    merge: bool  # computes it from parts
    map: bool  # writes the gradient


class Pointers(NamedTuple):
    """The first column of a row, of each matrix."""

    student: Any
    teacher: Any
    gradient: Any


class StudentGradient(NamedTuple):
    """What the gradient of a row's elements is computed from: see `element.student_element`. Scalars in f64."""

    student_tau: Any
    teacher_tau: Any
    student_one: Any
    student_log: Any
    log_z: Any
    quiet: Any  # the teacher has no part in it


class Element(NamedTuple):
    """A column of the gradient that is computed separately, and its value; column -1: none."""

    column: Any
    value: Any


@triton.jit
def row_of(row, logits):
    """Row i of a `launch.Matrix`: see `cudfast.rows.layout.row_layout`."""
    return logits.pointer + ((row // logits.inner) * logits.outer + (row % logits.inner) * logits.stride)


@triton.jit(do_not_specialize=["upstream_step"])
def scale_rows(gradient, upstream, padded, chunk, upstream_step, R: tl.constexpr, BLOCK: tl.constexpr):
    """A gradient times the upstream gradient. If that is 1, the gradient is not read; 0 remains 0, even times NaN."""
    row = tl.program_id(0).to(tl.int64)
    by = tl.load(upstream + row * upstream_step).to(R)
    if by != 1:
        begin = tl.program_id(1).to(tl.int64) * chunk
        end = tl.minimum(begin + chunk, padded)
        g_row = row_of(row, gradient)
        for start in range(begin, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            g = tl.load(g_row + column, mask=column < end, other=0.0).to(R)
            tl.store(g_row + column, stored(tl.where(g == 0, g, g * by), g_row), mask=column < end)


@triton.jit
def f64(scalar):
    """An argument in double precision; the interpreter passes Python floats."""
    return tl.zeros((), tl.float64) + scalar


@triton.jit
def stored(block, pointer):
    """The block in the type of its memory; through f32, the only conversion to 16 bits that the interpreter has."""
    if pointer.dtype.element_ty == tl.float64:
        return block
    return block.to(tl.float32).to(pointer.dtype.element_ty)


@triton.jit
def replaced(block, start, column, value, BLOCK: tl.constexpr):
    """The block that begins at column `start`, with `value` in one column if that is in it."""
    at = tl.where((column >= start) & (column < start + BLOCK), (column - start).to(tl.int32), -1)
    return tl.where(tl.arange(0, BLOCK) == at, value, block)


@triton.jit
def clear(g_row, begin, end, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        tl.store(g_row + start + lanes, tl.zeros((BLOCK,), g_row.dtype.element_ty), mask=start + lanes < end)


@triton.jit
def larger_of_both(a0, a1, b0, b1):
    return tl.maximum(a0, b0), tl.maximum(a1, b1)


@triton.jit
def largest_of_both(x, y):
    """The maxima of two blocks, with one synchronisation."""
    if PAIRS:
        a, b = tl.reduce((x, y), 0, larger_of_both)
    else:
        a, b = tl.max(x, 0), tl.max(y, 0)
    return a, b


@triton.jit
def unless(quiet, t_row, s_row):
    """The teacher's row; the student's if the teacher's part of the gradient is 0, so that its NaN cannot be read.

    That works for rows of one dtype, and costs nothing. Blocks of others go through `heard`.
    """
    if t_row.dtype == s_row.dtype:
        t_row = tl.where(quiet, s_row, t_row)
    return t_row


@triton.jit
def heard(t, quiet, instead, t_row, s_row):
    """A block of teacher logits, or `instead` of all of them."""
    if t_row.dtype == s_row.dtype:
        return t
    return tl.where(quiet, instead, t)


@triton.jit
def centre(m):
    return tl.where(m == NOTHING, 0.0, m)


# ---- the values of a row besides its logits ----


@triton.jit
def marks(row, given, V):
    """(ignored, labelled, y, in every term, in those of the label): y is always a valid class; the last two are what
    the row counts, NaN if its input is invalid.

    The host reads no values, so a label that is not a class makes the loss of its row NaN and raises no error.
    """
    w = tl.full((), 1.0, tl.float64)
    if given.weight is not None:
        w = tl.load(given.weight + row)
    y = tl.zeros((), tl.int64)
    ignored = w == 0
    labelled = tl.zeros((), tl.int1)
    if given.labels is not None:
        ignore_index, unlabeled_index = special(given.settings)
        y = tl.load(given.labels + row)
        ignored = ignored | (y == ignore_index)
        labelled = (y != ignore_index) & (y != unlabeled_index)
    wrong = (labelled & ((y < 0) | (y >= V))) | ((w >= 0) == 0) | (w == float("inf"))
    y = tl.where(labelled & (y >= 0) & (y < V), y, 0)
    in_rows, in_labelled = row_weights(ignored, labelled, tl.where(wrong & (ignored == 0), float("nan"), w))
    return ignored, labelled, y, in_rows, in_labelled


@triton.jit
def shared(weight, divisor):
    """A row's part of a mean: 0 if all rows are excluded, NaN for a weight of NaN."""
    return tl.where(divisor > 0, weight / divisor, 0 * weight)


@triton.jit
def shares_of(in_rows, in_labelled, scales):
    """What a row counts in the means: see `marks`."""
    return shared(in_rows, tl.load(scales.divisors)), shared(in_labelled, tl.load(scales.divisors + 1))


@triton.jit
def scale_of(row, scales):
    """The upstream gradient of a row in f64."""
    by = tl.full((), 1.0, tl.float64)
    if scales.upstream is not None:
        by = tl.load(scales.upstream + row * scales.step).to(tl.float64)
    return by


@triton.jit
def temperature_of(row, given, temperature):
    """The temperature of a row in f64; NaN if it is out of range."""
    tau = f64(temperature)
    if given.temperatures is not None:
        tau = tl.load(given.temperatures + row)
        tau = tl.where((tau >= 1e-4) & (tau <= 1e4), tau, float("nan"))
    return tau


@triton.jit(do_not_specialize=["N"])
def count(labels, weight, divisors, settings, N, BLOCK: tl.constexpr):
    """Sums of the rows' weights: of all terms, and of those that need a label. One program, in a fixed order."""
    rows_sum = tl.zeros((BLOCK,), tl.float64)
    labelled_sum = tl.zeros((BLOCK,), tl.float64)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, N, BLOCK):
        row = start + lanes
        inside = row < N
        w = tl.full((BLOCK,), 1.0, tl.float64)
        if weight is not None:
            w = tl.load(weight + row, mask=inside, other=0.0)
        ignored = (inside == 0) | (w == 0)
        labelled = tl.zeros((BLOCK,), tl.int1)
        if labels is not None:
            ignore_index, unlabeled_index = special(settings)
            y = tl.load(labels + row, mask=inside, other=0)
            ignored = ignored | (y == ignore_index)
            labelled = (y != ignore_index) & (y != unlabeled_index)
        in_rows, in_labelled = row_weights(ignored, labelled, w)
        rows_sum += in_rows
        labelled_sum += in_labelled
    tl.store(divisors, tl.sum(rows_sum, 0))
    tl.store(divisors + 1, tl.sum(labelled_sum, 0))
