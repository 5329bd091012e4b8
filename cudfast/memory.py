"""Memory for logits and gradients: on the CPU, large tensors are made of pages that earlier ones have touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends

LARGE = 4 << 20  # bytes; what is smaller, malloc keeps by itself


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty; contents are arbitrary."""
    numel = 1
    for size in shape:
        numel *= size
    native: Any = backends.load("native")
    if device.type != "cpu" or isinstance(native, str) or numel * dtype.itemsize < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    memory: Tensor = native.pooled(numel, dtype).view(*shape)
    fill: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fill and torch.are_deterministic_algorithms_enabled():
        memory.fill_(torch.nan)
    return memory


def empty_cache() -> None:
    """Gives the memory that waits for the next call back to the system.

    On Linux and macOS, gradients and the buffers of fused linear losses (4 MiB and more) stay mapped when their tensor
    goes away, and the next one of that size, or up to a fifth smaller, is the same pages: the first touch of fresh ones
    costs as much as the loss. Meanwhile the system may take the pages for something else (MADV_FREE), though they count
    as resident until it does. At most CUDFAST_CACHE_BYTES wait, an environment variable that is read at the first call:
    by default a quarter of the machine's memory; 0: none.

    Example:
        >>> import cudfast
        >>> cudfast.empty_cache()
    """
    native: Any = backends.load("native")
    if not isinstance(native, str):
        native.empty_cache()
