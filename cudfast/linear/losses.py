"""FusedLinearCUDLoss and FusedLinearDUSLoss: the losses of hidden states as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..losses import FocalLoss, changed
from ..options import BackendName, CUDOptions, DUSOptions, LinearOptions, Reduction, Save, WClip
from ..rows.shard import Shard
from ..statistics import StudentStatistics, TeacherStatistics
from ..targets.projection import Projection
from .functional import fused_linear_cud_loss, fused_linear_dus_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedLinearCUDLoss(nn.Module):
    """`CUDLoss` (Eq. 9) from the last hidden states and the class weights, without storing the logits of all rows.

    With s = student_hidden @ student_weight.T + student_bias and t from the teacher in the same way, the loss and the
    gradients of the student's hidden states, weight and bias are those of ``CUDLoss`` on s and t. Chunks of rows (and,
    for very large V, tiles of classes) are processed in buffers that fit `memory_budget`; ignored rows are skipped.

    Args:
        temperature, kd_weight, ce_weight, calibration, teacher_temperature, label_smoothing, ignore_index,
            unlabeled_index, reduction, num_classes, backend, check_finite: as in `CUDLoss`.
        save: "gradient": the gradients are computed in forward, with four products. "state": in backward, with six
            products; only the row states are saved. "auto": "gradient" for scalar reductions, "state" for
            reduction="none" and for float16.
        memory_budget: bytes that a call may allocate besides the gradients that it returns; "auto": 256 MiB.
        accumulate_dtype: dtype in which weight gradients are summed over chunks, if wider than the weight. Default
            float32.
        student_logit_scale, teacher_logit_scale: factors of the logits, > 0 (Cohere). Default 1.0.
        student_logit_softcap, teacher_logit_softcap: c of c tanh(z / c), > 0 (Gemma); None: no cap. Default None.
        process_group, class_offset: as in `CUDLoss`, for classes that are sharded over ranks: weights (V_r, D), biases
            and teacher_logits are this rank's shards. The gradient of the hidden states is already summed over the
            ranks: do not sum it again. Always six products. `Projection` raises an error.
        sequence_sharded: with process_group, hidden states of both sides are (S_r, ..., D), sharded along the first
            axis over the ranks in their order. They are gathered, and each rank gets the gradient of its own part.
            Labels are not sharded.

    Shapes:
        student_hidden (..., Ds), student_weight (V, Ds), labels (...), student_bias (V,), teacher_hidden (..., Dt),
        teacher_weight (V, Dt), teacher_bias (V,) or teacher_logits (..., V), weight (...), temperature () or (...),
        bias (V,); returns () or (...) for reduction="none".

    Raises:
        TypeError, ValueError, RuntimeError: see `cudfast.linear.fused_linear_cud_loss`.

    Example:
        >>> loss = FusedLinearCUDLoss(temperature=2.0)
        >>> student, teacher = nn.Linear(16, 30522), nn.Linear(32, 30522).requires_grad_(False)
        >>> hidden, labels = torch.randn(8, 16), torch.randint(30522, (8,))
        >>> value = loss(
        ...     hidden, student.weight, labels, student_bias=student.bias,
        ...     teacher_hidden=torch.randn(8, 32), teacher_weight=teacher.weight, teacher_bias=teacher.bias,
        ... )
        >>> value.backward()
        >>> student.weight.grad.shape
        torch.Size([30522, 16])
    """

    def __init__(
        self,
        temperature: float = 2.0,
        kd_weight: float = 0.8,
        ce_weight: float = 0.2,
        *,
        calibration: WClip | Projection | None = WClip(),  # noqa: B008 (frozen)
        teacher_temperature: float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        unlabeled_index: int | None = -1,
        reduction: Reduction = "mean",
        num_classes: int | None = None,
        save: Save = "auto",
        backend: BackendName = "auto",
        check_finite: bool = False,
        memory_budget: int | Literal["auto"] = "auto",
        accumulate_dtype: torch.dtype = torch.float32,
        student_logit_scale: float = 1.0,
        student_logit_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_logit_softcap: float | None = None,
        process_group: ProcessGroup | None = None,
        class_offset: int | None = None,
        sequence_sharded: bool = False,
    ) -> None:
        super().__init__()
        self.shard = Shard.of(process_group, class_offset)
        self.sequence_sharded = sequence_sharded
        self.options = CUDOptions(
            temperature=temperature,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            calibration=calibration,
            teacher_temperature=teacher_temperature,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            unlabeled_index=unlabeled_index,
            reduction=reduction,
            num_classes=num_classes,
            save=save,
            backend=backend,
            check_finite=check_finite,
        )
        self.linear = LinearOptions(
            memory_budget=memory_budget,
            accumulate_dtype=accumulate_dtype,
            scale=student_logit_scale,
            softcap=student_logit_softcap,
            teacher_scale=teacher_logit_scale,
            teacher_softcap=teacher_logit_softcap,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
        bias: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, StudentStatistics]:
        """The loss; arguments as in `cudfast.linear.fused_linear_cud_loss`."""
        return fused_linear_cud_loss(
            student_hidden,
            student_weight,
            labels,
            self.options,
            self.linear,
            student_bias=student_bias,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            teacher_logits=teacher_logits,
            weight=weight,
            temperature=temperature,
            bias=bias,
            num_items=num_items,
            return_stats=return_stats,
            shard=self.shard,
            sequence_sharded=self.sequence_sharded,
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (changed(self.options), changed(self.linear))))


class FusedLinearDUSLoss(FocalLoss):
    """`DUSLoss` (Eq. 3) from the last hidden states and the class weights of the teacher that is fine-tuned.

    Args:
        ce_weight, focal_weight, entropy_weight, gamma, alpha, gate_threshold, gate_scale, gate_power,
            differentiate_gate, ignore_index, reduction, num_classes, backend, check_finite: as in `DUSLoss`.
        save, memory_budget, accumulate_dtype: as in `FusedLinearCUDLoss`.
        logit_scale: factor of the logits, > 0. Default 1.0.
        logit_softcap: c of c tanh(z / c), > 0; None: no cap. Default None.
        process_group, class_offset, sequence_sharded: as in `FusedLinearCUDLoss`.

    Shapes:
        hidden (..., D), head_weight (V, D), labels (...), head_bias (V,), weight (...); returns () or (...) for
        reduction="none".

    Raises:
        TypeError, ValueError, RuntimeError: see `cudfast.linear.fused_linear_dus_loss`.

    Example:
        >>> loss, layer = FusedLinearDUSLoss(), nn.Linear(16, 30522, bias=False)
        >>> loss(torch.randn(8, 16), layer.weight, torch.randint(30522, (8,))).backward()
        >>> layer.weight.grad.shape
        torch.Size([30522, 16])
    """

    def __init__(
        self,
        ce_weight: float = 1.0,
        focal_weight: float = 1.0,
        entropy_weight: float = 0.1,
        *,
        gamma: float = 10.0,
        alpha: float | Tensor = 1.0,
        gate_threshold: float = 0.5,
        gate_scale: float = 1.0,
        gate_power: float = 1.0,
        differentiate_gate: bool = False,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        num_classes: int | None = None,
        save: Save = "auto",
        backend: BackendName = "auto",
        check_finite: bool = False,
        memory_budget: int | Literal["auto"] = "auto",
        accumulate_dtype: torch.dtype = torch.float32,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        process_group: ProcessGroup | None = None,
        class_offset: int | None = None,
        sequence_sharded: bool = False,
    ) -> None:
        super().__init__()
        self.shard = Shard.of(process_group, class_offset)
        self.sequence_sharded = sequence_sharded
        self.options = DUSOptions(
            ce_weight=ce_weight,
            focal_weight=focal_weight,
            entropy_weight=entropy_weight,
            gamma=gamma,
            alpha=self.register_alpha(alpha),
            gate_threshold=gate_threshold,
            gate_scale=gate_scale,
            gate_power=gate_power,
            differentiate_gate=differentiate_gate,
            ignore_index=ignore_index,
            reduction=reduction,
            num_classes=num_classes,
            save=save,
            backend=backend,
            check_finite=check_finite,
        )
        self.linear = LinearOptions(
            memory_budget=memory_budget, accumulate_dtype=accumulate_dtype, scale=logit_scale, softcap=logit_softcap
        )

    def forward(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        *,
        head_bias: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, TeacherStatistics]:
        """The loss; arguments as in `cudfast.linear.fused_linear_dus_loss`."""
        return fused_linear_dus_loss(
            hidden,
            head_weight,
            labels,
            self.options,
            self.linear,
            head_bias=head_bias,
            alpha=self.alpha,
            weight=weight,
            num_items=num_items,
            return_stats=return_stats,
            shard=self.shard,
            sequence_sharded=self.sequence_sharded,
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (changed(self.options), changed(self.linear))))
