"""The exact target of rows whose classes are sharded over ranks: the search of `calibration.project`, with maxima and
sums over the group. The result is the calibrated teacher of this rank's classes, for the plain loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends.reference import Marks
from ..options import RowOptions
from ..reference import NOTHING, first_top1
from ..rows.call import (
    PROJECTED_COLUMNS,
    SHARDED_COLUMNS,
    STUDENT_COLUMNS,
    Rows,
    State,
    columns_of,
    compute_dtype,
)
from ..targets.calibration import Alone, Factors, Projected, factored, groups_of, project, refuse_relaxed
from .group import as_bytes, from_bytes, gather, reduce


class Ranks(Alone):
    """This rank's columns, and reductions over the group."""

    def __init__(self, group: Any, first: int, width: int, top1: Tensor) -> None:
        self.first, self.width, self._group, self._top1 = first, width, group, top1

    def top1(self, t: Tensor) -> Tensor:
        return self._top1

    def largest(self, m: Tensor) -> Tensor:
        return gather(self._group, m).amax(0)  # NaN stays

    def total(self, sums: Tensor) -> Tensor:
        return reduce(self._group, sums)


def _teacher(rows: Rows) -> Tensor:
    """(N, V_r) in the compute dtype; one column of -inf if this rank has no classes."""
    assert rows.target is not None
    t = rows.target[..., : rows.classes].reshape(rows.n, rows.classes).to(compute_dtype(rows))
    return t if rows.classes else F.pad(t, (0, 1), value=NOTHING)


def _top1(group: Any, t: Tensor, first: int, rows: Rows, marks: Marks) -> tuple[Tensor, Tensor]:
    """The teacher's top-1 (N,), and its logits of that and of the label (N, 2), of all classes."""
    index = marks.column - first
    inside = marks.labelled & (index.squeeze(-1) >= 0) & (index.squeeze(-1) < rows.classes)
    t_y = torch.where(inside, t.gather(-1, torch.where(inside.unsqueeze(-1), index, 0)).squeeze(-1), NOTHING)
    found = gather(group, as_bytes(torch.stack([t.amax(-1), t_y], -1), first_top1(t) + first))
    logits, k = from_bytes(found, 2, t.dtype)  # (R, N, 2) and (R, N)
    assert k is not None
    best = logits.amax(0)
    k = torch.where(logits[..., 0] == best[:, 0], k, torch.iinfo(k.dtype).max).amin(0)
    return torch.where(best[:, 0].isnan(), 0, k), best


def calibrated(rows: Rows, marks: Marks, group: Any, first: int) -> tuple[Rows, Projected, Tensor]:
    """The rows with the calibrated teacher and no constraints, the projection, and the teacher's own logits (N, 2)
    of its top-1 and of the label.

    Raises:
        ValueError: a bound that a row cannot meet, on every rank.
    """
    assert rows.constraints is not None
    t = _teacher(rows)
    k, picked = _top1(group, t, first, rows, marks)
    at = Ranks(group, first, rows.classes, k)
    found = project(t, marks.labelled, marks.column.squeeze(-1), rows.constraints, at)
    refuse_relaxed(rows, found)
    return _plain(rows, found.logits), found, picked


def _plain(rows: Rows, logits: Tensor) -> Rows:
    target = logits[:, : rows.classes].reshape(*rows.logits.shape[:-1], rows.classes)
    return rows._replace(target=target, constraints=None)


def packed(plain: State, found: Projected, picked: Tensor) -> State:
    """The state of rows with constraints: that of the plain loss, and the values that recompute the target."""
    near, wrong, rest = found.factors.centres.unbind(-1)
    of = dict(zip(STUDENT_COLUMNS, plain.sums.unbind(-1)))
    confidence, prob = (picked - found.log_total.unsqueeze(-1)).exp().unbind(-1)
    values = {
        "beta": found.beta,
        "centre": rest,
        **dict(zip(("near", "wrong", "rest"), found.factors.scales.unbind(-1))),
        "confidence": confidence,
        "prob": prob,
        "target": (of["t_y"] - of["m_t"]).exp() / of["z_one"],
        "moved": found.moved,
        "relaxed": found.relaxed.any(-1),
        "near_centre": near,
        "wrong_centre": wrong,
    }
    columns = [values[name].to(plain.sums.dtype) for name in (*PROJECTED_COLUMNS, *SHARDED_COLUMNS)]
    extra = torch.stack(columns, -1)
    return plain._replace(sums=torch.cat([plain.sums, extra], -1), top1=found.top1)


def again(rows: Rows, options: RowOptions, marks: Marks, state: State, first: int) -> tuple[Rows, State]:
    """The rows with the calibrated teacher, and the plain loss's state, from the state of `packed`. Sends nothing."""
    assert rows.constraints is not None
    of = dict(zip(columns_of(rows, options, sharded=True), state.sums.unbind(-1)))
    t = _teacher(rows)
    at = Ranks(None, first, rows.classes, state.top1)
    group = groups_of(t, marks.labelled, marks.column.squeeze(-1), rows.constraints, state.top1, at)
    centres = torch.stack([of[name] for name in ("near_centre", "wrong_centre", "centre")], -1)
    scales = torch.stack([of[name] for name in ("near", "wrong", "rest")], -1)
    plain = _plain(rows, factored(t, group, Factors(of["beta"], centres, scales)))
    own = torch.stack([of[name] for name in columns_of(plain, options)], -1)
    return plain, state._replace(sums=own)
