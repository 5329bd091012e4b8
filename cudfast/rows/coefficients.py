"""The coefficients of a call's terms: those of the options, times the call's term_weights and the focal scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..terms import Weighted
from .call import vector_dtype
from .checks import vector_of
from .fields import NUMBERS
from .layout import row_count
from .shard import Shard
from .tensors import direct, local


def alpha_of(alpha: object, labels: Tensor, classes: int, shard: Shard | None) -> tuple[Tensor, Shard | None]:
    """(N,) focal scale of each row's label; 1 for rows without a label (a label out of range raises an error later).

    Also the shard, with the total number of classes, which alpha gives.
    """
    if not isinstance(alpha, Tensor):
        raise TypeError(f"alpha: expected a torch.Tensor (V,) with one value per class, got {type(alpha).__name__}")
    alpha = local(alpha, "alpha")
    if shard is not None and alpha.dim():
        classes = len(alpha)
        shard = shard.of_all(classes)
    if alpha.shape != (classes,) or not alpha.dtype.is_floating_point:
        raise ValueError(f"alpha is {alpha.dtype} {tuple(alpha.shape)}: expected floating point ({classes},)")
    if alpha.requires_grad:
        raise ValueError("alpha requires grad, and no gradient flows to it: pass alpha.detach()")
    if alpha.device != labels.device:
        raise ValueError(f"alpha is on {alpha.device} and labels on {labels.device}: move them to one device")
    inside = (labels >= 0) & (labels < classes)
    chosen = alpha.detach().to(vector_dtype(labels.device))[torch.where(inside, labels, 0)]
    return torch.where(inside, chosen, 1), shard


def focal_scales(
    alpha: Mapping[str, Tensor] | None, labels: Tensor | None, logits: Tensor, classes: int, shard: Shard | None
) -> tuple[Mapping[str, Tensor], Shard | None]:
    """(N,) scales of focal terms, by their names, from one scale per class; and the shard with the number of classes.

    Raises:
        ValueError: a scale out of range, if the host can read it without waiting for a device; elsewhere it is NaN.
    """
    found = {}
    for name, values in (alpha or {}).items():
        if labels is None:  # no row has a label
            found[name] = logits.new_ones(row_count(logits), dtype=vector_dtype(logits.device))
            continue
        scale, shard = alpha_of(values, labels, classes, shard)
        good = (scale > 0) & (scale < torch.inf)
        if not torch.compiler.is_compiling() and scale.is_cpu and direct(scale) and not bool(good.all()):
            row = int((~good).nonzero()[0])
            where = ", ".join(str(int(i)) for i in np.unravel_index(row, logits.shape[:-1] or (1,)))
            raise ValueError(f"alpha of the label of row {where} is {float(scale[row])}: expected a finite number > 0")
        found[name] = torch.where(good, scale, torch.nan)
    return found, shard


def coefficients_of(
    terms: Sequence[Weighted],
    term_weights: object,
    scales: Mapping[str, Tensor],
    logits: Tensor,
    name: str,
) -> Tensor | None:
    """(T, N) or (T, 1) f64: coefficient times the term's weight in this call; None if there is nothing to multiply.

    scales: (N,) factors of some terms, by their names.
    """
    if term_weights is None and not scales:
        return None
    given = _term_weights(terms, term_weights)
    device, dtype = logits.device, vector_dtype(logits.device)
    rows: list[Tensor] = []
    every_row = bool(scales)
    for key, coefficient, _ in terms:
        value = given.get(key, 1.0)
        if isinstance(value, Tensor) and value.dim() > 0:
            row = vector_of(value, f"term_weights[{key!r}]", logits, name) * coefficient
            every_row = True
        elif isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(f"term_weights[{key!r}] requires grad, and no gradient flows to it: pass .detach()")
            row = value.to(device, dtype).reshape(1) * coefficient
        else:
            row = logits.new_ones(1, dtype=dtype) * (value * coefficient)  # traced with a symbol
        rows.append(row * scales[key] if key in scales else row)
    if every_row:
        rows = [row.expand(row_count(logits)) for row in rows]
    return torch.stack(rows)


def _term_weights(terms: Sequence[Weighted], term_weights: object) -> Mapping[str, Any]:
    if term_weights is None:
        return {}
    if not isinstance(term_weights, Mapping):
        raise TypeError(
            f"term_weights: expected a dict from names of terms to weights, got {type(term_weights).__name__}"
        )
    known = [weighted.name for weighted in terms]
    for key, value in term_weights.items():
        if key not in known:
            raise ValueError(f"term_weights has the key {key!r}: the terms of this loss are {', '.join(known)}")
        if isinstance(value, Tensor):
            continue
        if isinstance(value, bool) or not isinstance(value, NUMBERS):
            raise TypeError(f"term_weights[{key!r}]: expected a number or a tensor, got {type(value).__name__}")
        if not torch.compiler.is_compiling() and not math.isfinite(value):
            raise ValueError(f"term_weights[{key!r}] = {value}: expected a finite number")
    return term_weights
