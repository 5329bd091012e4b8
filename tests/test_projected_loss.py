"""CUDLoss with a Projection: against materialised targets, native against reference, every way to call it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cudfast import ClassSets, CUDLoss, CUDOptions, FusedLinearCUDLoss, Projection, WClip, calibrate
from cudfast.functional import cud_loss

from .conftest import BUILT
from .test_temperature import awkward

cuda = pytest.mark.skipif("cuda" not in BUILT, reason="needs nvcc when cudfast is installed")
f32, f64 = torch.float32, torch.float64
INF = torch.inf


def sets(classes: int) -> tuple[ClassSets, ClassSets]:
    """Groups of three as near classes; two far ones as wrong classes."""
    groups = torch.arange(classes) // 3
    far = [
        [j for j in {(i + classes // 2) % classes, (i + classes // 2 + 1) % classes} if j // 3 != i // 3]
        for i in range(classes)
    ]
    return ClassSets.from_groups(groups), ClassSets.from_lists(far, include_label=False)


def draw(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float, dict[str, Any]]:
    """Student, teacher, labels, temperature and the fields of a projection."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    classes, count = rng.choice([3, 5, 17, 100, 2500, 4100]), rng.choice([1, 3, 9])
    teacher = torch.randn(count, classes, dtype=dtype) * rng.choice([0.3, 2, 10, 60])
    student = torch.randn(count, classes, dtype=dtype) * 2 + teacher * 0.3
    labels = torch.randint(classes, (count,))
    labels[torch.rand(count) < 0.15] = -1
    labels[torch.rand(count) < 0.1] = -100
    if rng.random() < 0.3:  # impossible classes, for both
        hole = torch.rand(count, classes) < 0.2
        hole[torch.arange(count), labels.clamp(min=0)] = False
        teacher, student = teacher.masked_fill(hole, -INF), student.masked_fill(hole, -INF)
    near, wrong = sets(classes)
    fields: dict[str, Any] = {"near": rng.choice([None, near]), "wrong": rng.choice(["top1", "top1", wrong])}
    if rng.random() < 0.6:
        fields["min_near_mass"] = rng.choice([0.05, 0.3, 0.6, 0.9])
    if rng.random() < 0.6:
        fields["max_wrong_mass"] = rng.choice([0.0, 0.01, 0.1, 0.5])
    if rng.random() < 0.5:
        fields["min_entropy"] = rng.choice([0.1, 0.5, 1.0, 2.0])
    elif rng.random() < 0.2:
        fields["max_entropy"] = rng.choice([0.3, 1.0, 2.0])
    return student, teacher, labels, rng.choice([1.0, 2.0, 3.0]), fields


def run(backend: str, save: str, data: tuple[Tensor, Tensor, Tensor], tau: float, projection: Projection) -> Any:
    student = data[0].clone().requires_grad_()
    loss = CUDLoss(tau, calibration=projection, backend=backend, save=save)
    value, statistics = loss(student, *data[1:], return_stats=True)
    value.backward()
    return value.detach(), student.grad, statistics


