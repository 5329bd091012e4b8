"""Sets of classes of a row that are summed separately: members of an ascending list, at the places [begin, end)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pieces import centre
from .row import student_fold, tempered_fold

SET = tl.constexpr(256)  # members at a time
FAR = tl.constexpr(1 << 62)  # beyond every column


class Members(NamedTuple):
    """The classes of a row that are summed separately. Places in the lists, and columns, are scalars in i64."""

    near: Any  # list
    near_at: Any
    near_end: Any
    wrong: Any  # list
    wrong_at: Any
    wrong_end: Any
    alone: Any  # the top-1 if it is the wrong class, else -1


@triton.jit
def in_thread(x, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of WIDTH adjacent columns: in one thread if accesses are wide, else over lanes, which then all have the sum.

    x must not be a plain product: see `zero_beside`.
    """
    return tl.sum(tl.reshape(x, (BLOCK // WIDTH, WIDTH)), 1)


@triton.jit
def zero_beside(x):
    """Zero, computed from a finite x, so that the compiler cannot replace it with a constant.

    A product is added to this zero in one multiply-add before it is summed over lanes. Without it, the compiler would
    fuse the product and the first sum over lanes, which rounds the product of the other lane only. The sums of two
    lanes would then differ by an ulp, and which of them is stored would differ between runs.
    """
    return x - x


@triton.jit
def member(indices, at, end):
    """The column at a place of the list; FAR beyond its end."""
    return tl.load(indices + at, mask=at < end, other=FAR)


@triton.jit
def apart(x, t, start, indices, at, end, column, middle, offset, beta, BLOCK: tl.constexpr):
    """x with beta (t - middle) + offset in columns of the block that are members; the next member's place and column.

    `column` is the member at place `at`, the first that is not in an earlier block.
    """
    lanes = tl.arange(0, BLOCK)
    while column < start + BLOCK:
        x = tl.where(lanes == (column - start).to(tl.int32), (t - middle) * beta + offset, x)
        at += 1
        column = member(indices, at, end)
    return x, at, column


@triton.jit
def holds(indices, begin, end, column):
    """Whether the column is a member."""
    lanes = tl.arange(0, SET)
    found = tl.zeros((SET,), tl.int32)
    for at in range(begin, end, SET):
        found += (tl.load(indices + at + lanes, mask=at + lanes < end, other=FAR) == column).to(tl.int32)
    return tl.sum(found, 0) > 0


@triton.jit
def set_top(t_row, indices, begin, end, R: tl.constexpr):
    """The largest logit of the members, in f64, and the first of its columns; -inf and FAR if there is none."""
    lanes = tl.arange(0, SET)
    top = tl.full((), float("-inf"), R)
    k = tl.full((), FAR, tl.int64)
    for at in range(begin, end, SET):
        inside = at + lanes < end
        column = tl.load(indices + at + lanes, mask=inside, other=0)
        t = tl.load(t_row + column, mask=inside, other=float("-inf")).to(R)
        high = tl.max(t, 0)
        if high > top:
            top = high
            k = tl.min(tl.where(t == high, column, FAR), 0)
    return top.to(tl.float64), k


@triton.jit
def set_sums(
    s_row, t_row, indices, begin, end, top, beta, m_s, tau, base,
    R: tl.constexpr, P: tl.constexpr, ONES: tl.constexpr,
):  # fmt: skip
    """(z_tau, a, z_one, e_one, impossible) of the members in f64, relative to their own maximum and the row's m_s."""
    lanes = tl.arange(0, SET)
    nothing = tl.zeros((SET,), R)
    z_tau = tl.zeros((SET,), R)
    a = tl.zeros((SET,), R)
    z_one = tl.zeros((SET,), R)
    e_one = tl.zeros((SET,), R)
    impossible = tl.full((SET,), float("-inf"), R)
    for at in range(begin, end, SET):
        inside = at + lanes < end
        column = tl.load(indices + at + lanes, mask=inside, other=0)
        t = tl.load(t_row + column, mask=inside, other=float("-inf")).to(R)
        s = tl.load(s_row + column, mask=inside, other=0.0).to(R)
        dt = (t - centre(top).to(R)) * beta.to(R)
        z_tau, _, a, _, z_one, e_one, _, impossible = student_fold(
            z_tau, nothing, a, nothing, z_one, e_one, nothing, impossible, dt, s - centre(m_s).to(R), base, P, ONES
        )
    return (
        tl.sum(z_tau, 0).to(tl.float64),
        tl.sum(a, 0).to(tl.float64) / tau,
        tl.sum(z_one, 0).to(tl.float64),
        tl.sum(e_one, 0).to(tl.float64),
        tl.where(tl.max(impossible, 0) == float("inf"), 1.0, 0.0).to(tl.float64),
    )


@triton.jit
def set_tempered(t_row, indices, begin, end, middle, beta, R: tl.constexpr):
    """(z, e, v) of the members relative to `middle`, in f64."""
    lanes = tl.arange(0, SET)
    z = tl.zeros((SET,), R)
    e = tl.zeros((SET,), R)
    v = tl.zeros((SET,), R)
    for at in range(begin, end, SET):
        inside = at + lanes < end
        column = tl.load(indices + at + lanes, mask=inside, other=0)
        t = tl.load(t_row + column, mask=inside, other=float("-inf")).to(R)
        dz, de, dv = tempered_fold(t - middle.to(R), beta.to(R))
        z += dz
        e += de
        v += dv
    return tl.sum(z, 0).to(tl.float64), tl.sum(e, 0).to(tl.float64), tl.sum(v, 0).to(tl.float64)


@triton.jit
def sets_of_row(row, y, bounded, bounds, near_offsets, near, wrong_offsets, TOP1: tl.constexpr):
    """(own, own_end, near_end, wrong_at, wrong_end, wants_top1).

    N(y) are the places [own, own_end) of the near list, summed separately up to near_end: all of them or none.
    """
    none = tl.zeros((), tl.int64)
    own, own_end, near_end, wrong_at, wrong_end = none, none, none, none, none
    wants_top1 = tl.zeros((), tl.int1)
    if bounded:
        low = tl.load(bounds + row * 4)
        high = tl.load(bounds + row * 4 + 1)
        if near_offsets is not None:
            own = tl.load(near_offsets + y)
            own_end = tl.load(near_offsets + y + 1)
        else:
            own = row
            own_end = tl.where(tl.load(near + row) == y, row + 1, row)  # empty if the label is not a class
        near_end = tl.where(low == low, own_end, own)
        if wrong_offsets is not None:
            wrong_at = tl.load(wrong_offsets + y)
            wrong_end = tl.where(high == high, tl.load(wrong_offsets + y + 1), wrong_at)
        if TOP1:
            wants_top1 = high == high
    return own, own_end, near_end, wrong_at, wrong_end, wants_top1


@triton.jit
def bounds_of_row(row, has_near, has_wrong, bounds):
    """(least mass of N, largest mass of W)."""
    least = tl.full((), 0.0, tl.float64)
    most = tl.full((), 1.0, tl.float64)
    if has_near:
        least = tl.load(bounds + row * 4)
    if has_wrong:
        most = tl.load(bounds + row * 4 + 1)
    return least, most
