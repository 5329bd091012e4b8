"""The inverse temperature at which a row's entropy meets a bound: the mirror of csrc/row/search.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ...targets import search
from .pieces import centre, f64, marks, row_of
from .row import NOTHING, TemperedState, entropy, log_mass, masses, spread, temper, tempered_fold
from .sets import (
    Members,
    apart,
    bounds_of_row,
    holds,
    in_thread,
    member,
    set_tempered,
    set_top,
    sets_of_row,
    zero_beside,
)

SWEEPS = tl.constexpr(search.SWEEPS)
STEPS = tl.constexpr(search.STEPS)
PLACES = tl.constexpr(search.PLACES)
NATS = tl.constexpr(search.NATS)
HOTTEST = tl.constexpr(search.HOTTEST)
NARROW, WIDE = (tl.constexpr(tolerance) for tolerance in search.TOLERANCE.values())


COLUMNS = tl.constexpr(10)  # of a packed state, after those of the student
# Marks in the last column of a row whose temperature is searched:
MISSES = tl.constexpr(-1.0)  # the entropy at T = 1 misses a bound
TEMPERED = tl.constexpr(-2.0)  # the temperature is found
OUT_OF_REACH = tl.constexpr(-3.0)  # the bound is infeasible; the temperature is the nearest possible

# Layout of a row in `work`: two ends with (beta, entropy, slope), places, and three sums of each set for each place.
LOW = tl.constexpr(0)
HIGH = tl.constexpr(3)
PLACE = tl.constexpr(6)
NEAR = tl.constexpr(10)
WRONG = tl.constexpr(22)
REST = tl.constexpr(34)
WORK = tl.constexpr(46)


@triton.jit
def entropy_tolerance(R: tl.constexpr):
    return WIDE if tl.float64 == R else NARROW


@triton.jit
def tempered_columns(t_row, V, members, middle, places, R: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(z, e, v) of the rest around `middle`, (COUNT,), at the betas at `places`: one sweep over the teacher's row."""
    near, near_at, near_end, wrong, wrong_at, wrong_end, alone = members
    lanes = tl.arange(0, BLOCK)
    WIDTH: tl.constexpr = 2 if R == tl.float64 else 8
    place = tl.arange(0, COUNT)[:, None]
    z = tl.zeros((COUNT, BLOCK // WIDTH), R)
    e = tl.zeros((COUNT, BLOCK // WIDTH), R)
    v = tl.zeros((COUNT, BLOCK // WIDTH), R)
    near_column = member(near, near_at, near_end)
    wrong_column = tl.where(alone >= 0, alone, member(wrong, wrong_at, wrong_end))
    for start in range(0, V, BLOCK):
        t = tl.load(t_row + start + lanes, mask=start + lanes < V, other=float("-inf"), eviction_policy="evict_last")
        x = t.to(R) - middle.to(R)
        x, near_at, near_column = apart(x, x, start, near, near_at, near_end, near_column, 0.0, NOTHING, 1.0, BLOCK)
        x, wrong_at, wrong_column = apart(
            x, x, start, wrong, wrong_at, wrong_end, wrong_column, 0.0, NOTHING, 1.0, BLOCK
        )
        for i in range(0, COUNT):
            beta = tl.load(places + i).to(R)
            dz, de, dv = tempered_fold(x, beta)
            zero = zero_beside(beta)
            here = place == i
            z += tl.where(here, in_thread(dz, BLOCK, WIDTH)[None, :], 0.0)
            e += tl.where(here, in_thread(zero + de, BLOCK, WIDTH)[None, :], 0.0)
            v += tl.where(here, in_thread(zero + dv, BLOCK, WIDTH)[None, :], 0.0)
    return tl.sum(z, 1), tl.sum(e, 1), tl.sum(v, 1)


@triton.jit
def store_sums(at, z, e, v):
    tl.store(at, z.to(tl.float64))
    tl.store(at + PLACES, e.to(tl.float64))
    tl.store(at + 2 * PLACES, v.to(tl.float64))


@triton.jit
def sum_places(
    t_row, V, members, near_top, wrong_top, middle, work, R: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes the sums of every set at the first COUNT places to `work`, in one sweep over the teacher's row."""
    near, near_at, near_end, wrong, wrong_at, wrong_end, alone = members
    place = tl.arange(0, COUNT)
    z, e, v = tempered_columns(t_row, V, members, middle, work + PLACE, R, COUNT, BLOCK)
    store_sums(work + REST + place, z, e, v)
    for i in range(0, COUNT):
        beta = tl.load(work + PLACE + i)
        z_0, e_0, v_0 = set_tempered(t_row, near, near_at, near_end, centre(near_top), beta, R)
        store_sums(work + NEAR + i, z_0, e_0, v_0)
        z_1, e_1, v_1 = set_tempered(t_row, wrong, wrong_at, wrong_end, centre(wrong_top), beta, R)
        store_sums(work + WRONG + i, tl.where(alone >= 0, 1.0, z_1), e_1, v_1)  # alone: a set of one


@triton.jit
def load_sums(at, m):
    return TemperedState(m, tl.load(at), tl.load(at + PLACES), tl.load(at + 2 * PLACES))


@triton.jit
def store_end(at, beta, value, slope):
    tl.store(at, beta)
    tl.store(at + 1, value)
    tl.store(at + 2, slope)


@triton.jit
def next_places(work, wanted):
    """Writes the next step to `work`, and further places for the same sweep."""
    low = tl.load(work + LOW)
    high = tl.load(work + HIGH)
    step = temper(
        low, tl.load(work + LOW + 1), tl.load(work + LOW + 2),
        high, tl.load(work + HIGH + 1), tl.load(work + HIGH + 2), wanted,
    )  # fmt: skip
    tl.store(work + PLACE, tl.maximum(step, 1.0 / HOTTEST))
    for i in range(1, PLACES):
        share = f64(i) / PLACES
        tl.store(work + PLACE + i, tl.maximum(spread(low, high, step, share), 1.0 / HOTTEST))


@triton.jit
def find_temperature(
    t_row, V, members, near_top, wrong_top, middle, row, bounds, start, wanted, floor, work,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(beta, whether the bound is infeasible); start: the entropy at beta = 1.

    The first sweep is at the end, where T is infinite for a floor and nearly 0 for a ceiling; for a ceiling, a second
    one computes the slope at 1. The bracket, the places and their sums are in memory, `work`, not in registers.
    """
    has_near = members.near_end > members.near_at
    has_wrong = (members.wrong_end > members.wrong_at) | (members.alone >= 0)
    unknown = tl.full((), float("nan"), tl.float64)
    store_end(work + LOW, tl.where(floor, -1.0, 0.0), start, unknown)
    store_end(work + HIGH, tl.where(floor, 1.0, 2.0 * HOTTEST), start, unknown)
    tl.store(work + PLACE, tl.where(floor, 0.0, HOTTEST))
    beta = tl.full((), 1.0, tl.float64)
    out_of_reach = tl.zeros((), tl.int1)
    sweeps = tl.full((), 1, tl.int32)
    settling = tl.where(floor, 2, 3)  # sweeps before the first step
    going = tl.full((), 1, tl.int32)
    while going > 0:
        tl.debug_barrier()
        count = tl.where(sweeps < STEPS, 1, PLACES)
        if sweeps < STEPS:
            sum_places(t_row, V, members, near_top, wrong_top, middle, work, R, 1, BLOCK)
        else:
            sum_places(t_row, V, members, near_top, wrong_top, middle, work, R, PLACES, BLOCK)
        sweeps += 1
        nearest = tl.full((), 1.0, tl.float64)
        missed_by = tl.full((), float("inf"), tl.float64)
        for i in range(0, count):
            tl.debug_barrier()
            place = tl.load(work + PLACE + i)
            least, most = bounds_of_row(row, has_near, has_wrong, bounds)
            target = masses(
                log_mass(centre(near_top), tl.load(work + NEAR + i), place),
                log_mass(centre(wrong_top), tl.load(work + WRONG + i), place),
                log_mass(middle, tl.load(work + REST + i), place),
                least,
                most,
            )
            near = load_sums(work + NEAR + i, centre(near_top))
            wrong = load_sums(work + WRONG + i, centre(wrong_top))
            rest = load_sums(work + REST + i, middle)
            value, slope = entropy(near, wrong, rest, target, place)
            missed = value - wanted
            if (tl.abs(missed) >= missed_by) == 0:
                missed_by = tl.abs(missed)
                nearest = place
            raises = (missed > 0) & (place > tl.load(work + LOW))
            lowers = ((missed > 0) == 0) & (place < tl.load(work + HIGH))
            tl.debug_barrier()
            if raises:
                store_end(work + LOW, place, value, slope)
            if lowers:
                store_end(work + HIGH, place, value, slope)
        tl.debug_barrier()
        low = tl.load(work + LOW)
        high = tl.load(work + HIGH)
        if sweeps == 2:
            beyond = tl.where(floor, low < 0, high > HOTTEST)
            beta = tl.where(beyond, tl.where(floor, f64(1.0 / HOTTEST), f64(HOTTEST)), beta)
            out_of_reach = beyond & (missed_by > NATS)
            going = tl.where(beyond, 0, 1)
        elif sweeps > settling:
            over = sweeps >= SWEEPS
            kept = tl.where(floor, tl.maximum(low, 1.0 / HOTTEST), high)  # the side that meets the bound
            beta = tl.where(over & (missed_by > NATS), kept, nearest)
            going = tl.where(over | (missed_by <= entropy_tolerance(R)), 0, 1)
        if sweeps < settling:
            tl.store(work + PLACE, 1.0)
        else:
            next_places(work, wanted)
    return beta, out_of_reach


@triton.jit
def temper_rows(
    teacher, given, sets, results, work, V,
    R: tl.constexpr, TOP1: tl.constexpr, STUDENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The temperatures of rows that `projected.projected_rows` has marked; see there. One row, program (row, 0).

    STUDENT: columns of the state before those that are read here.
    """
    bounds, near_offsets, near, wrong_offsets, wrong = sets
    row = tl.program_id(0).to(tl.int64)
    at = results.sums + row * (STUDENT + COLUMNS) + STUDENT
    if tl.load(at + 9) == MISSES:
        _, labelled, y, _, _ = marks(row, given, V)
        t_row = row_of(row, teacher)
        own, own_end, near_end, wrong_at, wrong_end, wants_top1 = sets_of_row(
            row, y, labelled, bounds, near_offsets, near, wrong_offsets, TOP1
        )
        near_top = set_top(t_row, near, own, near_end, R)[0]
        wrong_top = set_top(t_row, wrong, wrong_at, wrong_end, R)[0]
        alone = tl.full((), -1, tl.int64)
        if wants_top1:
            k = tl.load(results.top1 + row)
            if holds(near, own, own_end, k) == 0:
                alone = k
                wrong_top = tl.load(t_row + k).to(tl.float64)
        middle = tl.load(at + 1).to(tl.float64)
        start = tl.load(at + 2).to(tl.float64)
        wanted = tl.load(bounds + row * 4 + 2)
        floor = start < wanted
        if floor == 0:
            wanted = tl.load(bounds + row * 4 + 3)
        members = Members(near, own, near_end, wrong, wrong_at, wrong_end, alone)
        beta, out_of_reach = find_temperature(
            t_row, V, members, near_top, wrong_top, middle, row, bounds, start, wanted, floor, work + row * WORK,
            R, BLOCK,
        )  # fmt: skip
        tl.store(at, beta)
        tl.store(at + 9, tl.where(out_of_reach, OUT_OF_REACH, TEMPERED))
