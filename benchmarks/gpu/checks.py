"""That the kernels are right: every result is compared with float64, under the gate of the benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cudfast import ClassSets, CUDLoss, CUDOptions, DUSOptions, Projection, WClip
from cudfast.autograd.ops import row_state_op
from cudfast.bench.cases import cud_cases, dus_cases, eager_cud, eager_dus, make, through, with_gradient
from cudfast.bench.gate import Errors, Loss, gate, truth
from cudfast.bench.shapes import Shape
from cudfast.functional import cud_loss
from cudfast.options import BackendName

from .place import Place
from .steps import Item

SAVES: tuple[Literal["gradient", "state"], ...] = ("gradient", "state")


def agrees(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> None:
    """Every way to call both losses, against float64."""
    data = make(shape, dtype, device)
    for plain, cases, rest in (
        (eager_cud, cud_cases(data, backend=backend), (data.teacher, data.labels)),
        (eager_dus, dus_cases(data, backend=backend), (data.labels,)),
    ):
        loss: Loss = plain
        true = truth(loss, data.plain, *rest)
        eager = Errors.of(with_gradient(through(loss, data.student, *rest))(), true)
        for name, forward in cases.items():
            data.restore()
            gate(name, with_gradient(forward)(), true, eager, 2.0)


def same_bits(once: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> None:
    """Fails where two runs differ."""
    for a, b in zip(once, again):
        torch.testing.assert_close(b, a, rtol=0, atol=0, msg="two runs gave different bits", equal_nan=True)


def laid_out(shape: Shape, dtype: torch.dtype, device: str) -> str | None:
    """The CUDA kernels on whole lines and, with a class more, on rows that begin anywhere; twice with the same bits."""
    if device == "cuda" and 60 * shape.rows * shape.classes > torch.cuda.get_device_properties(0).total_memory:
        return "left out: too little memory for float64 beside it"  # five matrices, and what eager makes
    for wider in (0, 1):
        rows = Shape(shape.rows, shape.classes + wider)
        agrees(rows, dtype, device, "cuda")
        data = make(rows, dtype, device)
        for cases in (cud_cases(data, backend="cuda"), dus_cases(data, backend="cuda")):
            call = with_gradient(cases["fresh gradient"])
            same_bits(call(), call())
    return None


def entropy_repeats(device: str, backend: BackendName, shape: Shape) -> None:
    """A bound on the entropy, whose search reads its own sums from memory: the same bits in every run."""
    data = make(shape, torch.bfloat16, device)
    bounds = Projection(max_wrong_mass=0.05, min_entropy=3.0, on_infeasible="relax")
    loss = CUDLoss(calibration=bounds, backend=backend)
    call = with_gradient(lambda: (loss(data.student, data.teacher, data.labels), data.student))
    once = call()
    for _ in range(4 if device == "cuda" else 1):
        same_bits(once, call())


def compared(device: str, backend: str, options: dict[str, Any], n: int, v: int, rtol: float, **rows: Any) -> None:
    """Loss, gradient and statistics in float32, against the reference backend in float64."""
    torch.manual_seed(0)
    student, teacher = torch.randn(n, v, device=device), 3 * torch.randn(n, v, device=device)
    student[:, 7], teacher[:, 7] = -torch.inf, -torch.inf
    labels = torch.randint(8, v, (n,), device=device)
    labels[: n // 8], labels[n // 8 : n // 4] = -100, -1
    for save in SAVES:
        found = []
        for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
            x = student.to(dtype, copy=True).requires_grad_()
            loss = CUDLoss(save=save, backend=name, **options)  # type: ignore[arg-type]
            value, stats = loss(x, teacher.to(dtype), labels, return_stats=True, **rows)
            (g,) = torch.autograd.grad(value.sum(), x)
            found.append((value, g, *(s for s in stats if s.is_floating_point())))
        for wanted, got in zip(*found):
            torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=1e-5, equal_nan=True)


def options_agree(device: str, backend: str, n: int = 64, v: int = 5000) -> None:
    """Weights, temperatures, masks and reductions."""
    torch.manual_seed(1)
    rows = {"weight": torch.rand(n, device=device), "temperature": 1 + torch.rand(n, device=device)}
    for reduction in ("none", "sum", "mean"):
        compared(device, backend, {"reduction": reduction}, n, v, 1e-5, **rows)


def projection_agrees(device: str, backend: str, n: int = 64, v: int = 5000) -> None:
    """Bounds on masses and on the entropy, binding and not."""
    near = ClassSets.from_groups(torch.arange(v, device=device) // 4)
    bounds: list[dict[str, Any]] = [
        {"near": near, "min_near_mass": 0.3, "max_wrong_mass": 0.1},
        {"near": near, "min_near_mass": 0.3, "max_wrong_mass": 0.1, "min_entropy": 5.0},
        {"max_entropy": 1.0},
    ]
    for bound in bounds:
        # A bound on the entropy is met to 1e-5 nats; what that does to a probability, too, is allowed.
        compared(device, backend, {"calibration": Projection(**bound)}, n, v, 1e-4)


def ops_check(device: str, backend: BackendName) -> None:
    """torch.library.opcheck of the op that torch.compile sees."""
    student = torch.randn(8, 300, device=device, requires_grad=True)
    labels = torch.randint(300, (8,), device=device)
    for options in (CUDOptions(backend=backend), DUSOptions(backend=backend)):
        target = student.detach() * 2 if isinstance(options, CUDOptions) else None
        ones = torch.ones(len(options.rows.kinds), 1, dtype=torch.float64, device=device)
        arguments: Any = (
            student, target, labels, None, None, ones, None, [], 2.0, 300, options.rows.text, "", "", False
        )  # fmt: skip
        torch.library.opcheck(row_state_op, arguments)


def compiles(device: str, backend: BackendName, compiler: str = "inductor") -> str | None:
    """torch.compile(fullgraph=True) gives the numbers of eager."""
    if device != "cuda" and compiler == "inductor":
        return "left out: a C++ compiler would take longer than all other checks"
    loss = CUDLoss(backend=backend)
    n, v = (32, 4000) if device == "cuda" else (4, 300)
    teacher, labels = torch.randn(n, v, device=device), torch.randint(v, (n,), device=device)
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        x = torch.linspace(-3, 3, n * v, device=device).reshape(n, v).requires_grad_()
        value = function(x * 2, teacher, labels)
        found.append((value, *torch.autograd.grad(value, x)))
    for got, wanted in zip(found[1], found[0]):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    return None


def captures(device: str, backend: BackendName) -> str | None:
    """A CUDA graph holds forward and backward, and follows its inputs."""
    if device != "cuda":
        return "left out: needs CUDA"
    bounds = Projection(min_near_mass=0.2, max_wrong_mass=0.1, min_entropy=4.0, on_infeasible="relax")
    for calibration in (WClip(), bounds):
        capture(CUDOptions(calibration=calibration, backend=backend))
    return None


def capture(options: CUDOptions) -> None:
    student = torch.randn(256, 32_000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher, labels = torch.randn_like(student), torch.randint(32_000, (256,), device="cuda")
    memory = torch.empty_like(student)

    def step() -> tuple[Tensor, Tensor]:
        value = cud_loss(student, teacher, labels, options, grad_out=memory)
        return value, *torch.autograd.grad(value, student)  # type: ignore[return-value]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradient = step()
    with torch.no_grad():
        teacher.copy_(torch.randn_like(teacher) * 3)
    graph.replay()
    torch.cuda.synchronize()
    held = value.clone(), gradient.clone()
    for got, wanted in zip(held, step()):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def table(place: Place, backend: BackendName) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """The checks of a backend, the most important first."""
    device = place.device
    for dtype in place.dtypes:
        for v in place.widths:
            shape = Shape(max(2, min(512, place.most // v)), v)
            yield f"{shape} {dtype}", partial(agrees, shape, dtype, device, backend)
        if backend == "cuda":
            for what, shape in place.layouts(dtype):
                yield f"{what}, {shape} {dtype}", partial(laid_out, shape, dtype, device)
        if dtype is not place.dtypes[0]:
            continue
        yield "calibration=Projection(...)", partial(projection_agrees, device, backend, *place.projected)
        if backend == "cuda" and not place.stand_in:
            for what, shape in place.layouts(torch.float32):
                run = partial(projection_agrees, device, backend, shape.rows, shape.classes)
                yield f"calibration=Projection(...), {what}", run
        odd = Shape(place.projected[0], place.widths[-1] - 1)
        yield f"a bound on the entropy, twice, {odd}", partial(entropy_repeats, device, backend, odd)
        yield "CUDA graph", partial(captures, device, backend)
        yield "opcheck", partial(ops_check, device, backend)
        yield "options, masks, statistics", partial(options_agree, device, backend, *place.projected)
    yield "torch.compile(fullgraph=True)", partial(compiles, device, backend)


def items(place: Place, backend: BackendName) -> Iterator[Item]:
    """The same as steps, or why there are none."""
    if why := place.missing().get(backend):
        yield Item(backend, lambda log: f"left out: {why}", backend)
        return
    for what, check in table(place, backend):
        yield Item(what, lambda log, check=check: check(), backend, proves=True)  # type: ignore[misc]


def every_dtype(place: Place, backend: BackendName) -> Iterator[Item]:
    """What no budget of minutes has time for: float64, single columns, rows of a million."""
    if backend not in place.backends():
        return
    for v, dtype in itertools.product(() if place.stand_in else (1, 2048, 1_000_000), place.dtypes):
        shape = Shape(max(2, min(512, place.most // v)), v)
        check = partial(agrees, shape, dtype, place.device, backend)
        yield Item(f"{shape} {dtype}", lambda log, check=check: check(), backend, proves=True)  # type: ignore[misc]
    for v in place.widths:
        shape = Shape(max(2, min(512, place.most // v)), v)
        check = partial(agrees, shape, torch.float64, place.device, backend)
        yield Item(f"{shape} float64", lambda log, check=check: check(), backend, proves=True)  # type: ignore[misc]
