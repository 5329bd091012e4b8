"""Measured peak memory of a call: the system's resident memory, or that of PyTorch's GPU allocator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from ..autograd.memory import empty_cache

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes. VmRSS: resident now. VmHWM: the maximum since the last reset; getrusage would include the parent's."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def reset() -> int:
    """Returns free memory to the system, because reusing it would not be measured; sets VmHWM to VmRSS.

    Returns:
        Bytes that are resident now.
    """
    empty_cache()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    CLEAR.write_text("5")
    return resident("VmRSS")


def peak(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Maximum of bytes beyond those before the call; None if the system does not report it (not Linux).

    Returned tensors count as well: a fresh gradient is memory that the call has allocated.
    """
    if device != "cpu":
        memory = torch.get_device_module(torch.device(device))
        memory.synchronize()
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
        call()
        memory.synchronize()
        most: int = memory.max_memory_allocated() - before
        return most
    if not CLEAR.exists():
        return None
    before = reset()
    call()
    return max(0, resident("VmHWM") - before)
