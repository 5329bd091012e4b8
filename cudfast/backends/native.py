"""The native backend: calls of the C++ kernels for CPUs."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..options import RowOptions
from ..rows.call import Rows, State, columns_of, compute_dtype
from ..rows.vectors import refuse_label, refuse_value
from ..targets.calibration import refuse_row
from .packed import copied, kernels
from .reference import scale as scale

try:
    import cudfast._native as _native
except ModuleNotFoundError as error:
    note = Path(__file__).parents[1] / "_native_missing.txt"
    reason = note.read_text(encoding="utf-8").strip() if note.exists() else "it is not in the package: install g++"
    raise ImportError(
        f"the native core was not built when cudfast was installed: {reason}, then install cudfast again with "
        "pip install --force-reinstall --no-deps --no-cache-dir"
    ) from error
except ImportError as error:
    raise ImportError(f"the native core does not load: {error}") from error

if _native.isa_warning():
    warnings.warn(_native.isa_warning(), RuntimeWarning, stacklevel=2)

_CPU = torch.device("cpu")  # always passed explicitly: torch.set_default_device may have set another
_SCALARS = {dtype: torch.empty((), dtype=dtype, device=_CPU) for dtype in (torch.float32, torch.float64)}
_FAULTS = {number: name for name, number in _native.FAULTS.items()}
_STRIDES = _native.FAULTS["strides"]


def isa() -> str:
    """Instruction set in use: "baseline", "avx2" or "avx512"."""
    return _native.isa()


def pooled(numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor (numel,) in memory of the library's pool; see `cudfast.empty_cache`."""
    try:
        return torch.frombuffer(_native.Memory(numel * dtype.itemsize), dtype=dtype, count=numel)
    except MemoryError:  # freed memory of the pool may be enough; otherwise PyTorch raises its own error
        empty_cache()
        return torch.empty(numel, dtype=dtype, device=_CPU)


def empty_cache() -> None:
    """See `cudfast.empty_cache`."""
    _native.clear_pool()


def _limit_of_pool(text: str) -> None:
    if not text.isdecimal():
        raise ValueError(f"CUDFAST_CACHE_BYTES={text!r}: expected a number of bytes >= 0")
    _native.limit_pool(int(text))


if "CUDFAST_CACHE_BYTES" in os.environ:
    _limit_of_pool(os.environ["CUDFAST_CACHE_BYTES"])


def _divisors(num_items: float | Tensor | None) -> tuple[float, float]:
    """Divisors of terms that need no label, and of those that do; NaN: the kernel counts them."""
    if num_items is None:
        return math.nan, math.nan
    if isinstance(num_items, Tensor) and num_items.dim() == 1:
        items, labelled = num_items.tolist()
        return items, labelled
    return float(num_items), float(num_items)


def row_state(
    rows: Rows,
    options: RowOptions,
    *,
    statistics: bool,
    keep: bool,
    gradient: Tensor | None,
) -> tuple[Tensor, State | None]:
    """See `cudfast.rows.call.Backend`."""
    calls = kernels(_native, options)
    dtype = compute_dtype(rows)
    loss = torch.empty_like(_SCALARS[dtype]) if calls.scalar else torch.empty(rows.n, dtype=dtype, device=_CPU)
    state = None
    if keep:
        count = rows.n
        state = State(
            torch.empty(count, len(columns_of(rows, options)), dtype=dtype, device=_CPU),
            torch.empty(count if rows.target is not None else 0, dtype=torch.int64, device=_CPU),
            torch.empty(2, dtype=torch.float64, device=_CPU),
        )
    fault, row = calls.state(
        rows,
        calls.terms,
        calls.ignore_index,
        calls.unlabeled_index,
        torch.get_num_threads(),
        calls.reduction,
        *_divisors(rows.num_items),
        statistics,
        loss,
        state,
        gradient,
    )
    if fault == _STRIDES:
        return row_state(copied(rows), options, statistics=statistics, keep=keep, gradient=gradient)
    if fault:
        raise _refusal(rows, options, fault, row)
    return loss, state


def _refusal(rows: Rows, options: RowOptions, fault: int, row: int) -> ValueError:
    """The error for a fault that the kernel's check found."""
    name = _FAULTS[fault]
    if name == "label":
        assert rows.labels is not None
        return refuse_label(rows, options, row, int(rows.labels[row]))
    if name == "bounds":
        return refuse_row(rows, row)
    values = {"weight": rows.weight, "temperature": rows.temperature, "coefficient": rows.coefficients}[name]
    assert values is not None
    return refuse_value(rows, options, name, row, float(values.flatten()[row]))


def row_gradient(
    rows: Rows,
    options: RowOptions,
    state: State,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """See `cudfast.rows.call.Backend`."""
    calls = kernels(_native, options)
    fault, row = calls.gradient(
        rows,
        calls.terms,
        calls.ignore_index,
        calls.unlabeled_index,
        torch.get_num_threads(),
        upstream.to(state.sums.dtype).contiguous(),
        upstream.dim() > 0,
        state,
        gradient,
    )
    if fault == _STRIDES:
        row_gradient(copied(rows), options, state, upstream, gradient)
    elif fault:  # memory shared with another library may have changed since the forward pass
        raise _refusal(rows, options, fault, row)