def check_equal(seed: int, ways: tuple[tuple[str, str], ...]) -> None:
    dtype = f64 if seed % 3 else f32
    *data, tau, fields = draw(seed, dtype)
    projection = Projection(on_infeasible="relax", **fields)
    value, gradient, statistics = run("reference", "gradient", (data[0], data[1], data[2]), tau, projection)
    tolerance = 1e-8 if dtype == f64 else 1e-4
    for backend, save in ways:
        got = run(backend, save, (data[0], data[1], data[2]), tau, projection)
        torch.testing.assert_close(got[0], value, rtol=tolerance, atol=tolerance)
        size = gradient.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(got[1] / size, gradient / size, rtol=0, atol=tolerance)
        for name, a, b in zip(statistics._fields, got[2], statistics, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("seed", range(120))
def test_native_equals_reference(seed: int, isa: str) -> None:
    check_equal(seed, (("reference", "state"), ("native", "gradient"), ("native", "state")))


@pytest.mark.parametrize("seed", range(30))
def test_triton_equals_reference(seed: int) -> None:
    check_equal(seed, (("triton", "state" if seed % 2 else "gradient"),))


@cuda
@pytest.mark.parametrize("seed", range(120))
def test_cuda_equals_reference(seed: int) -> None:
    check_equal(seed, (("cuda", "gradient"), ("cuda", "state")))


@pytest.mark.parametrize("seed", range(20))
def test_loss_is_that_of_the_materialised_target(seed: int, backend: str) -> None:
    student, teacher, labels, tau, fields = draw(seed, f64)
    projection = Projection(on_infeasible="relax", **fields)
    q = calibrate(teacher, labels, projection)
    tempered = (q.log() / tau).softmax(-1)
    kl = torch.where(tempered > 0, tempered * (tempered.log() - (student / tau).log_softmax(-1)), 0).sum(-1)
    counts = labels != -100
    wanted = tau**2 * kl[counts].sum() / counts.sum() if counts.any() else torch.zeros((), dtype=f64)
    options = CUDOptions(temperature=tau, kd_weight=1.0, ce_weight=0.0, calibration=projection, backend=backend)
    torch.testing.assert_close(cud_loss(student, teacher, labels, options), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("name", ["min_entropy", "max_entropy"])
@pytest.mark.parametrize("V", [3, 40, 5000])
def test_bounds_on_the_entropy_are_met(V: int, name: str, dtype: torch.dtype) -> None:
    """Against a uniform student the loss gives the entropy: KL(q || u) = log V - H(q)."""
    torch.manual_seed(0)
    N = 1_200 if V < 1000 else 120
    teacher, labels = awkward(V, N).to(dtype), torch.randint(V, (N,))
    bounds: dict[str, Any] = {
        "min_near_mass": 0.3,
        "max_wrong_mass": torch.where(torch.arange(N) % 2 == 0, 0.3, 1.0).to(f64),
    }

    def entropies(**bound: Any) -> Tensor:
        projection = Projection(**bounds, **bound, on_infeasible="relax")
        options = CUDOptions(temperature=1.0, kd_weight=1.0, ce_weight=0.0, reduction="none", calibration=projection)
        return math.log(V) - cud_loss(torch.zeros(N, V, dtype=dtype), teacher, labels, options).double()

    free, end = entropies(), entropies(**{name: 100.0 if name == "min_entropy" else 0.0})
    wanted = (free + (end - free) * torch.rand(N, dtype=f64).pow(3)).clamp(min=0)
    missed = (entropies(**{name: wanted}) - wanted).abs()
    rounding = 0 if dtype == f64 else 2e-6 * math.log(V) + 4e-6  # of a loss and of the entropies asked for
    assert missed.max() < 1e-5 + rounding


@pytest.mark.parametrize(
    ("backend", "tau"),
    [
        *itertools.product(["native", "reference"], [1.0, 2.0, 3.0]),
        ("triton", 2.0),
        pytest.param("cuda", 2.0, marks=cuda),
    ],
)
def test_gradcheck(backend: str, tau: float) -> None:
    torch.manual_seed(0)
    near, wrong = sets(12)
    projection = Projection(near=near, wrong=wrong, min_near_mass=0.6, max_wrong_mass=0.05, min_entropy=1.5)
    teacher, labels = torch.randn(4, 12, dtype=f64) * 3, torch.tensor([1, 7, -1, 11])
    loss = CUDLoss(tau, calibration=projection, backend=backend, reduction="none")
    student = torch.randn(4, 12, dtype=f64, requires_grad=True)
    fast = backend in ("triton", "cuda")  # whose interpreters take long: against one random direction
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels), (student,), fast_mode=fast)


def test_every_way_to_call(isa: str) -> None:
    check_every_way("native")


def test_every_way_to_call_triton() -> None:
    check_every_way("triton")


@cuda
def test_every_way_to_call_cuda() -> None:
    check_every_way("cuda")


