"""FusedLinearLoss: a sum of terms, of hidden states, as a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..composed import TermLoss, options_of
from ..options import BackendName, LinearOptions, Reduction, Save, WClip
from ..rows.shard import Shard
from ..statistics import RowStatistics
from ..targets.projection import Projection
from ..terms import Terms
from .functional import fused_linear_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedLinearLoss(TermLoss):
    """`Loss` from the last hidden states and the class weights, without storing the logits of all rows.

    Args:
        terms, calibration, ignore_index, unlabeled_index, values, reduction, num_classes, backend, check_finite: as in `Loss`.
        save, memory_budget, accumulate_dtype, student_logit_scale, student_logit_softcap, teacher_logit_scale,
            teacher_logit_softcap, process_group, class_offset, sequence_sharded: as in `FusedLinearCUDLoss`.

    Shapes:
        student_hidden (..., Ds), student_weight (V, Ds), labels (...), student_bias (V,), teacher_hidden (..., Dt),
        teacher_weight (V, Dt), teacher_bias (V,) or teacher_logits (..., V), weight (...), temperature () or (...),
        smoothing () or (...), bias (V,); returns () or (...) for reduction="none".

    Raises:
        TypeError, ValueError, RuntimeError: see `cudfast.Loss` and `cudfast.linear.fused_linear_loss`.

    Example:
        >>> import torch
        >>> from cudfast import CrossEntropy, FusedLinearLoss, ZLoss
        >>> loss = FusedLinearLoss(CrossEntropy() + 1e-4 * ZLoss())
        >>> hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(30522, 16)
        >>> loss(hidden, weight, torch.randint(30522, (8,))).backward()
        >>> hidden.grad.shape
        torch.Size([8, 16])
    """

    def __init__(
        self,
        terms: Terms,
        *,
        calibration: WClip | Projection | None = None,
        ignore_index: int = -100,
        unlabeled_index: int | Literal["auto"] | None = "auto",
        values: Sequence[str] = (),
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
        self.set_options(
            *options_of(
                terms,
                calibration,
                unlabeled_index,
                values=values,
                ignore_index=ignore_index,
                reduction=reduction,
                num_classes=num_classes,
                save=save,
                backend=backend,
                check_finite=check_finite,
            )
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
        term_weights: Mapping[str, float | Tensor] | None = None,
        smoothing: float | Tensor | None = None,
        bias: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss; arguments as in `cudfast.linear.fused_linear_loss`."""
        return fused_linear_loss(
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
            term_weights=term_weights,
            smoothing=smoothing,
            bias=bias,
            per_class=self.per_class,
            num_items=num_items,
            return_stats=return_stats,
            shard=self.shard,
            sequence_sharded=self.sequence_sharded,
        )
