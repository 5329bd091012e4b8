"""The C++ kernels: tensors become addresses here."""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..options import CUDOptions, DUSOptions
from ..rows import DTYPES, Rows, State, compute_dtype, refuse_label, refuse_value, row_layout

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

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_REDUCTION_CODES = {"none": 0, "sum": 1, "mean": 2}
_ABSENT = (0, 1, 0, 0, 0)
_FAULTS = {2: "weight", 3: "per_row"}

_Matrix = tuple[int, int, int, int, int]


def isa() -> str:
    """Instruction set in use: "baseline", "avx2" or "avx512"."""
    return _native.isa()


def _matrix(logits: Tensor, name: str) -> tuple[_Matrix, Tensor]:
    """The address of (..., V) logits, and the tensor that must outlive the call."""
    layout = row_layout(logits)
    if layout is None:
        size = logits.numel() * logits.element_size()
        warnings.warn(
            f"cudfast: {name} of shape {tuple(logits.shape)} and strides {logits.stride()} has no dense last axis or "
            f"too many leading strides; it is copied once per call ({size:,} bytes). Pass a tensor whose last axis is "
            "contiguous to avoid that.",
            stacklevel=2,
        )
        logits = logits.contiguous()
        layout = row_layout(logits)
        assert layout is not None
    return (logits.data_ptr(), *layout, _DTYPE_CODES[logits.dtype]), logits


@functools.lru_cache(maxsize=256)
def _native_options(options: CUDOptions | DUSOptions) -> _native.StudentOptions | _native.TeacherOptions:
    if isinstance(options, CUDOptions):
        clip = options.calibration
        return _native.StudentOptions(
            options.kd_weight,
            options.ce_weight,
            clip is not None,
            clip.budget if clip is not None else 0.0,
            clip.margin if clip is not None else 1.0,
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _common(rows: Rows, options: CUDOptions | DUSOptions, logits: _Matrix, target: _Matrix) -> tuple[object, ...]:
    """Leading arguments of every kernel."""
    unlabeled = options.ignore_index if options.unlabeled_index is None else options.unlabeled_index
    return (
        (rows.n, rows.classes, rows.logits.shape[-1]),
        logits,
        target,
        (_address(rows.labels), _address(rows.weight), _address(rows.per_row)),
        rows.scalar,
        options.ignore_index,
        unlabeled,
        torch.get_num_threads(),
        _native_options(options),
    )


def row_state(
    rows: Rows,
    options: CUDOptions | DUSOptions,
    *,
    statistics: bool,
    keep: bool,
    gradient: Tensor | None,
    fresh: bool,
) -> tuple[Tensor, State | None]:
    """See `cudfast.rows.Backend`."""
    student = isinstance(options, CUDOptions)
    dtype = compute_dtype(rows)
    count = rows.n
    loss = torch.empty(count if options.reduction == "none" else (), dtype=dtype)
    state = None
    results = (loss.data_ptr(), 0, 0, 0)
    if keep:
        columns = _native.STUDENT_COLUMNS if student else _native.TEACHER_COLUMNS
        state = State(
            torch.empty(count, columns, dtype=dtype),
            torch.empty(count if student else 0, dtype=torch.int64),
            torch.empty(2, dtype=torch.float64),
        )
        results = (loss.data_ptr(), state.sums.data_ptr(), state.top1.data_ptr(), state.divisors.data_ptr())
    logits, logits_kept = _matrix(rows.logits, "student_logits" if student else "logits")
    target, target_kept = (_ABSENT, None) if rows.target is None else _matrix(rows.target, "teacher_logits")
    out, out_kept = (_ABSENT, None) if gradient is None else _matrix(gradient, "grad_out")
    kernel = _native.student_state if student else _native.teacher_state
    fault, row = kernel(
        *_common(rows, options, logits, target),
        _REDUCTION_CODES[options.reduction],
        math.nan if rows.num_items is None else float(rows.num_items),
        statistics,
        results,
        dtype == torch.float64,
        out,
        fresh,
    )
    del logits_kept, target_kept, out_kept
    if fault:
        raise _refusal(rows, options, fault, row)
    return loss, state


def _refusal(rows: Rows, options: CUDOptions | DUSOptions, fault: int, row: int) -> ValueError:
    """The error for a fault that the kernel's check found."""
    if fault == 1:
        assert rows.labels is not None
        return refuse_label(rows, options, row, int(rows.labels[row]))
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
    *,
    fresh: bool,
) -> None:
    """See `cudfast.rows.Backend`."""
    student = isinstance(options, CUDOptions)
    dtype = state.sums.dtype
    upstream = upstream.to(dtype).contiguous()
    logits, logits_kept = _matrix(rows.logits, "student_logits" if student else "logits")
    target, target_kept = (_ABSENT, None) if rows.target is None else _matrix(rows.target, "teacher_logits")
    out, out_kept = _matrix(gradient, "grad_out")
    kernel = _native.student_gradient if student else _native.teacher_gradient
    fault, row = kernel(
        *_common(rows, options, logits, target),
        upstream.data_ptr(),
        upstream.dim() > 0,
        (0, state.sums.data_ptr(), state.top1.data_ptr(), state.divisors.data_ptr()),
        dtype == torch.float64,
        out,
        fresh,
    )
    del logits_kept, target_kept, out_kept
    if fault:  # memory shared with another library may have changed since the forward pass
        raise _refusal(rows, options, fault, row)
