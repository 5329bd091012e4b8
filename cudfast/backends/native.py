"""The C++ kernels."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration import refuse_row
from ..options import CUDOptions, DUSOptions, WClip
from ..rows import Rows, State, columns_of, compute_dtype, dense, refuse_label, refuse_value
from .reference import scale as scale

try:
    import cudfast._native as _native
except ModuleNotFoundError as error:
    note = Path(__file__).parents[1] / "_native_missing.txt"
    reason = note.read_text().strip() if note.exists() else "it is not in the package"
    raise ImportError(
        f"the native core was not built when cudfast was installed: {reason}. "
        "Install a C++17 compiler (g++ or clang++), then install cudfast again with pip install --force-reinstall"
    ) from error
except ImportError as error:
    raise ImportError(f"the native core does not load: {error}") from error

if _native.isa_warning():
    warnings.warn(_native.isa_warning(), RuntimeWarning, stacklevel=2)

_REDUCTION_CODES = {"none": 0, "sum": 1, "mean": 2}
_SCALARS = {dtype: torch.empty((), dtype=dtype) for dtype in (torch.float32, torch.float64)}
_FAULTS = {2: "weight", 3: "per_row"}


def isa() -> str:
    """Instruction set in use: "baseline", "avx2" or "avx512"."""
    return _native.isa()


def pooled(numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) of a pool that outlives its tensors; see `cudfast.empty_cache`."""
    try:
        return torch.frombuffer(_native.Memory(numel * dtype.itemsize), dtype=dtype, count=numel)
    except MemoryError:  # PyTorch says it better, if what waits in the pool does not help
        empty_cache()
        return torch.empty(numel, dtype=dtype)


def empty_cache() -> None:
    """See `cudfast.empty_cache`."""
    _native.clear_pool()


def _limit_of_pool(text: str) -> None:
    if not text.isdecimal():
        raise ValueError(f"CUDFAST_CACHE_BYTES={text!r}: expected a number of bytes >= 0")
    _native.limit_pool(int(text))


if "CUDFAST_CACHE_BYTES" in os.environ:
    _limit_of_pool(os.environ["CUDFAST_CACHE_BYTES"])


def _copied(rows: Rows, logits_name: str) -> Rows:
    """The same rows where the kernels can walk them."""
    target = None if rows.target is None else dense(rows.target, "teacher_logits")
    return rows._replace(logits=dense(rows.logits, logits_name), target=target)


class _Kernels(NamedTuple):
    """Everything that follows from the options alone."""

    state: Callable[..., tuple[int, int]]
    gradient: Callable[..., tuple[int, int]]
    options: _native.StudentOptions | _native.TeacherOptions
    ignore_index: int
    unlabeled_index: int
    reduction: int
    scalar: bool  # the loss is one number
    indices: bool  # the state has a top-1
    logits: str  # what the caller calls the logits


@functools.lru_cache(maxsize=256)
def _kernels(options: CUDOptions | DUSOptions) -> _Kernels:
    student = isinstance(options, CUDOptions)
    return _Kernels(
        state=_native.student_state if student else _native.teacher_state,
        gradient=_native.student_gradient if student else _native.teacher_gradient,
        options=_native_options(options),
        ignore_index=options.ignore_index,
        unlabeled_index=options.ignore_index if options.unlabeled_index is None else options.unlabeled_index,
        reduction=_REDUCTION_CODES[options.reduction],
        scalar=options.reduction != "none",
        indices=student,
        logits="student_logits" if student else "logits",
    )


def _native_options(options: CUDOptions | DUSOptions) -> _native.StudentOptions | _native.TeacherOptions:
    if isinstance(options, CUDOptions):
        clip = options.calibration
        return _native.StudentOptions(
            options.kd_weight,
            options.ce_weight,
            isinstance(clip, WClip),
            clip.budget if isinstance(clip, WClip) else 0.0,
            clip.margin if isinstance(clip, WClip) else 1.0,
        )
    return _native.TeacherOptions(
        options.ce_weight,
        options.focal_weight,
        options.entropy_weight,
        options.gamma,
        options.gate_threshold,
        options.gate_scale,
        options.gate_power,
        options.differentiate_gate,
    )


def _divisors(num_items: float | Tensor | None) -> tuple[float, float]:
    """Of the distillation term and of the label terms; NaN: to be counted."""
    if num_items is None:
        return math.nan, math.nan
    if isinstance(num_items, Tensor) and num_items.dim() == 1:
        kd, ce = num_items.tolist()
        return kd, ce
    return float(num_items), float(num_items)


def row_state(
    rows: Rows,
    options: CUDOptions | DUSOptions,
    *,
    statistics: bool,
    keep: bool,
    gradient: Tensor | None,
) -> tuple[Tensor, State | None]:
    """See `cudfast.rows.Backend`."""
    kernels = _kernels(options)
    dtype = compute_dtype(rows)
    loss = torch.empty_like(_SCALARS[dtype]) if kernels.scalar else torch.empty(rows.n, dtype=dtype)
    state = None
    if keep:
        count = rows.n
        state = State(
            torch.empty(count, len(columns_of(rows, options)), dtype=dtype),
            torch.empty(count if kernels.indices else 0, dtype=torch.int64),
            torch.empty(2, dtype=torch.float64),
        )
    fault, row = kernels.state(
        rows,
        kernels.options,
        kernels.ignore_index,
        kernels.unlabeled_index,
        torch.get_num_threads(),
        kernels.reduction,
        *_divisors(rows.num_items),
        statistics,
        loss,
        state,
        gradient,
    )
    if fault == _native.STRIDES:
        rows = _copied(rows, kernels.logits)
        return row_state(rows, options, statistics=statistics, keep=keep, gradient=gradient)
    if fault:
        raise _refusal(rows, options, fault, row)
    return loss, state


def _refusal(rows: Rows, options: CUDOptions | DUSOptions, fault: int, row: int) -> ValueError:
    """The error for a fault that the kernel's check found."""
    if fault == 1:
        assert rows.labels is not None
        return refuse_label(rows, options, row, int(rows.labels[row]))
    if fault == 5:
        return refuse_row(rows, row)
    name = _FAULTS[fault]
    values = rows.weight if name == "weight" else rows.per_row
    assert values is not None
    return refuse_value(rows, options, name, row, float(values[row]))


def row_gradient(
    rows: Rows,
    options: CUDOptions | DUSOptions,
    state: State,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """See `cudfast.rows.Backend`."""
    kernels = _kernels(options)
    fault, row = kernels.gradient(
        rows,
        kernels.options,
        kernels.ignore_index,
        kernels.unlabeled_index,
        torch.get_num_threads(),
        upstream.to(state.sums.dtype).contiguous(),
        upstream.dim() > 0,
        state,
        gradient,
    )
    if fault == _native.STRIDES:
        row_gradient(_copied(rows, kernels.logits), options, state, upstream, gradient)
    elif fault:  # memory shared with another library may have changed since the forward pass
        raise _refusal(rows, options, fault, row)
