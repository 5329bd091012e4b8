"""Every term against its definition in float64, on every backend; a new term is one more entry of CASES."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cudfast import (
    ClassSets,
    CrossEntropy,
    CUDLoss,
    DUSLoss,
    Entropy,
    Focal,
    ForwardKL,
    FusedLinearLoss,
    Gate,
    Loss,
    Projection,
    WClip,
    ZLoss,
)
from cudfast.terms import TERMS, Sum, Term, Terms, named
from cudfast.terms.term import RowValues

from .conftest import BUILT
from .truth import cud_rows, dus_rows, gradient

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
GATE = Gate(threshold=0.4, scale=1.3, power=0.7, differentiate=True)
Formula = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def log_p_y(s: Tensor, y: Tensor) -> Tensor:
    return -F.cross_entropy(s, y.clamp(min=0), reduction="none")


def entropy(s: Tensor) -> Tensor:
    q = s.softmax(-1)
    return -torch.where(q > 0, q * s.log_softmax(-1), 0).sum(-1)


class Case(NamedTuple):
    term: Term
    formula: Formula  # of student logits, teacher logits, labels and temperature, (N,)
    labelled: bool  # counts in labelled rows only


CASES = {
    "forward_kl": Case(ForwardKL(), lambda s, t, y, tau: cud_rows(s, t, y, tau=tau, kd=1.0, ce=0.0)[0], False),
    "cross_entropy": Case(CrossEntropy(), lambda s, t, y, tau: -log_p_y(s, y), True),
    "focal": Case(
        Focal(gamma=1.5, alpha=0.9),
        lambda s, t, y, tau: dus_rows(s, y, ce=0.0, entropy=0.0, gamma=1.5, alpha=0.9),
        True,
    ),
    "entropy": Case(Entropy(), lambda s, t, y, tau: entropy(s), False),
    "gated": Case(
        Entropy(GATE, name="gated"),
        lambda s, t, y, tau: (
            -dus_rows(
                s, y, ce=0.0, focal=0.0, entropy=1.0, threshold=0.4, scale=1.3, power=0.7, differentiate_gate=True
            )
        ),
        True,
    ),
    "z_loss": Case(ZLoss(), lambda s, t, y, tau: s.logsumexp(-1) ** 2, False),
}


def batch(n: int = 9, v: int = 21, dtype: torch.dtype = f64) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels with an ignored and an unlabelled row, impossible classes and equal maxima."""
    s, t = 2 * torch.randn(n, v), 3 * torch.randn(n, v)
    y = torch.randint(v, (n,))
    y[0], y[1] = -100, -1
    if v > 4:
        y[2], y[3] = 0, v - 1
        s[3, 1] = t[3, 1] = -torch.inf
        t[4, 2] = -torch.inf
        t[5, 0] = t[5, v - 1] = t[5].max() + 1
    return s.to(dtype).requires_grad_(), t.to(dtype), y


def expected(case: Case, s: Tensor, t: Tensor, y: Tensor, tau: float) -> Tensor:
    """(N,) of the definition, in rows that the term counts in."""
    counts = (y >= 0) if case.labelled else (y != -100)
    s = torch.where(s == -torch.inf, -1e3, s)  # autograd would give NaN; e^-1000 is 0
    return torch.where(counts, case.formula(s, t, y, tau), 0)


def test_every_term_has_a_case() -> None:
    assert {type(case.term) for case in CASES.values()} == set(TERMS)
    assert all(name == (case.term.name or case.term.label) for name, case in CASES.items())
    assert sorted(case.term.kind for case in CASES.values()) == list(range(len(CASES)))


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(backend: str, name: str, tau: float) -> None:
    case = CASES[name]
    s, t, y = batch()
    extra = 0.25 * ForwardKL(tau, name="kd") if name != "forward_kl" else 0 * CrossEntropy()
    term = ForwardKL(tau) if name == "forward_kl" else case.term
    kd = 0.25 * expected(CASES["forward_kl"], s, t, y, tau) if name != "forward_kl" else 0
    weight = torch.rand(len(y), dtype=f64)
    loss = Loss(-1.7 * term + extra, calibration=WClip(), reduction="none", backend=backend)  # type: ignore[arg-type]
    value, stats = loss(s, t, y, return_stats=True)
    truth = expected(case, s, t, y, tau)
    torch.testing.assert_close(value, -1.7 * truth + kd)
    torch.testing.assert_close(stats.terms[name], truth.detach())
    found, wanted = gradient((weight * value).sum(), s), gradient((weight * (-1.7 * truth + kd)).sum(), s)
    torch.testing.assert_close(found, torch.where(s == -torch.inf, 0, wanted))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.term.distils])
