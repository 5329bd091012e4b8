"""csrc/row against cudfast/reference, function by function, on random and on special scalars."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cudfast import CrossEntropy, Entropy, Focal, ForwardKL, Gate, ReverseKL, WClip, reference
from cudfast.backends.native import _native
from cudfast.backends.packed import packed_options
from cudfast.options import RowOptions
from cudfast.targets import search
from cudfast.terms import Term, Terms, named
from cudfast.terms.cross_entropy import Uniform
from cudfast.terms.entropy import gate
from cudfast.terms.focal import focal
from cudfast.terms.term import RowValues

row = _native.row
f64 = torch.float64
INF = math.inf


def tensors(values: list[float]) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=f64) for v in values]


def same(got: list[float], wanted: tuple[torch.Tensor, ...], tolerance: float = 1e-13) -> None:
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            torch.tensor(g, dtype=f64), w.to(f64).reshape(()), rtol=tolerance, atol=tolerance, equal_nan=True
        )


def draw(rng: random.Random, special: bool) -> float:
    return rng.choice([-INF, 0.0, 80.0, -80.0]) if special and rng.random() < 0.3 else rng.gauss(0, 5)


def student_state(rng: random.Random, first: int) -> list[float]:
    """State of three columns starting at `first`, with every sum."""
    t, s = [draw(rng, True) for _ in range(3)], [draw(rng, True) for _ in range(3)]
    m_t, m_s = max(t), max(s)
    c_t, c_s = (0 if m == -INF else m for m in (m_t, m_s))
    folded = row.student_fold([x - c_t for x in t], [x - c_s for x in s], INV_T, INV_S, 1.5)
    z, s_tau, a, s1, z1, impossible, *more = folded
    k = t.index(m_t)
    label = rng.randrange(4)
    at_label = (t[label], s[label]) if label < 3 else (-INF, -INF)
    return [m_t, s[k], m_s, z, s_tau, a, s1, z1, *at_label, impossible, *more, INF, first + k]


INV_T, INV_S = 0.8, 0.5
EMPTY = [-INF, -INF, -INF, 0, 0, 0, 0, 0, -INF, -INF, 0, *[0] * 8, INF, 0]


def as_state(values: list[float]) -> reference.StudentState:
    *floats, k = values
    return reference.StudentState(*tensors(floats), torch.tensor([int(k)]))


def plain(values: list[float]) -> list[float]:
    """The state without the sums that only some losses need."""
    return [*values[:12], values[-1]]


def as_plain(values: list[float]) -> reference.StudentState:
    return as_state(values)._replace(**dict.fromkeys(reference.StudentState._fields[12:-1]))


SEEDS = range(60)


@pytest.mark.parametrize("seed", SEEDS)
def test_student_fold(seed: int) -> None:
    rng = random.Random(seed)
    dt, ds = ([-abs(draw(rng, True)) for _ in range(7)] for _ in range(2))
    inverse = [rng.uniform(0.1, 2) for _ in range(2)]
    t, s = (torch.tensor([x], dtype=f64) for x in (dt, ds))
    weights = torch.full((7,), 1.5, dtype=f64)
    same(row.student_fold(dt, ds, *inverse, 1.5), reference.student_fold(t, s, *tensors(inverse), weights))


@pytest.mark.parametrize("seed", SEEDS)
def test_student_merge(seed: int) -> None:
    rng = random.Random(seed)
    left, right = student_state(rng, 0), student_state(rng, 3)
    if seed % 4 == 0:  # an empty part
        left = EMPTY
    if seed % 5 == 0:  # a tie: the lower index wins from either side
        right[0] = left[0]
    for a, b in ((left, right), (right, left)):
        wanted = reference.student_merge(as_state(a), as_state(b), *tensors([INV_T, INV_S]))
        same(row.extended_merge(a, b, INV_T, INV_S), wanted)
        found = row.student_merge(plain(a), plain(b), INV_S)
        wanted = reference.student_merge(as_plain(a), as_plain(b), *tensors([INV_S, INV_S]))
        same(found, tuple(x for x in wanted if x is not None))


@pytest.mark.parametrize("seed", SEEDS)
def test_teacher(seed: int) -> None:
    rng = random.Random(seed)
    states = []
    for _ in range(2):
        z = [draw(rng, True) for _ in range(5)]
        m = max(z)
        c = 0 if m == -INF else m
        sums = reference.teacher_fold(torch.tensor([[v - c for v in z]], dtype=f64), torch.full((5,), 1.5, dtype=f64))
        same(row.teacher_fold([v - c for v in z], 1.5), sums)
        s_one, e_s, *more = (float(v) for v in sums)
        states.append([m, s_one, e_s, z[rng.randrange(5)], *more])
    merged = reference.teacher_merge(*(reference.TeacherState(*tensors(s)) for s in states))
    same(row.extended_teacher_merge(*states), merged)
    same(row.teacher_merge(*(s[:4] for s in states)), merged[:4])
    terms = (
        rng.choice([0.0, 1.0]) * CrossEntropy()
        + Focal(gamma=rng.choice([0, 0.5, 1, 10]), alpha=0.7)
        - 0.1 * Entropy(gate=Gate(power=rng.choice([0, 0.5, 1, 3]), differentiate=seed % 2 == 0))
        + 0.3 * Entropy(name="all")
    )
    smooth = CrossEntropy(label_smoothing=0.3, name="smooth")
    for state in states:
        if state[0] == -INF:
            continue
        values, of = state[:4], reference.TeacherState(*tensors(state[:4]), *[None] * 4)
        end = same_end(rng, of, values, True, 1.0, options_of(terms))
        more = reference.TeacherState(*tensors(state))
        extended = same_end(rng, more, state, True, 1.0, options_of(terms + smooth))
        log_z = math.log(state[1])
        for x, (found, uniform) in itertools.product((0.0, -3.0, -INF), ((end, 0.0), (extended, 1.0))):
            c = found.gradient
            element = reference.own_element(c, *tensors([x, state[1], log_z]), 1.5)
            numbers = [float(c.one), float(c.log), uniform * float(c.uniform)]
            same([row.teacher_element(numbers, x, 1 / state[1], log_z, 1.5)], (element,))


def options_of(terms: Terms, calibration: WClip | None = None, **fields: Any) -> RowOptions:
    return RowOptions(terms=named(terms), temperature=2.0, calibration=calibration, **fields)


def same_end(
    rng: random.Random, state: reference.StudentState | reference.TeacherState, values: list[float], labelled: bool,
    tau: float, options: RowOptions,
) -> reference.RowEnd:  # fmt: skip
    """The end of a row in both mirrors, with the coefficients of the terms and with the row's own."""
    shares = [0.3, 0.4 if labelled else 0.0]
    packed = packed_options(_native, options)
    extended = len(values) in (8, 21)
    finish = row.extended_finish if extended else row.finish
    for own in ([rng.choice([0.0, -1.5, 2.0]) for _ in options.pieces], list(options.coefficients)):
        end = reference.finish(
            state,
            torch.tensor([labelled]),
            *tensors([tau]),
            options,
            reference.RowWeights(*tensors(shares)),
            torch.tensor(own, dtype=f64).reshape(-1, 1),
            None,
        )
        gradient = end.gradient if extended else end.gradient[:5]
        wanted = (end.value, end.target.z_tau, end.target.impossible, *gradient)
        same(finish(values, labelled, tau, packed, *shares, own), wanted)
    same(finish(values, labelled, tau, packed, *shares, []), wanted)
    return end


