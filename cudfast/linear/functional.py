"""The losses from hidden states as functions: they check and flatten their arguments."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ..distributed.dtensors import localized_heads
from ..distributed.group import telling
from ..distributed.heads import spread, spread_teacher
from ..options import CUDOptions, DUSOptions, LinearOptions
from ..rows.call import Call, Rows, State
from ..rows.checks import (
    alpha_of,
    check_alpha,
    check_call,
    check_mode,
    classes_of,
    coefficients_of,
    constraints_of,
    labels_of,
    logits_of,
    num_items_of,
    temperature_of,
    weight_of,
)
from ..rows.shard import Shard
from ..rows.tensors import is_dtensor
from ..statistics import StudentStatistics, TeacherStatistics, student_statistics, teacher_statistics
from ..targets.projection import Projection
from .autograd import evaluate
from .checks import Layer, autocast, check_alike, check_frozen, hidden_of, layer_of
from .layers import Problem, problem

_TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias")


def _options(options: CUDOptions | DUSOptions, kind: type, linear: LinearOptions) -> None:
    if not isinstance(options, kind):
        raise TypeError(f"options: expected {kind.__name__}, got {type(options).__name__}")
    if not isinstance(linear, LinearOptions):
        raise TypeError(f"linear: expected LinearOptions, got {type(linear).__name__}")
    if options.inplace:
        raise ValueError("inplace=True is not supported here: there are no logits to overwrite; leave it out")
    if options.save == "gradient" and options.reduction == "none":
        raise ValueError(
            "save='gradient' cannot be combined with reduction='none': gradients of the weights are sums over rows, "
            "whose upstream gradients are known only in backward; use save='auto' or 'state'"
        )


def _teacher(
    given: tuple[object, object, object],
    logits: object,
    linear: LinearOptions,
    hidden: Tensor,
    needed: str,
    shard: Shard | None,
    sequence_sharded: bool,
) -> tuple[Tensor | None, Layer | None]:
    """The teacher's hidden states and layer, or its logits; needed: the reason why a teacher is required, or ""."""
    check_frozen(dict(zip(_TEACHER, given)))
    check_frozen({"teacher_logits": logits})
    if logits is not None:
        for name, value in zip(_TEACHER, given):
            if value is not None:
                raise TypeError(f"teacher_logits and {name} were both given: expected one of them")
        if linear.teacher_scale != 1 or linear.teacher_softcap is not None:
            raise ValueError(
                "teacher_logits were given with a teacher scale or soft cap, which belong to teacher_hidden and "
                "teacher_weight: pass logits that are final, and leave both out"
            )
        found = logits_of(logits, "teacher_logits", empty=shard is not None)
        check_alike(hidden, found, ("student_hidden", "teacher_logits"))
        return found, None
    if given[0] is None and given[1] is None:
        if needed:
            raise TypeError(
                "no teacher: expected teacher_hidden (..., Dt) and teacher_weight (V, Dt), or teacher_logits (..., V), "
                f"{needed}"
            )
        return None, None
    for name, value in zip(_TEACHER[:2], given[:2]):
        if value is None:
            raise TypeError(f"{name} is None: expected teacher_hidden and teacher_weight together, or teacher_logits")
    found = spread_teacher(hidden_of(autocast(given[0]), "teacher_hidden"), shard, sequence_sharded)
    check_alike(hidden, found, ("student_hidden", "teacher_hidden"))
    layer = layer_of(
        autocast(given[1]),
        autocast(given[2]),
        found,
        ("teacher_weight", "teacher_bias", "teacher_hidden"),
        empty=shard is not None,
    )
    return found, layer


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
    _options(options, CUDOptions, linear)
    if is_dtensor(student_weight):
        hiddens, layers, vectors, shard, sequence_sharded = localized_heads(
            {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden},
            {
                "student_weight": student_weight,
                "student_bias": student_bias,
                "teacher_weight": teacher_weight,
                "teacher_bias": teacher_bias,
            },
            (labels, weight, temperature),
            shard,
        )
        (student_hidden, teacher_hidden), (labels, weight, temperature) = hiddens, vectors
        student_weight, student_bias, teacher_weight, teacher_bias = layers
    with telling(shard):
        hidden = spread(hidden_of(autocast(student_hidden), "student_hidden"), shard, sequence_sharded)
        names = ("student_weight", "student_bias", "student_hidden")
        student = layer_of(autocast(student_weight), autocast(student_bias), hidden, names, empty=shard is not None)
        plain = options.kd_weight == 0 and not return_stats
        needed = "" if plain else "unless kd_weight=0 and return_stats=False"
        given = (teacher_hidden, teacher_weight, teacher_bias)
        target, teacher = _teacher(given, teacher_logits, linear, hidden, needed, shard, sequence_sharded)
        other, other_name = (target, "teacher_logits") if teacher is None else (teacher[0].t(), "teacher_weight")
        classes = classes_of(student[0].t(), other, options.num_classes, ("student_weight", other_name), shard)
        flat_labels = labels_of(labels, hidden, "student_hidden")
        scalar, per_row = temperature_of(temperature, options.temperature, hidden, "student_hidden")
        constraints = None
        if isinstance(options.calibration, Projection) and flat_labels is not None and not plain:
            if shard is not None:
                raise ValueError(
                    "calibration=Projection(...) over a process group needs this rank's logits all at once: use CUDLoss"
                )
            constraints = constraints_of(options.calibration, hidden, classes, "student_weight")
        rows = Rows(
            hidden,
            None if plain else target,
            flat_labels,
            weight_of(weight, hidden, "student_hidden"),
            None if plain else per_row,
            None,
            1.0 if plain else scalar,
            num_items_of(num_items),
            classes,
            constraints,
        )
        made = options.alone if plain else options.rows
    found = _evaluated(problem(rows, student, None if plain else teacher, made, linear, shard), return_stats)
    if not return_stats:
        return found[0]
    return found[0], student_statistics(rows, options.rows, found[1])


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
    _options(options, DUSOptions, linear)
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
        scales = {}
        if alpha is not None and options.focal_weight > 0:
            scales["focal"], shard = alpha_of(alpha, flat_labels, classes, shard)
            check_alpha(scales["focal"], hidden)
        rows = Rows(
            hidden,
            None,
            flat_labels,
            weight_of(weight, hidden, "hidden"),
            None,
            coefficients_of(options.rows.terms, None, scales, hidden, "hidden"),
            1.0,
            num_items_of(num_items),
            classes,
        )
    loss, state = _evaluated(problem(rows, layer, None, options.rows, linear, shard), return_stats)
    if not return_stats:
        return loss
    return loss, teacher_statistics(rows, options.rows, state)


def _evaluated(p: Problem, statistics: bool) -> tuple[Tensor, State]:
    check_call(p.rows, "hidden", Call(p.options, statistics, None))
    for head in (p.student, p.teacher):  # not p.heads: torch 2.8 cannot trace properties of named tuples
        if head is not None:
            check_mode(head.weight, head.bias)
    loss, state = evaluate(p, statistics=statistics)
    return (loss.reshape(p.rows.logits.shape[:-1]) if p.options.reduction == "none" else loss), state
