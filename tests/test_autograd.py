"""Both ways to a gradient, in-place gradients and given memory, compile, and errors."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from cudfast import ClassSets, CUDLoss, CUDOptions, DUSLoss, DUSOptions, Projection
from cudfast.autograd.ops import row_gradient_op, row_state_op
from cudfast.functional import cud_loss, dus_loss
from cudfast.rows.checks import constraints_of

from .truth import cud_rows, gradient

N, V = 6, 300


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(V, (N,))
    labels[2] = -1
    return torch.randn(N, V), torch.randn(N, V), labels


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("save", ["state", "gradient", "auto"])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_way_gives_the_same_gradient(
    backend: str, reduction: str, save: str, inplace: bool, batch: tuple[Tensor, ...]
) -> None:
    student, teacher, labels = batch
    leaf = student.double().requires_grad_()
    kd, ce = cud_rows(leaf, teacher.double(), labels)
    upstream = torch.rand(N) + 0.5 if reduction == "none" else torch.tensor(0.37)
    rows = (kd / N + ce / 5) if reduction == "mean" else kd + ce
    truth = gradient((rows * upstream.double()).sum(), leaf)

    weights = student.clone().requires_grad_()
    logits = weights * 1  # an op that does not keep its output
    loss = CUDLoss(reduction=reduction, save=save, inplace=inplace, backend=backend)(logits, teacher, labels)
    loss.backward(upstream)
    torch.testing.assert_close(weights.grad.double(), truth, rtol=1e-4, atol=1e-7)
    if inplace:
        torch.testing.assert_close(logits.detach(), weights.grad, rtol=0, atol=0)


@pytest.mark.parametrize("save", ["state", "gradient"])
def test_backward_twice_never_scales_twice(backend: str, save: str, batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    leaf = student.requires_grad_()
    loss = CUDLoss(save=save, backend=backend)(leaf, teacher, labels)
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(6.0), retain_graph=True)
    (third,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0))
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(third, first, rtol=1e-5, atol=1e-8)


def test_memory_between_forward_and_backward(batch: tuple[Tensor, ...]) -> None:
    """save="state" keeps nothing of size N V but the inputs."""
    student, teacher, labels = batch
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        CUDLoss(save="state")(student.requires_grad_(), teacher, labels)
    inputs = {student.data_ptr(), teacher.data_ptr()}
    others = [t for t in saved if t is not None and t.data_ptr() not in inputs]
    assert sum(t.numel() * t.element_size() for t in others) <= 96 * N + 8 * N + 16


def test_given_gradient_memory(backend: str, batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    expected = gradient(cud_loss(leaf := student.clone().requires_grad_(), teacher, labels), leaf)
    out = torch.full_like(student, torch.nan)
    options = CUDOptions(backend=backend)
    cud_loss(student, teacher, labels, options, grad_out=out)  # no autograd at all
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-8)
    out = torch.full_like(student, torch.nan)
    leaf = student.clone().requires_grad_()
    (g,) = torch.autograd.grad(cud_loss(leaf, teacher, labels, options, grad_out=out), leaf)
    assert g.data_ptr() == out.data_ptr()
    torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-8)
    out = torch.full((N, 2 * V), torch.nan)[:, :V]  # a row stride of its own
    dus_loss(student, labels.clamp(min=0), DUSOptions(backend=backend), grad_out=out)
    assert out.isfinite().all()


def test_gradient_memory_serves_one_loss_at_a_time(backend: str, batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    a, b, out = student.clone().requires_grad_(), student.clone().requires_grad_(), torch.empty_like(student)
    options = CUDOptions(backend=backend)
    first, second = (
        cud_loss(a, teacher, labels, options, grad_out=out),
        cud_loss(b, teacher, labels, options, grad_out=out),
    )
    with pytest.raises(RuntimeError, match="was overwritten before backward"):
        (first + second).backward()


def test_inplace_keeps_nothing_and_checks_first(batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    alive = weakref.ref(teacher := teacher.clone())
    logits = student.requires_grad_() * 1
    loss = CUDLoss(inplace=True, save="gradient")(logits, teacher, labels)
    del teacher
    gc.collect()
    assert alive() is None
    loss.backward()
    logits = student.detach() * 1
    logits[1, 1] = torch.nan
    before = (logits := logits.requires_grad_() * 1).detach().clone()
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        CUDLoss(inplace=True, check_finite=True)(logits, batch[1], labels)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("save", ["state", "gradient"])
def test_an_infinite_upstream_leaves_ignored_rows_alone(backend: str, save: str, batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    labels[0] = -100
    leaf = student.requires_grad_()
    loss = CUDLoss(reduction="none", save=save, backend=backend)(leaf, teacher, labels)
    (g,) = torch.autograd.grad(loss, leaf, torch.tensor([torch.inf, *[1.0] * (N - 1)]))
    assert g[0].eq(0).all()
    assert g[1:].isfinite().all()


def test_labels_changed_behind_autograds_back(batch: tuple[Tensor, ...]) -> None:
    """numpy shares the memory and no version counter: still an error, never a write out of bounds."""
    student, teacher, labels = batch
    array = labels.numpy().copy()
    leaf = student.requires_grad_()
    loss = CUDLoss(save="state")(leaf, teacher, torch.from_numpy(array))
    array[0] = 10**6
    with pytest.raises(ValueError, match=r"labels\[0\] = 1000000: expected a class"):
        loss.backward()


def test_check_finite_under_compile() -> None:
    torch._dynamo.reset()
    logits = torch.randn(3, 9)
    logits[2, 0] = torch.nan
    compiled = torch.compile(CUDLoss(check_finite=True), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="row 2 holds NaN"):
        compiled(logits, torch.randn(3, 9), torch.tensor([1, 2, 3]))


def test_inplace_is_seen_by_autograd(batch: tuple[Tensor, ...]) -> None:
    """tanh saves its output for backward: overwriting it must raise an error, not give a wrong gradient."""
    student, teacher, labels = batch
    logits = torch.tanh(student.requires_grad_())
    loss = CUDLoss(inplace=True)(logits, teacher, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("save", ["state", "gradient"])
def test_inplace_on_a_view(save: str) -> None:
    """The shift of a causal language model is a view; its gradient reaches the base, and the last position has none."""
    hidden, teacher, labels = torch.randn(2, 5, 9), torch.randn(2, 4, 9), torch.randint(9, (2, 4))
    grads = []
    for inplace in (False, True):
        leaf = hidden.clone().requires_grad_()
        CUDLoss(inplace=inplace, save=save)((leaf * 1)[:, :-1], teacher, labels).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-8)
    assert grads[1][:, -1].eq(0).all()


@pytest.mark.parametrize("save", ["state", "gradient"])
def test_inplace_backward_runs_once(save: str, batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    logits = student.requires_grad_() * 1
    loss = CUDLoss(inplace=True, save=save)(logits, teacher, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice through a loss with inplace=True"):
        loss.backward()


def test_logits_may_change_after_the_loss_when_the_gradient_is_made(batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    logits = student.requires_grad_() * 1
    loss = CUDLoss(save="gradient")(logits, teacher, labels)
    logits.detach().zero_()
    loss.backward()
    loss = CUDLoss(save="state")(logits := student * 1, teacher, labels)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_an_error(backend: str, batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    leaf = student.requires_grad_()
    for save in ("state", "gradient"):
        loss = CUDLoss(backend=backend, save=save)(leaf, teacher, labels)
        (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert g.isfinite().all()
        with pytest.raises(RuntimeError, match="no second derivative"):
            g.pow(2).sum().backward()


def test_func_transforms_are_an_error(batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=r"do not work inside torch.func transforms"):
            transform(lambda s, t, y: CUDLoss()(s, t, y))(student, teacher, labels)


@pytest.mark.parametrize("backend", ["native", "reference"])  # 4,096 rows are too many for an interpreter
def test_grad_scaler_with_half_students(backend: str) -> None:
    """f16 logits under a loss scale: unscaled gradients are those of f32, also where an early f16 gradient is 0."""
    weight = torch.randn(V, 16)
    x, teacher, labels = torch.randn(64, 16), torch.randn(64, V), torch.randint(V, (64,))
    grads = []
    for dtype in (torch.float32, torch.float16):
        w = weight.clone().requires_grad_()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD([w], lr=0.0)
        logits = (x @ w.t()).to(dtype)
        scaler.scale(CUDLoss(backend=backend)(logits, teacher, labels)).backward()
        scaler.unscale_(optimizer)
        grads.append(w.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=5e-3, atol=2e-5)
    leaf = torch.zeros(4096, V, dtype=torch.float16, requires_grad=True)  # gradients near 1e-9: 0 in f16 unscaled
    loss = CUDLoss(backend=backend)(leaf, torch.randn(4096, V), torch.randint(V, (4096,)))
    (loss * 2.0**14).backward()
    assert (leaf.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_gives_the_numbers_of_eager(reduction: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    cud, dus = CUDLoss(reduction=reduction), DUSLoss(reduction=reduction, alpha=torch.rand(V) + 0.5)
    tau = torch.tensor(3.0)

    def step(student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor, items: Tensor) -> Tensor:
        a = cud(student * 2, teacher, labels, weight=weight, temperature=tau, num_items=items)
        b, stats = dus(student, labels.clamp(min=0), return_stats=True)
        return a.sum() * 1.5 + b.sum() + stats.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (N, N + 3):
        student, teacher = torch.randn(n, V), torch.randn(n, V).to(torch.bfloat16)
        labels, weight = torch.randint(-1, V, (n,)), torch.rand(n)
        values = []
        for function in (step, compiled):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, teacher, labels, weight, torch.tensor(8.0))
            values.append((loss.detach(), gradient(loss, leaf)))
        torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-7)


def test_compile_with_inductor(batch: tuple[Tensor, ...]) -> None:
    torch._dynamo.reset()
    student, teacher, labels = batch
    loss = CUDLoss()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = student.clone().requires_grad_()
        value = function(leaf.tanh(), teacher, labels)
        results.append((value.detach(), gradient(value, leaf)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    words = r"do not work under torch\.compile|raised exception.*RuntimeError"  # torch 2.8 shows its class alone
    with pytest.raises(Exception, match=words):
        torch.compile(lambda s: CUD_INPLACE(s * 1, teacher, labels), fullgraph=True)(student)


CUD_INPLACE = CUDLoss(inplace=True)


def test_opcheck(batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    cud, dus = CUDOptions().rows.text, DUSOptions(reduction="none").rows.text
    two, three = (torch.ones(count, 1, dtype=torch.float64) for count in (2, 3))
    weight, tau = torch.rand(N, dtype=torch.float64), torch.rand(N, dtype=torch.float64) + 1
    near = ClassSets.from_groups(torch.arange(V) // 2)
    asked = constraints_of(Projection(near=near, min_near_mass=0.3, min_entropy=0.5), student, V, "student_logits")
    tensors, flags = asked.packed()
    bounds = (tensors, 2.0, V, cud, flags, "")
    for logits in (student.clone().requires_grad_(), student.to(torch.bfloat16).requires_grad_()):
        for args in (
            (logits, teacher, labels, weight, tau, two, None, [], 2.0, V, cud, "", "", True),
            (logits, teacher, None, None, None, two, torch.tensor(7.0), [], 3.0, V - 5, cud, "", "", False),
            (logits, None, labels.clamp(min=0), None, None, three, None, [], 1.0, V, dus, "", "", False),
            (logits, teacher, labels, None, None, two, None, *bounds, False),
        ):
            torch.library.opcheck(row_state_op, args)
    _, sums, top1, divisors = row_state_op(student, teacher, labels, None, None, two, None, *bounds, False)
    one = torch.ones(())
    packed = (sums, top1, divisors, one)
    torch.library.opcheck(row_gradient_op, (student, teacher, labels, None, None, two, *bounds, *packed))


def test_no_gradient_is_wanted(batch: tuple[Tensor, ...]) -> None:
    student, teacher, labels = batch
    with torch.no_grad():
        loss = CUDLoss(inplace=True)(student.requires_grad_(), teacher, labels)
    assert not loss.requires_grad
    assert not CUDLoss()(student.detach(), teacher, labels).requires_grad


def test_a_model_in_bf16_autocast() -> None:
    layer = nn.Linear(8, V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(torch.randn(N, 8))
        loss = CUDLoss()(logits, torch.randn(N, V), torch.randint(V, (N,)))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all()


def test_from_several_threads(batch: tuple[Tensor, ...]) -> None:
    labels = batch[2]
    wide_teacher = torch.randn(N, 50_000)
    students = [torch.randn(N, 50_000) for _ in range(6)]
    expected = [CUDLoss()(s, wide_teacher, labels) for s in students]
    results: list[Tensor | None] = [None] * 6

    def work(i: int) -> None:
        for _ in range(5):
            leaf = students[i].clone().requires_grad_()
            loss = CUDLoss()(leaf, wide_teacher, labels)
            loss.backward()
            results[i] = loss.detach()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for got, wanted in zip(results, expected):
        assert got is not None
        assert torch.equal(got, wanted)


def _in_child(queue: multiprocessing.Queue[float]) -> None:
    torch.manual_seed(1)
    student, teacher, labels = torch.randn(9, 60_000), torch.randn(9, 60_000), torch.randint(60_000, (9,))
    queue.put(CUDLoss()(student, teacher, labels).item())


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is what is tested")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_fork() -> None:
    """The parent's OpenMP pool has no threads in the child; the loss works there all the same."""
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[float] = context.Queue()
    torch.manual_seed(1)
    student, teacher, labels = torch.randn(9, 60_000), torch.randn(9, 60_000), torch.randint(60_000, (9,))
    expected = CUDLoss()(student, teacher, labels).item()
    torch.set_num_threads(1)  # torch's own ops would hang in the child otherwise; ours may not
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get() == expected
    finally:
        child.join(10)
        torch.set_num_threads(os.cpu_count() or 1)


class _Distilled(torch.utils.data.Dataset[float]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return CUDLoss()(torch.ones(2, 40_000), torch.ones(2, 40_000), torch.tensor([1, index])).item()


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_dataloader_workers() -> None:
    loader = torch.utils.data.DataLoader(_Distilled(), num_workers=2)
    assert len(set(torch.cat(list(loader)).tolist())) == 1
