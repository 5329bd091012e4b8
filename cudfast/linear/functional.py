"""The losses from hidden states as functions: they check and flatten their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

from torch import Tensor

from ..distributed.dtensors import localized_heads
from ..distributed.group import telling
from ..distributed.heads import spread
from ..options import CUDOptions, DUSOptions, LinearOptions, RowOptions
from ..rows.arguments import rows_of
from ..rows.checks import (
    classes_of,
    labels_of,
)
from ..rows.shard import Shard
from ..rows.tensors import is_dtensor
from ..statistics import (
    Evaluated,
    RowStatistics,
    StudentStatistics,
    TeacherStatistics,
    row_statistics,
    student_statistics,
    teacher_statistics,
)
from .call import check_options, distilled, evaluated
from .checks import autocast, hidden_of, layer_of
from .layers import problem


@overload
def fused_linear_cud_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = ...,
    options: CUDOptions = ...,
    linear: LinearOptions = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_hidden: Tensor | None = ...,
    teacher_weight: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    teacher_logits: Tensor | None = ...,
    weight: Tensor | None = ...,
    temperature: float | Tensor | None = ...,
    bias: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    shard: Shard | None = ...,
    sequence_sharded: bool = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def fused_linear_cud_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = ...,
    options: CUDOptions = ...,
    linear: LinearOptions = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_hidden: Tensor | None = ...,
    teacher_weight: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    teacher_logits: Tensor | None = ...,
    weight: Tensor | None = ...,
    temperature: float | Tensor | None = ...,
    bias: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    shard: Shard | None = ...,
    sequence_sharded: bool = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, StudentStatistics]: ...


def fused_linear_cud_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None = None,
    options: CUDOptions = CUDOptions(),  # noqa: B008 (frozen)
    linear: LinearOptions = LinearOptions(),  # noqa: B008 (frozen)
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
    shard: Shard | None = None,
    sequence_sharded: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, StudentStatistics]:
    """`cud_loss` (Eq. 9) of logits that are computed in tiles. See `cudfast.FusedLinearCUDLoss`.

    Args:
        student_hidden: (..., Ds) float32, float64, bfloat16 or float16.
        student_weight: (V, Ds) in the same dtype (under torch.autocast both are cast as a linear layer casts them).
        labels: (...) integer class indices, `ignore_index` or `unlabeled_index`; None: every row is unlabelled.
        options: the settings of the loss; see `CUDOptions`. `inplace` is not supported.
        linear: logit scales and soft caps, and the memory budget; see `LinearOptions`.
        student_bias: (V,), the student's dtype.
        teacher_hidden: (..., Dt) in any of these dtypes; like all teacher tensors, it must not require grad.
        teacher_weight: (V, Dt), the dtype of teacher_hidden.
        teacher_bias: (V,), the same.
        teacher_logits: (..., V) instead of these three. If kd_weight is 0, the teacher may be omitted.
        weight: (...) one weight per row, as in `cud_loss`.
        temperature: overrides options.temperature, as in `cud_loss`.
        bias: (V,) added to the teacher's logits at temperature 1, as in `cud_loss`. It becomes a part of teacher_bias, so
            it costs no memory with teacher_hidden; it cannot be combined with a soft cap of the teacher.
        num_items: replaces both divisors, as in `cud_loss`.
        shard: `cudfast.distributed.Shard.of(group)` if the classes are sharded over a process group; weights, biases
            and teacher_logits are then this rank's shards. See `cudfast.FusedLinearCUDLoss`.
        sequence_sharded: with a shard, hidden states are (S_r, ..., D), sharded along their first axis over its ranks.
        return_stats: also return `StudentStatistics` of every row.

    Returns:
        The loss: () or, for reduction="none", (...); float32, or float64 if any inputs that the loss uses are float64.
        With return_stats, a pair. Differentiable in the student's hidden states, weight and bias.

    Raises:
        TypeError, ValueError, RuntimeError: as `cud_loss`; ValueError for a memory budget that is too small, which
            names the smallest that works.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
        >>> teacher = {"teacher_hidden": torch.randn(4, 16), "teacher_weight": torch.randn(1000, 16)}
        >>> loss = fused_linear_cud_loss(hidden, weight, torch.tensor([1, 2, -1, -100]), **teacher)
        >>> loss.backward()
        >>> hidden.grad[3].abs().sum().item(), weight.grad.shape  # the ignored row
        (0.0, torch.Size([1000, 8]))
    """
    check_options(options, CUDOptions, linear)
    plain = options.kd_weight == 0 and not return_stats
    needed = "" if plain else "unless kd_weight=0 and return_stats=False"
    loss, found = distilled(
        student_hidden,
        student_weight,
        labels,
        options.alone if plain else options.rows,
        linear,
        needed,
        student_bias=student_bias,
        teacher=(teacher_hidden, teacher_weight, teacher_bias),
        teacher_logits=teacher_logits,
        weight=weight,
        temperature=temperature,
        num_items=num_items,
        shard=shard,
        sequence_sharded=sequence_sharded,
        statistics=return_stats,
        bias=bias,
    )
    return (loss, student_statistics(found)) if return_stats else loss


def fused_linear_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    options: RowOptions,
    linear: LinearOptions = LinearOptions(),  # noqa: B008 (frozen)
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
    per_class: Mapping[str, Tensor] | None = None,
    num_items: float | Tensor | None = None,
    shard: Shard | None = None,
    sequence_sharded: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """`composed_loss` of logits that are computed in tiles. See `cudfast.FusedLinearLoss`, whose `options` these are.

    Args:
        student_hidden: (..., Ds), as in `fused_linear_cud_loss`.
        student_weight: (V, Ds), as in `fused_linear_cud_loss`.
        labels: (...); None: every row is unlabelled.
        options: `FusedLinearLoss(...).options`.
        linear: logit scales and soft caps, and the memory budget; see `LinearOptions`.
        student_bias: (V,).
        teacher_hidden: (..., Dt). The teacher may be left out if no term distils.
        teacher_weight: (V, Dt).
        teacher_bias: (V,).
        teacher_logits: (..., V) instead of these three.
        weight: (...) one weight per row.
        temperature: of the distillation terms.
        term_weights: as in `cudfast.functional.composed_loss`.
        smoothing: as in `cudfast.functional.composed_loss`.
        bias: as in `fused_linear_cud_loss`.
        per_class: as in `cudfast.functional.composed_loss`.
        num_items: replaces every divisor.
        shard: as in `fused_linear_cud_loss`.
        sequence_sharded: as in `fused_linear_cud_loss`.
        return_stats: also return `RowStatistics`.

    Returns:
        The loss: () or, for reduction="none", (...). With return_stats, a pair.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_linear_cud_loss`.

    Example:
        >>> import torch
        >>> from cudfast import CrossEntropy, FusedLinearLoss
        >>> options = FusedLinearLoss(CrossEntropy()).options
        >>> fused_linear_loss(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([0, 1]), options).item()
        2.079441547393799
    """
    check_options(options, RowOptions, linear)
    if labels is None and not options.whole:
        raise TypeError("labels is None: every term of this loss needs a label")
    loss, found = distilled(
        student_hidden,
        student_weight,
        labels,
        options,
        linear,
        "unless no term distils" if options.distils else "",
        student_bias=student_bias,
        teacher=(teacher_hidden, teacher_weight, teacher_bias),
        teacher_logits=teacher_logits,
        weight=weight,
        temperature=temperature,
        num_items=num_items,
        shard=shard,
        sequence_sharded=sequence_sharded,
        statistics=return_stats,
        term_weights=term_weights,
        per_class=per_class,
        smoothing=smoothing,
        bias=bias,
    )
    return (loss, row_statistics(found)) if return_stats else loss


@overload
def fused_linear_dus_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    options: DUSOptions = ...,
    linear: LinearOptions = ...,
    *,
    head_bias: Tensor | None = ...,
    alpha: Tensor | None = ...,
    weight: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    shard: Shard | None = ...,
    sequence_sharded: bool = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def fused_linear_dus_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    options: DUSOptions = ...,
    linear: LinearOptions = ...,
    *,
    head_bias: Tensor | None = ...,
    alpha: Tensor | None = ...,
    weight: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    shard: Shard | None = ...,
    sequence_sharded: bool = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, TeacherStatistics]: ...


def fused_linear_dus_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    options: DUSOptions = DUSOptions(),  # noqa: B008 (frozen)
    linear: LinearOptions = LinearOptions(),  # noqa: B008 (frozen)
    *,
    head_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    shard: Shard | None = None,
    sequence_sharded: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TeacherStatistics]:
    """`dus_loss` (Eq. 3) of logits that are computed in tiles. See `cudfast.FusedLinearDUSLoss`.

    Args:
        hidden: (..., D) float32, float64, bfloat16 or float16.
        head_weight: (V, D) of the classes, in the same dtype.
        labels: (...) integer class indices, or `ignore_index`.
        options: the settings of the loss; see `DUSOptions`. `inplace` is not supported.
        linear: logit scale and soft cap, and the memory budget; see `LinearOptions`.
        head_bias: (V,), the same dtype.
        alpha: (V,) focal scale per class, > 0; overrides options.alpha.
        weight: (...) one weight per row, finite and >= 0.
        num_items: as in `dus_loss`.
        shard: as in `fused_linear_cud_loss`; alpha has one value for each of all classes.
        sequence_sharded: as in `fused_linear_cud_loss`.
        return_stats: also return `TeacherStatistics` of every row.

    Returns:
        The loss: () or, for reduction="none", (...). With return_stats, a pair.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_linear_cud_loss`.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(4, 8), torch.randn(1000, 8, requires_grad=True)
        >>> fused_linear_dus_loss(hidden, weight, torch.tensor([1, 2, 3, -100])).backward()
        >>> weight.grad.shape
        torch.Size([1000, 8])
    """
    check_options(options, DUSOptions, linear)
    if is_dtensor(head_weight):
        (hidden,), layers, (labels, weight), shard, sequence_sharded = localized_heads(
            {"hidden": hidden}, {"head_weight": head_weight, "head_bias": head_bias}, (labels, weight), shard
        )
        head_weight, head_bias = layers
    with telling(shard):
        if labels is None:
            raise TypeError("labels is None: the teacher loss needs a label (or ignore_index) for every row")
        hidden = spread(hidden_of(autocast(hidden), "hidden"), shard, sequence_sharded)
        layer = layer_of(
            autocast(head_weight),
            autocast(head_bias),
            hidden,
            ("head_weight", "head_bias", "hidden"),
            empty=shard is not None,
        )
        classes = classes_of(layer[0].t(), None, options.num_classes, ("head_weight", ""), shard)
        flat_labels = labels_of(labels, hidden, "hidden")
        assert flat_labels is not None
        rows, row_options, scales, shard = rows_of(
            hidden,
            "hidden",
            None,
            flat_labels,
            options.rows,
            classes,
            shard,
            weight=weight,
            num_items=num_items,
            per_class=options.per_class(alpha),
        )
    loss, state = evaluated(problem(rows, layer, None, row_options, linear, shard), return_stats)
    if not return_stats:
        return loss
    return loss, teacher_statistics(Evaluated(rows, row_options, state, scales))
