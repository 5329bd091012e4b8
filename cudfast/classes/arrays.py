"""Validation of arrays that users pass, and index arithmetic on them."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterable

import torch
from torch import Tensor


def first(mask: Tensor) -> int | None:
    """Index of the first True in a bool vector, or None."""
    return int(mask.view(torch.uint8).argmax()) if mask.any() else None


def slices(values: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """values[starts[i] : starts[i] + counts[i]] for every i, one after another."""
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    places = (starts - ends + counts).repeat_interleave(counts, output_size=total)
    places += torch.arange(total, device=places.device)
    return values[places]


def largest_in(scores: Tensor, k: int) -> Tensor:
    """(n, V) bool: the k largest of every row of scores (n, V), ties to the lower column."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(k, dim=1).values[:, -1:]
    chosen = scores >= least
    if (chosen.sum(1, dtype=torch.int32) > k).any():
        above = scores > least
        room = k - above.sum(1, keepdim=True, dtype=torch.int32)
        chosen = above | (chosen & ((scores == least).cumsum(1, dtype=torch.int32) <= room))
    return chosen


def as_tensor(value: object, name: str, expected: str) -> Tensor:
    """A detached tensor from a tensor, an array or a list."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        return torch.as_tensor(value, device="cpu")  # independent of torch.set_default_device
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} ({error})") from error


def as_integers(value: object, name: str, shape: str, *, least: int = 1) -> Tensor:
    """An int64 vector with at least that many elements."""
    tensor = as_tensor(value, name, f"integers {shape}")
    if tensor.dim() != 1 or len(tensor) < least:
        at_least = f" with at least {least}" if least else ""
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}{at_least}")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {tensor.dtype}: expected integers")
    return tensor.to(torch.int64)


def at_least_one(value: int, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from error
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name}={value}: expected an int of at least 1")
    return number


def progress(blocks: range, what: str) -> Iterable[int]:
    """The same blocks, with a progress bar after two seconds if tqdm is installed."""
    try:
        bar: Iterable[int] = importlib.import_module("tqdm").tqdm(blocks, desc=what, delay=2, leave=False)
    except ImportError:
        return blocks
    return bar


def refuse_cycles(parent: Tensor) -> None:
    """Raises if parents form a cycle. Pointer jumping: nodes that have not reached a root after M steps are on one."""
    M = len(parent)
    root = parent.new_tensor([M])
    ancestor = torch.cat([torch.where(parent < 0, root, parent), root])
    for _ in range(M.bit_length()):
        ancestor = ancestor[ancestor]
    if (i := first(ancestor < M)) is not None:
        node = int(ancestor[i])
        raise ValueError(f"parent has a cycle through node {node}: expected every node to lead to a root, marked -1")
