"""CUDLoss and DUSLoss: the losses as modules."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .functional import cud_loss, dus_loss
from .options import BackendName, CUDOptions, DUSOptions, LinearOptions, LossOptions, Reduction, Save, WClip
from .rows.shard import Shard
from .statistics import StudentStatistics, TeacherStatistics
from .targets.projection import Projection

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def changed(options: LossOptions | LinearOptions) -> str:
    """The fields that differ from their defaults, for repr."""
    fields = ((f.name, getattr(options, f.name), f.default) for f in dataclasses.fields(options))
    return ", ".join(f"{name}={value!r}" for name, value, default in fields if value != default)


class FocalLoss(nn.Module):
    """A loss with a focal scale: a number is an option; a tensor (V,), one value per class, is a persistent buffer."""

    alpha: Tensor | None
    _version = 2  # of the state dict; 1, that of cudfast 0.1.0, has no alpha

    def register_alpha(self, alpha: float | Tensor) -> float:
        """Registers the scale per class, if there is one, as a buffer. Returns the scale for the options."""
        per_class = alpha.detach() if isinstance(alpha, Tensor) and alpha.dim() > 0 else None
        self.register_buffer("alpha", per_class)
        return float(alpha) if per_class is None else 1.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._non_persistent_buffers_set.discard("alpha")  # as 0.1.0 pickled it

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if local_metadata.get("version", 1) < 2 and prefix + "alpha" in missing_keys:
            missing_keys.remove(prefix + "alpha")


class CUDLoss(nn.Module):
    """Student loss of Calibrated Uncertainty Distillation, Eq. 9, in one pass over both logits.

    For one row with student logits s, teacher logits t and label y::

        p  = softmax(t)                                    teacher at temperature 1
        q  = p with W-Clip applied when argmax t != y      calibrated target, Eq. 4-8
        q' = softmax(log q / temperature)                  tempered after the clip
        L  = kd_weight * temperature^2 * KL(q' || softmax(s / temperature)) + ce_weight * (-log softmax(s)[y])

    ``calibration=None`` is plain knowledge distillation with cross-entropy; ``kd_weight=0`` is cross-entropy.

    Args:
        temperature: tau in [1e-4, 1e4]. Default 2.0; 1, 2 and 4 are fastest.
        kd_weight, ce_weight: weights of the two terms, >= 0. Default 0.8 and 0.2 (paper).
        teacher_temperature: the teacher's own temperature in [1e-4, 1e4], of q' alone. Default None: tau.
        label_smoothing: of the cross-entropy term, in [0, 1], as in `torch.nn.CrossEntropyLoss`. Default 0.
        calibration: `WClip`, `Projection` (the exact target of Eq. 2, in place of q above), or None. Default
            ``WClip(budget=0.5, margin=0.7)`` (paper).
        ignore_index: label of rows that are excluded. Default -100.
        unlabeled_index: label that marks a row as unlabelled: it has the distillation term only, unclipped. Default -1.
        reduction: "mean", "sum" or "none". The mean divides the distillation term by the number of rows that are not
            excluded, and cross-entropy by the number of labelled rows (with `weight`, by the sums of their weights).
        num_classes: number of leading columns that are classes, for logits padded to unequal widths. Default: all.
        save: "auto", "state" or "gradient": the tensors saved for backward; see `cudfast.options.LossOptions`.
        inplace: write the gradient over the student logits.
        backend: "auto", "native" or "reference".
        check_finite: raise on rows whose loss is NaN, naming the first.
        process_group: the group across which the class dimension is sharded. Each rank has consecutive classes: logits
            are (..., V_r), where V_r may differ between ranks and may be 0. All other arguments, the loss and the
            statistics are the same on every rank. docs/distributed.md lists the messages between ranks (none has size
            V). Default None: one process.
        class_offset: the first class of this rank. Default None: the shards are in the order of the ranks.

    Shapes:
        student_logits (..., V), teacher_logits (..., V), labels (...), weight (...), temperature () or (...), bias (V,);
        returns () or (...) for reduction="none". The classes are the last axis, also of (N, C, C) logits; pass logits
        (N, C, L) of nn.CrossEntropyLoss as logits.movedim(1, -1). Logits float32, float64, bfloat16 or float16, also
        mixed; the loss is float32, or float64 if any logits that it uses are float64; the gradient has the student's
        dtype.

    Raises:
        TypeError, ValueError, RuntimeError: see `cudfast.functional.cud_loss`.

    Example:
        >>> import torch
        >>> loss = CUDLoss(temperature=2.0)
        >>> student, teacher = torch.randn(8, 77, requires_grad=True), torch.randn(8, 77)
        >>> labels = torch.randint(77, (8,))
        >>> loss(student, teacher, labels).backward()
        >>> value, stats = loss(student, teacher, labels, return_stats=True)
        >>> stats.teacher_confidence.shape
        torch.Size([8])
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
        inplace: bool = False,
        backend: BackendName = "auto",
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
        class_offset: int | None = None,
    ) -> None:
        super().__init__()
        self.shard = Shard.of(process_group, class_offset)
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
            inplace=inplace,
            backend=backend,
            check_finite=check_finite,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
        bias: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, StudentStatistics]:
        """The loss; arguments as in `cudfast.functional.cud_loss`."""
        return cud_loss(
            student_logits,
            teacher_logits,
            labels,
            self.options,
            weight=weight,
            temperature=temperature,
            bias=bias,
            num_items=num_items,
            return_stats=return_stats,
            shard=self.shard,
        )

    def extra_repr(self) -> str:
        return changed(self.options)


