"""`make gpu-verify`: Triton and CUDA kernels on this GPU, proven and timed; a report in JSON and markdown.

Every result is compared with float64 first, under the gate of the benchmarks. When a check failed nothing is timed and
it exits with 1; without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cudfast import ClassSets, CUDLoss, CUDOptions, DUSLoss, DUSOptions, Projection, WClip, __version__
from cudfast.autograd.ops import row_state_op
from cudfast.backends import available
from cudfast.bench.cases import compiled, cud_cases, dus_cases, eager_cud, eager_dus, make, through, with_gradient
from cudfast.bench.contestants import Contestant
from cudfast.bench.gate import Errors, Loss, gate, truth
from cudfast.bench.shapes import Shape
from cudfast.functional import cud_loss
from cudfast.options import BackendName

WIDTHS = (1, 77, 1000, 2048, 4097, 32_000, 50_257, 128_256, 1_000_000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAID_OUT = DTYPES[:3]  # float64 rows are never held
SAVES: tuple[Literal["gradient", "state"], ...] = ("gradient", "state")
RACES = tuple(itertools.product((32_000, 128_256, 151_936, 262_144), (512, 2048, 16_384)))
BUDGET = 40e9  # bytes that the tensors of a race may take
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")  # of compute-sanitizer
ROOT = Path(__file__).parents[1]


class Line(NamedTuple):
    """One check."""

    what: str
    verdict: str  # "ok", or what went wrong, or why it was left out
    seconds: float


Check = tuple[str, Callable[[], str | None]]
"""Its name, and what runs it."""


class Time(NamedTuple):
    """One way to do the work at one shape, forward and backward."""

    shape: str
    dtype: str
    name: str
    milliseconds: float
    gigabytes_per_second: float  # of 2 reads and 1 write of (N, V)
    of_copy: float  # that, over what a copy of the same bytes reaches in the same run
    peak_bytes: int  # beyond the inputs


def checked(what: str, run: Callable[[], str | None]) -> Line:
    """Runs a check; what it raises is the verdict. A string says why it was left out."""
    start = time.perf_counter()
    try:
        verdict = run() or "ok"
    except Exception as error:  # every failure belongs in the report
        verdict = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Line(what, verdict, time.perf_counter() - start)


# ---- Correctness ----


def agrees(shape: Shape, dtype: torch.dtype, device: str, backend: str = "triton") -> None:
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


class Chip(NamedTuple):
    """What decides how the CUDA backend lays rows over blocks (csrc/cuda/launch.cpp)."""

    processors: int
    shared: int  # bytes that a block may ask for
    clusters: tuple[int, ...]  # how many blocks may hold a row

    @classmethod
    def here(cls) -> Chip:
        """This GPU's, as far as the kernels were compiled for it."""
        from cudfast.backends import cuda

        found: Any = torch.cuda.get_device_properties(0)
        capability = min(10 * found.major + found.minor, max(map(int, cuda.ARCHITECTURES.split())))
        clusters = (1, 2, 4, 8) if capability >= 90 else (1,) if capability >= 80 else ()
        return cls(found.multi_processor_count, found.shared_memory_per_block_optin, clusters)


