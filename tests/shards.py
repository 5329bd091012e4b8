"""Helpers for the cases over a process group: groups of ranks, shards of a batch, and the results of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

N, V = 11, 96
f32, f64 = torch.float32, torch.float64
TOLERANCE = {f32: 1e-6, f64: 1e-12}
CASES: dict[str, Callable[[], None]] = {}


def case(f: Callable[[], None]) -> Callable[[], None]:
    CASES[f.__name__] = f
    return f


_GROUPS: list[Any] = []


def groups() -> Iterator[tuple[Any, list[int]]]:
    """This process's group of two and that of all four, each with cuts that are even, uneven, and with empty shards."""
    if not _GROUPS:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        _GROUPS.extend([pairs[dist.get_rank() // 2], dist.group.WORLD])
    for widths in ([48, 48], [95, 1], [0, 96]):
        yield _GROUPS[0], widths
    for widths in ([24, 24, 24, 24], [1, 50, 13, 32], [0, 60, 0, 36], [0, 0, 0, 96]):
        yield _GROUPS[1], widths


def mine(x: Tensor, group: Any, widths: list[int]) -> Tensor:
    """This rank's columns."""
    rank = dist.get_rank(group)
    first = sum(widths[:rank])
    return x[..., first : first + widths[rank]]


def rows_of(x: Tensor, group: Any, sizes: list[int]) -> Tensor:
    rank = dist.get_rank(group)
    return x[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def batch(dtype: torch.dtype, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels: labels and top-1 in all shards, ties of the top-1 in distant classes, impossible
    classes, rows without a label, rows that are ignored."""
    s, t = torch.randn(2, rows, V, dtype=f64) * 3
    labels = torch.randint(V, (rows,))
    labels[:4] = torch.tensor([0, V - 1, -1, -100])
    t[:3, [5, 50, V - 1]] = 11.0  # ties: the first of them is the top-1, wherever the others are
    t[4, 70:] = -torch.inf
    s[5, :30] = t[5, :30] = -torch.inf
    labels[4], labels[5] = 80, 40  # a label without mass
    return s.to(dtype), t.to(dtype), labels


def close(got: Tensor, wanted: Tensor, what: object) -> None:
    assert got.shape == wanted.shape, what
    assert got.dtype == wanted.dtype, what
    error = (got - wanted).abs() / wanted.abs().clamp(min=1)
    error = torch.where(got.isnan() & wanted.isnan() | (got == wanted), 0, error)
    tolerance = TOLERANCE.get(got.dtype, 1e-2)
    assert bool((error <= tolerance).all()), f"{what}: {float(error.max()):.1e}"


def agree(
    group: Any,
    widths: list[int],
    loss: type,
    options: dict[str, Any],
    logits: tuple[Tensor, ...],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Loss, gradient and statistics of shards are those of one process, for any upstream gradient."""
    what = (loss.__name__, widths, options, list(kwargs))
    whole = [logits[0].clone().requires_grad_(), *logits[1:]]
    wanted, wanted_stats = loss(**options)(*whole, *args, **kwargs, return_stats=True)
    upstream = torch.rand_like(wanted) + 0.5
    (wanted_grad,) = torch.autograd.grad(wanted, whole[0], upstream)
    parts = [mine(x, group, widths).clone() for x in logits]
    parts[0].requires_grad_()
    got, stats = loss(**options, process_group=group)(*parts, *args, **kwargs, return_stats=True)
    (grad,) = torch.autograd.grad(got, parts[0], upstream)
    close(got, wanted, what)
    close(grad, mine(wanted_grad, group, widths), what)
    for name, a in _tensors(stats).items():
        b = _tensors(wanted_stats)[name]
        close(a, b, (name, *what)) if a.is_floating_point() else torch.testing.assert_close(a, b, msg=f"{name} {what}")


def _tensors(stats: Any) -> dict[str, Tensor]:
    """Statistics by name, those in a dict included."""
    found: dict[str, Tensor] = {}
    for name, value in stats._asdict().items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def refused(error: type | tuple[type, ...], *words: str, of: Callable[[], object]) -> None:
    try:
        of()
    except Exception as found:
        if isinstance(found, error) and all(word in str(found) for word in words):
            return
        raise AssertionError(f"expected {error} with {words}") from found
    raise AssertionError(f"nothing was raised: expected {words}")


class Sent(TorchDispatchMode):
    """Bytes that this rank passes to collectives, and their names."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[-1].rstrip("_")
            given = args[1] if name == "allgather" else args[0]
            self.names.append(name)
            self.bytes.append(sum(x.nbytes for x in given))
        return func(*args, **(kwargs or {}))
