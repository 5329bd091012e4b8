"""What the exact projection must be: a convex solver for short rows, the optimality conditions for rows of any length.

Nothing here is shared with the library, and its closed form is not used. One row's target q minimises KL(q || p)
subject to q(N) >= min_near, q(W) <= max_wrong and H(q) >= floor. With multipliers >= 0 its Lagrangian

    KL(q || p) - near (q(N) - min_near) + wrong (q(W) - max_wrong) - nu (H(q) - floor) + total (sum q - 1)

is stationary where, for every possible class,

    (1 + nu) (log q + 1) = log p - total + near [on N] - wrong [on W]

and multipliers of bounds with slack are 0. The problem is convex, so this is sufficient. A ceiling H(q) <= h adds
+ nu' (H(q) - h): the set is not convex, yet while nu' < 1 the Lagrangian is, and its minimiser, where it meets the
ceiling, is below every other q that does.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import cvxpy as cp
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SETTINGS = {f"tol_{what}": 1e-9 for what in ("gap_abs", "gap_rel", "feas")}
FALLBACK = {f"reduced_{name}": 1e-7 for name in SETTINGS}  # where it gets no further, with a warning


@dataclass(frozen=True)
class Row:
    """One row and what is asked of it; the defaults ask nothing."""

    log_p: Floats  # (V,) normalised
    near: Bools  # (V,)
    wrong: Bools  # (V,)
    min_near: float = 0.0
    max_wrong: float = 1.0
    floor: float = -math.inf
    ceiling: float = math.inf


class Solution(NamedTuple):
    q: Floats  # (V,)
    binds: tuple[bool, bool, bool]  # near, wrong, floor


def entropy(q: Floats) -> float:
    """In nats."""
    q = q[q > 0]
    return float(-(q * np.log(q)).sum())


@functools.cache
def _problem(V: int) -> tuple[cp.Problem, cp.Variable, tuple[cp.Parameter, ...]]:
    q = cp.Variable(V)
    log_p, near, wrong = (cp.Parameter(V) for _ in range(3))
    min_near, max_wrong, floor = (cp.Parameter() for _ in range(3))
    h = np.ones(V) @ cp.entr(q)  # type: ignore[attr-defined]
    constraints = [np.ones(V) @ q == 1, near @ q >= min_near, wrong @ q <= max_wrong, h >= floor]
    return cp.Problem(cp.Minimize(-h - log_p @ q), constraints), q, (log_p, near, wrong, min_near, max_wrong, floor)


def nearest(row: Row) -> Solution:
    """The minimiser without the ceiling, by Clarabel, polished.

    An interior point method in float64 stops at about 1e-7 in q, because the objective is flat there. Therefore its
    multipliers are the start of Newton's method on the optimality conditions; a bound whose multiplier or slack is then
    negative changes between active and inactive.
    """
    there = row.log_p > -np.inf
    log_p, near, wrong = row.log_p[there], row.near[there].astype(float), row.wrong[there].astype(float)
    problem, variable, parameters = _problem(len(log_p))
    values = (log_p, near, wrong, row.min_near, row.max_wrong, max(row.floor, -1.0))
    for parameter, value in zip(parameters, values):
        parameter.value = value
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        problem.solve(solver=cp.CLARABEL, **SETTINGS, **FALLBACK)  # type: ignore[no-untyped-call]
    total, *multipliers = (float(constraint.dual_value) for constraint in problem.constraints)
    solved: Floats = np.asarray(variable.value)

    def slacks(q: Floats) -> tuple[float, float, float]:
        n = float(near @ q) - row.min_near if row.min_near > 0 else math.inf
        w = row.max_wrong - float(wrong @ q) if row.max_wrong < 1 else math.inf
        return n, w, entropy(q) - row.floor

    now = [multiplier > slack for multiplier, slack in zip(multipliers, slacks(solved))]
    for _ in range(8):
        binds = now
        q, found = _stationary(log_p, near, wrong, row, binds, total, multipliers)
        now = [m > 0 if b else slack < 0 for b, m, slack in zip(binds, found, slacks(q))]
        if now == binds:
            break
    assert now == binds, "no set of binding bounds fits"
    assert np.abs(q - solved).max() < 1e-4, "the polish left the solver's solution"
    full = np.zeros(len(row.log_p))
    full[there] = q
    return Solution(full, (binds[0], binds[1], binds[2]))


def _stationary(
    log_p: Floats, near: Floats, wrong: Floats, row: Row, binds: list[bool], total: float, multipliers: list[float]
) -> tuple[Floats, list[float]]:
    """Newton's method on stationarity and the bounds that bind, as equalities: q and the three multipliers."""
    at_near, at_wrong, nu = (m if b else 0.0 for m, b in zip(multipliers, binds))
    A = np.stack([np.ones_like(log_p), -near * binds[0], wrong * binds[1]])
    b = np.array([1.0, -row.min_near * binds[0], row.max_wrong * binds[1]])
    duals, V = np.array([total, at_near, at_wrong]), len(log_p)
    z = (log_p - duals @ A) / (1 + nu) - 1  # log q
    for _ in range(20):
        q = np.exp(z)
        jacobian = np.zeros((V + 4, V + 4))
        jacobian[:V, :V], jacobian[:V, V:-1], jacobian[:V, -1] = (1 + nu) * np.eye(V), A.T, binds[2] * (z + 1)
        jacobian[V:-1, :V], jacobian[-1, :V] = A * q, binds[2] * -q * (z + 1)
        miss = [entropy(q) - row.floor if binds[2] else 0.0]
        residual = np.concatenate([(1 + nu) * (z + 1) - log_p + duals @ A, A @ q - b, miss])
        step = np.linalg.lstsq(jacobian, -residual)[0]  # zero in the unknowns that do not occur
        z, duals, nu = z + step[:V], duals + step[V:-1], nu + step[-1]
        if np.abs(step).max() < 1e-14:
            break
    return np.exp(z), [duals[1], duals[2], nu]


