"""csrc/row against cudfast/reference, function by function, on random and on special scalars."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch

from cudfast import CUDOptions, DUSOptions, WClip, reference
from cudfast.backends.native import _native
from cudfast.backends.packed import packed_options
from cudfast.targets import search

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
    z, s_tau, a, s1, z1, impossible, _ = row.student_fold([x - c_t for x in t], [x - c_s for x in s], 0.5)
    k = t.index(m_t)
    label = rng.randrange(4)
    at_label = (t[label], s[label]) if label < 3 else (-INF, -INF)
    return [m_t, s[k], m_s, z, s_tau, a, s1, z1, *at_label, impossible, first + k]


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
    *got, e_one = row.student_fold(dt, ds, inv_tau)
    same(got, sums)
    assert e_one == pytest.approx(sum(math.exp(x) * x for x in dt if x > -INF), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_student_merge(seed: int) -> None:
    rng = random.Random(seed)
    left, right = student_state(rng, 0), student_state(rng, 3)
    if seed % 4 == 0:  # an empty part
        left = [-INF, -INF, -INF, 0, 0, 0, 0, 0, -INF, -INF, 0, 0]
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
    options = DUSOptions(
        gamma=rng.choice([0, 0.5, 1, 10]),
        gate_power=rng.choice([0, 0.5, 1, 3]),
        differentiate_gate=seed % 2 == 0,
        ce_weight=rng.choice([0.0, 1.0]),
    )
    alpha = torch.tensor([0.7], dtype=f64)
    for state in states:
        if state[0] == -INF:
            continue
        loss = reference.teacher_finish(reference.TeacherState(*tensors(state)), alpha, options)
        c = reference.teacher_coefficients(loss, torch.tensor([1.5], dtype=f64))
        got = row.teacher_finish(state, 0.7, packed_options(_native, options), 1.5)
        same(got, (loss.value, loss.entropy, *c))
        for x in (0.0, -3.0, -INF):
            log_z = math.log(state[1])
            element = reference.teacher_element(
                c, torch.tensor([x], dtype=f64), torch.tensor([1 / state[1]], dtype=f64), log_z
            )
            same([row.teacher_element([float(v) for v in c], x, 1 / state[1], log_z)], (element,))


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
    options = CUDOptions(
        temperature=2.0,
        calibration=WClip() if seed % 3 else None,
        kd_weight=rng.choice([0.0, 0.8]),
        ce_weight=rng.choice([0.0, 0.2]),
    )
    tau, kd, ce = (torch.tensor([v], dtype=f64) for v in (2.0, 0.3, 0.4 if labelled else 0.0))
    loss = reference.student_finish(state, torch.tensor([labelled]), tau, options)
    c = reference.student_coefficients(state, loss, tau, kd, ce)
    got = row.student_finish(values, labelled, 2.0, packed_options(_native, options), 0.3, float(ce))
    same(got, (loss.kd, loss.ce, loss.z_tau, loss.impossible, *c))
    for dt, ds in itertools.product((0.0, -2.0, -INF), repeat=2):
        element = reference.student_element(c, *(torch.tensor([v], dtype=f64) for v in (dt, ds)), 0.5)
        same([row.student_element([float(v) for v in c], dt, ds, 0.5)], (element,))


@pytest.mark.parametrize("log_p", [0.0, -1e-300, -1e-17, -1e-3, -2.0, -800.0, -INF])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 10.0])
def test_focal_and_gate(log_p: float, gamma: float) -> None:
    p = torch.tensor([log_p], dtype=f64)
    term = reference.focal(p, gamma, torch.tensor([0.9], dtype=f64))
    same(row.focal(log_p, gamma, 0.9), term)
    assert not term.value.isnan()
    assert not term.slope.isnan()
    options = DUSOptions(gate_power=gamma, gate_scale=1.3)
    weight = reference.gate(p, options)
    same(row.gate(log_p, packed_options(_native, options)), weight)
    assert not weight.slope.isnan()


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
    rooms = ("state", "target", "terms", "element")
    headers = [root / "csrc/row" / f"{name}.h" for name in rooms]
    if not headers[0].exists():
        pytest.skip("needs the source tree")
    native = [t for header in headers for t in tag.findall(header.read_text())]
    python = [t for name in rooms for t in tag.findall((root / "cudfast/reference" / f"{name}.py").read_text())]
    native += [t for header in (root / "csrc/row/terms").glob("*.h") for t in tag.findall(header.read_text())]
    python += [t for file in (root / "cudfast/terms").glob("*.py") for t in tag.findall(file.read_text())]
    files = [root / "cudfast/backends/triton" / f"{name}.py" for name in ("row", "terms", "element")]
    triton = [t for file in files for t in tag.findall(file.read_text())]
    assert sorted(native) == sorted(python)
    assert sorted(triton) == sorted(native)
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
