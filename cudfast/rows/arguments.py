"""The rows of a call from its arguments, for losses of logits and of hidden states."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..options import RowOptions
from .call import Constraints, Rows
from .checks import num_items_of, temperature_of, weight_of
from .coefficients import coefficients_of, focal_scales
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
    alpha: Mapping[str, Tensor] | None = None,
    constraints: Constraints | None = None,
) -> tuple[Rows, Mapping[str, Tensor], Shard | None]:
    """The rows, the focal scales of their labels by the names of terms, and the shard with the number of classes.

    Args:
        logits: (..., V), or hidden states (..., D).
        name: the caller's name of the logits, for errors.
        target: logits or hidden states of the teacher; None: no term reads a teacher, nor a temperature.
        labels: (N,) int64, checked; None: no row has a label.
        options: the terms.
        classes: V.
        shard: if other ranks hold more classes.
        weight: as in `cudfast.functional.composed_loss`, and so are the next four.
        num_items: see weight.
        temperature: see weight.
        term_weights: see weight.
        alpha: see weight.
        constraints: of the target.
    """
    scalar, per_row = temperature_of(temperature, options.temperature, logits, name)
    scales, shard = focal_scales(alpha, labels, logits, classes, shard)
    rows = Rows(
        logits,
        target,
        labels,
        weight_of(weight, logits, name),
        None if target is None else per_row,
        coefficients_of(options.terms, term_weights, scales, logits, name),
        1.0 if target is None else scalar,
        num_items_of(num_items),
        classes,
        constraints,
    )
    return rows, scales, shard
