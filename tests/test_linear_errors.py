"""The modules of the losses from hidden states, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cudfast import (
    CUDLoss,
    CUDOptions,
    FusedLinearCUDLoss,
    FusedLinearDUSLoss,
    LinearOptions,
)
from cudfast.linear import fused_linear_cud_loss, fused_linear_dus_loss

from .hidden import Batch


def test_modules() -> None:
    loss = FusedLinearCUDLoss(4.0, memory_budget=1 << 20, student_logit_softcap=30.0)
    assert repr(loss) == "FusedLinearCUDLoss(temperature=4.0, memory_budget=1048576, softcap=30.0)"
    assert repr(FusedLinearDUSLoss(logit_scale=0.5)) == "FusedLinearDUSLoss(scale=0.5)"
    assert isinstance(CUDLoss().options, CUDOptions)


X = Batch(torch.float32, 4, classes=7)
ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "student_hidden: expected a torch.Tensor of hidden states (..., D), got list", {"student_hidden": [1]}),
    (TypeError, "student_weight: expected a torch.Tensor (V, D), as nn.Linear has it, got int", {"student_weight": 3}),
    (TypeError, "student_hidden has dtype torch.int64: expected one of", {"student_hidden": X.h.long()}),
    (
        ValueError,
        "student_hidden has shape (4, 0): expected (..., D) with at least one feature",
        {"student_hidden": X.h[:, :0]},
    ),
    (
        ValueError,
        "student_weight has shape (7, 6, 1): expected (V, D) with at least one class",
        {"student_weight": X.w[..., None]},
    ),
    (
        ValueError,
        "student_weight has shape (6, 7) and student_hidden (4, 6): expected (V, D) and (..., D) with the same D",
        {"student_weight": X.w.t()},
    ),
    (
        ValueError,
        "student_weight has strides (12, 2): expected dense rows or columns; call .contiguous() first",
        {"student_weight": torch.randn(7, 12)[:, ::2]},
    ),
    *(
        (
            ValueError,
            f"{name} has shape (0,): DeepSpeed ZeRO-3 has partitioned this parameter and not gathered it here (FSDP "
            "leaves the same of some); call the loss and backward within deepspeed.zero.GatheredParameters([weight, "
            "bias]), or use CUDLoss or DUSLoss, which take logits",
            {name: torch.nn.Parameter(torch.empty(0), requires_grad=name.startswith("student"))},
        )
        for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
    ),
    (ValueError, "student_bias has shape (6,): expected (7,), as student_weight", {"student_bias": X.b[:6]}),
    (TypeError, "student_bias: expected a torch.Tensor (V,) or None, got float", {"student_bias": 1.0}),
    (
        TypeError,
        "student_weight has dtype torch.bfloat16 and student_hidden torch.float32: expected the same; cast one of them",
        {"student_weight": X.w.bfloat16()},
    ),
    (
        ValueError,
        "student_weight is on meta and student_hidden on cpu: move them to one device",
        {"student_weight": X.w.to("meta")},
    ),
    (
        ValueError,
        "teacher_weight requires grad, and no gradient flows to the teacher: run the teacher under torch.no_grad(), "
        "or pass teacher_weight.detach()",
        {"teacher_weight": X.tw.clone().requires_grad_()},
    ),
    (
        TypeError,
        "no teacher: expected teacher_hidden (..., Dt) and teacher_weight (V, Dt), or teacher_logits (..., V), unless "
        "kd_weight=0 and return_stats=False",
        {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None},
    ),
    (
        TypeError,
        "teacher_weight is None: expected teacher_hidden and teacher_weight together, or teacher_logits",
        {"teacher_weight": None},
    ),
    (
        TypeError,
        "teacher_logits and teacher_hidden were both given: expected one of them",
        {"teacher_logits": torch.randn(4, 7)},
    ),
    (
        ValueError,
        "student_hidden has shape (4, 6) and teacher_hidden (3, 9): expected the same leading shape",
        {"teacher_hidden": X.th[:3]},
    ),
    (
        ValueError,
        "student_weight has 7 classes and teacher_weight has 5: expected the same width. If one of them is padded, "
        "pass num_classes=5 (the number of real classes)",
        {"teacher_weight": X.tw[:5], "teacher_bias": None},
    ),
    (
        ValueError,
        "labels has shape (3,): expected (4,), that of student_hidden without its last axis",
        {"labels": X.labels[:3]},
    ),
    (
        ValueError,
        "inplace=True is not supported here: there are no logits to overwrite; leave it out",
        {"options": CUDOptions(inplace=True)},
    ),
    (
        ValueError,
        "save='gradient' cannot be combined with reduction='none'",
        {"options": CUDOptions(save="gradient", reduction="none")},
    ),
    (
        ValueError,
        "teacher_logits were given with a teacher scale or soft cap",
        {
            "teacher_logits": torch.randn(4, 7),
            "teacher_hidden": None,
            "teacher_weight": None,
            "teacher_bias": None,
            "linear": LinearOptions(teacher_scale=2.0),
        },
    ),
    (TypeError, "options: expected CUDOptions, got NoneType", {"options": None}),
    (TypeError, "linear: expected LinearOptions, got int", {"linear": 3}),
]


@pytest.mark.parametrize(("kind", "words", "changed"), ERRORS, ids=[words[:40] for _, words, _ in ERRORS])
def test_errors(kind: type[Exception], words: str, changed: dict[str, Any]) -> None:
    good: dict[str, Any] = {"student_hidden": X.h, "student_weight": X.w, "labels": X.labels, **X.kwargs}
    with pytest.raises(kind) as error:
        fused_linear_cud_loss(**{**good, **changed})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("kind", "words", "fields"),
    [
        (ValueError, "memory_budget=0: expected a number of bytes >= 1, or 'auto'", {"memory_budget": 0}),
        (TypeError, "LinearOptions(memory_budget=...): expected an int, got float", {"memory_budget": 1e6}),
        (TypeError, "accumulate_dtype=torch.int8: expected a floating point", {"accumulate_dtype": torch.int8}),
        (ValueError, "LinearOptions(softcap=0): expected a finite number in (0, inf)", {"softcap": 0}),
    ],
)
def test_options(kind: type[Exception], words: str, fields: dict[str, Any]) -> None:
    with pytest.raises(kind) as error:
        LinearOptions(**fields)
    assert words in str(error.value)


def test_teacher_loss_needs_labels() -> None:
    with pytest.raises(TypeError, match="labels is None: the teacher loss needs a label"):
        fused_linear_dus_loss(X.h, X.w, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.grad(lambda h: fused_linear_dus_loss(h, X.w.detach(), X.labels.clamp(min=0)))(X.h.detach())


def test_a_head_of_the_teacher_that_was_not_gathered() -> None:
    for weight, bias, name in ((torch.empty(0), None, "head_weight"), (X.w, torch.empty(0), "head_bias")):
        with pytest.raises(ValueError, match=rf"{name} has shape \(0,\): DeepSpeed ZeRO-3 .*GatheredParameters"):
            FusedLinearDUSLoss()(X.h, weight, X.labels, head_bias=bias)