def check_every_way(backend: str) -> None:
    torch.manual_seed(0)
    near, wrong = sets(5000)
    projection = Projection(near=near, wrong=wrong, min_near_mass=0.4, max_wrong_mass=0.01, min_entropy=3.0)
    teacher, student = torch.randn(6, 5000) * 3, torch.randn(6, 5000)
    labels = torch.randint(5000, (6,))
    options = CUDOptions(calibration=projection, backend=backend)
    x = student.clone().requires_grad_()
    value = cud_loss(x, teacher, labels, options)
    (wanted,) = torch.autograd.grad(value, x)
    given = torch.full_like(student, torch.nan)
    cud_loss(x, teacher, labels, options, grad_out=given).backward()
    assert torch.equal(given, wanted)
    inplace = student.clone().requires_grad_() * 1
    cud_loss(inplace, teacher, labels, dataclasses.replace(options, inplace=True)).backward()
    torch.testing.assert_close(inplace.detach(), wanted, rtol=1e-5, atol=1e-9)
    wide = torch.randn(6, 2, 5003)
    strided = wide[:, 1, :5000].copy_(student)
    assert torch.equal(cud_loss(strided, teacher, labels, options), value.detach())
    low = cud_loss(student.bfloat16(), teacher.bfloat16(), labels, options)
    wanted_low = cud_loss(student.bfloat16().double(), teacher.bfloat16().double(), labels, options)
    torch.testing.assert_close(low.double(), wanted_low, rtol=2e-6, atol=8e-6)


def test_same_bits_for_any_threads() -> None:
    torch.manual_seed(0)
    near, _ = sets(40_000)
    projection = Projection(near=near, min_near_mass=0.4, max_wrong_mass=0.01, min_entropy=3.0)
    teacher, labels = torch.randn(2, 40_000) * 3, torch.randint(40_000, (2,))
    student = torch.randn(2, 40_000)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        x = student.clone().requires_grad_()
        value = CUDLoss(calibration=projection)(x, teacher, labels)
        value.backward()
        found.append((value.detach(), x.grad))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_bound_out_of_reach_names_the_row(backend: str) -> None:
    teacher, labels = torch.zeros(2, 2, 4), torch.tensor([[0, -1], [2, 3]])
    teacher[1, 0, 2] = -INF
    loss = CUDLoss(calibration=Projection(min_near_mass=0.5), backend=backend)
    with pytest.raises(ValueError, match=r"^row 1, 0 cannot meet min_near_mass=0.5: the value within reach is 0;"):
        loss(torch.randn(2, 2, 4), teacher, labels)
    loss = CUDLoss(calibration=Projection(min_entropy=5.0), backend=backend)
    with pytest.raises(ValueError, match=r"^row 0, 0 cannot meet min_entropy=5: the value within reach is 1.38629;"):
        loss(torch.randn(2, 2, 4), teacher, labels)
    relaxed = CUDLoss(calibration=Projection(min_entropy=5.0, on_infeasible="relax"), backend=backend)
    _, statistics = relaxed(torch.randn(2, 2, 4), teacher, labels, return_stats=True)
    assert statistics.relaxed.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("bad", [torch.nan, INF])
@pytest.mark.parametrize("bounds", [{"min_near_mass": 0.3, "max_wrong_mass": 0.2}, {"min_entropy": 0.5}])
def test_nan_stays_in_its_row(backend: str, bad: float, bounds: dict[str, float]) -> None:
    """Wherever it sits: in the label's class, in another one, or in every one (-inf)."""
    torch.manual_seed(0)
    teacher, labels = torch.randn(5, 7), torch.arange(5)
    teacher[1, 1], teacher[2, 5], teacher[3] = bad, bad, -INF
    student = torch.randn(5, 7, requires_grad=True)
    loss = CUDLoss(calibration=Projection(**bounds, on_infeasible="relax"), backend=backend, reduction="none")
    value = loss(student, teacher, labels)
    assert value.isnan().tolist() == [False, True, True, True, False]
    (gradient,) = torch.autograd.grad(value, student, torch.ones(5))
    assert gradient.isnan().any(-1).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("fields", [{}, {"max_wrong_mass": 0.05, "wrong": "far"}, {"min_entropy": 1.5}])
