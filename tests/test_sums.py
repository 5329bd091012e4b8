"""Every sum of a row: the fold is the definition, the merge is the union, the slope is a finite difference.

One table for all sums; reference and C++ (`_native.row`) are both compared with it in float64. test_mirrors.py and
test_triton.py compare the Triton functions with these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cudfast.backends import native
from cudfast.reference import StudentState, TeacherState, student_fold, student_merge, teacher_fold, teacher_merge

row = native._native.row
f64 = torch.float64
TAU = 1.7


class Sum(NamedTuple):
    """x = (t - m_t) / tau, w = (s - m_s) / tau, u = s - m_s, v = t - m_t; all (V,)."""

    element: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # with respect to s at fixed maxima


SUMS = {
    "z_tau": Sum(lambda x, w, u, v: x.exp(), lambda x, w, u, v: 0 * w),
    "s_tau": Sum(lambda x, w, u, v: w.exp(), lambda x, w, u, v: w.exp() / TAU),
    "a": Sum(lambda x, w, u, v: x.exp() * (x - w), lambda x, w, u, v: -x.exp() / TAU),
    "s_one": Sum(lambda x, w, u, v: u.exp(), lambda x, w, u, v: u.exp()),
    "z_one": Sum(lambda x, w, u, v: v.exp(), lambda x, w, u, v: 0 * u),
    "e_s": Sum(lambda x, w, u, v: u.exp() * u, lambda x, w, u, v: u.exp() * (u + 1)),
}
FOLDED = ("z_tau", "s_tau", "a", "s_one", "z_one", "impossible", "e_one", "e_s")  # of _native.row.student_fold
PACKED = ("m_t", "s_k", "m_s", "z_tau", "s_tau", "a", "s_one", "z_one", "t_y", "s_y", "impossible", "e_s", "k")


def columns(s: Tensor, t: Tensor, m_s: Tensor, m_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u, v = s - m_s, t - m_t
    return v / TAU, u / TAU, u, v


def state(s: Tensor, t: Tensor, first: int = 0) -> StudentState:
    """Of one row (V,), by the reference's fold."""
    m_s, m_t = s.max(), t.max()
    sums = student_fold((t - m_t)[None], (s - m_s)[None], torch.full((1, 1), 1 / TAU, dtype=f64))
    k = t.argmax()
    fields = {name: getattr(sums, name) for name in SUMS}
    nothing = torch.full((1,), -torch.inf, dtype=f64)
    return StudentState(
        m_t=m_t[None], s_k=s[k][None], m_s=m_s[None], t_y=nothing, s_y=nothing, impossible=sums.impossible,
        k=k[None] + first, **fields,
    )  # fmt: skip


def test_the_table_has_every_sum() -> None:
    assert set(SUMS) == set(StudentState._fields) - {"m_t", "s_k", "m_s", "t_y", "s_y", "impossible", "k"}
    assert StudentState._fields == PACKED


@pytest.mark.parametrize("name", SUMS)
def test_fold_is_the_definition(name: str) -> None:
    s, t = 3 * torch.randn(40, dtype=f64), 3 * torch.randn(40, dtype=f64)
    wanted = SUMS[name].element(*columns(s, t, s.max(), t.max())).sum()
    torch.testing.assert_close(getattr(state(s, t), name)[0], wanted)
    found = dict(zip(FOLDED, row.student_fold((t - t.max()).tolist(), (s - s.max()).tolist(), 1 / TAU)))
    assert found[name] == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("cut", [0, 1, 13, 38])
def test_merge_is_the_union(cut: int) -> None:
    """In both orders; a part may be of one column, and the other part of its maximum."""
    s, t = 3 * torch.randn(40, dtype=f64), 3 * torch.randn(40, dtype=f64)
    left, right, whole = state(s[: cut + 1], t[: cut + 1]), state(s[cut + 1 :], t[cut + 1 :], cut + 1), state(s, t)
    for a, b in ((left, right), (right, left)):
        merged = student_merge(a, b, torch.full((1,), 1 / TAU, dtype=f64))
        torch.testing.assert_close(merged._asdict(), whole._asdict())
        numbers = [[float(x) for x in part] for part in (a, b)]  # type: ignore[arg-type]
        assert row.student_merge(*numbers, 1 / TAU) == pytest.approx([float(x) for x in whole], rel=1e-12)  # type: ignore[arg-type]


def test_merge_without_a_target_is_the_union() -> None:
    s = 3 * torch.randn(40, dtype=f64)

    def own(part: Tensor) -> TeacherState:
        m = part.max()
        nothing = torch.full((1,), -torch.inf, dtype=f64)
        return TeacherState(m[None], *teacher_fold((part - m)[None]), nothing)

    left, right, whole = own(s[:11]), own(s[11:]), own(s)
    torch.testing.assert_close(teacher_merge(left, right)._asdict(), whole._asdict())
    found = row.teacher_merge([float(x) for x in left], [float(x) for x in right])
    assert found == pytest.approx([float(x) for x in whole], rel=1e-12)


@pytest.mark.parametrize("name", SUMS)
def test_slope_is_a_finite_difference(name: str) -> None:
    s, t = torch.randn(9, dtype=f64), torch.randn(9, dtype=f64)
    m_s, m_t, h = s.max(), t.max(), 1e-6
    slopes = SUMS[name].slope(*columns(s, t, m_s, m_t))
    for j in range(9):
        up, down = s.clone(), s.clone()
        up[j], down[j] = s[j] + h, s[j] - h
        high, low = (SUMS[name].element(*columns(x, t, m_s, m_t)).sum() for x in (up, down))
        torch.testing.assert_close(slopes[j], (high - low) / (2 * h), rtol=1e-6, atol=1e-8)
