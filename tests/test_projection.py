"""Calibrated targets: against a convex solver, against the optimality conditions, and their invariants."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cudfast import ClassSets, Projection, WClip, calibrate

from .convex import Floats, Row, entropy, nearest, violations
from .truth import calibrated

f64 = torch.float64
BOUNDS = ("min_near_mass", "max_wrong_mass", "min_entropy")
SUBSETS = [names for count in range(4) for names in itertools.combinations(BOUNDS, count)]
Sets = list[list[int]]


def draw_sets(V: int) -> tuple[Sets, Sets]:
    """Near and wrong classes for every class, disjoint; the wrong ones may be none, the rest may be none."""
    near, wrong = [], []
    for y in range(V):
        others = [int(j) for j in torch.randperm(V) if j != y]
        cut, end = sorted(torch.randint(V, (2,)).tolist())
        near.append(others[: cut // 2])
        wrong.append(others[cut // 2 : end])
    return near, wrong


def projection_of(near: Sets | None, wrong: Sets | None, **asked: Any) -> Projection:
    """With wrong=None for the teacher's top-1."""
    sets = None if near is None else ClassSets.from_lists(near)
    return Projection(sets, "top1" if wrong is None else ClassSets.from_lists(wrong, include_label=False), **asked)


def row_of(t: Tensor, y: int, near: list[int], wrong: list[int] | None, **bounds: float) -> Row:
    """One labelled row (V,) as the oracle takes it."""
    inside = np.isin(np.arange(len(t)), [y, *near])
    top = [int(t.numpy().argmax())]
    return Row(
        t.log_softmax(-1).numpy(),
        inside,
        np.isin(np.arange(len(t)), top if wrong is None else wrong) & ~inside,
        **bounds,
    )


def mass(row: Row, members: Any) -> float:
    return float(np.exp(row.log_p[members]).sum())


def draw_bounds(row: Row, bits: int, names: tuple[str, ...]) -> Row:
    """Bounds that are active if their bit is set, and else have slack, as far as p alone determines it."""
    a, b, (u, v, w) = mass(row, row.near), mass(row, row.wrong), (0.1 + 0.8 * torch.rand(3)).tolist()
    if "min_near_mass" in names:
        row = replaced(row, min_near=a + u * (1 - a) if bits & 1 else a * u)
    if "max_wrong_mass" in names:
        row = replaced(row, max_wrong=b * v if bits & 2 else b + v * (1 - b))
    if "min_entropy" in names:
        free = entropy(nearest(row).q)
        uniform = np.where(row.log_p > -np.inf, 0.0, -np.inf)
        most = entropy(nearest(replaced(row, log_p=uniform - np.log((uniform == 0).sum()))).q)
        row = replaced(row, floor=free + w * (most - free) if bits & 4 else free * w)
    return row


def replaced(row: Row, **changes: Any) -> Row:
    return Row(**{**vars(row), **changes})


def tensors_of(rows: list[Row], names: tuple[str, ...]) -> dict[str, Tensor]:
    """The bounds of the rows, one value per row."""
    fields = dict(zip(BOUNDS, ("min_near", "max_wrong", "floor")))
    return {name: torch.tensor([getattr(row, fields[name]) for row in rows], dtype=f64) for name in names}


def assert_nearest(q: Tensor | Floats, row: Row) -> None:
    found = violations(row, np.asarray(q))
    assert max(found) < 1e-9, f"{found} of {row}"


# ---- against the convex solver ----


