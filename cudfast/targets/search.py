"""The search for the inverse temperature at which a row's entropy meets a bound: the mirror of csrc/row/search.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import End, Entropy, spread, temper

SWEEPS = 12  # over the teacher's row
STEPS = 8  # sweeps, after which each further one evaluates several points
PLACES = 4
NATS = 1e-5  # largest distance of the entropy from its bound
# The search ends when the entropy is within this of its bound, by computing dtype: in kernels, and in the reference,
# which the kernels are compared with.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
TOLERANCE_OF_REFERENCE = {torch.float32: 1e-6, torch.float64: 1e-12}
HOTTEST = 1e6  # T is searched up to this value, and down to its inverse


class Temperature(NamedTuple):
    """The temperature at which rows meet a bound on their entropy."""

    beta: Tensor  # (N,) 1 / T; 1 without a search
    missed: Tensor  # (N,) bool, the bound is infeasible
    limit: Tensor  # (N,) the entropy that can be reached
    sweeps: int


def search(
    look: Callable[[Tensor], Entropy], free: Entropy, short: Tensor, long: Tensor, wanted: Tensor, tolerance: float
) -> Temperature:
    """For rows whose entropy `free` at T = 1 is below (`short`) or above (`long`) the `wanted` bound (N,)."""
    beta, open_rows = torch.ones_like(wanted), short | long
    if not bool(open_rows.any()):
        return Temperature(beta, open_rows, free.value, 1)
    last = torch.where(short, 1 / HOTTEST, torch.where(long, HOTTEST, 1.0))
    edge = torch.where(short, 0, last)
    limit = look(edge)
    outside = torch.where(short, limit.value <= wanted, limit.value >= wanted) & open_rows
    missed = outside & ((limit.value - wanted).abs() > NATS)
    # The native search of a lower bound starts without this slope, which would need a second sum.
    start = End(beta, free.value, torch.where(short, torch.nan, free.slope))
    low = End(*(torch.where(short, a, b) for a, b in zip((edge, *limit), start)))
    high = End(*(torch.where(short, b, a) for a, b in zip((edge, *limit), start)))
    beta = torch.where(outside, last, beta)
    open_rows = open_rows & ~outside
    closest = torch.zeros_like(beta)
    sweeps = 3 if bool((open_rows & long).any()) else 2
    while bool(open_rows.any()) and sweeps < SWEEPS:
        places = [temper(low, high, wanted)]
        if sweeps >= STEPS:
            places += [spread(low, high, places[0], i / PLACES) for i in range(1, PLACES)]
        closest = torch.full_like(beta, torch.inf)
        for place in places:
            here = place.clamp(min=1 / HOTTEST)
            end = End(here, *look(here))
            missed_by = (end.value - wanted).abs()
            beta = torch.where(open_rows & ~(missed_by >= closest), here, beta)
            closest = torch.minimum(closest, missed_by)
            raises = open_rows & (end.value > wanted) & (here > low.beta)
            lowers = open_rows & ~(end.value > wanted) & (here < high.beta)
            low = End(*(torch.where(raises, a, b) for a, b in zip(end, low)))
            high = End(*(torch.where(lowers, a, b) for a, b in zip(end, high)))
        sweeps += 1
        open_rows = open_rows & (closest > tolerance)
    stuck = open_rows & (closest > NATS)  # not converged: the end that meets the bound
    beta = torch.where(stuck, torch.where(short, low.beta.clamp(min=1 / HOTTEST), high.beta), beta)
    return Temperature(beta, missed, limit.value, sweeps)
