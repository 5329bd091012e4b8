"""Derivatives that the losses do not have, inputs that autograd does not save, infinite upstream gradients."""

from __future__ import annotations

import pytest
import torch

from cudfast import CUDLoss, DUSLoss, FusedLinearCUDLoss, FusedLinearDUSLoss

from .batches import D, N, V, batch, heads
from .truth import gradient


def test_forward_mode_is_an_error(backend: str) -> None:
    student, teacher, labels, _ = batch()
    words = r"carries a tangent of forward-mode AD"
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, torch.ones_like(student))
        for s, t in ((dual, teacher), (student, dual), (dual * student.clone().requires_grad_(), teacher)):
            with pytest.raises(RuntimeError, match=words):
                CUDLoss(backend=backend)(s, t, labels)
        with pytest.raises(RuntimeError, match=words):
            DUSLoss(backend=backend)(dual, labels.clamp(min=0))
        with pytest.raises(RuntimeError, match=words):
            FusedLinearDUSLoss(backend=backend)(torch.randn(N, V), dual, labels.clamp(min=0))
        assert CUDLoss(backend=backend)(student, teacher, labels).isfinite()  # no tangent: as ever


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_is_an_error() -> None:
    student, teacher, labels, _ = batch()
    with pytest.raises(RuntimeError, match=r"not recorded by torch\.jit\.trace"):
        torch.jit.trace(CUDLoss(), (student, teacher, labels))
    with pytest.raises(RuntimeError, match=r"not recorded by torch\.jit\.trace"):
        torch.jit.trace(lambda h, w: FusedLinearDUSLoss()(h, w, labels), (torch.randn(N, D), torch.randn(V, D)))


@pytest.mark.parametrize("save", ["state", "gradient"])
def test_batched_gradients_are_an_error(backend: str, save: str) -> None:
    student, teacher, labels, _ = batch()
    loss = CUDLoss(reduction="none", save=save, backend=backend)
    with pytest.raises(RuntimeError, match="one upstream gradient at a time"):
        torch.autograd.functional.jacobian(lambda s: loss(s, teacher, labels), student, vectorize=True)
    slow = torch.autograd.functional.jacobian(lambda s: loss(s, teacher, labels), student)
    assert slow.shape == (N, N, V)
    hidden = torch.randn(N, D, requires_grad=True)
    fused = FusedLinearDUSLoss(reduction="none", backend=backend)(hidden, torch.randn(V, D), labels.clamp(min=0))
    with pytest.raises(RuntimeError, match="one upstream gradient at a time"):
        torch.autograd.grad(fused, hidden, torch.eye(N), is_grads_batched=True)


# ---- a teacher, or labels, from torch.inference_mode ----


@pytest.mark.parametrize("save", ["auto", "state", "gradient"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_under_inference_mode(backend: str, save: str, reduction: str) -> None:
    """Taken as it is: no copy, and the same numbers."""
    student, teacher, labels, weight = batch()
    with torch.inference_mode():
        inferred = [x.clone() for x in (teacher, labels, weight)]
    assert all(x.is_inference() for x in inferred)
    loss = CUDLoss(save=save, reduction=reduction, backend=backend)
    values = []
    for t, y, w in ((teacher, labels, weight), inferred):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, t, y, weight=w).sum()
        (g,) = torch.autograd.grad(value, leaf, retain_graph=True)
        values += [(value.detach(), g), (value.detach(), gradient(value, leaf))]
    torch.testing.assert_close(values[2], values[0], rtol=0, atol=0)
    torch.testing.assert_close(values[3], values[1], rtol=0, atol=0)  # the second time, from the state
    with torch.inference_mode():
        assert loss(student, teacher, labels, weight=weight).sum().equal(values[0][0])


@pytest.mark.parametrize("save", ["auto", "state"])
def test_a_teacher_under_inference_mode_in_a_fused_head(backend: str, save: str) -> None:
    hidden, head, labels, given = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,)), heads()
    with torch.inference_mode():
        inferred = {name: x.clone() for name, x in given.items()}
        logits = torch.nn.functional.linear(*inferred.values())
    fused = FusedLinearCUDLoss(save=save, backend=backend)
    values = []
    for teacher in (given, inferred, {"teacher_logits": logits}):
        leaf = hidden.clone().requires_grad_()
        value = fused(leaf, head, labels, **teacher)
        values.append((value.detach(), gradient(value, leaf)))
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
    torch.testing.assert_close(values[2], values[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("save", ["state", "gradient"])
@pytest.mark.parametrize("above", [torch.inf, torch.nan])
def test_an_ignored_row_under_an_infinite_upstream_gradient(backend: str, save: str, above: float) -> None:
    student, teacher, labels, _ = batch()
    leaf = student.requires_grad_()
    value = CUDLoss(save=save, backend=backend)(leaf, teacher, labels)
    (g,) = torch.autograd.grad(value, leaf, torch.tensor(above))
    assert g[0].eq(0).all()
    assert not g[2:].isfinite().all()
    hidden = torch.randn(N, D, requires_grad=True)
    value = FusedLinearCUDLoss(save=save, backend=backend)(hidden, torch.randn(V, D), labels, **heads())
    (g,) = torch.autograd.grad(value, hidden, torch.tensor(above))
    assert g[0].eq(0).all()