@pytest.mark.parametrize("top1", [False, True])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_nearest_by_a_convex_solver(names: tuple[str, ...], top1: bool) -> None:
    torch.manual_seed(len(names) + 10 * top1)
    seen = set()
    for V in (3, 4, 5, 8, 12):
        near, wrong = draw_sets(V)
        labels = torch.arange(16) % V
        t = torch.randn(16, V, dtype=f64) * torch.tensor([0.5, 2.0, 6.0], dtype=f64)[torch.arange(16) % 3, None]
        rows = [row_of(t[i], y, near[y], None if top1 else wrong[y]) for i, y in enumerate(labels.tolist())]
        rows = [draw_bounds(row, i, names) for i, row in enumerate(rows)]
        projection = projection_of(near, None if top1 else wrong, **tensors_of(rows, names))
        for row, q in zip(rows, calibrate(t, labels, projection).numpy()):
            solution = nearest(row)
            assert_nearest(solution.q, row)
            np.testing.assert_allclose(q, solution.q, rtol=0, atol=1e-9)
            assert_nearest(q, row)
            seen.add(tuple(name for name, binds in zip(BOUNDS, solution.binds) if binds))
    assert seen == {some for some in SUBSETS if set(some) <= set(names)}


@pytest.mark.parametrize("distance", [1e-13, 1e-9, 1e-6, 1e-3])
def test_floors_at_the_ends_of_their_range(distance: float) -> None:
    """Just above the entropy that the row has anyway, and just below the most that it can have."""
    near, wrong = draw_sets(8)
    t = 2 * torch.randn(8, 8, dtype=f64)
    masses = {"min_near_mass": 0.4, "max_wrong_mass": 0.1}
    for logits, sign in ((t, 1), (torch.zeros_like(t), -1)):
        free = calibrate(logits, torch.arange(8), projection_of(near, wrong, **masses))
        floor = torch.special.entr(free).sum(-1) + sign * distance
        q = calibrate(t, torch.arange(8), projection_of(near, wrong, **masses, min_entropy=floor))
        for y in range(8):
            row = row_of(t[y], y, near[y], wrong[y], min_near=0.4, max_wrong=0.1, floor=float(floor[y]))
            assert_nearest(q[y], row)


def test_classes_that_cannot_happen() -> None:
    V = 8
    near, wrong = draw_sets(V)
    t = 2 * torch.randn(V, V, dtype=f64)
    t[torch.rand(V, V) < 0.4] = -torch.inf
    t.diagonal().copy_(torch.randn(V, dtype=f64))
    wrong = [[j for j in some if j != (y + 1) % V] for y, some in enumerate(wrong)]
    t[torch.arange(V), (torch.arange(V) + 1) % V] = 0
    rows = [draw_bounds(row_of(t[y], y, near[y], wrong[y]), y, BOUNDS) for y in range(V)]
    q = calibrate(t, torch.arange(V), projection_of(near, wrong, **tensors_of(rows, BOUNDS)))
    assert (q[t == -torch.inf] == 0).all()
    for row, got in zip(rows, q.numpy()):
        np.testing.assert_allclose(got, nearest(row).q, rtol=0, atol=1e-9)
        assert_nearest(got, row)


# ---- against the optimality conditions, where no solver goes ----


@pytest.mark.parametrize("V", [1_000, 1_000_000])
def test_long_rows(V: int) -> None:
    """The first 50 classes are near, the next 50 wrong; the label is class 0."""
    t, label = 3 * torch.randn(V, dtype=f64), torch.tensor(0)
    near = ClassSets.from_groups(torch.arange(V).clamp(min=49))
    wrong = ClassSets(torch.full((V + 1,), 50).index_fill(0, label, 0), torch.arange(50, 100))
    row = row_of(t, 0, list(range(50)), list(range(50, 100)), min_near=0.6, max_wrong=1e-9)
    q = calibrate(t, label, Projection(near, wrong, 0.6, 1e-9))
    assert_nearest(q, row)
    h = entropy(q.numpy())
    for floor, ceiling in ((h + 0.3, 100.0), (h - 0.3, 100.0), (0.0, h - 0.3)):
        q = calibrate(t, label, Projection(near, wrong, 0.6, 1e-9, floor, ceiling))
        assert_nearest(q, replaced(row, floor=floor, ceiling=ceiling))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("gap", [60.0, 700.0])
