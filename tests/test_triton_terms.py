"""Sums of terms in the Triton kernels, against their definitions in float64. Under the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cudfast import ClassSets, CrossEntropy, Entropy, Focal, ForwardKL, Gate, Loss, Projection, WClip
from cudfast.backends import triton as backend
from cudfast.backends.triton import launch
from cudfast.terms import Terms
from cudfast.terms.term import Evaluated, RowValues, Term

from .truth import cud_rows, dus_rows, gradient

f32, f64 = torch.float32, torch.float64
pytestmark = pytest.mark.skipif(not backend.interpreted(), reason="needs TRITON_INTERPRET=1")

GATE = Gate(threshold=0.4, scale=1.3, power=0.7, differentiate=True)
Values = dict[str, Tensor]


@dataclass(frozen=True)
class ZLoss(Term):
    """lse^2"""

    kind = 5
    label = "z_loss"

    def evaluate(self, at: RowValues) -> Evaluated:
        return Evaluated(at.lse * at.lse, lse=2 * at.lse)


def values(student: Tensor, teacher: Tensor, labels: Tensor, tau: float | Tensor, clip: bool) -> Values:
    """What terms are functions of, (N,) each; 0 in rows that they do not count in."""
    log_q = student.log_softmax(-1)
    counts, labelled = labels != -100, labels >= 0
    index = labels.clamp(min=0)[:, None]
    return {
        "kl": cud_rows(student, teacher, labels, tau=tau, kd=1.0, ce=0.0, clip=clip)[0],
        "ce": -log_q.gather(-1, index).squeeze(-1) * labelled,
        "focal": dus_rows(student, labels, ce=0.0, entropy=0.0, gamma=1.5, alpha=0.9) * labelled,
        "entropy": -(log_q.exp() * log_q).sum(-1) * counts,
        "gated": -dus_rows(
            student, labels, ce=0.0, focal=0.0, entropy=1.0, threshold=0.4, scale=1.3, power=0.7,
            differentiate_gate=True,
        ) * labelled,
        "z": student.logsumexp(-1) ** 2 * counts,
    }  # fmt: skip


# Terms, and the same as sums over rows: those that count in every row, and those of labelled rows.
Sums = Callable[[Values], tuple[Tensor, Tensor]]
CASES: dict[str, tuple[Callable[[float], Terms], Sums]] = {
    "entropy": (
        lambda tau: 0.8 * ForwardKL(tau) + 0.2 * CrossEntropy() - 0.1 * Entropy(),
        lambda at: (0.8 * at["kl"] - 0.1 * at["entropy"], 0.2 * at["ce"]),
    ),
    "z-loss": (
        lambda tau: 1.3 * ForwardKL(tau) + 0.01 * ZLoss(),
        lambda at: (1.3 * at["kl"] + 0.01 * at["z"], at["ce"] * 0),
    ),
    "gate": (
        lambda tau: ForwardKL(tau) + 0.7 * Focal(1.5, 0.9) - 0.3 * Entropy(GATE),
        lambda at: (at["kl"], 0.7 * at["focal"] - 0.3 * at["gated"]),
    ),
    "two of a kind": (
        lambda tau: Entropy(GATE, name="gated") + 0.5 * Entropy() + ForwardKL(tau) + ForwardKL(tau, name="more"),
        lambda at: (2 * at["kl"] + 0.5 * at["entropy"], at["gated"]),
    ),
}


def batch(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(n, v).to(dtype), (3 * torch.randn(n, v)).to(dtype)
    labels = torch.randint(v, (n,))
    labels[1:3] = torch.tensor([-100, -1])
    return student, teacher, labels


def compare(loss: Tensor, x: Tensor, truth: Tensor, exact: Tensor, upstream: Tensor | None = None) -> None:
    upstream = torch.ones_like(truth) if upstream is None else upstream
    (found,) = torch.autograd.grad(loss, x, upstream.to(loss.dtype))
    (wanted,) = torch.autograd.grad(truth, exact, upstream)
    tolerance = 1e-11 if x.dtype == f64 else 1e-5
    torch.testing.assert_close(loss.double(), truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("save", ["state", "gradient"])
@pytest.mark.parametrize("tau", [2.0, 3.0])  # 3: an exponential of its own for temperature 1
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n", "v", "dtype"), [(5, 77, f64), (5, 300, f32), (4, 5_000, f64), (4, 20_483, f32)])
def test_terms_with_a_target(
    monkeypatch: pytest.MonkeyPatch, n: int, v: int, dtype: torch.dtype, case: str, tau: float, save: Any
) -> None:
    """Rows of one block with a rest, and rows that programs share."""
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    assert (launch.plan(n, v, dtype == f64, 4).parts > 1) == (v >= 5_000)
    terms, sums = CASES[case]
    student, teacher, labels = batch(n, v, dtype)
    x, exact = student.clone().requires_grad_(), student.double().clone().requires_grad_()
    loss = Loss(terms(tau), calibration=WClip(), save=save, backend="triton")(x, teacher, labels)
    whole, labelled = sums(values(exact, teacher.double(), labels, tau, True))
    compare(loss, x, whole.sum() / (labels != -100).sum() + labelled.sum() / (labels >= 0).sum(), exact)


@pytest.mark.parametrize("v", [77, 20_483])
def test_terms_without_a_target(monkeypatch: pytest.MonkeyPatch, v: int) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 4)
    student, teacher, labels = batch(4, v, f32)
    x, exact = student.clone().requires_grad_(), student.double().clone().requires_grad_()
    loss = Loss(CrossEntropy() - 0.2 * Entropy() + 0.01 * ZLoss(), unlabeled_index=-1, backend="triton")
    at = values(exact, teacher.double(), labels, 1.0, False)
    truth = (0.01 * at["z"] - 0.2 * at["entropy"]).sum() / 3 + at["ce"].sum() / 2
    compare(loss(x, labels=labels), x, truth, exact)


@pytest.mark.parametrize("save", ["state", "gradient"])
def test_a_weight_per_row_and_a_temperature_per_row(save: Any) -> None:
    student, teacher, labels = batch(5, 77, f64)
    x, exact = student.clone().requires_grad_(), student.clone().requires_grad_()
    tau, share = torch.linspace(1.5, 4, 5, dtype=f64), torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=f64)
    loss = Loss(ForwardKL() + CrossEntropy() + 0.5 * Entropy(), reduction="none", save=save, backend="triton")
    found = loss(x, teacher, labels, temperature=tau, term_weights={"forward_kl": share, "entropy": 0.25 - share})
    at = values(exact, teacher, labels, tau, False)
    truth = share * at["kl"] + at["ce"] + 0.5 * (0.25 - share) * at["entropy"]
    compare(found, x, truth, exact, torch.linspace(-1, 2, 5, dtype=f64))


@pytest.mark.parametrize("bounds", [{}, {"min_entropy": 3.0}])
@pytest.mark.parametrize("save", ["state", "gradient"])
@pytest.mark.parametrize("dtype", [f32, f64])
def test_entropy_beside_a_projected_target(dtype: torch.dtype, save: Any, bounds: dict[str, float]) -> None:
    """The same as the distillation loss, and the entropy by its definition."""
    student, teacher, labels = batch(5, 600, dtype)
    near = ClassSets.from_groups(torch.arange(600) // 4)
    projection = Projection(
        near=near,
        min_near_mass=0.3,
        max_wrong_mass=0.1,
        on_infeasible="relax",
        **bounds,  # type: ignore[arg-type]
    )
    common: dict[str, Any] = {"calibration": projection, "save": save, "backend": "triton"}
    found = []
    for terms in (ForwardKL(), ForwardKL() - 0.5 * Entropy() + 0.01 * ZLoss()):
        x = student.clone().requires_grad_()
        loss = Loss(terms, **common)(x, teacher, labels)
        found.append((loss.double(), gradient(loss, x).double()))
    exact = student.double().clone().requires_grad_()
    at = values(exact, teacher.double(), labels, 1.0, False)
    more = (0.01 * at["z"] - 0.5 * at["entropy"]).sum() / 4
    tolerance = 1e-11 if dtype == f64 else 1e-5
    (plain, plain_gradient), (both, both_gradient) = found
    torch.testing.assert_close(both, plain + more, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(both_gradient, plain_gradient + gradient(more, exact), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("calibration", [None, WClip(), Projection(min_near_mass=0.5, on_infeasible="relax")])
@pytest.mark.parametrize("dtype", [f32, torch.float16])  # of the teacher: that of the student, and another
@pytest.mark.parametrize("save", ["state", "gradient"])
def test_a_teacher_that_is_nan_is_not_read_where_it_has_no_weight(
    save: Any, dtype: torch.dtype, calibration: WClip | Projection | None
) -> None:
    student, teacher, labels = batch(4, 300, f32)
    labels[1:3] = 7
    teacher[1], teacher[2, 5:] = torch.nan, -torch.inf
    teacher = teacher.to(dtype)
    x, exact = student.clone().requires_grad_(), student.double().clone().requires_grad_()
    terms = ForwardKL() + CrossEntropy() - 0.1 * Entropy()
    loss = Loss(terms, calibration=calibration, reduction="none", save=save, backend="triton")
    found = loss(x, teacher, labels, term_weights={"forward_kl": torch.tensor([1.0, 0.0, 0.0, 1.0])})
    compared = slice(1, 3)
    at = values(exact, torch.zeros_like(exact), labels, 1.0, False)
    compare(found[compared], x, (at["ce"] - 0.1 * at["entropy"])[compared], exact)


def test_a_weight_that_is_not_finite_makes_its_row_nan() -> None:
    student, teacher, labels = batch(5, 77, f32)
    loss = Loss(ForwardKL() + CrossEntropy(), reduction="none", backend="triton")
    own = torch.tensor([torch.inf, torch.inf, torch.nan, 1.0, 1.0])
    found = loss(student.requires_grad_(), teacher, labels, term_weights={"cross_entropy": own})
    # The second row is ignored; the third has no label, so that the term does not count.
    assert found.isnan().tolist() == [True, False, False, False, False]