def test_without_a_teacher(backend: str, name: str) -> None:
    case = CASES[name]
    s, t, y = batch()
    loss = Loss(0.3 * case.term, unlabeled_index=-1, reduction="sum", backend=backend)  # type: ignore[arg-type]
    value, truth = loss(s, None, y), 0.3 * expected(case, s, t, y, 1.0).sum()
    torch.testing.assert_close(value, truth)
    wanted = torch.where(s == -torch.inf, 0, gradient(truth, s))
    torch.testing.assert_close(gradient(value, s), wanted)


@pytest.mark.parametrize("name", CASES)
def test_slopes_are_derivatives(name: str) -> None:
    """Of a term with respect to the values of a row, against autograd."""
    term = CASES[name].term
    values = RowValues(*(x.requires_grad_() for x in (-torch.rand(4, 7, dtype=f64) - 0.01)))
    given = values._replace(forward_kl=-values.forward_kl)
    found = term.evaluate(given)
    slopes = torch.autograd.grad(found.value.sum(), values, allow_unused=True)
    for name_of, slope, wanted in zip(RowValues._fields, found[1:], slopes):
        wanted = torch.zeros(7, dtype=f64) if wanted is None else wanted
        sign = -1 if name_of == "forward_kl" else 1
        torch.testing.assert_close(torch.zeros(7, dtype=f64) + slope, sign * wanted)


EVERY: Terms = sum((0.1 * (i + 1) * case.term for i, case in enumerate(CASES.values())), start=0)  # type: ignore[assignment]


