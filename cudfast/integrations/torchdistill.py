"""CUDLoss and DUSLoss among torchdistill's mid-level losses: importing this module registers them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from .. import losses
from ..options import Reduction, WClip
from ..targets.projection import Projection
from .require import require

register_mid_level_loss = require("torchdistill.losses.registry", "torchdistill").register_mid_level_loss


def logits_at(io_dict: Mapping[str, Mapping[str, Any]], path: str, io: str, model: str) -> Tensor:
    """The input or output of a module of the student or the teacher, from a forward hook of torchdistill."""
    try:
        return cast(Tensor, io_dict[path][io])
    except KeyError:
        found = ", ".join(f"{name!r} ({', '.join(kept) or 'nothing'})" for name, kept in io_dict.items()) or "nothing"
        raise ValueError(
            f"{model}_module_path={path!r} with {model}_module_io={io!r} is not in the {model}'s io dict, which has "
            f"{found}: add {path!r} to {model}.forward_hook.{io} in the YAML, or change {model}_module_path"
        ) from None


@register_mid_level_loss(key="CUDLoss")
class CUDLoss(nn.Module):
    """`cudfast.CUDLoss` with the arguments of torchdistill's KDLoss: ``alpha * CE + beta * temperature^2 * KL``.

    Without calibration, with labels in every row and reduction "batchmean", it equals KDLoss. If targets are None,
    KDLoss drops beta and temperature^2, and this loss keeps them. Reduction "mean" is the same as "batchmean" here,
    whereas KDLoss also divides by the number of classes. The classes are the last axis.

    Args:
        student_module_path, teacher_module_path: the modules whose input or output are logits (..., V).
        student_module_io, teacher_module_io: "input" or "output".
        temperature: tau in [1e-4, 1e4]. Default 2.0.
        alpha: weight of cross-entropy, >= 0. Default 0.2 (paper).
        beta: weight of the distillation term, >= 0. Default None: 1 - alpha.
        reduction: "batchmean", "sum" or "none". Default "batchmean".
        calibration: None, `WClip` or `Projection`, or a mapping of WClip's fields, in YAML
            ``{budget: 0.5, margin: 0.7}``. Default ``WClip(budget=0.5, margin=0.7)`` (paper).
        options: all other arguments of `cudfast.CUDLoss`.

    Shapes:
        logits (..., V), targets (...) or None; returns ().

    Raises:
        TypeError: alpha is not a number. ValueError: a module path that is not in the io dict. Errors of
            `cudfast.CUDLoss` are raised as well.

    Example:
        >>> import torch
        >>> loss = CUDLoss("fc", "output", "classifier", "output", temperature=4.0, alpha=0.5)
        >>> student, teacher = torch.randn(8, 77, requires_grad=True), torch.randn(8, 77)
        >>> labels = torch.randint(77, (8,))
        >>> loss({"fc": {"output": student}}, {"classifier": {"output": teacher}}, labels).backward()
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float = 2.0,
        alpha: float = 0.2,
        beta: float | None = None,
        reduction: str = "batchmean",
        *,
        calibration: WClip | Projection | Mapping[str, float] | None = WClip(),  # noqa: B008 (frozen)
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha={alpha!r}: expected a number (YAML reads 1e-1 as text; write 0.1)")
        self.student = student_module_path, student_module_io
        self.teacher = teacher_module_path, teacher_module_io
        self.loss = losses.CUDLoss(
            temperature,
            kd_weight=1 - alpha if beta is None else beta,
            ce_weight=alpha,
            reduction=cast(Reduction, reduction),
            calibration=WClip(**calibration) if isinstance(calibration, Mapping) else calibration,
            **options,
        )

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Any]],
        teacher_io_dict: Mapping[str, Mapping[str, Any]],
        targets: Tensor | None = None,
    ) -> Tensor:
        """The loss of the tensors that both models' hooks stored."""
        student = logits_at(student_io_dict, *self.student, "student")
        teacher = logits_at(teacher_io_dict, *self.teacher, "teacher")
        return cast(Tensor, self.loss(student, teacher, targets))


@register_mid_level_loss(key="DUSLoss")
class DUSLoss(nn.Module):
    """`cudfast.DUSLoss` for torchdistill's TrainingBox, where the trained model is called the student.

    Args:
        student_module_path: the module whose input or output are logits (..., V).
        student_module_io: "input" or "output".
        options: arguments of `cudfast.DUSLoss`.

    Shapes:
        logits (..., V), targets (...); returns ().

    Raises:
        ValueError: a module path that is not in the io dict. Errors of `cudfast.DUSLoss` are raised as well.

    Example:
        >>> import torch
        >>> loss = DUSLoss("fc", "output", gamma=2.0)
        >>> logits = torch.randn(8, 77, requires_grad=True)
        >>> loss({"fc": {"output": logits}}, {}, torch.randint(77, (8,))).backward()
    """

    def __init__(self, student_module_path: str, student_module_io: str, **options: Any) -> None:
        super().__init__()
        self.student = student_module_path, student_module_io
        self.loss = losses.DUSLoss(**options)

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Any]],
        teacher_io_dict: Mapping[str, Mapping[str, Any]],
        targets: Tensor,
    ) -> Tensor:
        """The loss of the tensor that the model's hook stored; `teacher_io_dict` is not read."""
        return cast(Tensor, self.loss(logits_at(student_io_dict, *self.student, "student"), targets))
