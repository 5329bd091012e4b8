"""The memory layout of the rows of (..., V) logits."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def row_count(logits: Tensor) -> int:
    """N of (..., V); V may be 0. Without Size.numel(), which would specialise a traced graph to one number of rows."""
    shape = logits.shape
    return shape[0] if len(shape) == 2 else math.prod(shape[:-1])


def row_layout(logits: Tensor) -> tuple[int, int, int] | None:
    """Memory layout of the rows of (..., V): (inner rows, outer stride, inner stride) in elements.

    Row i starts at (i // inner) * outer + (i % inner) * inner_stride. None when the leading axes do not reduce to two
    strides or the last axis is not dense: such logits need a copy.
    """
    if logits.is_contiguous():
        return 1, logits.shape[-1], 0
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return None
    axes: list[tuple[int, int]] = []  # (size, stride), adjacent axes joined if possible
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1]):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return None
    inner, inner_stride = axes[-1] if axes else (1, 0)
    return max(inner, 1), axes[0][1] if len(axes) == 2 else 0, inner_stride


def dense(logits: Tensor, name: str) -> Tensor:
    """(..., V) logits in a layout that the kernels can address: the same tensor, or a copy."""
    if row_layout(logits) is not None:
        return logits
    size = logits.numel() * logits.element_size()
    warnings.warn(
        f"cudfast: {name} of shape {tuple(logits.shape)} and strides {logits.stride()} has no dense last axis or "
        f"too many leading strides; it is copied once per call ({size:,} bytes). Pass a tensor whose last axis is "
        "contiguous to avoid that.",
        stacklevel=2,
    )
    return logits.contiguous()