@pytest.mark.parametrize(
    ("u", "budget", "margin"),
    list(itertools.product([-INF, -800.0, -3.0, -1e-9, 0.0], [0.0, 0.3, 0.99], [1e-3, 0.7, 1.0])),
)
def test_wclip(u: float, budget: float, margin: float) -> None:
    clip = reference.wclip(torch.tensor([u], dtype=f64), budget, margin)
    same(row.wclip(u, budget, margin), clip)


@pytest.mark.parametrize("seed", SEEDS)
def test_replace_and_finish(seed: int) -> None:
    rng = random.Random(seed)
    values = student_state(rng, 0)
    labelled = values[8] > -INF or rng.random() < 0.5
    clip = row.wclip(min(0.0, values[8] - values[0]) if values[0] > -INF else 0.0, 0.5, 0.7)
    inverse = (INV_T, INV_S)
    changed = reference.replace(as_state(values), reference.Clip(*tensors(clip)), *tensors([*inverse]))
    same(row.replace(plain(values), clip, *inverse), changed[:3])
    terms: Terms = CrossEntropy() / 5 + rng.choice([0.0, -0.1]) * Entropy()
    if seed % 4:
        terms = 0.8 * ForwardKL() + terms
    calibration = WClip() if seed % 3 and seed % 4 else None
    numbers = plain(student_state(random.Random(seed), 0))
    end = same_end(rng, as_plain(values), numbers, labelled, 2.0, options_of(terms, calibration))
    c, s_one = end.gradient, values[6]
    if s_one == 0:
        return
    numbers = [*(float(v) for v in c[:4]), 1 / s_one, float(end.log_z)]
    for dt, ds in itertools.product((0.0, -2.0, -INF), repeat=2):
        element = reference.student_element(c, *tensors([dt, ds, 0.5, 0.5, s_one]), end.log_z)
        same([row.student_element(numbers, dt, ds, 0.5)], (element,))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_sum_and_two_temperatures(seed: int) -> None:
    rng = random.Random(seed)
    values = student_state(rng, 0)
    state, labelled = as_state(values), values[8] > -INF or rng.random() < 0.5
    if seed % 3 == 0:  # a state that has been calibrated
        values[19] = values[0] - 0.2
        state = as_state(values)
    terms = 0.3 * ReverseKL(2.0, 1.25) + CrossEntropy(label_smoothing=0.1) + rng.choice([0.0, -0.1]) * Entropy()
    if seed % 2:
        terms = 0.8 * ForwardKL(2.0, 1.25) + terms
    options = options_of(terms, WClip() if seed % 5 else None, teacher_temperature=1 / INV_T)
    end = same_end(rng, state, values, labelled, 1 / INV_S, options)
    c, s_one = end.gradient, values[6]
    if s_one == 0:
        return
    numbers = [*(float(v) for v in c[:4]), 1 / s_one, float(end.log_z), float(c.reverse), float(c.uniform)]
    for dt, ds in itertools.product((0.0, -2.0, -INF), repeat=2):
        element = reference.student_element(c, *tensors([dt, ds, INV_T, INV_S, s_one]), end.log_z, 1.5)
        same([row.extended_element(numbers, dt, ds, INV_T, INV_S, 1.5)], (element,))


