"""The losses in the distillation trainers of TRL."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from ..linear import FusedLinearCUDLoss, fused_linear_cud_loss, fused_linear_dus_loss
from ..linear.checks import check_gathered
from ..losses import CUDLoss
from ..options import CUDOptions, DUSOptions
from .distillation import check_loss
from .require import require

_module: Any = require("trl.trainer.distillation_trainer", "trl")

Labels = Literal["sampled", "teacher"] | None


def cud_trainer(trainer: type[Any], loss: CUDLoss | FusedLinearCUDLoss, *, labels: Labels) -> type[Any]:
    """A subclass of one of TRL's distillation trainers whose divergence is this loss.

    `GKDTrainer` and `GOLDTrainer` take `CUDLoss`, of logits; `DistillationTrainer` takes `FusedLinearCUDLoss`, of
    hidden states, with the logit scale and soft cap that TRL reads from the models' configs. TRL determines the data,
    the generation, the tokens that are included and the divisor of the sum. The loss uses its own temperature and
    weights, not `beta` and `temperature` of TRL's config (`temperature` is still used for sampling).

    Args:
        trainer: `GKDTrainer`, `GOLDTrainer`, `DistillationTrainer`, or a subclass.
        loss: `CUDLoss` or `FusedLinearCUDLoss`; reduction="mean" and ignore_index=-100.
        labels: the label of a position. "sampled": the token that follows, from the dataset or from the model that
            generated the completion. "teacher": the teacher's top-1; its target is then never clipped. None: no label,
            and the loss is plain distillation.

    Returns:
        The subclass, with the trainer's arguments.

    Raises:
        TypeError: another trainer, or the other loss. ValueError: other labels; unlabeled_index=None with labels=None;
            options that trainers cannot honour; and, when the trainer is made, a label_smoothing_factor, and GOLD with
            use_uld_loss=True, which uses another loss. In training, RuntimeError for a last layer that FSDP2 has
            sharded, and ValueError for one that ZeRO-3 has partitioned.

    Example:
        >>> from trl.experimental.gkd import GKDTrainer
        >>> cud_trainer(GKDTrainer, CUDLoss(temperature=1.0), labels="sampled").__mro__[1].__name__
        'GKDTrainer'
    """
    if labels not in ("sampled", "teacher", None):
        raise ValueError(f"labels={labels!r}: expected 'sampled', 'teacher' or None")
    hidden = issubclass(trainer, _module.DistillationTrainer)
    if not hidden and not hasattr(trainer, "generalized_jsd_loss"):
        raise TypeError(f"trainer: expected GKDTrainer, GOLDTrainer or DistillationTrainer, got {trainer.__name__}")
    hint = "; FusedLinearCUDLoss, which takes hidden states, belongs to DistillationTrainer, and CUDLoss to the others"
    check_loss(loss, (FusedLinearCUDLoss,) if hidden else (CUDLoss,), hint)
    if labels is None and loss.options.unlabeled_index is None:
        raise ValueError("labels=None with unlabeled_index=None: give the loss an index for rows without label, as -1")
    return _of_hidden(trainer, loss, labels) if hidden else _of_logits(trainer, loss, labels)


def _refuse_smoothing(args: Any) -> None:
    """Raises for an argument that TRL's trainers ignore."""
    factor = args.label_smoothing_factor
    if factor:
        raise ValueError(
            f"TrainingArguments(label_smoothing_factor={factor}): expected 0, as TRL's trainers do not read it: pass "
            f"CUDLoss(label_smoothing={factor})"
        )


def _targets(labels: Labels, options: CUDOptions, sampled: Tensor, counts: Tensor, top1: partial[Tensor]) -> Tensor:
    """The label (B, S) of each position that is included; -100 elsewhere."""
    if labels is None:
        chosen = torch.full_like(sampled, options.unlabeled_index or 0)
    else:
        chosen = sampled if labels == "sampled" else top1()
    return torch.where(counts, chosen, options.ignore_index)


