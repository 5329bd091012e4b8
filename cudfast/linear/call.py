"""A call of a loss from hidden states: its arguments checked and flattened, its teacher, its evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..distributed.dtensors import localized_heads
from ..distributed.group import telling
from ..distributed.heads import spread, spread_teacher
from ..options import LinearOptions, LossOptions, RowOptions
from ..rows.arguments import rows_of
from ..rows.call import Call, State
from ..rows.checks import (
    biased,
    check_call,
    check_mode,
    classes_of,
    constraints_of,
    labels_of,
    logits_of,
)
from ..rows.shard import Shard
from ..rows.tensors import is_dtensor
from ..statistics import Evaluated
from ..targets.projection import Projection
from .autograd import evaluate
from .checks import Layer, autocast, check_alike, check_frozen, hidden_of, layer_of
from .layers import Problem, problem

_TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias")


def check_options(options: LossOptions, kind: type, linear: LinearOptions) -> None:
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


def _biased(
    target: Tensor | None, layer: Layer | None, bias: Tensor, linear: LinearOptions
) -> tuple[Tensor | None, Layer | None]:
    """The teacher with a bias (V,) of its logits: a part of its layer's bias, which is multiplied by the scale."""
    if target is None or layer is None:
        return biased(target, bias), None
    if linear.teacher_softcap is not None:
        raise ValueError(
            "bias was given with a soft cap of the teacher: it is added to logits that are final, so pass "
            "teacher_logits instead of teacher_hidden"
        )
    weight, own = layer
    added = biased(weight.new_zeros(()).expand(weight.shape[:1]), bias) / linear.teacher_scale
    return target, (weight, added if own is None else own + added)


def distilled(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    options: RowOptions,
    linear: LinearOptions,
    needed: str,
    *,
    student_bias: Tensor | None,
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    teacher_logits: Tensor | None,
    weight: Tensor | None,
    temperature: float | Tensor | None,
    num_items: float | Tensor | None,
    shard: Shard | None,
    sequence_sharded: bool,
    statistics: bool,
    term_weights: Mapping[str, float | Tensor] | None = None,
    per_class: Mapping[str, Tensor] | None = None,
    smoothing: float | Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Evaluated]:
    """The loss of the options' terms, and what its statistics are computed from.

    needed: when the teacher may be left out, in words for an error; "": a teacher is checked, but not read.
    """
    teacher_hidden, teacher_weight, teacher_bias = teacher
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
        given = (teacher_hidden, teacher_weight, teacher_bias)
        target, layer = _teacher(given, teacher_logits, linear, hidden, needed, shard, sequence_sharded)
        if bias is not None:
            target, layer = _biased(target, layer, bias, linear)
        other, other_name = (target, "teacher_logits") if layer is None else (layer[0].t(), "teacher_weight")
        classes = classes_of(student[0].t(), other, options.num_classes, ("student_weight", other_name), shard)
        flat_labels = labels_of(labels, hidden, "student_hidden")
        constraints = None
        if isinstance(options.calibration, Projection) and flat_labels is not None:
            if shard is not None:
                raise ValueError(
                    "calibration=Projection(...) over a process group needs this rank's logits all at once: use CUDLoss"
                )
            constraints = constraints_of(options.calibration, hidden, classes, "student_weight")
        rows, options, scales, shard = rows_of(
            hidden,
            "student_hidden",
            target if needed else None,
            flat_labels,
            options,
            classes,
            shard,
            weight=weight,
            num_items=num_items,
            temperature=temperature,
            term_weights=term_weights,
            per_class=per_class,
            smoothing=smoothing,
            constraints=constraints,
        )
    loss, state = evaluated(problem(rows, student, layer if needed else None, options, linear, shard), statistics)
    return loss, Evaluated(rows, options, state, scales)


def evaluated(p: Problem, statistics: bool) -> tuple[Tensor, State]:
    check_call(p.rows, "hidden", Call(p.options, statistics, None))
    for head in (p.student, p.teacher):  # not p.heads: torch 2.8 cannot trace properties of named tuples
        if head is not None:
            check_mode(head.weight, head.bias)
    loss, state = evaluate(p, statistics=statistics)
    return (loss.reshape(p.rows.logits.shape[:-1]) if p.options.reduction == "none" else loss), state