class Violations(NamedTuple):
    """By how much q misses the optimality conditions; zeros prove it the minimiser."""

    feasibility: float
    stationarity: float  # log q - beta log p must be constant on N, W and the rest, with beta = 1 / (1 + nu - nu')
    signs: float  # that constant must not rise from N to the rest to W, and beta is 1 between floor and ceiling


def violations(row: Row, q: Floats) -> Violations:
    """The optimality conditions at q (V,), for any V. A set whose bound has slack shares the constant of the rest."""
    there = row.log_p > -np.inf
    near_mass, wrong_mass, h = float(q[row.near].sum()), float(q[row.wrong].sum()), entropy(q)
    feasibility = max(
        abs(float(q.sum()) - 1),
        float(q[~there].sum()),
        row.min_near - near_mass,
        wrong_mass - row.max_wrong,
        row.floor - h,
        h - row.ceiling,
    )
    near_binds = near_mass <= row.min_near * (1 + 1e-12)
    wrong_binds = row.max_wrong < 1 and wrong_mass >= row.max_wrong * (1 - 1e-12)
    at_floor, at_ceiling = h <= row.floor + 1e-9, h >= row.ceiling - 1e-9

    there &= q > 0  # bounds of 0 on W and 1 on N leave no question for the classes that they empty
    log_q, log_p, near, wrong = np.log(q[there]), row.log_p[there], row.near[there], row.wrong[there]
    part = np.where(near & near_binds, 0, np.where(wrong & wrong_binds, 2, 1))
    parts = [part == i for i in range(3) if (part == i).any()]
    widest = max(parts, key=lambda mask: float(np.ptp(log_p[mask])))
    x, y = log_p[widest] - log_p[widest].mean(), log_q[widest] - log_q[widest].mean()
    beta = float(x @ y / (x @ x)) if (at_floor or at_ceiling) and np.ptp(x) > 1e-6 else 1.0
    constants = [log_q[mask] - beta * log_p[mask] for mask in parts]
    rises = np.diff([c.mean() for c in constants])
    return Violations(
        feasibility,
        max(float(np.ptp(c)) for c in constants),
        max(0.0, *rises, 0.0 if at_floor else 1 - beta, 0.0 if at_ceiling else beta - 1),
    )