@pytest.mark.parametrize("seed", SEEDS)
def test_leaves_and_recalibrated(seed: int) -> None:
    rng = random.Random(seed)
    values = student_state(rng, 0)
    if -INF in (values[0], values[2]):
        return
    clip = row.wclip(min(0.0, values[8] - values[0]), rng.choice([0.0, 0.5, 0.99]), 0.7)
    of, inverse = reference.Clip(*tensors(clip)), [1 / rng.choice([0.01, 0.3, 2.0]), INV_S]
    state, given = as_state(values), tensors(inverse)
    assert row.leaves(plain(values), clip, *inverse) == bool(reference.leaves(state, of, *given))
    rest = [values[0] - rng.expovariate(1), rng.uniform(1, 2), rng.gauss(0, 1)] if seed % 3 else [-INF, 0.0, 0.0]
    wanted = reference.recalibrated(state, of, reference.Rest(*tensors(rest)), *given, f64)
    same(row.recalibrated(values, clip, rest, *inverse), wanted)


@pytest.mark.parametrize("log_p", [0.0, -1e-300, -1e-17, -1e-3, -2.0, -800.0, -INF])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 10.0])
def test_focal_and_gate(log_p: float, gamma: float) -> None:
    p = torch.tensor([log_p], dtype=f64)
    for got, wanted in (
        (row.focal(log_p, gamma, 0.9), focal(p, gamma, 0.9)),
        (row.gate(log_p, 0.5, 1.3, gamma), gate(p, 0.5, 1.3, gamma)),
    ):
        same(got, wanted)
        assert not wanted.slope.isnan()


@pytest.mark.parametrize(
    "term",
    [
        ForwardKL(),
        ReverseKL(),
        CrossEntropy(),
        Uniform(),
        Focal(gamma=2.5, alpha=0.9),
        Entropy(),
        Entropy(gate=Gate(0.4, 1.3, 0.5, True)),
    ],
)
def test_terms(term: Term) -> None:
    rng = random.Random(term.kind)
    for _ in range(20):
        values = [rng.uniform(0, 3), rng.uniform(0, 3), -rng.expovariate(1), rng.uniform(0, 5), rng.gauss(0, 5)]
        values.append(rng.gauss(0, 1))
        found = term.evaluate(RowValues(*tensors(values)))
        wanted = tuple(torch.as_tensor(slope, dtype=f64) for slope in found)
        same(row.term(term.kind, *term.parameters, *values), wanted)


def test_z_loss() -> None:
    assert row.term(5, 0, 0, 0, 0, 1, 4, -2, 3, -1.5, 6) == [2.25, 0, 0, 0, 0, -3, 0]


