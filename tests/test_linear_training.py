"""The losses from hidden states in training: backward, compile, autocast, scaling, projections, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cudfast import (
    ClassSets,
    CUDOptions,
    FusedLinearCUDLoss,
    FusedLinearDUSLoss,
    LinearOptions,
    Projection,
)
from cudfast.functional import cud_loss
from cudfast.linear import fused_linear_cud_loss
from cudfast.linear.autograd import linear_gradient_op, linear_state_op

from .hidden import DS, Batch, N, V, budget, close, f64, grads


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """The interpreter of Triton kernels takes seconds at these sizes: it has a test of its own."""
    return str(request.param)


def test_backward_twice_and_second_derivatives() -> None:
    x = Batch()
    for save in ("auto", "state"):
        loss = x.fused(save=save)
        first = [g.clone() for g in torch.autograd.grad(loss * 3, x.leaves, retain_graph=True)]
        close(torch.autograd.grad(loss * 3, x.leaves, retain_graph=True), tuple(first))
        (g,) = torch.autograd.grad(loss, x.h, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            g.sum().backward()


def test_gradient_accumulation_and_a_step_before_backward() -> None:
    x = Batch()
    whole = grads(fused_linear_cud_loss(x.h, x.w, x.labels, **x.kwargs, num_items=N), x.leaves)
    for part in (slice(0, 5), slice(5, N)):
        kwargs = {**x.kwargs, "teacher_hidden": x.th[part]}
        fused_linear_cud_loss(x.h[part], x.w, x.labels[part], **kwargs, num_items=N).backward()
    close((x.h.grad, x.w.grad, x.b.grad), whole)
    loss = x.fused(save="state")
    with torch.no_grad():
        x.w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("save", ["auto", "state"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(save: str, reentrant: bool) -> None:
    x = Batch()
    body = nn.Linear(DS, DS).double()

    def step(h: Tensor) -> Tensor:
        return fused_linear_cud_loss(body(h).tanh(), x.w, x.labels, CUDOptions(save=save), **x.kwargs)

    wanted = grads(step(x.h), (*x.leaves, *body.parameters()))
    loss = checkpoint(step, x.h, use_reentrant=reentrant)
    loss.backward()
    close((x.h.grad, x.w.grad, x.b.grad, *(p.grad for p in body.parameters())), wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("save", ["auto", "state"])
def test_compile_gives_the_numbers_of_eager(reduction: str, save: str) -> None:
    torch._dynamo.reset()
    x = Batch()
    cud = FusedLinearCUDLoss(reduction=reduction, save=save, memory_budget=budget("rows"))
    dus = FusedLinearDUSLoss(reduction=reduction, save=save)

    def step(h: Tensor, items: Tensor) -> Tensor:
        a, stats = cud(h * 2, x.w, x.labels, **x.kwargs, num_items=items, return_stats=True)
        b = dus(h, x.w, x.labels.clamp(min=0), head_bias=x.b)
        return a.sum() * 1.5 + b.sum() + stats.student_nll.nansum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    values = [(loss.detach(), *grads(loss, x.leaves)) for loss in (f(x.h, torch.tensor(8.0)) for f in (step, compiled))]
    close(values[1], values[0])


def test_opcheck() -> None:
    x = Batch(torch.float32, 5, classes=40)
    x.labels = torch.tensor([1, -1, 3, -100, 5])
    given = (x.th, x.tw, None, x.labels, None, None, torch.ones(2, 1, dtype=torch.float64))
    for options in (CUDOptions(), CUDOptions(save="state")):
        texts = (options.rows.text, "", LinearOptions().text)
        torch.library.opcheck(
            linear_state_op, (x.h, x.w, x.b, *given, None, [], 2.0, 40, *texts, True, [True, False, True])
        )
    with torch.no_grad():
        frozen = [False, False, False]
        _, *state, _, _, _ = linear_state_op(x.h, x.w, x.b, *given, None, [], 2.0, 40, *texts, False, frozen)
        torch.library.opcheck(
            linear_gradient_op,
            (x.h, x.w, x.b, *given, [], 2.0, 40, *texts, [True, True, True], *state, torch.ones(())),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_under_autocast() -> None:
    """As a linear layer there: cast, and the master weights get their gradients in float32."""
    x = Batch(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = x.fused()
        plain = cud_loss(F.linear(x.h, x.w, x.b), F.linear(x.th, x.tw, x.tb), x.labels)
    assert loss.dtype == torch.float32
    found = grads(loss, x.leaves)
    assert all(g.dtype == torch.float32 for g in found)
    close((loss, *found), (plain, *grads(plain, x.leaves)), 0.02)


def test_grad_scaler_with_half_students() -> None:
    x = Batch(torch.float16, 64, classes=3000)
    wide = Batch(torch.float32, 64, classes=3000)
    for a, b in zip((*wide.leaves, wide.th, wide.tw, wide.tb), (*x.leaves, x.th, x.tw, x.tb)):
        a.data.copy_(b.data)
    wide.labels = x.labels
    found = grads(x.fused() * 2.0**10, x.leaves)
    close(tuple(g.float() / 2**10 for g in found), grads(wide.fused(), wide.leaves), 2e-3)


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_projection_in_chunks_of_rows(backend: str) -> None:
    rows = 4 if backend == "triton" else N  # the interpreter takes two seconds a row
    x = Batch(f64, rows, classes=400)
    near = ClassSets.from_groups(torch.arange(400) // 20)
    bounds = torch.rand(rows, dtype=f64) * 0.6
    projection = Projection(near=near, min_near_mass=bounds, max_wrong_mass=0.05, min_entropy=2.0)
    for bytes_ in ("auto", 200_000 if backend == "native" else 2_000_000):
        options, linear = CUDOptions(calibration=projection, backend=backend), LinearOptions(memory_budget=bytes_)
        loss, stats = fused_linear_cud_loss(x.h, x.w, x.labels, options, linear, **x.kwargs, return_stats=True)
        plain, expected = cud_loss(*x.logits(), x.labels, options, return_stats=True)
        close((loss, *grads(loss, x.leaves)), (plain, *grads(plain, x.leaves)), 1e-9)
        torch.testing.assert_close(stats.moved_mass, expected.moved_mass, equal_nan=True)


def test_errors_name_the_callers_rows(backend: str) -> None:
    """Rows are compacted and cut into chunks; messages name the caller's rows all the same."""
    x = Batch(f64, 3, 4)
    x.labels = torch.randint(V, (3, 4))
    x.labels[0] = -100
    x.labels[2, 1] = V
    with pytest.raises(ValueError, match=rf"labels\[2, 1\] = {V}: expected a class in \[0, {V}\)"):
        x.fused(backend=backend)
    x.labels[2, 1] = 3
    bound = torch.zeros(3, 4, dtype=f64)
    bound[2, 3] = 99
    with pytest.raises(ValueError, match="row 2, 3 cannot meet min_entropy=99"):
        x.fused(backend=backend, calibration=Projection(min_entropy=bound))
    with torch.no_grad():
        x.h[1, 2, 0] = torch.nan
    for room in ("auto", "both"):
        with pytest.raises(ValueError, match="row 1, 2 holds NaN"):
            x.fused(backend=backend, budget=budget(room, backend), check_finite=True)
        losses = x.fused(backend=backend, budget=budget(room, backend), reduction="none")
        assert losses.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs (Linux)")
