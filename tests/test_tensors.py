"""Every kind of tensor in PyTorch: used, resolved, or refused with an error that names what to pass instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_tensor
from torch.utils.flop_counter import FlopCounterMode

from cudfast import ClassSets, CUDLoss, DUSLoss, FusedLinearCUDLoss, FusedLinearDUSLoss, Projection, WClip
from cudfast.functional import cud_loss

from .batches import D, N, V, batch, heads
from .truth import gradient

# ---- fake, meta, functional tensors and wrappers: what the losses' torch.library ops make of them ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_tensors(backend: str, reduction: str) -> None:
    """As F.cross_entropy: a fake result of the right shape, dtype and device, with a fake gradient."""
    cud, dus = CUDLoss(reduction=reduction, backend=backend), DUSLoss(reduction=reduction, backend=backend)
    with FakeTensorMode():
        student, teacher, labels, weight = batch()
        student.requires_grad_()
        loss, stats = cud(student, teacher, labels, weight=weight, num_items=8, return_stats=True)
        both = loss.sum() + dus(student, labels, return_stats=True)[0].sum()
        assert isinstance(both, FakeTensor)
        assert loss.shape == (() if reduction == "mean" else (N,))
        assert stats.teacher_top1.shape == (N,)
        assert gradient(both, student).shape == (N, V)


def test_fake_tensors_without_their_mode() -> None:
    with FakeTensorMode() as mode:
        student, teacher, labels, _ = batch()
        student.requires_grad_()
    loss = CUDLoss(calibration=Projection(min_near_mass=0.5))(student, teacher, labels)
    assert isinstance(loss, FakeTensor)
    assert loss.fake_mode is mode
    assert isinstance(gradient(loss, student), FakeTensor)
    for mixed in ((torch.randn(N, V), teacher, labels), (student.detach(), torch.randn(N, V), labels)):
        with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
            CUDLoss()(*mixed)
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        CUDLoss()(torch.randn(N, V), torch.randn(N, V), labels)


@pytest.mark.parametrize("save", ["state", "gradient"])
def test_fake_tensors_in_fused_heads(save: str) -> None:
    cud, dus = FusedLinearCUDLoss(save=save), FusedLinearDUSLoss(save=save)
    with FakeTensorMode():
        hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        labels = torch.randint(V, (N,))
        loss = cud(hidden, weight, labels, **heads()) + dus(hidden, weight, labels)
        loss.backward()
        assert isinstance(loss, FakeTensor)
        assert isinstance(hidden.grad, FakeTensor)
        assert weight.grad.shape == (V, D)


def test_meta_tensors() -> None:
    """No warning, no backend: a result on meta."""
    student, teacher, labels, weight = (x.to("meta") for x in batch())
    student.requires_grad_()
    loss = CUDLoss()(student, teacher, labels, weight=weight) + DUSLoss()(student, labels)
    assert loss.is_meta
    assert gradient(loss, student).is_meta
    hidden, head = torch.randn(N, D, device="meta"), torch.randn(V, D, device="meta", requires_grad=True)
    loss = FusedLinearDUSLoss()(hidden, head, labels)
    loss.backward()
    assert head.grad.is_meta


class Twin(Tensor):
    """A wrapper subclass: two tensors, and no memory of its own."""

    @staticmethod
    def __new__(cls, a: Tensor, b: Tensor) -> Twin:
        return Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype, device=a.device, strides=a.stride())

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def of(x, which):  # type: ignore[no-untyped-def]
            if isinstance(x, (list, tuple)):
                return type(x)(of(y, which) for y in x)
            return getattr(x, which) if isinstance(x, Twin) else x

        a, b = (func(*of(args, w), **{k: of(v, w) for k, v in (kwargs or {}).items()}) for w in ("a", "b"))
        if isinstance(a, (list, tuple)):
            return tuple(Twin(x, y) if isinstance(x, Tensor) else x for x, y in zip(a, b))
        return Twin(a, b) if isinstance(a, Tensor) else a


def test_wrapper_subclasses(backend: str) -> None:
    """Each of the tensors inside gets the loss and the gradient that it would get alone."""
    (s, t, y, w), (s2, t2, _, _) = batch(), batch()
    loss = CUDLoss(backend=backend)
    student = Twin(s, s2).requires_grad_()
    value = loss(student, Twin(t, t2), y, weight=w)
    value.sum().backward()
    for a, b, which in ((s, t, "a"), (s2, t2, "b")):
        leaf = a.clone().requires_grad_()
        expected = loss(leaf, b, y, weight=w)
        torch.testing.assert_close(getattr(value, which), expected.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(getattr(student.grad, which), gradient(expected, leaf), rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match=r"cannot be used with student_logits, which has no memory of its own"):
        CUDLoss(inplace=True)(Twin(s, s2), Twin(t, t2), y)


@pytest.mark.parametrize("which", [0, 1, 3])
def test_one_tensor_without_memory_of_its_own(backend: str, which: int) -> None:
    """Among ordinary ones: a functional tensor, a tensor of zeros that are stored nowhere, a negative bit."""
    made = list(batch())
    for special in (
        torch._to_functional_tensor(made[which]),
        torch._efficientzerotensor(made[which].shape),
        torch.complex(torch.zeros_like(made[which]), -made[which]).conj().imag,
    ):
        plain = torch.zeros_like(made[which]) if special._is_zerotensor() else made[which]
        values = []
        for x in (plain, special):
            given = [*made]
            given[which] = x
            student = given[0].detach().requires_grad_()
            loss = CUDLoss(backend=backend)(student, *given[1:3], weight=given[3])
            values.append((loss, gradient(loss, student)))
        for got, wanted in zip(values[1], values[0]):
            if torch._is_functional_tensor(got):
                got = torch._from_functional_tensor(got)
            torch.testing.assert_close(got.resolve_neg(), wanted, rtol=1e-5, atol=1e-7)


def test_upstream_gradients_without_memory_of_their_own(backend: str) -> None:
    student, teacher, labels, _ = batch()
    student.requires_grad_()
    above = torch.rand(N)
    negative = torch.complex(torch.zeros(N), -above).conj().imag
    assert negative.is_neg()
    for save in ("state", "gradient"):
        loss = CUDLoss(reduction="none", save=save, backend=backend)
        expected = torch.autograd.grad(loss(student, teacher, labels), student, above)[0]
        got = torch.autograd.grad(loss(student, teacher, labels), student, negative)[0]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
        zero = torch.autograd.grad(loss(student, teacher, labels), student, torch._efficientzerotensor((N,)))[0]
        assert zero.eq(0).all()


@contextlib.contextmanager
def _alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_results_of_functional_collectives(backend: str) -> None:
    """In flight when the loss is called; also over a group, in a fused head, and with a gradient."""
    student, teacher, labels, weight = batch()
    hidden, head, given = torch.randn(N, D), torch.randn(V, D), heads()
    with _alone() as group:

        def sent(x: Tensor) -> Tensor:
            found = all_gather_tensor(x, 0, group)
            assert isinstance(found, AsyncCollectiveTensor)
            return found

        for loss in (CUDLoss(backend=backend), CUDLoss(backend=backend, process_group=group)):
            leaf = student.clone().requires_grad_()
            expected = loss(leaf, teacher, labels, weight=weight)
            flying = sent(student).requires_grad_()
            got = loss(flying, sent(teacher), sent(labels), weight=sent(weight))
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
            torch.testing.assert_close(gradient(got, flying) + 0, gradient(expected, leaf), rtol=0, atol=0)
        fused = FusedLinearCUDLoss(backend=backend)
        expected = fused(hidden, head, labels, **given)
        flying_given = {name: sent(x) for name, x in given.items()}
        torch.testing.assert_close(fused(sent(hidden), sent(head), sent(labels), **flying_given), expected)
        with pytest.raises(TypeError, match="grad_out is a AsyncCollectiveTensor which has no memory of its own"):
            cud_loss(student, teacher, labels, grad_out=sent(student))


def test_a_fused_head_over_a_group_refuses_what_it_cannot_trace() -> None:
    with _alone() as group, FakeTensorMode():
        fused = FusedLinearDUSLoss(process_group=group)
        with pytest.raises(RuntimeError, match="over a process group cannot be traced"):
            fused(torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,)))


# ---- refused ----


def _masked(x: Tensor) -> Tensor:
    return torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


def _nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:2], x[2:]])


def _jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (_masked, r"is a MaskedTensor: pass \w+\.to_tensor\(value\)"),
        (_nested, r"is a nested tensor: pass the rows of all its parts as one tensor"),
        (_jagged, r"is a nested tensor: pass the rows of all its parts as one tensor"),
        (Tensor.to_sparse, r"has layout torch\.sparse_coo: expected a dense"),
    ],
)
def test_refused(kind: Callable[[Tensor], Tensor], words: str) -> None:
    student, teacher, labels, weight = batch()
    hidden, head, given = torch.randn(N, D), torch.randn(V, D), heads()
    fused = FusedLinearCUDLoss()
    calls: list[Callable[[], object]] = [
        lambda: CUDLoss()(kind(student), teacher, labels),
        lambda: CUDLoss()(student, kind(teacher), labels),
        lambda: CUDLoss()(student, teacher, kind(labels)),
        lambda: CUDLoss()(student, teacher, labels, weight=kind(weight)),
        lambda: DUSLoss()(kind(student), labels),
        lambda: fused(kind(hidden), head, labels, **given),
        lambda: fused(hidden, kind(head), labels, **given),
        lambda: fused(hidden, head, kind(labels), **given),
        lambda: fused(hidden, head, labels, teacher_hidden=given["teacher_hidden"], teacher_weight=kind(head)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_freed_storage(which: int) -> None:
    """As FSDP leaves a parameter that is not gathered."""
    given = list(batch())
    given[3] = given[3].double()
    given[which].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^[a-z_() ]+ has no memory: its storage has been freed"):
        CUDLoss(backend="native")(*given[:3], weight=given[3])
    hidden, head = torch.randn(N, D), torch.randn(V, D)
    (hidden, head)[which % 2].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^(hidden|head_weight) has no memory: its storage has been freed"):
        FusedLinearDUSLoss()(hidden, head, torch.randint(V, (N,)))


# ---- modes ----


def test_under_a_mode_that_counts(backend: str) -> None:
    """FlopCounterMode and other observing modes: the same numbers as without, also in place."""
    student, teacher, labels, _ = batch()
    for inplace in (False, True):
        values = []
        for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
            with mode:
                leaf = student.clone().requires_grad_()
                loss = CUDLoss(backend=backend, inplace=inplace)(leaf * 1, teacher, labels)
                values.append((loss.detach(), gradient(loss, leaf)))
        torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)


def test_a_default_device_changes_nothing(backend: str) -> None:
    """Outputs and constants are on the logits' device, also when the first call of a kind is made there."""
    student, teacher, labels, weight = batch()
    groups, bad = [c // 2 for c in range(V)], torch.tensor([0, 99, 0, 0, 0, 0])
    hidden, head, given = torch.randn(N, D), torch.randn(V, D), heads()

    def run() -> list[Tensor]:
        near = ClassSets.from_groups(groups)
        assert near.row(0).device == ClassSets.from_lists([[0], [1]]).row(0).device == torch.device("cpu")
        found = []
        for save in ("state", "gradient"):
            for reduction in ("mean", "none"):
                options = {"save": save, "reduction": reduction, "backend": backend}
                projected = Projection(near=near, min_near_mass=0.3, min_entropy=0.5)
                for loss in (CUDLoss(**options), CUDLoss(calibration=projected, **options)):
                    leaf = student.clone().requires_grad_()
                    value, stats = loss(leaf, teacher, labels, weight=weight, temperature=2.5, return_stats=True)
                    found += [value, gradient(value.sum(), leaf), *stats]
                leaf = student.clone().requires_grad_()
                value, teacher_stats = DUSLoss(**options)(leaf, labels.clamp(min=0), num_items=7, return_stats=True)
                found += [value, gradient(value.sum(), leaf), *teacher_stats]
        for tile in (1 << 30, 60_000):
            leaf = hidden.clone().requires_grad_()
            value = FusedLinearCUDLoss(backend=backend, memory_budget=tile)(leaf, head, labels, **given)
            found += [value, gradient(value, leaf)]
        with pytest.raises(ValueError, match=r"labels\[1\] = 99"):
            CUDLoss(backend="reference")(student, teacher, bad)
        return found

    expected = run()
    for enter in (lambda: torch.device("meta"), lambda: _default("meta")):
        with enter():
            found = run()
        for got, wanted in zip(found, expected, strict=True):
            assert got.device == wanted.device
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@contextlib.contextmanager
def _default(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def test_a_first_call_under_a_default_device() -> None:
    """Objects that a module makes when it is imported do not change."""
    import subprocess
    import sys

    script = (
        "import torch; from cudfast import CUDLoss\n"
        "s, t, y = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7), torch.tensor([1, 2, -1, -100])\n"
        "with torch.device('meta'): a = CUDLoss()(s, t, y); a.backward()\n"
        "b = CUDLoss()(s, t, y); b.backward()\n"
        "assert a.device == b.device == s.device and torch.equal(a, b) and s.grad.isfinite().all()"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


# ---- no rows ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)])
def test_no_rows_over_a_group(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """A loss of 0, gradients of the inputs' shapes, statistics of no rows."""
    near = ClassSets.from_groups(torch.arange(V) // 2)
    calibrations = (WClip(), None, Projection(near=near, min_near_mass=0.5, min_entropy=0.3))
    labels = torch.zeros(rows, dtype=torch.int64)
    with _alone() as group:
        for calibration in calibrations:
            for reduction in ("mean", "none"):
                for y in (labels, None):
                    student, teacher = torch.randn(*rows, V, dtype=dtype, requires_grad=True), torch.randn(*rows, V)
                    loss = CUDLoss(calibration=calibration, reduction=reduction, process_group=group)
                    value, stats = loss(student, teacher, y, return_stats=True)
                    assert gradient(value.sum(), student).shape == student.shape
                    assert value.sum() == 0
                    assert stats.teacher_top1.shape == rows
        logits = torch.randn(*rows, V, dtype=dtype, requires_grad=True)
        assert gradient(DUSLoss(process_group=group)(logits, labels), logits).shape == logits.shape
        for cut in (False, True):
            hidden, head = (torch.randn(*n, D, dtype=dtype, requires_grad=True) for n in (rows, (V,)))
            teacher_of = {"teacher_hidden": hidden.detach(), "teacher_weight": head.detach()}
            fused = FusedLinearCUDLoss(process_group=group, sequence_sharded=cut)
            fused(hidden, head, labels, **teacher_of).backward()
            assert hidden.grad.shape == hidden.shape
            assert head.grad.eq(0).all()