def _of_logits(trainer: Any, loss: Any, labels: Labels) -> type[Any]:
    class CUDTrainer(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _refuse_smoothing(self.args)
            if getattr(self, "use_uld_loss", False):
                raise ValueError(
                    "use_uld_loss=True compares sorted probabilities of two vocabularies and calls no other loss: set "
                    "use_uld_loss=False, with models of one tokenizer"
                )

        @staticmethod
        def generalized_jsd_loss(
            student_logits: Tensor,
            teacher_logits: Tensor,
            labels: Tensor,
            *,
            num_items_in_batch: float | Tensor | None = None,
            **_: Any,  # beta, temperature and reduction: those of the loss are used
        ) -> Tensor:
            """The loss of logits (B, S, V) and the tokens (B, S) that they predict, -100 at excluded positions."""
            classes = teacher_logits[..., : loss.options.num_classes]
            targets = _targets(choice, loss.options, labels, labels != -100, partial(classes.argmax, -1))
            value: Tensor = loss(student_logits, teacher_logits, targets, num_items=num_items_in_batch)
            return value

    choice = labels
    return CUDTrainer


def _of_hidden(trainer: Any, loss: Any, labels: Labels) -> type[Any]:
    class CUDTrainer(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _refuse_smoothing(self.args)

        def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
            """As TRL's method, which calls the divergence of its module."""
            divergence = partial(_divergence, loss, labels, inputs["completion_ids"])
            with mock.patch.object(_module, "_chunked_divergence_loss", divergence):
                return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    return CUDTrainer


def _divergence(
    loss: FusedLinearCUDLoss,
    labels: Labels,
    completion_ids: Tensor,
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    *,
    num_items_in_batch: float | Tensor | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces TRL's `_chunked_divergence_loss`, for hidden states (B, S, D) and tokens (B, S). Returns the loss, the
    sum of the student's entropies in nats (at temperature 1, from a separate product) and the number of tokens."""
    if isinstance(student_lm_head_weight, torch.distributed.tensor.DTensor):
        raise RuntimeError("the last layer is sharded by FSDP2, and FusedLinearCUDLoss needs it whole: use DDP instead")
    student = _layer("student", student_hidden_states, student_lm_head_weight, student_lm_head_bias)
    bias = None if teacher_lm_head_bias is None else teacher_lm_head_bias.detach()
    teacher = _layer("teacher", teacher_hidden_states, teacher_lm_head_weight.detach(), bias)
    linear = dataclasses.replace(
        loss.linear,
        scale=student_logit_scale,
        softcap=student_final_logit_softcapping,
        teacher_scale=teacher_logit_scale,
        teacher_softcap=teacher_final_logit_softcapping,
    )
    counts = completion_mask != 0
    sampled = completion_ids.to(counts.device)
    top1 = partial(_top1, *teacher, loss.options.num_classes, linear.bytes)
    value = fused_linear_cud_loss(
        student[0],
        student[1],
        _targets(labels, loss.options, sampled, counts, top1),
        loss.options,
        linear,
        student_bias=student[2],
        teacher_hidden=teacher[0],
        teacher_weight=teacher[1],
        teacher_bias=teacher[2],
        num_items=num_items_in_batch,
    )
    with torch.no_grad():
        _, stats = fused_linear_dus_loss(
            student[0],
            student[1],
            torch.where(counts, sampled, -100),
            DUSOptions(num_classes=loss.options.num_classes, backend=loss.options.backend),
            linear,
            head_bias=student[2],
            return_stats=True,
        )
    return value, stats.entropy[counts].sum(), counts.sum()


def _layer(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight (V, D) and bias (V,) in one dtype, that of the hidden states."""
    for part, given in (("weight", weight), ("bias", bias)):
        check_gathered(given, f"{name}: the {part} of its last layer", "use ZeRO-2, which leaves parameters whole")
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


@torch.no_grad()
def _top1(hidden: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int | None, memory: int) -> Tensor:
    """The class (B, S) of the largest logit of each hidden state; scales and soft caps do not change it."""
    rows = max(1, memory // (weight.shape[0] * weight.element_size()))
    parts = hidden.flatten(0, -2).split(rows)
    found = [F.linear(part, weight, bias)[:, :num_classes].argmax(-1) for part in parts]
    return torch.cat(found).view(hidden.shape[:-1])
