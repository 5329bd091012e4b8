"""The CUDA C++ kernels, opt-in: NVIDIA GPUs from compute capability 7.5.

As in the Triton backend, the host reads no values: a label that is not a class, or a weight or temperature out of
range, or a coefficient that is not finite, makes the loss of its row NaN. So does W-Clip in a row whose top-1 leaves,
if the call has a temperature per row (for a temperature of all rows see `_refuse`).
"""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

from ...options import RowOptions
from ...terms.term import REVERSE, SQUARE, TEACHER_ENTROPY, UNIFORM
from ...rows.call import RECALIBRATED, Rows, State, columns_of, compute_dtype, recalibrates
from ...rows.vectors import divisors_of
from ...targets.calibration import refuse_unmet
from ..packed import Kernels, copied, kernels
from ..reference import scale as by_torch
from ..tuning import tuned

try:
    import cudfast._cuda as _cuda
except ModuleNotFoundError as error:
    raise ImportError(
        "the CUDA kernels were not built when cudfast was installed: there was no nvcc that "
        "works, or CUDFAST_CUDA=0. Install the CUDA toolkit, 12.0 or newer, then install cudfast again with "
        "CUDFAST_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir"
    ) from error
except ImportError as error:
    raise ImportError(f"the CUDA kernels do not load: {error}") from error

ARCHITECTURES: str = _cuda.ARCHITECTURES
OLDEST = (7, 5)


def emulated() -> bool:
    """Whether CUDFAST_CUDA_EMULATE=1 runs the kernels on CPU tensors, one thread after another."""
    return os.environ.get("CUDFAST_CUDA_EMULATE") == "1"


def _place(device: torch.device) -> tuple[int, int]:
    """Index and current stream of a device; -1 is the emulation."""
    if device.type == "cpu":
        return -1, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(device).cuda_stream


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _tuning(rows: Rows) -> tuple[int, int]:
    """Blocks that hold a row, and threads of a block; 0 leaves them to the plan (csrc/cuda/launch.cpp)."""
    loss = "projected" if rows.constraints is not None else "teacher" if rows.target is None else "student"
    found = tuned("cuda", rows.logits.device, loss, rows.logits.element_size(), rows.classes)
    return found.get("cluster", 0), found.get("threads", 0)


_MISSING = {
    REVERSE: "ReverseKL",
    UNIFORM: "label smoothing",
    TEACHER_ENTROPY: "the value teacher_entropy",
    SQUARE: "the value brier",
}


def _refuse(rows: Rows, options: RowOptions) -> None:
    """Raises for sums that these kernels do not have."""
    asked = [name for sums, name in _MISSING.items() if options.sums & sums]
    if options.teacher_temperature is not None:
        asked.append("a teacher_temperature")
    if recalibrates(rows, options) and rows.temperature is None:
        asked.append(f"W-Clip at temperatures below {options.leaving:.3g}")
    if asked:
        raise ValueError(f"backend='cuda' does not have {', '.join(asked)}: use backend='triton'")


def _divisors(rows: Rows, options: RowOptions, calls: Kernels) -> Tensor:
    """(2,) f64 on the device: divisors of terms without and with a label. One launch counts the rows."""
    if rows.num_items is not None or options.reduction != "mean":
        return divisors_of(rows, options)
    found = torch.empty(2, dtype=torch.float64, device=rows.logits.device)
    place = _place(rows.logits.device)
    _cuda.count(rows.labels, rows.weight, rows.n, calls.ignore_index, calls.unlabeled_index, *place, found)
    return found


def row_state(
    rows: Rows,
    options: RowOptions,
    *,
    statistics: bool,
    keep: bool,
    gradient: Tensor | None,
) -> tuple[Tensor, State | None]:
    """See `cudfast.rows.call.Backend`."""
    _refuse(rows, options)
    strict = rows.constraints is not None and not rows.constraints.relax
    needs_state = keep or strict
    calls, device, dtype = kernels(_cuda, options), rows.logits.device, compute_dtype(rows)
    loss = torch.zeros(rows.n, dtype=torch.float64, device=device)
    with _on(device):
        place = _place(device)
        # If blocks share a row, its gradient is computed from its state.
        parts = _cuda.parts(rows.n, rows.classes, place[0])
        state = State(
            torch.empty(rows.n if needs_state else 0, _columns(rows, options), dtype=dtype, device=device),
            torch.empty(rows.n if needs_state and rows.target is not None else 0, dtype=torch.int64, device=device),
            _divisors(rows, options, calls),
        )
        room = torch.empty(rows.n * parts * _cuda.PART if parts > 1 else 0, dtype=torch.float64, device=device)
        done = calls.state(
            rows, calls.terms, calls.ignore_index, calls.unlabeled_index, *place, *_tuning(rows), statistics,
            state.divisors, loss, state if needs_state else None, gradient, room,
        )  # fmt: skip
        if strict and done:
            refuse_unmet(rows, state)
        value = loss if options.reduction == "none" else loss.sum()
    if not done:
        return row_state(copied(rows), options, statistics=statistics, keep=keep, gradient=gradient)
    if keep and recalibrates(rows, options):  # RECALIBRATED is the last column
        state = state._replace(sums=torch.nn.functional.pad(state.sums, (0, 1), value=torch.inf))
    return value.to(dtype), state if keep else None


def _columns(rows: Rows, options: RowOptions) -> int:
    """Number of columns of a state that the kernels write."""
    return sum(name != RECALIBRATED for name in columns_of(rows, options))


def row_gradient(
    rows: Rows,
    options: RowOptions,
    state: State,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """See `cudfast.rows.call.Backend`."""
    calls, device = kernels(_cuda, options), rows.logits.device
    packed = state._replace(sums=state.sums[:, : _columns(rows, options)].contiguous())
    with _on(device):
        done = calls.gradient(
            rows, calls.terms, calls.ignore_index, calls.unlabeled_index, *_place(device),
            upstream.to(state.sums.dtype).contiguous(), upstream.dim() > 0, packed, gradient,
        )  # fmt: skip
    if not done:
        row_gradient(copied(rows), options, state, upstream, gradient)


def scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    """See `cudfast.rows.call.Backend`."""
    if gradient.numel():
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        by = upstream.to(dtype).reshape(-1).contiguous()
        with _on(gradient.device):
            if not _cuda.scale(gradient, *_place(gradient.device), by, upstream.dim() > 0):
                return by_torch(gradient, upstream)
    return gradient
