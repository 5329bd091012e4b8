"""One graph for any number of rows and any num_items, under torch.compile(dynamic=True) and torch.export."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cudfast import ClassSets, CUDLoss, DUSLoss, FusedLinearCUDLoss, FusedLinearDUSLoss, Projection

from .truth import gradient

V, D = 11, 13  # no number of rows: equal sizes share a symbol
ROWS = (4, 7, 5, 12, 9, 16, 3, 8, 21, 6, 10, 2)
NEAR = ClassSets.from_groups(torch.arange(V) // 2)
HEAD, TEACHER = torch.randn(V, V), torch.randn(V, V)


def _cud(loss: CUDLoss, **call: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda s, t, y: loss(s, t, y, **call).sum()


def _dus(loss: DUSLoss) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda s, t, y: loss(s, y.clamp(min=0)).sum()


def _fused_cud(loss: FusedLinearCUDLoss) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda s, t, y: loss(s, HEAD, y, teacher_hidden=t, teacher_weight=TEACHER).sum()


def _fused_dus(loss: FusedLinearDUSLoss) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda s, t, y: loss(s, HEAD, y.clamp(min=0)).sum()


def _everything(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    tau, weight = s.detach()[:, 0].abs() + 1, t[:, 0].abs()
    loss, stats = NONE(s, t, y, weight=weight, temperature=tau, num_items=s.shape[0], return_stats=True)
    return loss.sum() + stats.student_nll.nansum()


NONE = CUDLoss(reduction="none")
CALLS = {
    "cud": _cud(CUDLoss()),
    "cud none": _cud(CUDLoss(reduction="none")),
    "kd_weight=0": _cud(CUDLoss(kd_weight=0)),
    "temperature of the call": _cud(CUDLoss(), temperature=3.0),
    "num_classes": _cud(CUDLoss(num_classes=V - 2, unlabeled_index=None)),
    "projection": _cud(CUDLoss(calibration=Projection(near=NEAR, min_near_mass=0.4, min_entropy=0.5))),
    "everything": _everything,
    "dus": _dus(DUSLoss()),
    "dus alpha": _dus(DUSLoss(alpha=torch.rand(V) + 0.5)),
    "fused cud": _fused_cud(FusedLinearCUDLoss()),
    "fused cud none": _fused_cud(FusedLinearCUDLoss(reduction="none")),
    "fused dus": _fused_dus(FusedLinearDUSLoss()),
}


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled at the first call. A later one that would compile again raises."""
    torch._dynamo.reset()
    made, calls = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True), itertools.count()

    def call(*arguments: object) -> Tensor:
        with torch.compiler.set_stance("fail_on_recompile" if next(calls) else "default"):
            return made(*arguments)

    return call


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_for_any_number_of_rows(name: str) -> None:
    """With gradients that are those of an eager call."""
    function = CALLS[name]
    compiled = _compiled(function)
    for n in ROWS:
        student, teacher, labels = torch.randn(n, V), torch.randn(n, V), torch.randint(V - 2, (n,))
        values = []
        for f in (function, compiled):
            leaf = student.clone().requires_grad_()
            loss = f(leaf, teacher, labels)
            values.append((loss.detach(), gradient(loss, leaf)))
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)


def test_one_graph_for_rows_in_two_axes() -> None:
    compiled = _compiled(CUDLoss())
    for b, s in ((2, 3), (4, 5), (3, 7), (6, 2)):
        student, teacher, labels = torch.randn(b, s, V), torch.randn(b, s, V), torch.randint(V, (b, s))
        torch.testing.assert_close(compiled(student, teacher, labels), CUDLoss()(student, teacher, labels))


@pytest.mark.parametrize("items", [[8, 9, 11, 64, 3], [8.0, 9.5, 11.25, 64.0, 3.5]], ids=["int", "float"])
@pytest.mark.parametrize("fused", [False, True])
def test_one_graph_for_a_num_items_that_changes(fused: bool, items: list[float]) -> None:
    student, teacher, labels = torch.randn(6, V), torch.randn(6, V), torch.randint(V, (6,))
    loss: nn.Module = FusedLinearDUSLoss() if fused else CUDLoss()
    given = (student, HEAD, labels) if fused else (student, teacher, labels)
    compiled = _compiled(lambda n: loss(*given, num_items=n))
    for n in items:
        torch.testing.assert_close(compiled(n), loss(*given, num_items=n))
    for bad in (-2 * items[0], 0 * items[0]):
        with pytest.raises(ValueError, match=r"num_items=(-16: expected a finite number|0, and row 0 counts)"):
            compiled(bad)


class _Step(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(D, V), loss

    def forward(self, hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        logits = self.layer(hidden)
        value: Tensor = (
            self.loss(logits, teacher, labels) if isinstance(self.loss, CUDLoss) else self.loss(logits, labels)
        )
        return value


@pytest.mark.parametrize("loss", [CUDLoss(), CUDLoss(reduction="none"), DUSLoss(alpha=torch.rand(V) + 0.5)])
def test_export_with_a_dynamic_batch(loss: nn.Module) -> None:
    step = _Step(loss)
    rows = torch.export.Dim("rows", min=2)
    example = (torch.randn(4, D), torch.randn(4, V), torch.randint(V, (4,)))
    exported = torch.export.export(step, example, dynamic_shapes=({0: rows}, {0: rows}, {0: rows})).module()
    for n in (2, 5, 30):
        given = (torch.randn(n, D), torch.randn(n, V), torch.randint(V, (n,)))
        torch.testing.assert_close(exported(*given), step(*given))


def test_export_of_a_fused_head_with_a_dynamic_batch() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.loss = nn.Linear(D, V, bias=False), FusedLinearDUSLoss()

        def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
            value: Tensor = self.loss(hidden, self.head.weight, labels)
            return value

    rows, step = torch.export.Dim("rows", min=2), Fused()
    example = (torch.randn(4, D), torch.randint(V, (4,)))
    exported = torch.export.export(step, example, dynamic_shapes=({0: rows}, {0: rows})).module()
    for n in (2, 5, 30):
        given = (torch.randn(n, D), torch.randint(V, (n,)))
        torch.testing.assert_close(exported(*given), step(*given))
