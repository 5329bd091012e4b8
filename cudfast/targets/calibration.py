"""Calibrated targets as tensors: `calibrate` to inspect them, and the targets of the reference backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..options import CUDOptions, WClip
from ..reference import (
    NOTHING,
    Masses,
    TemperedState,
    entropy,
    first_top1,
    log_mass,
    masses,
    tempered_fold,
    wclip,
)
from ..rows.call import Constraints, Rows, State, compute_dtype
from ..rows.checks import classes_of, constraints_of, labels_of, logits_of
from ..rows.vectors import masks, refuse_label, row_name
from .projection import BOUNDS, Projection
from .search import TOLERANCE_OF_REFERENCE, search

_SETS = (1, 2, 0)  # near, wrong, the rest, in the numbers of `groups_of`


class Factors(NamedTuple):
    """The parameters of a target, from which `factored` computes its logits."""

    beta: Tensor  # (N,) 1 / T
    centres: Tensor  # (N, 3) of the logits of each set: near, wrong, the rest
    scales: Tensor  # (N, 3) added to the logits of each set; -inf for a set without classes


class Projected(NamedTuple):
    """Targets of rows, with the temperatures and bounds that led to them."""

    logits: Tensor  # (N, V) log q up to a constant per row
    beta: Tensor  # (N,) 1 / T
    relaxed: Tensor  # (N, 4) bool, bounds that could not be met
    reachable: Tensor  # (N, 4) the nearest feasible values of the bounds
    moved: Tensor  # (N,) mass that changed sets, at temperature T
    sweeps: int  # over the rows, in the search for the temperature
    top1: Tensor  # (N,) of the teacher's own logits
    factors: Factors
    log_total: Tensor  # (N,) log sum exp of the teacher's own logits


class Alone:
    """Rows whose classes are all in this process, as `project` uses them; see `distributed.projected` for others."""

    first = 0  # class of the first column
    width: int | None = None  # columns that are classes; None: all of them

    def top1(self, t: Tensor) -> Tensor:
        """(N,) int64 of teacher logits t (N, V)."""
        return first_top1(t)

    def largest(self, m: Tensor) -> Tensor:
        """The maxima over all parts of the rows, from the maxima m of this part."""
        return m

    def total(self, sums: Tensor) -> Tensor:
        """The sums over all parts of the rows, from the sums of this part."""
        return sums


def groups_of(t: Tensor, labelled: Tensor, index: Tensor, constraints: Constraints, top: Tensor, at: Alone) -> Tensor:
    """(N, V) int8: 1 near, 2 wrong, 0 neither. index and top (N,): label and top-1 among all classes."""
    group = torch.zeros(t.shape, dtype=torch.int8, device=t.device)
    last = at.first + (t.shape[-1] if at.width is None else at.width)
    rows = labelled.nonzero().squeeze(-1)

    def mark(row: Tensor, column: Tensor, number: int) -> None:
        inside = (column >= at.first) & (column < last)
        group[row[inside], column[inside] - at.first] = number

    for number, sets in ((1, constraints.near), (2, constraints.wrong)):
        if sets is not None:
            row, column = sets.expand(index[rows])
            mark(rows[row], column, number)
    if constraints.near is None:
        mark(rows, index[rows], 1)
    if constraints.top1:
        row = rows[(top[rows] >= at.first) & (top[rows] < last)]
        row = row[group[row, top[row] - at.first] == 0]
        mark(row, top[row], 2)
    return group


def factored(t: Tensor, group: Tensor, factors: Factors) -> Tensor:
    """(N, V) log q, from teacher logits t (N, V) and the set of every class.

    log q = beta (t - m) - log z + log M: centred, so that a large beta causes no loss of precision.
    """
    beta = factors.beta.to(t.dtype).unsqueeze(-1)
    logits = torch.full_like(t, NOTHING)
    for number, centre, scale in zip(_SETS, factors.centres.unbind(-1), factors.scales.unbind(-1)):
        q = (t - centre.to(t.dtype).unsqueeze(-1)) * beta + scale.to(t.dtype).unsqueeze(-1)
        logits = torch.where((group == number) & (t > NOTHING), q, logits)
    return torch.where(factors.centres.isnan().any(-1, keepdim=True), torch.nan, logits)


def project(
    t: Tensor,
    labelled: Tensor,
    index: Tensor,
    constraints: Constraints,
    at: Alone = Alone(),  # noqa: B008
) -> Projected:
    """Targets for teacher logits t (N, V) in the compute dtype; labelled (N,), index (N,): the label or any class.

    at: the position of the columns, if other processes hold more of them.
    """
    top = at.top1(t)
    group = groups_of(t, labelled, index, constraints, top, at)
    least, most, floor, ceiling = constraints.bounds.unbind(-1)  # f64: 1 - low - high may be small
    least, most = (torch.where(labelled & ~x.isnan(), x, d) for x, d in ((least, 0.0), (most, 1.0)))
    inside = [group == number for number in _SETS]
    m = at.largest(torch.stack([torch.where(mask, t, NOTHING).amax(-1) for mask in inside], -1))
    bad = (m.isnan() | (m == torch.inf)).any(-1)  # NaN logits, not an infeasible bound
    centres = torch.where(m == NOTHING, 0, m)

    def look(beta: Tensor) -> tuple[tuple[TemperedState, ...], Masses, Tensor]:
        sums = []
        for mask, centre in zip(inside, centres.unbind(-1)):
            x = torch.where(mask & (t > NOTHING), t - centre.unsqueeze(-1), NOTHING)
            found = tempered_fold(x, beta.to(t.dtype).unsqueeze(-1))
            sums.append(torch.stack(found if constraints.entropy else found[:1], -1))
        whole = at.total(torch.stack(sums, -2).to(least.dtype))  # (N, 3, 3 or 1)
        whole = torch.nn.functional.pad(whole, (0, 3 - whole.shape[-1]))
        states = [
            TemperedState(centre.to(least.dtype), *found.unbind(-1))
            for centre, found in zip(centres.unbind(-1), whole.unbind(-2))
        ]
        near, wrong, rest = states
        target = masses(log_mass(near, beta), log_mass(wrong, beta), log_mass(rest, beta), least, most)
        return (near, wrong, rest), target, beta

    beta = torch.ones_like(least)
    states, target, _ = look(beta)
    total_free = _log_total(states, beta)
    start = entropy(states, target, beta)
    tolerance = TOLERANCE_OF_REFERENCE[t.dtype]
    short = labelled & (start.value < floor - tolerance)  # false where there is no bound
    long = labelled & (start.value > ceiling + tolerance)
    wanted = torch.where(short, floor, ceiling)
    found = search(lambda beta: entropy(*look(beta)), start, short, long, wanted, tolerance)
    if found.sweeps > 1:
        states, target, beta = look(found.beta)
    reachable = torch.where(found.missed, found.limit, start.value)
    short, long = short & found.missed & ~bad, long & found.missed & ~bad
    total, moved = _log_total(states, beta), torch.zeros_like(beta)
    scales = []
    for state, new in zip(states, target[:3]):
        scales.append(torch.where(state.z > 0, new - state.z.log(), NOTHING))
        moved = moved + torch.clamp(new.exp() - (log_mass(state, beta) - total).exp(), min=0)
    factors = Factors(beta, torch.where(bad.unsqueeze(-1), torch.nan, centres), torch.stack(scales, -1))
    relaxed = torch.stack([target.no_near, target.all_wrong, short, long], -1)
    value = torch.stack([torch.zeros_like(beta), torch.ones_like(beta), reachable, reachable], -1)
    moved = torch.where(labelled, moved, 0).to(t.dtype)
    logits = factored(t, group, factors)
    return Projected(logits, beta.to(t.dtype), relaxed, value, moved, found.sweeps, top, factors, total_free)


def _log_total(states: tuple[TemperedState, ...], beta: Tensor) -> Tensor:
    near, wrong, rest = (log_mass(state, beta) for state in states)
    return torch.logaddexp(torch.logaddexp(near, wrong), rest)


def refuse_bound(rows: Rows, row: int, relaxed: Tensor, reachable: Tensor) -> ValueError:
    """The error for a row whose bounds cannot be met; relaxed and reachable (4,)."""
    assert rows.constraints is not None
    bound = int(relaxed.nonzero()[0])
    return ValueError(
        f"row {row_name(rows, row)} cannot meet {BOUNDS[bound]}={float(rows.constraints.bounds[row, bound]):g}: the "
        f"value within reach is {float(reachable[bound]):g}; change the bound, or use on_infeasible='relax'"
    )


def refuse_relaxed(rows: Rows, found: Projected) -> None:
    """Raises for the first row with a bound that cannot be met."""
    assert rows.constraints is not None
    unmet = found.relaxed.any(-1)
    if not rows.constraints.relax and bool(unmet.any()):
        row = int(unmet.nonzero()[0])
        raise refuse_bound(rows, row, found.relaxed[row], found.reachable[row])


def refuse_row(rows: Rows, row: int) -> ValueError:
    """The same error for a row that a kernel has returned."""
    assert rows.target is not None
    assert rows.labels is not None
    assert rows.constraints is not None
    t = rows.target[..., : rows.classes].reshape(rows.n, rows.classes)[row : row + 1].to(compute_dtype(rows))
    constraints = rows.constraints._replace(bounds=rows.constraints.bounds[row : row + 1])
    label = rows.labels[row : row + 1]
    found = project(t, torch.ones_like(label, dtype=torch.bool), label, constraints)
    return refuse_bound(rows, row, found.relaxed[0], found.reachable[0])


def refuse_unmet(rows: Rows, state: State) -> None:
    """Raises for the first row with an infeasible bound; this synchronises with the device."""
    unmet = state.sums[:, -1] > 0
    if bool(unmet.any()):
        raise refuse_row(rows, int(unmet.nonzero()[0]))


def calibrate(
    teacher_logits: Tensor,
    labels: Tensor,
    calibration: WClip | Projection | None = WClip(),  # noqa: B008 (frozen)
    *,
    ignore_index: int = -100,
    unlabeled_index: int | None = -1,
) -> Tensor:
    """The calibrated targets at temperature 1, from which `CUDLoss` distils after tempering.

    For inspecting targets and for small V: it allocates a few (..., V) tensors.

    Args:
        teacher_logits: (..., V) float32, float64, bfloat16 or float16.
        labels: (...) integer class indices, `ignore_index` or `unlabeled_index`.
        calibration: `WClip`, `Projection`, or None for softmax(teacher_logits). Default ``WClip()`` (paper).
        ignore_index: label of rows that keep softmax(teacher_logits). Default -100.
        unlabeled_index: the same for unlabelled rows. Default -1; None: no such label.

    Returns:
        (..., V) probabilities in float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; bounds that a row cannot meet.

    Example:
        >>> t = torch.tensor([[2.0, 1.0, 0.0]])
        >>> calibrate(t, torch.tensor([1]), Projection(min_near_mass=0.5)).round(decimals=4)
        tensor([[0.4404, 0.5000, 0.0596]])
    """
    logits = logits_of(teacher_logits, "teacher_logits")
    classes = classes_of(logits, None, None, ("teacher_logits", ""))
    flat_labels = labels_of(labels, logits, "teacher_logits")
    options = CUDOptions(ignore_index=ignore_index, unlabeled_index=unlabeled_index, calibration=calibration)
    rows = Rows(logits.detach(), None, flat_labels, None, None, None, 1.0, None, classes)
    _, labelled = masks(rows, options)
    assert flat_labels is not None
    outside = labelled & ((flat_labels < 0) | (flat_labels >= classes))
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise refuse_label(rows, options, row, int(flat_labels[row]))
    t = rows.logits.reshape(-1, classes).to(compute_dtype(rows))
    index = torch.where(labelled, flat_labels, 0)
    if isinstance(calibration, Projection):
        rows = rows._replace(constraints=constraints_of(calibration, logits, classes, "teacher_logits"))
        assert rows.constraints is not None
        found = project(t, labelled, index, rows.constraints)
        refuse_relaxed(rows, found)
        q = found.logits.softmax(-1)
    else:
        q = t.softmax(-1)
        if calibration is not None:
            k = first_top1(t)
            u = t.gather(-1, index.unsqueeze(-1)).squeeze(-1) - t.amax(-1)
            clip = wclip(u, calibration.budget, calibration.margin)
            p_k = q.gather(-1, k.unsqueeze(-1)).squeeze(-1)
            moved = torch.where(labelled & (clip.r > 0), clip.r * p_k, 0).unsqueeze(-1)
            q = q.scatter_add(-1, k.unsqueeze(-1), -moved).scatter_add(-1, index.unsqueeze(-1), moved)
    return q.reshape(logits.shape)
