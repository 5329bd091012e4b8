"""Peak memory of a call, measured: what the system counts as resident, or what PyTorch's allocator of a GPU counts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from ..memory import empty_cache

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes. VmRSS: resident now. VmHWM: the most since the last reset; getrusage would count the parent's, too."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def reset() -> int:
    """Gives free memory back to the system, which would else serve the next call unseen; sets VmHWM to VmRSS.

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
    """Bytes beyond what was there before the call, at their most; None where the system does not tell (not Linux).

    What it returns counts, too: a fresh gradient is memory that the call took.
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