@pytest.mark.parametrize("v", [1, 2, 7, 64, 77, 2049, 5000])
def test_widths_and_dtypes(v: int) -> None:
    """Natively: not worse than twice eager's error in the dtype, against float64."""
    for dtype, tolerance in ((f32, 3e-6), (bf16, 1e-2)):
        s, t, y = batch(6, v, dtype)
        y = y.clamp(max=v - 1)
        wide = s.detach().double().requires_grad_()
        loss = Loss(EVERY, calibration=WClip(), reduction="none", save="state")
        value, truth = loss(s, t, y), loss(wide, t.double(), y)
        torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)
        found, wanted = gradient(value.sum(), s), gradient(truth.sum(), wide)
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_the_same_bits_for_any_threads() -> None:
    s, t, y = batch(6, 9000, f32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value = Loss(EVERY, calibration=WClip())(s, t, y)
            found.append((value.detach(), gradient(value, s)))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    finally:
        torch.set_num_threads(before)


def test_ways_of_saving_and_memory_agree() -> None:
    s, t, y = batch(7, 300, f32)
    wanted = None
    for save in ("state", "gradient"):
        value = Loss(EVERY, calibration=WClip(), save=save)(s, t, y)  # type: ignore[arg-type]
        found = (value.detach(), gradient(value, s))
        wanted = found if wanted is None else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_gradcheck() -> None:
    s, t, y = (
        torch.randn(4, 6, dtype=f64, requires_grad=True),
        torch.randn(4, 6, dtype=f64),
        torch.tensor([0, 2, -1, 5]),
    )
    assert torch.autograd.gradcheck(lambda x: Loss(EVERY, calibration=WClip())(x, t, y), (s,))


@pytest.mark.parametrize("budget", [30_000, 1 << 20])
def test_from_hidden_states(budget: int) -> None:
    """In tiles of classes and of whole rows."""
    h, w = torch.randn(9, 5, dtype=f64, requires_grad=True), torch.randn(300, 5, dtype=f64, requires_grad=True)
    t, y = 2 * torch.randn(9, 300, dtype=f64), batch(9, 300)[2]
    weights = {"entropy": torch.rand(9), "focal": 0.5}
    fused = FusedLinearLoss(EVERY, calibration=WClip(), memory_budget=budget)
    value, stats = fused(h, w, y, teacher_logits=t, term_weights=weights, return_stats=True)
    truth, wanted = Loss(EVERY, calibration=WClip())(h @ w.T, t, y, term_weights=weights, return_stats=True)
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(stats.terms, wanted.terms)
    torch.testing.assert_close(torch.autograd.grad(value, (h, w)), torch.autograd.grad(truth, (h, w)))


def test_over_a_projection(backend: str) -> None:
    s, t, y = batch()
    t = torch.where(t == -torch.inf, -20.0, t)
    near = ClassSets.from_groups(torch.arange(21) // 3)
    projection = Projection(near=near, min_near_mass=0.4, max_wrong_mass=0.2, wrong="top1", min_entropy=1.0)
    loss = Loss(ForwardKL() - 0.5 * Entropy() + 0.1 * ZLoss(), calibration=projection, backend=backend)  # type: ignore[arg-type]
    kd = CUDLoss(kd_weight=1.0, ce_weight=0.0, calibration=projection, backend=backend)  # type: ignore[arg-type]
    own = Loss(-0.5 * Entropy() + 0.1 * ZLoss(), unlabeled_index=-1, backend="reference")
    value, truth = loss(s, t, y), kd(s, t, y) + own(s, None, y)
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(value, s), gradient(truth, s), rtol=1e-5, atol=1e-6)


def test_presets_are_sums_of_terms() -> None:
    s, t, y = batch(dtype=f32)
    y[1] = 4
    pairs: list[tuple[Any, Any]] = [
        (CUDLoss()(s, t, y), Loss(0.8 * ForwardKL() + 0.2 * CrossEntropy(), calibration=WClip())(s, t, y)),
        (DUSLoss(gamma=2.0)(s, y), Loss(CrossEntropy() + Focal(2.0) - 0.1 * Entropy(Gate()))(s, None, y)),
    ]
    for preset, composed in pairs:
        assert torch.equal(preset, composed)
        assert torch.equal(gradient(preset, s), gradient(composed, s))


# ---- Divisors, weights, coefficients ----


def test_what_each_term_is_divided_by(backend: str) -> None:
    s, t, y = batch()
    weight = torch.rand(9, dtype=f64)
    whole, labelled = (weight * (y != -100)).sum(), (weight * (y >= 0)).sum()
    for name, case in CASES.items():
        loss = Loss(case.term + 0 * ForwardKL(name="kd"), backend=backend)  # type: ignore[arg-type]
        rows = expected(case, s, t, y, 2.0) if name != "forward_kl" else cud_rows(s, t, y, kd=1.0, clip=False)[0]
        total = (weight * rows).sum()
        torch.testing.assert_close(loss(s, t, y, weight=weight), total / (labelled if case.labelled else whole))
        torch.testing.assert_close(loss(s, t, y, weight=weight, num_items=3), total / 3)


def test_term_weights(backend: str) -> None:
    """Numbers, tensors of one element and of one per row; never in a divisor."""
    s, t, y = batch()
    loss = Loss(0.8 * ForwardKL() + 0.2 * CrossEntropy(), backend=backend)  # type: ignore[arg-type]
    kd, ce = cud_rows(s, t, y, clip=False)
    per_row = torch.rand(9)
    for given in (0.5, torch.tensor(0.5), per_row, 0, -1.0):
        value = loss(s, t, y, term_weights={"forward_kl": given})
        torch.testing.assert_close(value, (given * kd).sum() / 8 + ce.sum() / 7)


def test_a_term_of_weight_0_may_be_infinite(backend: str) -> None:
    s, _t, y = batch()
    with torch.no_grad():
        s[2, 0] = -torch.inf  # the label's
    loss = Loss(CrossEntropy() + Focal() + ZLoss(), reduction="none", backend=backend)  # type: ignore[arg-type]
    rows = torch.ones(9)
    rows[2] = 0
    value = loss(s, None, y.clamp(min=0), term_weights={"cross_entropy": rows, "focal": rows})
    assert value.isfinite().all()
    assert gradient(value.sum(), s).isfinite().all()
    assert loss(s, None, y.clamp(min=0)).isinf().sum() == 1


def test_alpha_per_class_is_part_of_the_state_dict() -> None:
    s, _, y = batch(dtype=f32)
    y, alpha = y.clamp(min=0), torch.rand(21) + 0.5
    loss = Loss(CrossEntropy() + Focal(2.0, alpha))
    assert list(loss.state_dict()) == ["focal_alpha"]
    assert torch.equal(loss(s, None, y), DUSLoss(gamma=2.0, alpha=alpha, entropy_weight=0.0)(s, y))
    value, stats = loss(s, None, y, return_stats=True)
    torch.testing.assert_close(value, (stats.terms["cross_entropy"] + stats.terms["focal"]).mean())


def test_no_labels() -> None:
    s, t, _ = batch()
    with pytest.raises(TypeError, match="labels is None: every term of this loss needs a label"):
        Loss(CrossEntropy())(s)
    torch.testing.assert_close(
        Loss(ForwardKL() + CrossEntropy())(s, t), cud_rows(s, t, None, kd=1.0, clip=False)[0].mean()
    )


# ---- The algebra ----


def test_algebra() -> None:
    a, b = ForwardKL(), CrossEntropy()
    assert (0.8 * a + b / 5).parts() == ((0.8, a), (0.2, b))
    assert (a - b).parts() == ((1.0, a), (-1.0, b))
    assert (2 * (a + 3 * b)).parts() == ((2.0, a), (6.0, b))
    assert sum([a, b]).parts() == (a + b).parts()
    assert (-a).parts() == ((-1.0, a),)
    assert repr(0.8 * a - b) == "0.8 * ForwardKL(temperature=2.0) + -1 * CrossEntropy()"
    assert [w.name for w in named(a + ForwardKL(name="second"))] == ["forward_kl", "second"]
    assert isinstance(a + b, Sum)


WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Loss(ForwardKL() + 0.5 * ForwardKL()), ValueError, "two terms are named 'forward_kl': give one of them"),
    (lambda: Loss(0.5), TypeError, "terms: expected a sum of terms such as"),  # type: ignore[arg-type]
    (lambda: ForwardKL() * float("nan"), ValueError, "a term times nan: expected a finite number"),
    (lambda: torch.tensor(2.0) * ForwardKL(), TypeError, "term_weights="),
    (lambda: ForwardKL() / 0, ValueError, "divided by 0"),
    (lambda: Loss(CrossEntropy(), calibration=WClip()), ValueError, "without a distillation term"),
    (lambda: Loss(ForwardKL(1.0) + ForwardKL(2.0, name="b")), ValueError, "expected one temperature"),
    (lambda: Loss(sum(Entropy(name=f"e{i}") for i in range(9))), ValueError, "a loss of 9 terms: expected 1 to 8"),  # type: ignore[arg-type]
    (lambda: ForwardKL(0), ValueError, r"ForwardKL\(temperature=0\)"),
    (lambda: Focal(-1), ValueError, r"Focal\(gamma=-1\)"),
    (lambda: Entropy("gate"), TypeError, r"expected Gate"),  # type: ignore[arg-type]
    (lambda: ZLoss(name="a b"), ValueError, "expected an identifier"),
]


