"""The native kernels against float64, on every instruction set of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cudfast import CUDLoss, CUDOptions, DUSLoss, DUSOptions
from cudfast.backends import native
from cudfast.functional import cud_loss, dus_loss

from .truth import cud_rows, dus_rows, gradient

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

SHAPES = {
    (1, 1): "one class: loss and gradient are 0",
    (2, 2): "binary",
    (3, 3): "less than any vector",
    (32, 77): "Banking77: a partial vector at every width",
    (4, 150): "CLINC150",
    (5, 1000): "ImageNet",
    (3, 2048): "exactly one block",
    (3, 2049): "one column in the second block",
    (2, 6000): "blocks and a ragged end",
    (2, 32000): "Llama-2",
    (1, 50257): "GPT-2: odd width",
    (1, 128256): "Llama-3: columns over threads",
}


def gap(ours: Tensor, truth: Tensor) -> float:
    return float((ours.to(f64) - truth).abs().max()) if ours.numel() else 0.0


def draw(n: int, v: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(v, (n,))
    if kind == "normal":
        return 3 * torch.randn(n, v), 4 * torch.randn(n, v), labels
    if kind == "wide":  # logits up to +-80
        return 160 * torch.rand(n, v) - 80, 160 * torch.rand(n, v) - 80, labels
    if kind == "sharp":  # one-hot teacher, on the label in every other row
        teacher = torch.randn(n, v)
        hot = torch.where(torch.arange(n) % 2 == 0, labels, (labels + 1) % v)
        return torch.randn(n, v), teacher.scatter(1, hot[:, None], 60.0), labels
    assert kind == "equal"  # student close to the teacher
    teacher = 3 * torch.randn(n, v)
    return teacher + 1e-3 * torch.randn(n, v), teacher, labels


@pytest.mark.parametrize(("n", "v"), SHAPES)
@pytest.mark.parametrize("kind", ["normal", "wide", "sharp", "equal"])
def test_student_loss(isa: str, n: int, v: int, kind: str) -> None:
    student, teacher, labels = draw(n, v, kind)
    for tau in (1.0, 2.0, 4.0, 3.0):
        s64 = student.to(f64).requires_grad_()
        kd, ce = cud_rows(s64, teacher.to(f64), labels, tau=tau)
        truth = gradient((kd + ce).sum(), s64)
        leaf = student.clone().requires_grad_()
        eager = gradient(sum(t.sum() for t in cud_rows(leaf, teacher, labels, tau=tau)), leaf)
        ours = student.clone().requires_grad_()
        options = {"kd_only": (0.8, 0.0), "ce_only": (0.0, 0.2), "both": (0.8, 0.2)}
        for name, (kd_weight, ce_weight) in options.items():
            loss = CUDLoss(tau, kd_weight, ce_weight, reduction="none")(ours, teacher, labels)
            expected = {"kd_only": kd, "ce_only": ce, "both": kd + ce}[name]
            allowed = 2e-6 * torch.clamp(expected.abs(), min=max(1.0, tau**2))
            assert ((loss.to(f64) - expected).abs() <= allowed).all(), (name, tau)
        got = gradient(loss.sum(), ours)
        assert gap(got, truth) <= gap(eager, truth) + 1e-6 * max(1.0, tau)


@pytest.mark.parametrize(("n", "v"), SHAPES)
@pytest.mark.parametrize("kind", ["normal", "wide", "sharp"])
def test_teacher_loss(isa: str, n: int, v: int, kind: str) -> None:
    _, logits, labels = draw(n, v, kind)
    z64 = logits.to(f64).requires_grad_()
    expected = dus_rows(z64, labels, gamma=2.0)
    leaf = logits.clone().requires_grad_()
    eager = gradient(dus_rows(leaf, labels, gamma=2.0).sum(), leaf)
    ours = logits.clone().requires_grad_()
    loss = DUSLoss(gamma=2.0, reduction="none")(ours, labels)
    assert ((loss.to(f64) - expected).abs() <= 2e-6 * torch.clamp(expected.abs(), min=1)).all()
    truth = gradient(expected.sum(), z64)
    assert gap(gradient(loss.sum(), ours), truth) <= gap(eager, truth) + 1e-6


@pytest.mark.parametrize("student_dtype", [f32, f64, bf16, f16])
@pytest.mark.parametrize("teacher_dtype", [f32, f64, bf16, f16])
def test_mixed_dtypes(isa: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    n, v = 5, 2100
    student = (3 * torch.randn(n, v)).to(student_dtype).requires_grad_()
    teacher, labels = (4 * torch.randn(n, v)).to(teacher_dtype), torch.randint(v, (n,))
    loss = CUDLoss(2.0, save="gradient")(student, teacher, labels)
    assert loss.dtype == (f64 if f64 in (student_dtype, teacher_dtype) else f32)
    s64 = student.detach().to(f64).requires_grad_()
    kd, ce = cud_rows(s64, teacher.to(f64), labels)
    expected = (kd + ce).mean()
    assert abs(loss.item() - expected.item()) <= (1e-12 if loss.dtype == f64 else 2e-6) * max(4.0, expected.item())
    truth, got = gradient(expected, s64), gradient(loss, student)
    assert got.dtype == student_dtype
    # of float64, what the truth itself loses: 1.6 times 2^-50 against 80 bits, and it depends on PyTorch's own vectors
    half_ulp = {f32: 2.0**-24, f64: 2.0**-49, bf16: 2.0**-8, f16: 2.0**-11}[student_dtype]
    tiny = 2.0**-25 if student_dtype == f16 else 0.0
    slack = 1e-16 if loss.dtype == f64 else 1e-7  # a gradient is a difference of probabilities
    assert ((got.to(f64) - truth).abs() <= 1.01 * half_ulp * truth.abs() + tiny + slack).all()
    z = student.detach().requires_grad_()
    dus = DUSLoss(save="gradient")(z, labels)
    z64 = z.detach().to(f64).requires_grad_()
    truth = gradient(dus_rows(z64, labels).mean(), z64)
    slack = 1e-16 if student_dtype == f64 else 5e-7
    assert ((gradient(dus, z).to(f64) - truth).abs() <= 1.01 * half_ulp * truth.abs() + tiny + slack).all()


def test_exp_within_its_bound(isa: str) -> None:
    """The bound that simd.h states, over its whole range and around every power of two."""
    for dtype, lowest, run in ((f32, -87.33, native._native.exp32), (f64, -708.39, native._native.exp64)):
        x = torch.cat([torch.linspace(lowest, 0, 500_001, dtype=dtype), -torch.logspace(-30, 0, 10_001, dtype=dtype)])
        n = -torch.arange(1, int(-lowest / math.log(2)), dtype=f64)[:, None] * math.log(2)
        x = torch.cat([x, (n + torch.linspace(-1e-3, 1e-3, 101, dtype=f64)).reshape(-1).to(dtype)])
        x = x[x >= lowest]
        y = torch.empty_like(x)
        run(x, y, x.numel())
        if dtype == f32:
            truth = x.to(f64).exp()
            ulp = torch.nextafter(truth.to(f32), torch.tensor(torch.inf)) - truth.to(f32)
            assert float(((y.to(f64) - truth) / ulp.to(f64)).abs().max()) <= 1.5
        else:
            # libm's exp is within 1 ULP, so within 2.5 of it is implied by our 1.5; test_core measures in long double
            truth = x.exp()
            ulp = torch.nextafter(truth, torch.tensor(torch.inf, dtype=f64)) - truth
            assert float(((y - truth) / ulp).abs().max()) <= 2.5


def test_exp_below_its_range(isa: str) -> None:
    """Subnormal at most, 0 at -inf, and NaN for NaN: what a class that is masked out weighs."""
    for dtype, lowest, run in ((f32, -87.33, native._native.exp32), (f64, -708.39, native._native.exp64)):
        below = [lowest - 0.1, lowest - 0.35, lowest - 1, 2 * lowest, -1e30, -math.inf]
        x = torch.tensor([*below, math.nan] * 5, dtype=dtype)
        y = torch.full_like(x, -1)
        run(x, y, x.numel())
        tiny = torch.finfo(dtype).tiny
        assert (((y >= 0) & (y <= tiny)) | x.isnan()).all()
        assert (y[x <= lowest - 1] == 0).all()
        assert (y.isnan() == x.isnan()).all()


def bits(run: Callable[[], tuple[Tensor, ...]], threads: int) -> tuple[Tensor, ...]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("n", "v"), [(64, 1000), (9, 20_000), (1, 300_000), (3, 70_001)])
def test_same_bits_for_any_threads_and_every_run(isa: str, n: int, v: int) -> None:
    student, teacher, labels = draw(n, v, "normal")

    def run() -> tuple[Tensor, ...]:
        s = student.clone().requires_grad_()
        cud = CUDLoss()(s, teacher, labels)
        g = gradient(cud, s)
        dus = DUSLoss()(s, labels)
        return cud.detach(), g, dus.detach(), gradient(dus, s)

    first = bits(run, 1)
    for threads in (1, 2, 3, 2):
        for a, b in zip(first, bits(run, threads)):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("n", "width", "v", "dtype"),
    [
        (400, 16448, 16390, f32),  # rows over threads; a row ends in a part of a vector, and padding follows
        (800, 16448, 16390, bf16),
        (800, 16448, 16390, f16),
        (200, 16448, 16390, f64),
        (1, 7 << 20, 7 << 20, f32),  # columns over threads
    ],
)
def test_large_gradients_past_the_caches(isa: str, n: int, width: int, v: int, dtype: torch.dtype) -> None:
    """Only rows that start at cache lines are streamed; one element further the result is bitwise the same."""
    student, teacher = torch.randn(n, width).to(dtype).requires_grad_(), torch.randn(n, width).to(dtype)
    labels = torch.randint(v, (n,))
    memory = torch.empty(n * width + 64, dtype=dtype)
    line = -memory.data_ptr() // dtype.itemsize % (64 // dtype.itemsize)

    def run(at: int) -> Iterator[Tensor]:
        g = memory[at : at + n * width].view(n, width)
        for options in (CUDOptions(num_classes=v), CUDOptions(temperature=3.0, save="state", num_classes=v)):
            yield gradient(cud_loss(student, teacher, labels, options, grad_out=g.fill_(torch.nan)), student)
        yield gradient(dus_loss(student, labels, DUSOptions(num_classes=v), grad_out=g.fill_(torch.nan)), student)

    for past, ordinary in zip(map(Tensor.clone, run(line)), run(line + 1)):
        assert torch.equal(past, ordinary)


def test_ties_take_the_lowest_index(isa: str) -> None:
    teacher = torch.zeros(3, 5000)
    teacher[0, [4999, 7, 3000]] = 5.0
    teacher[1, [2047, 2048]] = 5.0
    student = torch.randn(3, 5000)
    for backend in ("native", "reference"):
        _, stats = cud_loss(student, teacher, None, CUDOptions(backend=backend), return_stats=True)
        assert stats.teacher_top1.tolist() == [7, 2047, 0]


def test_offsets_beyond_32_bits() -> None:
    """A row stride of 2^31 elements and more: the second row is beyond any 32-bit offset (bf16, 4.3 GB untouched)."""
    v, stride = 1000, 2**31 + 16
    memory = torch.empty_strided((2, v), (stride, 1), dtype=bf16)
    student, teacher, labels = torch.randn(2, v), torch.randn(2, v), torch.randint(v, (2,))
    memory.copy_(student)
    loss = CUDLoss()(memory, teacher, labels)
    torch.testing.assert_close(loss, CUDLoss()(student.to(bf16), teacher, labels), rtol=0, atol=0)
    leaf = memory.detach().requires_grad_()
    g = gradient(CUDLoss()(leaf, teacher, labels), leaf)
    other = student.to(bf16).requires_grad_()
    assert torch.equal(g, gradient(CUDLoss()(other, teacher, labels), other))
    out = torch.empty_strided((2, v), (stride, 1), dtype=bf16)
    cud_loss(student.to(bf16), teacher, labels, grad_out=out)
    assert torch.equal(out, g)


def test_a_hundred_million_classes() -> None:
    """One row of 1e8: index, sums and gradient; the truth in closed form, so that no float64 copy is needed.

    The student is 0 everywhere, the teacher c on the classes of one residue and 0 elsewhere, one peak on top.
    """
    v, peak, c, top = 100_000_000, 99_999_937, 2.0, 17.5
    teacher = torch.zeros(1, v)
    teacher[0, ::4] = c
    teacher[0, peak] = top
    label = 12_345_678 * 4
    student = torch.zeros(1, v)
    grad = torch.empty(1, v)
    options = CUDOptions(kd_weight=1.0, ce_weight=0.0, reduction="sum")
    loss, stats = cud_loss(student, teacher, torch.tensor([label]), options, return_stats=True, grad_out=grad)
    assert stats.teacher_top1.item() == peak

    quarter = v // 4
    z1 = math.exp(top) + quarter * math.exp(c) + (v - quarter - 1)
    pk, py = math.exp(top) / z1, math.exp(c) / z1
    delta = min(0.5 * pk, 0.7 * (pk - py))
    mass = {"peak": pk - delta, "label": py + delta, "c": math.exp(c) / z1, "zero": 1 / z1}
    count = {"peak": 1, "label": 1, "c": quarter - 1, "zero": v - quarter - 1}
    z = math.fsum(count[i] * math.sqrt(mass[i]) for i in mass)
    q = {i: math.sqrt(mass[i]) / z for i in mass}
    expected = 4 * math.fsum(count[i] * q[i] * math.log(q[i] * v) for i in mass)
    assert abs(loss.item() - expected) <= 2e-6 * max(4.0, expected)
    for i, column in (("peak", peak), ("label", label), ("c", 0), ("zero", 1)):
        assert grad[0, column].item() == pytest.approx(2 * (1 / v - q[i]), rel=1e-4, abs=1e-12)
    assert grad.isfinite().all()


WIDE = torch.randn(3, 9, 80)
STRIDED = {
    "shifted, as a causal language model does": lambda x: x[:, :-1],
    "columns of wider rows": lambda x: x[:, 1:, :64],
    "expanded": lambda x: x[:1, :-1].expand(3, -1, -1),
    "every other row": lambda x: x[:, ::2],
    "transposed rows": lambda x: x.transpose(0, 1),
    "one row": lambda x: x[1, 2],
}


@pytest.mark.parametrize("cut", STRIDED.values(), ids=STRIDED.keys())
def test_strides_need_no_copy(cut: Callable[[Tensor], Tensor], recwarn: pytest.WarningsRecorder) -> None:
    """On every layout of rows the same bits as on dense ones, and no warning of a copy."""
    student = cut(WIDE)
    teacher = cut(torch.randn(3, 9, 90))
    labels = torch.randint(60, student.shape[:-1])
    strided, dense = student.detach().requires_grad_(), student.contiguous().requires_grad_()
    options = CUDOptions(num_classes=60)
    a, b = cud_loss(strided, teacher, labels, options), cud_loss(dense, teacher.contiguous(), labels, options)
    assert torch.equal(a, b)
    assert torch.equal(gradient(a, strided), gradient(b, dense))
    a, b = (dus_loss(z, labels, DUSOptions(num_classes=60)) for z in (strided, dense))
    assert torch.equal(a, b)
    assert torch.equal(gradient(a, strided), gradient(b, dense))
    assert not recwarn.list


def test_a_sparse_last_axis_is_copied_with_a_warning() -> None:
    student, teacher, labels = torch.randn(40, 8).t(), torch.randn(8, 40), torch.randint(40, (8,))
    with pytest.warns(UserWarning, match=r"student_logits of shape \(8, 40\) and strides \(1, 8\).*1,280 bytes"):
        loss = CUDLoss()(student, teacher, labels)
    assert torch.equal(loss, CUDLoss()(student.contiguous(), teacher, labels))


def test_unknown_isa_is_refused() -> None:
    assert not native._native.use_isa("avx1024")
    assert native.isa() in native._native.runnable_isas()