def test_confident_rows(names: tuple[str, ...], gap: float) -> None:
    """1 - p(top) is e^-gap, and 0 by subtraction; the solver is lost here, the optimality conditions are not."""
    t = torch.randn(6, 6, dtype=f64)
    t[:, 2] += gap
    near: Sets = [[1], [], [4], [2], [], []]
    wrong: Sets = [[2], [0, 2], [3], [], [2, 3], [1]]
    asked = dict(zip(BOUNDS, (0.7, 0.1, 0.4)))
    q = calibrate(t, torch.arange(6), projection_of(near, wrong, **{name: asked[name] for name in names}))
    for y, got in enumerate(q.numpy()):
        bounds = dict(zip(BOUNDS, ("min_near", "max_wrong", "floor")))
        row = row_of(t[y], y, near[y], wrong[y], **{bounds[name]: asked[name] for name in names})
        assert_nearest(got, row)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_confident_rows_by_hand(dtype: torch.dtype) -> None:
    t, label = torch.tensor([60.0, 0.0, 0.0, 0.0], dtype=dtype), torch.tensor(1)
    by_hand: list[tuple[dict[str, Any], list[float]]] = [
        ({"max_wrong_mass": 0.1}, [0.1, 0.3, 0.3, 0.3]),
        ({"max_wrong_mass": 0.0}, [0.0, 1 / 3, 1 / 3, 1 / 3]),
        ({"max_wrong_mass": 0.2, "min_near_mass": 0.5}, [0.2, 0.5, 0.15, 0.15]),
        ({"min_near_mass": 0.9}, [0.1, 0.9, 0.1 * math.exp(-60), 0.1 * math.exp(-60)]),
        ({"min_near_mass": 1.0}, [0.0, 1.0, 0.0, 0.0]),
    ]
    for bounds, expected in by_hand:
        q = calibrate(t, label, Projection(**bounds))
        rtol = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(q, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=0.0)


def test_the_oracle_sees_mistakes() -> None:
    t = torch.randn(6, dtype=f64)
    for bounds in ({"min_near": 0.6}, {"max_wrong": 0.01}, {"min_near": 0.6, "max_wrong": 0.01, "floor": 1.2}):
        row = row_of(t, 0, [1], [2], **bounds)
        q = nearest(row).q
        assert_nearest(q, row)
        for i, j in itertools.permutations(range(6), 2):
            moved = q.copy()
            moved[i], moved[j] = q[i] - 1e-6, q[j] + 1e-6
            assert max(violations(row, moved)) > 1e-8


# ---- what is kept ----


