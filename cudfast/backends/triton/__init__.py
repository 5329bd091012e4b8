"""The Triton kernels: NVIDIA, AMD and Intel GPUs.

The host reads no values, so launches are queued without synchronisation and CUDA graphs can contain them. A label that
is not a class, or a weight or temperature out of range, raises an error on the CPU; here it makes the loss of its row
NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...options import RowOptions
from ...rows.call import Rows, State
from ...targets.calibration import refuse_unmet

OLDEST = (3, 4)

try:
    import triton
except ImportError as error:
    raise ImportError("triton is not installed; install it with pip install triton") from error
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"triton {triton.__version__} is too old: {'.'.join(map(str, OLDEST))} or newer is needed; "
        "install a newer PyTorch, or triton itself with pip install -U triton"
    )

from . import launch  # noqa: E402
from .launch import Call, on  # noqa: E402


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 runs the kernels on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def row_state(
    rows: Rows,
    options: RowOptions,
    *,
    statistics: bool,
    keep: bool,
    gradient: Tensor | None,
) -> tuple[Tensor, State | None]:
    """See `cudfast.rows.call.Backend`."""
    call = Call.of(rows, options)
    device = rows.logits.device
    strict = rows.constraints is not None and not rows.constraints.relax
    loss = torch.zeros(rows.n, dtype=torch.float64, device=device)
    with on(device):
        state = call.new_state()
        if rows.n:
            if call.plan.parts == 1:
                call.sweep(state, loss=loss, gradient=gradient, keep=keep, statistics=statistics, fold=True)
            else:
                call.sweep(state, loss=loss, parts=call.fold_parts(statistics), statistics=statistics)
                if gradient is not None:
                    call.sweep(state, gradient=gradient)
        if strict:
            refuse_unmet(rows, state)
        value = loss if options.reduction == "none" else loss.sum()
    return value.to(call.dtype), state if keep else None


def row_gradient(
    rows: Rows,
    options: RowOptions,
    state: State,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """See `cudfast.rows.call.Backend`."""
    if not rows.n:
        return
    with on(rows.logits.device):
        Call.of(rows, options).sweep(state, gradient=gradient, upstream=upstream.contiguous())


def scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    """See `cudfast.rows.call.Backend`."""
    if gradient.numel():
        with on(gradient.device):
            launch.scale(gradient, upstream.reshape(-1).contiguous() if upstream.dim() else upstream)
    return gradient