class DUSLoss(FocalLoss):
    """Teacher loss of Calibrated Uncertainty Distillation (difficulty-aware uncertainty shaping), Eq. 3.

    A drop-in replacement for `torch.nn.CrossEntropyLoss` to fine-tune the teacher. With p = softmax(logits)::

        L = ce_weight * (-log p_y) + focal_weight * (-alpha_y (1 - p_y)^gamma log p_y) - entropy_weight * w * H(p)
        w = 1{p_y < gate_threshold} + gate_scale * (1 - p_y)^gate_power

    ``focal_weight=0, entropy_weight=0`` is cross-entropy.

    Args:
        ce_weight, focal_weight: weights of the terms, >= 0. Default 1.0 and 1.0 (ours; the paper leaves them open).
        entropy_weight: weight of the gated entropy in nats, >= 0. Default 0.1 (paper).
        gamma: focal exponent, >= 0. Default 10 (paper).
        alpha: focal scale > 0: a number, or a tensor (V,), which is part of the state dict. Default 1.0 (paper).
        gate_threshold, gate_scale, gate_power: the gate. Default 0.5, 1.0, 1.0 (ours; the paper leaves them open).
        differentiate_gate: let the gradient flow through the gate's ramp. Default False (the gate is a weight).
        ignore_index, reduction, num_classes, save, inplace, backend, check_finite, process_group, class_offset: as in
            `CUDLoss`; alpha has one value for each of all classes.

    Shapes:
        logits (..., V), labels (...), weight (...); returns () or (...) for reduction="none".

    Raises:
        TypeError, ValueError, RuntimeError: see `cudfast.functional.dus_loss`.

    Example:
        >>> import torch
        >>> loss = DUSLoss()
        >>> logits = torch.randn(8, 77, requires_grad=True)
        >>> loss(logits, torch.randint(77, (8,))).backward()
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
        inplace: bool = False,
        backend: BackendName = "auto",
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
        class_offset: int | None = None,
    ) -> None:
        super().__init__()
        self.shard = Shard.of(process_group, class_offset)
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
            inplace=inplace,
            backend=backend,
            check_finite=check_finite,
        )

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, TeacherStatistics]:
        """The loss; arguments as in `cudfast.functional.dus_loss`."""
        return dus_loss(
            logits,
            labels,
            self.options,
            alpha=self.alpha,
            weight=weight,
            num_items=num_items,
            return_stats=return_stats,
            shard=self.shard,
        )

    def extra_repr(self) -> str:
        return changed(self.options)
