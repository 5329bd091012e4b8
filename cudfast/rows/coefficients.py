"""The coefficients of a call's pieces: those of the options, times the call's term_weights, the values per class of the
rows' labels, and the call's label smoothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..options import RowOptions
from ..terms import CrossEntropy, Focal, Weighted
from ..terms.term import UNIFORM
from .call import Rows, vector_dtype
from .checks import vector_of
from .fields import NUMBERS
from .layout import row_count
from .shard import Shard
from .tensors import direct, local
from .vectors import masks

Scales = Sequence[Tensor | None]
"""Factors (1,) or (N,) of the pieces of terms in every row; None: 1."""


class PerClass(NamedTuple):
    """A tensor of one value per class that a term has."""

    name: str  # of the term
    field: str  # of the term: "alpha" or "class_weight"
    values: Tensor  # (V,), of all classes
    rows: Tensor  # (N,) f64, of the rows' labels; 1 for rows without a label


def per_class_of(
    options: RowOptions,
    given: Mapping[str, Tensor] | None,
    labels: Tensor | None,
    logits: Tensor,
    classes: int,
    shard: Shard | None,
) -> tuple[list[PerClass], Shard | None]:
    """The tensors of the terms with the names `given`; and the shard with the total number of classes, which they give.

    Raises:
        ValueError: a value out of range, if the host can read it without waiting for a device; elsewhere it is NaN.
    """
    found = []
    terms = {weighted.name: weighted.term for weighted in options.terms}
    for name, values in (given or {}).items():
        field = terms[name].per_class
        positive = isinstance(terms[name], Focal)
        values, shard = _values_of(values, field, logits, classes, shard)
        total = len(values)
        if labels is None:  # no row has a label
            rows = logits.new_ones(row_count(logits), dtype=vector_dtype(logits.device))
        else:  # a label out of range raises an error later
            inside = (labels >= 0) & (labels < total)
            rows = torch.where(inside, values.to(vector_dtype(labels.device))[torch.where(inside, labels, 0)], 1)
        good = (rows > 0 if positive else rows >= 0) & (rows < torch.inf)
        _refuse(good, rows, f"{field} of the label of row", f"a finite number {'>' if positive else '>='} 0", logits)
        found.append(PerClass(name, field, values, torch.where(good, rows, torch.nan)))
    return found, shard


def _values_of(
    values: object, field: str, logits: Tensor, classes: int, shard: Shard | None
) -> tuple[Tensor, Shard | None]:
    """One value for each of all classes (V,); and the shard with V."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{field}: expected a torch.Tensor (V,) with one value per class, got {type(values).__name__}")
    values = local(values, field)
    if shard is not None and values.dim():
        classes = len(values)
        shard = shard.of_all(classes)
    if values.shape != (classes,) or not values.dtype.is_floating_point:
        raise ValueError(f"{field} is {values.dtype} {tuple(values.shape)}: expected floating point ({classes},)")
    if values.requires_grad:
        raise ValueError(f"{field} requires grad, and no gradient flows to it: pass {field}.detach()")
    if values.device != logits.device:
        raise ValueError(f"{field} is on {values.device} and labels on {logits.device}: move them to one device")
    return values.detach(), shard


def _refuse(good: Tensor, values: Tensor, what: str, expected: str, logits: Tensor) -> None:
    """Raises for the first value of a row that is not good, if the host can read it without waiting for a device."""
    if torch.compiler.is_compiling() or not values.is_cpu or not direct(values) or bool(good.all()):
        return
    row = int((~good).nonzero()[0])
    where = ", ".join(str(int(i)) for i in np.unravel_index(row, logits.shape[:-1] or (1,)))
    raise ValueError(f"{what} {where} is {float(values[row])}: expected {expected}")