BOUNDS = [0.0, 0.2, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_masses(seed: int) -> None:
    rng = random.Random(seed)
    logs = [rng.choice([-INF, rng.gauss(0, 3), rng.gauss(0, 60)]) for _ in range(3)]
    if max(logs) == -INF:
        logs[2] = 0.0
    for low, high in itertools.product(BOUNDS, repeat=2):
        target = reference.masses(*tensors([*logs, low, high]))
        same(row.masses(*logs, low, high), target)
        total = sum(float(m.exp()) for m in target[:3])
        assert total == pytest.approx(1, abs=1e-12)


def tempered(rng: random.Random, beta: float) -> list[float]:
    t = [rng.choice([draw(rng, True)] * 9 + [-1e9]) for _ in range(rng.choice([0, 1, 4]))]
    m = max(t, default=-INF)
    m = 0.0 if m == -INF else m
    x = [v - m for v in t]
    sums = reference.tempered_fold(torch.tensor([x], dtype=f64), torch.tensor([[beta]], dtype=f64))
    same(row.tempered_fold(x, beta), sums)
    return [m, *(float(v) for v in sums)]


@pytest.mark.parametrize("seed", SEEDS)
def test_entropy(seed: int) -> None:
    rng = random.Random(seed)
    beta = rng.choice([1.0, 1e-3, 0.4, 7.0, 0.0])
    sets = [tempered(rng, beta) for _ in range(3)]
    states = tuple(reference.TemperedState(*tensors(s)) for s in sets)
    b = torch.tensor([beta], dtype=f64)
    logs = [reference.log_mass(s, b) for s in states]
    same([row.log_mass(s, beta) for s in sets], tuple(logs))
    if max(float(v) for v in logs) == -INF:
        return
    target = reference.masses(*logs, *tensors([rng.choice(BOUNDS), rng.choice(BOUNDS)]))
    found = reference.entropy(states, target, b)
    got = row.entropy(sets, [float(v) for v in target], beta)
    same(got, found, 1e-10)


@pytest.mark.parametrize("seed", range(300))
def test_temper(seed: int) -> None:
    rng = random.Random(seed)
    slope = [-rng.lognormvariate(0, 3) for _ in range(2)]
    if seed % 4 == 0:
        slope[1] = math.nan
    low = [rng.choice([0.0, 0.1, 0.4]), rng.uniform(1, 3), slope[0]]
    high = [rng.choice([0.5, 1.0, 1e6]), rng.uniform(0, 1), slope[1]]
    step = reference.temper(reference.End(*tensors(low)), reference.End(*tensors(high)), *tensors([1.0]))
    same([row.temper(low, high, 1.0)], (step,))
    assert low[0] < float(step) < high[0]


@pytest.mark.parametrize("low", [0.0, 0.1])
def test_spread(low: float) -> None:
    ends = [[low, 2.0, -1.0], [0.5, 0.1, math.nan]]
    places = [row.spread(*ends, 0.2, share) for share in (0.25, 0.5, 0.75)]
    for share, place in zip((0.25, 0.5, 0.75), places):
        pair = (reference.End(*tensors(end)) for end in ends)
        same([place], (reference.spread(*pair, *tensors([0.2]), share),))
    assert low < places[0] < places[1] < places[2] < 0.5


def test_temper_is_exact_where_the_entropy_is_a_line_or_a_parabola_over_its_variable() -> None:
    for at in (0.1, 0.5, 0.9):  # H = 5 - 3 u: one step, with or without the slope at the far end
        for slope in (-3.0, math.nan):
            assert row.temper([0.0, 5.0, -3.0], [1.0, 2.0, slope], 5 - 3 * at) == pytest.approx(math.sqrt(at))
    entropy = [(1 - u) * (3 - u) for u in (0.0, 0.5)]  # u = 2 - sqrt(1 + H)
    found = row.temper([0.0, entropy[0], -4.0], [math.sqrt(0.5), entropy[1], -3.0], 2.0)
    assert found**2 == pytest.approx(2 - math.sqrt(3), abs=2e-3)


@pytest.mark.parametrize(("ignored", "labelled"), [(False, False), (False, True), (True, False), (True, True)])
def test_row_weights(ignored: bool, labelled: bool) -> None:
    weights = reference.row_weights(torch.tensor(ignored), torch.tensor(labelled), torch.tensor(2.5, dtype=f64))
    same(row.row_weights(ignored, labelled, 2.5), weights)


def test_every_function_has_its_twin() -> None:
    """Equation tags are the same in all mirrors."""
    root = Path(__file__).parents[1]
    tag = re.compile(r"(?:\s{4}|\.\s+|\s)\[([a-z]+(?:-[a-z]+)?)\]\W*$", re.MULTILINE)
    if not (root / "csrc/row/state.h").exists():
        pytest.skip("needs the source tree")

    def tags(*patterns: str) -> list[str]:
        files = [file for pattern in patterns for file in sorted(root.glob(pattern))]
        return [t for file in files for t in tag.findall(file.read_text())]

    native = tags("csrc/row/*.h", "csrc/row/terms/*.h")
    assert sorted(native) == sorted(tags("cudfast/reference/*.py", "cudfast/terms/*.py"))
    assert sorted(native) == sorted(tags("cudfast/backends/triton/*.py"))
    assert len(native) == len(set(native)) >= 14


def test_the_search_has_the_same_constants() -> None:
    assert [
        search.SWEEPS,
        search.STEPS,
        search.PLACES,
        search.NATS,
        *search.TOLERANCE.values(),
        search.HOTTEST,
    ] == row.SEARCH
