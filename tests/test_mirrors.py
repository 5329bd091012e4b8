"""csrc/row against cudfast/reference, function by function, on random and on special scalars."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch

from cudfast import CrossEntropy, Entropy, Focal, ForwardKL, Gate, WClip, reference
from cudfast.backends.native import _native
from cudfast.backends.packed import packed_options
from cudfast.options import RowOptions
from cudfast.targets import search
from cudfast.terms import Term, Terms, named
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
    """State of three columns starting at `first`."""
    t, s = [draw(rng, True) for _ in range(3)], [draw(rng, True) for _ in range(3)]
    m_t, m_s = max(t), max(s)
    c_t, c_s = (0 if m == -INF else m for m in (m_t, m_s))
    z, s_tau, a, s1, z1, impossible, _, e_s = row.student_fold([x - c_t for x in t], [x - c_s for x in s], 0.5)
    k = t.index(m_t)
    label = rng.randrange(4)
    at_label = (t[label], s[label]) if label < 3 else (-INF, -INF)
    return [m_t, s[k], m_s, z, s_tau, a, s1, z1, *at_label, impossible, e_s, first + k]


def as_state(values: list[float]) -> reference.StudentState:
    *floats, k = values
    return reference.StudentState(*tensors(floats), torch.tensor([int(k)]))


SEEDS = range(60)


@pytest.mark.parametrize("seed", SEEDS)
def test_student_fold(seed: int) -> None:
    rng = random.Random(seed)
    dt, ds = ([-abs(draw(rng, True)) for _ in range(7)] for _ in range(2))
    inv_tau = rng.uniform(0.1, 2)
    sums = reference.student_fold(torch.tensor([dt], dtype=f64), torch.tensor([ds], dtype=f64), inv_tau)
    *got, e_one, e_s = row.student_fold(dt, ds, inv_tau)
    same([*got, e_s], sums)
    assert e_one == pytest.approx(sum(math.exp(x) * x for x in dt if x > -INF), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_student_merge(seed: int) -> None:
    rng = random.Random(seed)
    left, right = student_state(rng, 0), student_state(rng, 3)
    if seed % 4 == 0:  # an empty part
        left = [-INF, -INF, -INF, 0, 0, 0, 0, 0, -INF, -INF, 0, 0, 0]
    if seed % 5 == 0:  # a tie: the lower index wins from either side
        right[0] = left[0]
    for a, b in ((left, right), (right, left)):
        same(row.student_merge(a, b, 0.5), reference.student_merge(as_state(a), as_state(b), 0.5))


@pytest.mark.parametrize("seed", SEEDS)
def test_teacher(seed: int) -> None:
    rng = random.Random(seed)
    states = []
    for _ in range(2):
        z = [draw(rng, True) for _ in range(5)]
        m = max(z)
        c = 0 if m == -INF else m
        sums = reference.teacher_fold(torch.tensor([[v - c for v in z]], dtype=f64))
        same(row.teacher_fold([v - c for v in z]), sums)
        states.append([m, *(float(v) for v in sums), z[rng.randrange(5)]])
    merged = reference.teacher_merge(*(reference.TeacherState(*tensors(s)) for s in states))
    same(row.teacher_merge(*states), merged)
    options = options_of(
        rng.choice([0.0, 1.0]) * CrossEntropy()
        + Focal(gamma=rng.choice([0, 0.5, 1, 10]), alpha=0.7)
        - 0.1 * Entropy(gate=Gate(power=rng.choice([0, 0.5, 1, 3]), differentiate=seed % 2 == 0))
        + 0.3 * Entropy(name="all")
    )
    for state in states:
        if state[0] == -INF:
            continue
        end = same_end(rng, reference.TeacherState(*tensors(state)), state, True, 1.0, options)
        log_z = math.log(state[1])
        for x in (0.0, -3.0, -INF):
            element = reference.own_element(end.gradient, *tensors([x, state[1], log_z]))
            got = row.teacher_element([float(end.gradient.one), float(end.gradient.log)], x, 1 / state[1], log_z)
            same([got], (element,))


def options_of(terms: Terms, calibration: WClip | None = None) -> RowOptions:
    return RowOptions(terms=named(terms), temperature=2.0, calibration=calibration)


def same_end(
    rng: random.Random, state: reference.StudentState | reference.TeacherState, values: list[float], labelled: bool,
    tau: float, options: RowOptions,
) -> reference.RowEnd:  # fmt: skip
    """The end of a row in both mirrors, with the coefficients of the terms and with the row's own."""
    shares = [0.3, 0.4 if labelled else 0.0]
    packed = packed_options(_native, options)
    for own in ([rng.choice([0.0, -1.5, 2.0]) for _ in options.terms], [w.coefficient for w in options.terms]):
        end = reference.finish(
            state,
            torch.tensor([labelled]),
            *tensors([tau]),
            options,
            reference.RowWeights(*tensors(shares)),
            torch.tensor(own, dtype=f64).reshape(-1, 1),
            None,
        )
        wanted = (end.value, end.target.z_tau, end.target.impossible, *end.gradient)
        same(row.finish(values, labelled, tau, packed, *shares, own), wanted)
    same(row.finish(values, labelled, tau, packed, *shares, []), wanted)
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
    state = as_state(values)
    labelled = values[8] > -INF or rng.random() < 0.5
    clip = row.wclip(min(0.0, values[8] - values[0]) if values[0] > -INF else 0.0, 0.5, 0.7)
    same(row.replace(values, clip, 0.5), reference.replace(state, reference.Clip(*tensors(clip)), 0.5))
    terms: Terms = CrossEntropy() / 5 + rng.choice([0.0, -0.1]) * Entropy()
    if seed % 4:
        terms = 0.8 * ForwardKL() + terms
    end = same_end(rng, state, values, labelled, 2.0, options_of(terms, WClip() if seed % 3 else None))
    c, s_one = end.gradient, values[6]
    if s_one == 0:
        return
    numbers = [*(float(v) for v in c[:4]), 1 / s_one, float(end.log_z)]
    for dt, ds in itertools.product((0.0, -2.0, -INF), repeat=2):
        element = reference.student_element(c, *tensors([dt, ds, 0.5, s_one]), end.log_z)
        same([row.student_element(numbers, dt, ds, 0.5)], (element,))


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
    [ForwardKL(), CrossEntropy(), Focal(gamma=2.5, alpha=0.9), Entropy(), Entropy(gate=Gate(0.4, 1.3, 0.5, True))],
)
def test_terms(term: Term) -> None:
    rng = random.Random(term.kind)
    for _ in range(20):
        values = [rng.uniform(0, 3), -rng.expovariate(1), rng.uniform(0, 5), rng.gauss(0, 5)]
        found = term.evaluate(RowValues(*tensors(values)))
        wanted = tuple(torch.as_tensor(slope, dtype=f64) for slope in found)
        same(row.term(term.kind, *term.parameters, *values), wanted)


def test_z_loss() -> None:
    assert row.term(5, 0, 0, 0, 0, 1, -2, 3, -1.5) == [2.25, 0, 0, 0, -3]


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