@pytest.mark.parametrize(("make", "kind", "message"), WRONG)
def test_wrong_terms(make: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_wrong_calls() -> None:
    s, t, y = batch()
    loss = Loss(ForwardKL() + CrossEntropy(), calibration=WClip())
    with pytest.raises(TypeError, match="pass labels="):
        loss(s, y)
    with pytest.raises(TypeError, match="teacher_logits is None"):
        loss(s, None, y)
    with pytest.raises(ValueError, match="'kl': the terms of this loss are forward_kl, cross_entropy"):
        loss(s, t, y, term_weights={"kl": 1.0})
    with pytest.raises(ValueError, match="expected a finite number"):
        loss(s, t, y, term_weights={"forward_kl": float("inf")})
    bad = torch.ones(9)
    bad[7] = torch.nan
    for name in ("native", "reference"):
        other = Loss(ForwardKL() + CrossEntropy(), backend=name)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"term_weights\['cross_entropy'\]\[7\] gives a coefficient of nan"):
            other(s, t, y, term_weights={"cross_entropy": bad})


# ---- As a module ----


def test_copies_and_pickles() -> None:
    s, t, y = batch(dtype=f32)
    loss = Loss(0.5 * ForwardKL(3.0) + Focal(2.0, torch.rand(21) + 1), calibration=WClip(budget=0.25))
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(file, weights_only=False)):
        assert torch.equal(other(s, t, y), loss(s, t, y))
        assert repr(other) == repr(loss) == "Loss(0.5 * ForwardKL(temperature=3.0) + 1 * Focal(gamma=2.0, alpha=1.0))"