def smoothing_of(smoothing: object, options: RowOptions, logits: Tensor, name: str) -> Tensor | None:
    """Label smoothing of a call, (1,) or (N,) f64.

    Raises:
        TypeError, ValueError: smoothing of a loss without cross-entropy, or out of range.
    """
    if smoothing is None:
        return None
    if options.smoothed is None:
        if any(isinstance(term, CrossEntropy) for _, _, term in options.terms):
            raise ValueError("smoothing= in a loss of 8 terms: expected at most 7, as a smoothed cross-entropy is two")
        raise ValueError("smoothing= in a loss without CrossEntropy: no other term has label smoothing; leave it out")
    if isinstance(smoothing, Tensor):
        if smoothing.dim() == 0 and logits.dim() != 1:
            smoothing = smoothing.expand(logits.shape[:-1])
        values = vector_of(smoothing, "smoothing", logits, name)
        good = (values >= 0) & (values <= 1)
        _refuse(good, values, "smoothing of row", "a number in [0, 1]", logits)
        return torch.where(good, values, torch.nan)
    if isinstance(smoothing, bool) or not isinstance(smoothing, NUMBERS):
        raise TypeError(f"smoothing: expected a number or a tensor (...), got {type(smoothing).__name__}")
    if not torch.compiler.is_compiling() and not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing}: expected a number in [0, 1]")
    return logits.new_ones(1, dtype=vector_dtype(logits.device)) * smoothing  # traced with a symbol


def scales_of(options: RowOptions, per_class: Sequence[PerClass], smoothing: Tensor | None) -> Scales:
    """The factors of pieces that come from labels and label smoothing."""
    of_term = {found.name: found.rows for found in per_class}
    scales: list[Tensor | None] = []
    for piece in options.pieces:
        uniform = piece.term.sums & UNIFORM
        factors = []
        if piece.name in of_term and not uniform:  # the sum over the classes has their weights already
            factors.append(of_term[piece.name])
        if smoothing is not None and options.smooths and (uniform or isinstance(piece.term, CrossEntropy)):
            factors.append(smoothing if uniform else 1 - smoothing)
        scales.append(math.prod(factors[1:], start=factors[0]) if factors else None)
    return scales


def shares_of(rows: Rows, options: RowOptions, per_class: Sequence[PerClass]) -> dict[str, Tensor]:
    """(1,) factors of a mean, by the names of terms: with class weights, cross-entropy is divided by their sum over the
    labels, and the other terms of labelled rows by the number of labels."""
    if options.reduction != "mean" or rows.num_items is not None:
        return {}
    found = {}
    for name, field, _, of_label in per_class:
        if field == "class_weight":
            _, labelled = masks(rows, options)
            weight = torch.where(labelled, torch.ones_like(of_label) if rows.weight is None else rows.weight, 0)
            weighted = torch.where(labelled, weight * of_label, 0).sum()
            found[name] = torch.where(weighted == 0, 0, weight.sum() / weighted).reshape(1)
    return found


def coefficients_of(
    options: RowOptions,
    term_weights: object,
    scales: Scales,
    shares: Mapping[str, Tensor],
    logits: Tensor,
    name: str,
) -> Tensor | None:
    """(T, N) or (T, 1) f64: the product of all factors of every piece; None if they are those of the options."""
    if term_weights is None and not shares and all(scale is None for scale in scales):
        return None
    given = _term_weights(options.terms, term_weights)
    device, dtype = logits.device, vector_dtype(logits.device)
    rows: list[Tensor] = []
    for piece, coefficient, scale in zip(options.pieces, options.coefficients, scales):
        key = piece.name
        value = given.get(key, 1.0)
        if isinstance(value, Tensor) and value.dim() > 0:
            row = vector_of(value, f"term_weights[{key!r}]", logits, name) * coefficient
        elif isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(f"term_weights[{key!r}] requires grad, and no gradient flows to it: pass .detach()")
            row = value.to(device, dtype).reshape(1) * coefficient
        else:
            row = logits.new_ones(1, dtype=dtype) * (value * coefficient)  # traced with a symbol
        row = row if scale is None else row * scale
        rows.append(row * shares[key] if key in shares else row)
    return torch.stack(torch.broadcast_tensors(*rows))


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