@pytest.mark.parametrize(("rows", "classes", "budget"), [(700, 60_000, 64), (5, 3_000_000, 48), (300, 200_000, 100)])
def test_peak_memory_is_within_the_budget(rows: int, classes: int, budget: int) -> None:
    """Beyond inputs and returned gradients, in a process of its own; logits would take 168, 60 and 240 MB a side."""
    code = (
        "import torch, cudfast\n"
        "from cudfast.bench.memory import resident, CLEAR\n"
        f"n, v, budget = {rows}, {classes}, {budget} << 20\n"
        "loss = cudfast.FusedLinearCUDLoss(memory_budget=budget)\n"
        "def step(n, v):\n"
        "    h, w = torch.randn(n, 16, requires_grad=True), torch.randn(v, 16, requires_grad=True)\n"
        "    th, tw, y = torch.randn(n, 16), torch.randn(v, 16), torch.randint(v, (n,))\n"
        "    h.grad, w.grad = torch.zeros_like(h), torch.zeros_like(w)\n"
        "    before = resident('VmRSS'); CLEAR.write_text('5')\n"
        "    torch.autograd.grad(loss(h, w, y, teacher_hidden=th, teacher_weight=tw), (h, w))\n"
        "    return resident('VmHWM') - before - h.nbytes - w.nbytes\n"
        "step(40, 3000); print(step(n, v))\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert int(done.stdout) <= budget << 20


def test_the_example_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    example = pytest.importorskip("examples.language_model", reason="needs the source tree")
    monkeypatch.setattr(example, "rows", example.rows[: 100 + 32 * 8])
    found = example.main()
    assert found["teacher"] < 3_000
    assert found["student"] < 20_000  # of 30,522 words
