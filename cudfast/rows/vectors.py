"""The vectors of a call: masks of the rows, divisors of the mean, and the errors for values out of range."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..options import LossOptions, RowOptions
from .call import Rows, State, columns_of, vector_dtype
from .fields import TEMPERATURES
from .layout import row_count


def masks(rows: Rows, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(N,) bool each: the rows that are not excluded, and those of them that are labelled."""
    n = row_count(rows.logits)  # not rows.n: torch 2.8 cannot trace properties of named tuples
    counts = torch.ones(n, dtype=torch.bool, device=rows.logits.device)
    if rows.weight is not None:
        counts = rows.weight != 0
    if rows.labels is None:
        return counts, torch.zeros_like(counts)
    counts = counts & (rows.labels != options.ignore_index)
    labelled = counts
    if options.unlabeled_index is not None:
        labelled = counts & (rows.labels != options.unlabeled_index)
    return counts, labelled


def divisors_of(rows: Rows, options: RowOptions) -> Tensor:
    """(2,) f64: divisors of the terms of all rows, and of those of labelled rows."""
    dtype, device = vector_dtype(rows.logits.device), rows.logits.device
    if rows.num_items is not None:
        items: Tensor = torch.as_tensor(rows.num_items, dtype=dtype, device=device)
        return items.expand(2).clone()
    if options.reduction != "mean":
        return torch.ones(2, dtype=dtype, device=device)
    weight = rows.weight if rows.weight is not None else torch.ones(rows.n, dtype=dtype, device=device)
    return torch.stack([torch.where(mask, weight, 0).sum() for mask in masks(rows, options)])


def row_name(rows: Rows, row: int) -> str:
    """Index of flat row `row` in the shape of the caller's tensors: "3", or "1, 3"."""
    shape = rows.logits.shape[:-1]
    if rows.part is not None:
        row, shape = int(rows.part.rows[row]), rows.part.shape
    index = np.unravel_index(row, shape or (1,))
    return ", ".join(str(int(i)) for i in index)


def refuse_label(rows: Rows, options: LossOptions, row: int, label: int) -> ValueError:
    """The error for a label that is neither a class nor one of the special values."""
    special = f"ignore_index={options.ignore_index}"
    if options.unlabeled_index is not None:
        special += f" or unlabeled_index={options.unlabeled_index}"
    hint = ""
    if label == rows.classes:
        hint = "; if the labels are 1-based, pass labels - 1"
    elif label == -100:
        hint = "; to ignore rows with label -100, pass ignore_index=-100"
    elif label == -1:
        hint = f"; to ignore rows without a label, give them the label {options.ignore_index}"
    return ValueError(
        f"labels[{row_name(rows, row)}] = {label}: expected a class in [0, {rows.classes}), {special}{hint}"
    )


def refuse_value(rows: Rows, options: RowOptions, name: str, row: int, value: float) -> ValueError:
    """The error for a value out of range. `name`: "weight", "temperature", or "coefficient" with its flat index."""
    if name == "weight":
        return ValueError(f"weight[{row_name(rows, row)}] = {value}: expected a finite number >= 0")
    if name == "temperature":
        low, high = TEMPERATURES
        return ValueError(f"temperature[{row_name(rows, row)}] = {value}: expected a number in [{low:g}, {high:g}]")
    assert rows.coefficients is not None
    term, row = divmod(row, rows.coefficients.shape[1])
    where = f"[{row_name(rows, row)}]" if rows.coefficients.shape[1] > 1 else ""
    return ValueError(
        f"term_weights[{options.pieces[term].name!r}]{where} gives a coefficient of {value}: expected finite numbers"
    )


def check_vectors(rows: Rows, options: RowOptions) -> None:
    """Raises for the first label, weight, temperature or coefficient out of range, before any sweep. Synchronises."""

    def first(bad: Tensor) -> int | None:
        return int(bad.nonzero()[0]) if bool(bad.any()) else None

    if rows.labels is not None:
        _, labelled = masks(rows._replace(weight=None), options)
        outside = labelled & ((rows.labels < 0) | (rows.labels >= rows.classes))
        if (row := first(outside)) is not None:
            raise refuse_label(rows, options, row, int(rows.labels[row]))
    largest = torch.finfo(torch.float64).max
    limits = {"weight": (0.0, largest), "temperature": TEMPERATURES, "coefficient": (-largest, largest)}
    given = (rows.weight, rows.temperature, None if rows.coefficients is None else rows.coefficients.reshape(-1))
    for (name, (low, high)), values in zip(limits.items(), given):
        if values is None:
            continue
        good = (values >= low) & (values <= high)
        if (row := first(~good)) is not None:
            raise refuse_value(rows, options, name, row, float(values[row]))


def check_items(rows: Rows, options: RowOptions) -> None:
    """Raises for a num_items on the host that cannot be a divisor of the sum over rows."""
    items = rows.num_items
    if items is None or (isinstance(items, Tensor) and (items.dim() > 0 or not items.is_cpu)):
        return
    value = float(items)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"num_items={value:g}: expected a finite number >= 0")
    if value == 0 and rows.logits.is_cpu:
        counts, labelled = masks(rows, options)
        bad = counts if options.whole else labelled
        if bool(bad.any()):
            raise ValueError(
                f"num_items=0, and row {row_name(rows, int(bad.nonzero()[0]))} counts: expected the number of labels "
                "that are not ignore_index, in all the batches that one step accumulates"
            )


def check_finite(rows: Rows, options: RowOptions, state: State) -> None:
    """Raises for the first row that is not excluded and whose loss is NaN. Synchronises."""
    bad = state.sums.isnan().any(-1)
    columns = columns_of(rows, options)
    for maximum in ("m_s",) if rows.target is None else ("m_t", "m_s"):
        bad = bad | (state.sums[:, columns.index(maximum)] == -torch.inf)
    counts, labelled = masks(rows, options)
    bad = bad & (counts if options.whole or rows.target is not None else labelled)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"row {row_name(rows, row)} holds NaN, +inf, or nothing but -inf, so its loss is NaN; "
            "check the model's outputs, or mask the row with ignore_index"
        )
