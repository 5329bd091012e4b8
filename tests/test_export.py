"""torch.export of every loss: the numbers of eager, also from a file."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from cudfast import ClassSets, CUDLoss, DUSLoss, FusedLinearCUDLoss, FusedLinearDUSLoss, Projection

N, V, D = 4, 9, 5
LABELS = torch.tensor([1, 2, -1, -100])
TAUGHT = torch.tensor([1, 2, 8, -100])
MATRICES = torch.randn(6, N, V, generator=torch.Generator().manual_seed(0))
STUDENT, TEACHER = MATRICES[:2]
HIDDEN, WEIGHT = MATRICES[2, :, :D].clone(), MATRICES[3:].reshape(-1, V)[:D].T.contiguous()
NEAR = ClassSets.from_groups(torch.arange(V) // 3)
TAUGHT_BY = {"teacher_hidden": HIDDEN * 2, "teacher_weight": WEIGHT + 1}
CASES: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "student": (CUDLoss(), (STUDENT, TEACHER, LABELS), {}),
    "cross-entropy": (CUDLoss(reduction="none", kd_weight=0.0), (STUDENT, TEACHER, LABELS), {}),
    "teacher": (DUSLoss(), (STUDENT, TAUGHT), {}),
    "student, from hidden states": (FusedLinearCUDLoss(), (HIDDEN, WEIGHT, LABELS), TAUGHT_BY),
    "teacher, from hidden states": (FusedLinearDUSLoss(), (HIDDEN, WEIGHT, TAUGHT), {}),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_file(case: str, strict: bool) -> None:
    loss, arguments, named = CASES[case]
    file = io.BytesIO()
    torch.export.save(torch.export.export(loss, arguments, named, strict=strict), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(*arguments, **named), loss(*arguments, **named))


@pytest.mark.parametrize("strict", [False, True])
def test_a_projection(strict: bool) -> None:
    """Not from a file: torch 2.8 cannot write NaN, which stands for a bound that is not there."""
    loss, arguments = CUDLoss(calibration=Projection(near=NEAR, min_near_mass=0.4)), (STUDENT, TEACHER, LABELS)
    exported = torch.export.export(loss, arguments, strict=strict)
    assert torch.equal(exported.module()(*arguments), loss(*arguments))
