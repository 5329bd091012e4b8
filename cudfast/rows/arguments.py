"""The rows of a call from its arguments, for losses of logits and of hidden states."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..options import RowOptions
from ..terms.term import UNIFORM
from .call import Constraints, Rows, compute_dtype
from .checks import num_items_of, temperature_of, weight_of
from .coefficients import Scales, coefficients_of, per_class_of, scales_of, shares_of, smoothing_of
from .shard import Shard


def rows_of(
    logits: Tensor,
    name: str,
    target: Tensor | None,
    labels: Tensor | None,
    options: RowOptions,
    classes: int,
    shard: Shard | None,
    *,
    weight: Tensor | None,
    num_items: float | Tensor | None,
    temperature: float | Tensor | None = None,
    term_weights: Mapping[str, float | Tensor] | None = None,
    per_class: Mapping[str, Tensor] | None = None,
    smoothing: float | Tensor | None = None,
    constraints: Constraints | None = None,
) -> tuple[Rows, RowOptions, Scales, Shard | None]:
    """The rows, the options for them, the factors of pieces, and the shard with the number of classes.

    Args:
        logits: (..., V), or hidden states (..., D).
        name: the caller's name of the logits, for errors.
        target: logits or hidden states of the teacher; None: no term reads a teacher, nor a temperature.
        labels: (N,) int64, checked; None: no row has a label.
        options: the terms.
        classes: V.
        shard: if other ranks hold more classes.
        weight: as in `cudfast.functional.composed_loss`, and so are the next five.
        num_items: see weight.
        temperature: see weight.
        term_weights: see weight.
        per_class: see weight.
        smoothing: see weight.
        constraints: of the target.
    """
    scalar, per_row = temperature_of(temperature, options.temperature, logits, name)
    smooth = smoothing_of(smoothing, options, logits, name)
    if smooth is not None and options.smoothed is not None:
        options = options.smoothed
    of_classes, shard = per_class_of(options, per_class, labels, logits, classes, shard)
    scales = scales_of(options, of_classes, smooth)
    rows = Rows(
        logits,
        target,
        labels,
        weight_of(weight, logits, name),
        None if target is None else per_row,
        None,
        1.0 if target is None else scalar,
        num_items_of(num_items),
        classes,
        constraints,
    )
    shares = shares_of(rows, options, of_classes)
    rows = rows._replace(coefficients=coefficients_of(options, term_weights, scales, shares, logits, name))
    for found in of_classes:
        if found.field == "class_weight" and options.sums & UNIFORM:
            c = found.values.to(compute_dtype(rows))
            rows = rows._replace(class_weight=torch.where((c >= 0) & (c < torch.inf), c, torch.nan))
    return rows, options, scales, shard