def test_compiled_without_recompiling() -> None:
    """A weight that anneals, a temperature and another number of rows use one graph."""
    loss = Loss(0.5 * ForwardKL() + CrossEntropy() - 0.1 * Entropy() + 1e-4 * ZLoss(), calibration=WClip())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for step in range(4):
            s, t, y = batch(9 + step, dtype=f32)
            weights = {"forward_kl": torch.tensor(0.5 + step), "entropy": torch.rand(9 + step)}
            value, wanted = compiled(s, t, y, term_weights=weights), loss(s, t, y, term_weights=weights)
            torch.testing.assert_close(value, wanted)
            torch.testing.assert_close(gradient(value, s), gradient(wanted, s))
            if step == 1:  # the second call has made the number of rows dynamic
                torch._dynamo.config.error_on_recompile = True  # type: ignore[attr-defined]


def test_exported() -> None:
    s, t, y = batch(dtype=f32)
    loss = Loss(0.5 * ForwardKL() + CrossEntropy(), calibration=WClip(), unlabeled_index=-1)
    program = torch.export.export(loss, (s.detach(), t, y))
    torch.testing.assert_close(program.module()(s.detach(), t, y), loss(s.detach(), t, y))


def test_under_autocast_and_accumulation() -> None:
    """num_items over two halves of a batch gives the mean over the whole."""
    s, t, y = batch(8, dtype=f32)
    y = y.clamp(min=0)
    loss = Loss(0.5 * ForwardKL() + CrossEntropy() + 0.01 * ZLoss(), calibration=WClip())
    whole = gradient(loss(s, t, y), s)
    halves = sum(gradient(loss(s[i], t[i], y[i], num_items=8), s) for i in (slice(4), slice(4, 8)))
    torch.testing.assert_close(whole, halves)
    with torch.autocast("cpu", dtype=bf16):
        assert loss(s.bfloat16(), t, y).dtype == f32


def test_with_a_scaler_and_data_parallel(tmp_path: Path) -> None:
    """Gradients of a model, under GradScaler with float16 logits and under DDP, are those of CUDLoss."""
    terms = 0.8 * ForwardKL() + 0.2 * CrossEntropy()
    x, t, y = torch.randn(6, 5), torch.randn(6, 21), torch.randint(21, (6,))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        found = []
        for loss in (CUDLoss(), Loss(terms, calibration=WClip())):
            torch.manual_seed(1)
            model = nn.parallel.DistributedDataParallel(nn.Linear(5, 21))
            step = torch.optim.SGD(model.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(loss(model(x).half(), t, y)).backward()
            scaler.step(step)
            found.append([p.detach().clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", BUILT)
def test_infinite_and_nan_rows_stay_in_their_rows(name: str) -> None:
    s, t, y = batch(dtype=f32)
    with torch.no_grad():
        s[2, 5], s[4, 1], s[6] = torch.nan, torch.inf, -torch.inf
    value = Loss(EVERY, reduction="none", calibration=WClip(), backend=name)(s, t, y)  # type: ignore[arg-type]
    assert value[[2, 4, 6]].isnan().all()
    assert value[[1, 3, 5, 7, 8]].isfinite().all()
    assert value[0] == 0