def test_compile(backend: str, fields: dict[str, Any]) -> None:
    """Constraints reach the compiled graph, one tensor for each that is one."""
    torch._dynamo.reset()
    near, far = sets(30)
    least = torch.tensor([0.2, 0.3, 0.4, 0.5])
    wrong = {"wrong": far} if "wrong" in fields else {}
    projection = Projection(near=near, min_near_mass=least, **{**fields, **wrong})
    loss = CUDLoss(calibration=projection, backend=backend)
    teacher, labels = torch.randn(4, 30) * 3, torch.tensor([1, -1, 20, 9])
    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x = torch.linspace(-2, 2, 120).reshape(4, 30).requires_grad_()
        value, statistics = function(x * 1.5, teacher, labels, return_stats=True)
        found.append((value, *torch.autograd.grad(value, x), statistics.moved_mass))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


def test_linear_compile() -> None:
    near, _ = sets(30)
    loss = FusedLinearCUDLoss(calibration=Projection(near=near, min_near_mass=0.4, max_wrong_mass=0.1), save="state")
    weight, teacher_weight, labels = torch.randn(30, 8), torch.randn(30, 8) * 2, torch.tensor([1, -1, 20, 9])
    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        hidden = torch.linspace(-2, 2, 32).reshape(4, 8).requires_grad_()
        value = function(hidden * 1.5, weight, labels, teacher_hidden=hidden.detach(), teacher_weight=teacher_weight)
        found.append((value, *torch.autograd.grad(value, hidden)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("calibration", [Projection(min_near_mass=0.5), WClip()])
@pytest.mark.parametrize(
    "fields",
    [
        {"ce_weight": 3.0},
        {"kd_weight": 0.0, "ce_weight": 3.0},
        {"reduction": "none", "kd_weight": 0.1},
        {"ignore_index": 7},
    ],
)
def test_every_option_reaches_the_compiled_graph(fields: dict[str, Any], calibration: Any, dynamic: bool) -> None:
    torch._dynamo.reset()
    loss = CUDLoss(calibration=calibration, **fields)
    teacher, labels, found = torch.randn(4, 30) * 3, torch.tensor([1, -1, 7, 9]), []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        x = torch.linspace(-2, 2, 120).reshape(4, 30).requires_grad_()
        value = function(x * 1.5, teacher, labels)
        found.append((value, *torch.autograd.grad(value.sum(), x)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


def test_a_label_without_mass(backend: str) -> None:
    teacher = torch.zeros(1, 4)
    teacher[0, 2] = -INF
    projection = Projection(min_near_mass=0.5, on_infeasible="relax")
    loss = CUDLoss(calibration=projection, backend=backend)
    _, statistics = loss(torch.zeros(1, 4), teacher, torch.tensor([2]), return_stats=True)
    assert statistics.label_prob_calibrated == 0


@pytest.mark.parametrize(
    "made",
    [
        lambda include: ClassSets.from_lists([[1], [2], [0]], include_label=include),
        lambda include: ClassSets.from_groups([0, 1, 1], include_label=include),
        lambda include: ClassSets.from_confusion([[0, 1, 0], [0, 0, 1], [1, 0, 0]], 1, include_label=include),
    ],
)
def test_wrong_sets_that_hold_the_label(made: Callable[[bool], ClassSets]) -> None:
    """As constructors make them by default; with near sets the error was an overlap, and did not name the label."""
    alone = ClassSets.from_lists([[], [], []])
    for near in (None, alone):
        with pytest.raises(ValueError, match=r"class 0 is in its own .*include_label=False"):
            Projection(near=near, wrong=made(True))
        Projection(near=near, wrong=made(False))