def layouts(chip: Chip, dtype: torch.dtype) -> Iterator[tuple[str, Shape]]:
    """A shape for every way to lay rows of the student loss over blocks, far from where the next way begins."""
    fitting = chip.shared // (2 * dtype.itemsize)  # classes that a block holds
    many = 2 * chip.processors + 1  # blocks share rows when there are fewer
    for blocks in chip.clusters:
        yield f"rows held by {blocks} block{'s' * (blocks > 1)}", Shape(many, 3 * blocks * fitting // 4 // 16 * 16)
    yield "rows in two sweeps", Shape(many, 5 * max(chip.clusters, default=1) * fitting // 4 // 16 * 16)
    yield "rows shared by blocks", Shape(3, 300_000)


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
            for once, again in zip(call(), call()):
                torch.testing.assert_close(again, once, rtol=0, atol=0, msg="two runs gave different bits")
    return None


def options_agree(device: str, tried: str = "triton") -> None:
    """Weights, temperatures, masks and reductions, against the reference backend in float64."""
    torch.manual_seed(0)
    n, v = 64, 5000
    student, teacher = torch.randn(n, v, device=device), 3 * torch.randn(n, v, device=device)
    student[:, 7], teacher[:, 7] = -torch.inf, -torch.inf
    labels = torch.randint(8, v, (n,), device=device)
    labels[:8], labels[8:16] = -100, -1
    weight, tau = torch.rand(n, device=device), 1 + torch.rand(n, device=device)
    for reduction, save in itertools.product(("none", "sum", "mean"), SAVES):
        found = []
        for backend, dtype in (("reference", torch.float64), (tried, torch.float32)):
            x = student.to(dtype, copy=True).requires_grad_()
            loss = CUDLoss(reduction=reduction, save=save, backend=backend)  # type: ignore[arg-type]
            value, stats = loss(x, teacher.to(dtype), labels, weight=weight, temperature=tau, return_stats=True)
            (g,) = torch.autograd.grad(value.sum(), x)
            found.append((value, g, *(s for s in stats if s.is_floating_point())))
        for wanted, got in zip(*found):
            torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-5, equal_nan=True)


def projection_agrees(device: str, tried: str = "triton", n: int = 64, v: int = 5000) -> None:
    """Bounds on masses and on the entropy, binding and not, against the reference backend in float64."""
    torch.manual_seed(0)
    student, teacher = torch.randn(n, v, device=device), 3 * torch.randn(n, v, device=device)
    labels = torch.randint(v, (n,), device=device)
    labels[:2] = -1
    near = ClassSets.from_groups(torch.arange(v, device=device) // 4)
    bounds: list[dict[str, Any]] = [
        {"near": near, "min_near_mass": 0.3, "max_wrong_mass": 0.1},
        {"near": near, "min_near_mass": 0.3, "max_wrong_mass": 0.1, "min_entropy": 5.0},
        {"max_entropy": 1.0},
    ]
    for bound, save in itertools.product(bounds, SAVES):
        found = []
        for backend, dtype in (("reference", torch.float64), (tried, torch.float32)):
            x = student.to(dtype, copy=True).requires_grad_()
            loss = CUDLoss(calibration=Projection(**bound), save=save, backend=backend)  # type: ignore[arg-type]
            value, stats = loss(x, teacher.to(dtype), labels, return_stats=True)
            (g,) = torch.autograd.grad(value, x)
            found.append((value, g, *(s for s in stats if s.is_floating_point())))
        for wanted, got in zip(*found):
            # A bound on the entropy is met to 1e-5 nats; what that does to a probability, too, is allowed.
            torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def ops_check(device: str, backend: BackendName = "triton") -> None:
    """torch.library.opcheck of the op that torch.compile sees."""
    student = torch.randn(8, 300, device=device, requires_grad=True)
    labels = torch.randint(300, (8,), device=device)
    for options in (CUDOptions(backend=backend), DUSOptions(backend=backend)):
        target = student.detach() * 2 if isinstance(options, CUDOptions) else None
        arguments: Any = (student, target, labels, None, None, None, [], 2.0, 300, options.text, "", "", False)
        torch.library.opcheck(row_state_op, arguments)


def compiles(device: str, backend: BackendName = "triton") -> None:
    """torch.compile(fullgraph=True) gives the numbers of eager."""
    loss = CUDLoss(backend=backend)
    teacher, labels = torch.randn(32, 4000, device=device), torch.randint(4000, (32,), device=device)
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = torch.linspace(-3, 3, 32 * 4000, device=device).reshape(32, 4000).requires_grad_()
        value = function(x * 2, teacher, labels)
        found.append((value, *torch.autograd.grad(value, x)))
    for got, wanted in zip(found[1], found[0]):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def captures(device: str, backend: BackendName = "triton") -> str | None:
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


def walk(backend: BackendName, dtype: torch.dtype, device: str, shapes: Iterable[Shape]) -> None:
    """Every kernel of a backend on these rows, for compute-sanitizer to watch."""
    bounds = Projection(min_near_mass=0.3, max_wrong_mass=0.1, min_entropy=3.0, on_infeasible="relax")
    for shape in shapes:
        x = torch.randn(shape.rows, shape.classes, device=device, dtype=dtype, requires_grad=True)
        t, y = torch.randn_like(x), torch.randint(shape.classes, (shape.rows,), device=device)
        y[0] = -100
        losses: list[tuple[CUDLoss | DUSLoss, tuple[Tensor, ...]]] = []
        for save in SAVES:
            usual = CUDLoss(save=save, backend=backend)
            losses += [(usual, (t, y)), (usual, (t.to(torch.float16), y))]  # one dtype, and two
            losses += [(CUDLoss(3.0, save=save, backend=backend), (t, y)), (DUSLoss(save=save, backend=backend), (y,))]
        losses += [(CUDLoss(calibration=bounds, save=save, backend=backend), (t, y)) for save in SAVES]
        for loss, others in losses:
            torch.autograd.grad(2 * loss(x, *others), x)


def watched(backend: BackendName, dtype: str) -> None:
    """What compute-sanitizer runs: rows of every kind."""
    found, shapes = getattr(torch, dtype), [Shape(3, 77), Shape(5, 4097), Shape(2, 300_000)]
    if backend == "cuda":
        shapes += [shape for _, shape in layouts(Chip.here(), found)]
    walk(backend, found, "cuda", shapes)
    torch.cuda.synchronize()


def sanitized(tool: str, backend: BackendName, dtype: str) -> str | None:
    """compute-sanitizer over both losses. Every tensor has an allocation of its own, whose bounds are seen."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "left out: compute-sanitizer is not on the PATH"
    script = f"from benchmarks import gpu_verify; gpu_verify.watched({backend!r}, {dtype!r})"
    found = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1800,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    if found.returncode or not re.search(r"SUMMARY: 0 (errors|hazards)", found.stdout):
        raise AssertionError((found.stdout + found.stderr)[-500:].replace("\n", " "))
    return None


def ours(device: str) -> dict[BackendName, str]:
    """The backends under test, with why one is left out."""
    names: tuple[BackendName, ...] = ("triton", "cuda")
    missing = {name: available()[name] for name in names}
    if torch.version.hip:
        missing["cuda"] = "this is no NVIDIA GPU"
    return missing


def checks(device: str) -> Iterator[Check]:
    """The whole table, for each backend."""
    for backend, missing in ours(device).items():
        if missing:
            yield backend, lambda why=missing: f"left out: {why}"  # type: ignore[misc]
        else:
            for what, run in checks_of(backend, device):
                yield f"{backend}: {what}", run


def checks_of(backend: BackendName, device: str) -> Iterator[Check]:
    """The table of one backend."""
    for v, dtype in itertools.product(WIDTHS, DTYPES):
        shape = Shape(max(2, min(512, 2**24 // v)), v)
        yield f"{shape} {dtype}", partial(agrees, shape, dtype, device, backend)
    if backend == "cuda":
        for dtype in LAID_OUT:
            for what, shape in layouts(Chip.here(), dtype):
                yield f"{what}, {shape} {dtype}", partial(laid_out, shape, dtype, device)
    yield "options, masks, statistics", partial(options_agree, device, backend)
    yield "calibration=Projection(...)", partial(projection_agrees, device, backend)
    if backend == "cuda":
        for what, shape in layouts(Chip.here(), torch.float32):
            run = partial(projection_agrees, device, backend, shape.rows, shape.classes)
            yield f"calibration=Projection(...), {what}", run
    yield "opcheck", partial(ops_check, device, backend)
    yield "torch.compile(fullgraph=True)", partial(compiles, device, backend)
    yield "CUDA graph", partial(captures, device, backend)
    for tool, name in itertools.product(TOOLS, ("float32", "bfloat16")):
        yield f"compute-sanitizer {tool}, {name}", partial(sanitized, tool, backend, name)


def verified(lines: list[Line]) -> bool:
    """Whether something was checked and nothing failed."""
    return any(line.verdict == "ok" for line in lines) and not any(line.verdict.startswith("FAILED") for line in lines)


# ---- Times ----


def liger(data: Any) -> Contestant | str:
    """Liger's KL kernel on log probabilities, as one would write distillation with it; or why it is not there."""
    try:
        found = importlib.import_module("liger_kernel.ops.kl_div").LigerKLDivLossFunction
    except ImportError as error:
        return f"Liger: {error}"

    def loss() -> tuple[Tensor, Tensor]:
        target = (data.teacher / 2).log_softmax(-1)
        value = found.apply((data.student / 2).log_softmax(-1), target, "batchmean", True)
        return value * 4, data.student

    return Contestant("Liger KL (no clip, no CE)", with_gradient(loss))


def race(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Time]:
    """All ways at one shape, each timed by `triton.testing.do_bench`, the copy last."""
    from triton.testing import do_bench

    data = make(shape, dtype, device)
    ways = [
        Contestant(f"{backend}, {name}", with_gradient(cud_cases(data, backend=backend)[name]))
        for backend, missing in ours(device).items()
        for name in ("given gradient", "fresh gradient", 'save="state"')
        if not missing
    ]
    rest = (data.teacher, data.labels)
    peers = [("eager PyTorch", eager_cud), ("torch.compile", compiled(eager_cud))]
    ways += [Contestant(name, with_gradient(through(loss, data.student, *rest))) for name, loss in peers]
    other = liger(data)
    ways += [] if isinstance(other, str) else [other]
    moved = ways[0].work(shape, dtype)
    source, target = data.plain, data.gradient
    copy_rate = (
        2 * source.numel() * source.element_size() / do_bench(lambda: target.copy_(source), return_mode="median")
    )
    for way in ways:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            way.call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            milliseconds = do_bench(way.call, return_mode="median")
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        rate = moved / milliseconds
        yield Time(str(shape), str(dtype)[6:], way.name, milliseconds, rate / 1e6, rate / copy_rate, peak)


# ---- Report ----


def markdown(machine: dict[str, str], lines: list[Line], times: list[Time]) -> str:
    """What a person reads."""
    bad = sum(line.verdict.startswith("FAILED") for line in lines)
    text = [f"# gpu-verify: {len(lines)} checks, {bad} failed", ""]
    text += [f"- {key}: {value}" for key, value in machine.items()]
    text += ["", "| check | verdict | s |", "|---|---|---|"]
    text += [f"| {line.what} | {line.verdict} | {line.seconds:.1f} |" for line in lines]
    text += ["", "Forward and backward; GB/s of two reads and one write of (N, V).", ""]
    text += ["| N x V | dtype | way | ms | GB/s | of a copy | peak MB |", "|---|---|---|---|---|---|---|"]
    text += [
        f"| {t.shape} | {t.dtype} | {t.name} | {t.milliseconds:.3f} | {t.gigabytes_per_second:.0f} | {t.of_copy:.0%} | "
        f"{t.peak_bytes / 1e6:.0f} |"
        for t in times
    ]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_verify", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_verify"), help="folder of the report")
    parser.add_argument("--no-times", action="store_true", help="checks only")
    parser.add_argument("--only", metavar="TEXT", default="", help="the checks that have this in their names; no times")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-verify: torch sees no CUDA or ROCm GPU here; nothing was verified", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    machine = {
        "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "torch": str(torch.__version__),
        "triton": importlib.import_module("triton").__version__,
        "cudfast": __version__,
    }
    lines: list[Line] = []
    for what, run in checks("cuda"):
        if asked.only in what:
            lines.append(checked(what, run))
            print(f"{what:<64} {lines[-1].verdict}", flush=True)
    good = verified(lines)
    if not good:
        print("Nothing is timed: a check failed, or none could be made")
    times: list[Time] = []
    races = RACES if good and not (asked.no_times or asked.only) else ()
    for (v, n), dtype in itertools.product(races, (torch.bfloat16, torch.float32)):
        if 5 * n * v * dtype.itemsize > min(BUDGET, 0.5 * properties.total_memory):
            continue
        for found in race(Shape(n, v), dtype, "cuda"):
            print(f"{found.shape:<18} {found.dtype:<9} {found.name:<26} {found.milliseconds:8.3f} ms "
                  f"{found.gigabytes_per_second:6.0f} GB/s {found.of_copy:6.0%} of a copy", flush=True)  # fmt: skip
            times.append(found)
    asked.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "checks": [x._asdict() for x in lines], "times": [x._asdict() for x in times]}
    (asked.out / "report.json").write_text(json.dumps(report, indent=1))
    (asked.out / "report.md").write_text(markdown(machine, lines, times))
    print(f"Written: {asked.out / 'report.md'}, {asked.out / 'report.json'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