def test_wclip_is_a_projection() -> None:
    """It moves the mass that its two bounds, one for the label and one for the top-1, leave no choice about."""
    t, labels = 2 * torch.randn(50, 9, dtype=f64), torch.randint(9, (50,))
    p = t.softmax(-1)
    p_y, p_k = p.gather(-1, labels[:, None])[:, 0], p.amax(-1)
    delta = torch.minimum(0.5 * p_k, 0.7 * (p_k - p_y))
    q = calibrate(t, labels, Projection(min_near_mass=p_y + delta, max_wrong_mass=p_k - delta))
    torch.testing.assert_close(q, calibrated(t, labels, 0.5, 0.7), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(calibrate(t, labels, WClip()), calibrated(t, labels, 0.5, 0.7), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(calibrate(t, labels), calibrate(t, labels, WClip()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "bounds",
    [
        {"min_near_mass": 0.6, "max_wrong_mass": 0.05},
        {"min_near_mass": 0.5, "max_wrong_mass": 0.1, "min_entropy": 1.4},
        {"min_near_mass": 0.5, "max_wrong_mass": 0.1, "max_entropy": 1.1},
        {"min_near_mass": 1.0},
        {"max_wrong_mass": 0.0},
        {"max_entropy": 0.3},
    ],
)
def test_a_target_is_its_own_target(bounds: dict[str, Any]) -> None:
    near, wrong = [[(y + 1) % 9] for y in range(9)], [[(y + 2) % 9, (y + 4) % 9] for y in range(9)]
    projection = projection_of(near, wrong, **bounds)
    q = calibrate(2 * torch.randn(9, 9, dtype=f64), torch.arange(9), projection)
    torch.testing.assert_close(calibrate(q.log(), torch.arange(9), projection), q, rtol=0, atol=1e-11)


@pytest.mark.parametrize("floor", [None, 1.5])
def test_order_and_odds_are_kept(floor: float | None) -> None:
    """Within N, within W and within the rest: the odds by the mass bounds, the odds to a power <= 1 by the floor."""
    near, wrong = [[(y + 1) % 9] for y in range(9)], [[(y + 2) % 9, (y + 4) % 9] for y in range(9)]
    t = 2 * torch.randn(9, 9, dtype=f64)
    q = calibrate(
        t, torch.arange(9), projection_of(near, wrong, min_near_mass=0.6, max_wrong_mass=0.05, min_entropy=floor)
    )
    for y in range(9):
        bad = torch.tensor(wrong[y])
        good = torch.tensor([y, *near[y]])
        rest = torch.tensor([j for j in range(9) if j not in (y, *near[y], *wrong[y])])
        powers = torch.cat([q[y, part].log().diff() / t[y, part].diff() for part in (good, bad, rest)])
        torch.testing.assert_close(powers, powers[:1].expand_as(powers), rtol=1e-9, atol=0.0)
        assert 0 < powers[0] <= 1 + 1e-12
        if floor is None:
            assert powers[0] == pytest.approx(1, abs=1e-12)


# ---- the ceiling ----


def kl(q: Tensor, p: Tensor) -> Tensor:
    terms: Tensor = torch.special.xlogy(q, q) - torch.special.xlogy(q, p)
    return terms.sum(-1)


def test_a_ceiling_may_have_two_nearest_distributions() -> None:
    """At p = (1/2, 1/2) and H <= 1/2 they mirror each other and p, their middle, is infeasible: the set is not convex.

    No temperature gives one of them, so the row raises an error; with the least preference it is the preferred one.
    """
    x = torch.linspace(0, 1, 100_001, dtype=f64)
    grid, p = torch.stack([x, 1 - x], -1), torch.tensor([0.5, 0.5], dtype=f64)
    allowed = torch.special.entr(grid).sum(-1) <= 0.5
    far = torch.where(allowed, kl(grid, p), torch.inf)
    left, right = far[x < 0.5], far[x > 0.5].flip(0)
    torch.testing.assert_close(left.min(), right.min(), rtol=0, atol=1e-12)
    best = grid[int(left.argmin())]
    assert not allowed[50_000]
    with pytest.raises(ValueError, match=r"row .*max_entropy.*reach\D*0\.693147"):
        calibrate(p.log(), torch.tensor(0), Projection(max_entropy=0.5))
    for sign in (1, -1):
        tilted = torch.tensor([-1e-4, 1e-4], dtype=f64) * sign
        q = calibrate(tilted, torch.tensor(0), Projection(max_entropy=0.5))
        torch.testing.assert_close(q, best if sign > 0 else best.flip(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bounds", [{}, {"min_near_mass": 0.3}, {"max_wrong_mass": 0.4}])
def test_no_distribution_under_the_ceiling_is_nearer_than_the_sharpened_one(bounds: dict[str, Any]) -> None:
    """By a grid over the simplex of three classes: where a temperature meets the ceiling, its member is the nearest."""
    i, j = torch.meshgrid(torch.arange(801), torch.arange(801), indexing="ij")
    inside = i + j <= 800
    grid = torch.stack([i[inside], j[inside], 800 - i[inside] - j[inside]], -1).to(f64) / 800
    label = torch.tensor(0)
    for t in 1.5 * torch.randn(12, 3, dtype=f64):
        free = calibrate(t, label, Projection(**bounds))
        sharpest = calibrate(t, label, Projection(**bounds, max_entropy=0, on_infeasible="relax"))
        ceiling = (entropy(free.numpy()) + entropy(sharpest.numpy())) / 2
        q = calibrate(t, label, Projection(**bounds, max_entropy=ceiling))
        k, p = int(t.argmax()), t.softmax(-1)
        allowed = torch.special.entr(grid).sum(-1) <= ceiling
        allowed &= grid[:, 0] >= bounds.get("min_near_mass", 0)
        allowed &= (grid[:, k] <= bounds.get("max_wrong_mass", 1)) | (k == 0)
        assert float(kl(q, p)) <= float(kl(grid[allowed], p).min()) + 1e-9


# ---- rows, and bounds out of reach ----


def test_a_bound_for_each_row() -> None:
    near, wrong = draw_sets(6)
    t, labels = torch.randn(2, 3, 6, dtype=f64), torch.arange(6).reshape(2, 3)
    bounds = {
        "min_near_mass": 0.4 * torch.rand(2, 3, dtype=f64),
        "max_wrong_mass": 0.2 + 0.2 * torch.rand(2, 3, dtype=f64),
        "min_entropy": 1.3 * torch.rand(2, 3, dtype=f64),
        "max_entropy": 1.4 + 0.1 * torch.rand(2, 3, dtype=f64),
    }
    q = calibrate(t, labels, projection_of(near, wrong, **bounds))
    assert q.shape == t.shape
    for at in itertools.product(range(2), range(3)):
        alone = projection_of(near, wrong, **{name: float(value[at]) for name, value in bounds.items()})
        torch.testing.assert_close(calibrate(t[at], labels[at], alone), q[at], rtol=0, atol=1e-11)


def test_the_top_1_is_wrong_unless_it_is_near() -> None:
    t = torch.tensor([[1.0, 1.0, 0.0]] * 3, dtype=f64)
    p, labels = t.softmax(-1), torch.tensor([1, 0, 2])
    q = calibrate(t, labels, Projection(max_wrong_mass=0.2))
    torch.testing.assert_close(
        q[:, 0], torch.tensor([0.2, float(p[0, 0]), 0.2], dtype=f64)
    )  # the lowest index of a tie
    torch.testing.assert_close(q[1], p[1])
    near = ClassSets.from_lists([[], [0], []])
    torch.testing.assert_close(calibrate(t, labels, Projection(near, max_wrong_mass=0.2))[:2], p[:2])
    torch.testing.assert_close(calibrate(t, labels, Projection(wrong=None, min_near_mass=0.1)), p)


def test_rows_without_a_label_keep_their_distribution() -> None:
    """Whatever is asked, also what they could not meet."""
    t, labels = 3 * torch.randn(4, 5, dtype=f64), torch.tensor([-1, 2, -100, -1])
    t[0] = -torch.inf
    t[0, 0] = 0
    q = calibrate(t, labels, Projection(min_near_mass=0.5, max_wrong_mass=0.1, min_entropy=1.0, max_entropy=1.2))
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(q[kept], t.softmax(-1)[kept], rtol=1e-14, atol=1e-16)
    assert float(q[1, 2]) >= 0.5 - 1e-12
    other = calibrate(t, torch.tensor([4, 2, -7, 4]), Projection(min_near_mass=0.5), ignore_index=-7, unlabeled_index=4)
    torch.testing.assert_close(other[kept], t.softmax(-1)[kept], rtol=1e-14, atol=1e-16)


NEVER = -math.inf
OUT_OF_REACH: list[tuple[list[float], int, dict[str, Any], str, str, list[float]]] = [
    ([1, 0, NEVER], 2, {"min_near_mass": 0.5}, "min_near_mass", "0", [0.7310586, 0.2689414, 0]),
    ([0, NEVER, NEVER], 1, {"max_wrong_mass": 0.5}, "max_wrong_mass", "1", [1, 0, 0]),
    ([2, 1, 0], 0, {"min_entropy": 1.2}, "min_entropy", r"1\.0986", [1 / 3, 1 / 3, 1 / 3]),
    ([2, 1, 0], 0, {"min_near_mass": 0.9, "min_entropy": 0.5}, "min_entropy", r"0\.3943", [0.9, 0.05, 0.05]),
    ([1, 1, 0], 0, {"max_entropy": 0.5}, "max_entropy", r"0\.6931", [0.5, 0.5, 0]),
    ([2, 1, 0], 1, {"min_near_mass": 0.5, "max_entropy": 0.6}, "max_entropy", r"0\.6931", [0.5, 0.5, 0]),
]


@pytest.mark.parametrize(("t", "y", "bounds", "name", "value", "best"), OUT_OF_REACH)
def test_out_of_reach(t: list[float], y: int, bounds: dict[str, Any], name: str, value: str, best: list[float]) -> None:
    fine, bad = [4.0, 3.9, 0.0], torch.tensor(t, dtype=f64)
    logits = torch.tensor([[fine, fine], [t, fine]], dtype=f64)
    labels = torch.tensor([[-1, -1], [y, -1]])
    with pytest.raises(ValueError, match=rf"row 1, 0 .*{name}={bounds[name]}.*reach\D*{value}"):
        calibrate(logits, labels, Projection(**bounds))
    q = calibrate(bad, torch.tensor(y), Projection(**bounds, on_infeasible="relax"))
    torch.testing.assert_close(q, torch.tensor(best, dtype=f64), rtol=0, atol=2e-6)


def test_relaxing_changes_only_rows_that_need_it() -> None:
    t, labels = torch.randn(8, 6, dtype=f64), torch.randint(6, (8,))
    floor = torch.full((8,), 1.6, dtype=f64)
    strict = calibrate(t, labels, Projection(min_entropy=floor))
    floor[3] = 2.0
    relaxed = calibrate(t, labels, Projection(min_entropy=floor, on_infeasible="relax"))
    others = torch.arange(8) != 3
    torch.testing.assert_close(relaxed[others], strict[others], rtol=0, atol=1e-11)
    torch.testing.assert_close(relaxed[3], torch.full((6,), 1 / 6, dtype=f64), rtol=0, atol=2e-6)


def test_the_most_that_is_possible_is_possible() -> None:
    """The uniform distribution, when the floor leaves nothing else."""
    q = calibrate(torch.tensor([1.0, 0.5, 0.0], dtype=f64), torch.tensor(0), Projection(min_entropy=math.log(3)))
    torch.testing.assert_close(q, torch.full((3,), 1 / 3, dtype=f64), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "bounds",
    [
        {"min_near_mass": 0.6, "max_wrong_mass": 0.05},
        {"min_near_mass": 0.5, "max_wrong_mass": 0.1, "min_entropy": 1.5},
        {"min_near_mass": 0.5, "max_wrong_mass": 0.1, "max_entropy": 1.1},
        {"min_entropy": 2.0},
    ],
)
def test_single_precision(bounds: dict[str, Any]) -> None:
    near, wrong = [[(y + 1) % 9] for y in range(9)], [[(y + 2) % 9, (y + 4) % 9] for y in range(9)]
    projection, labels = projection_of(near, wrong, **bounds), torch.arange(9).repeat(30)
    t = torch.randn(270, 9) * torch.tensor([0.5, 2.0, 6.0])[torch.arange(270) % 3, None]
    q = calibrate(t, labels, projection)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.double(), calibrate(t.double(), labels, projection), rtol=0, atol=2e-6)
    half = t.bfloat16()
    torch.testing.assert_close(
        calibrate(half, labels, projection), calibrate(half.float(), labels, projection), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_sharpening_keeps_the_masses(dtype: torch.dtype) -> None:
    """At a temperature near 0 logits / T are so large that their float32 rounding would be a factor per class."""
    t = torch.tensor([6.3, 1.7, 1.2, -4.0], dtype=dtype)
    projection = Projection(min_near_mass=0.3, max_wrong_mass=0.3, max_entropy=0, on_infeasible="relax")
    expected = torch.tensor([0.3, 0.4, 0.3, 0.0], dtype=dtype)
    torch.testing.assert_close(calibrate(t, torch.tensor(2), projection), expected, rtol=0, atol=2e-6)


def test_sets_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"near and the wrong classes of class 1 overlap"):
        projection_of([[], [2], []], [[1], [0, 2], []])
    with pytest.raises(ValueError, match=r"class 2 is in its own set of wrong classes"):
        Projection(wrong=ClassSets(torch.tensor([0, 1, 1, 2]), torch.tensor([1, 2])))
