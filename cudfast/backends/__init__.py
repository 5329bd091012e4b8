"""The backends, the reason for each one that is missing, and the selection of a backend for a call."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import cast

import torch

from ..rows.call import Backend, vector_dtype

NAMES = ("native", "triton", "cuda", "reference")
GPUS = ("cuda", "xpu")  # torch's names; ROCm is "cuda", too


@functools.cache
def load(name: str) -> Backend | str:
    """The backend with this name, or the reason why it cannot be used."""
    try:
        return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
    except ImportError as error:
        return str(error)


def available() -> dict[str, str]:
    """Every backend with "" if it can be used, otherwise the reason why not.

    Example:
        >>> available()["reference"]
        ''
    """
    return {name: "" if not isinstance(found := load(name), str) else found for name in NAMES}


def _default(device: torch.device) -> str:
    if device.type != "cpu" and device.type not in GPUS:
        return "reference"
    fast = "native" if device.type == "cpu" else "triton"
    missing = load(fast)
    if not isinstance(missing, str):
        missing = lacking(device) if fast == "triton" else ""
        if not missing:
            return fast
    warnings.warn(
        f"cudfast: {device.type.upper()} tensors go through the reference backend, which is much slower: {missing}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


def lacking(device: torch.device) -> str:
    """The feature for the Triton kernels that a GPU lacks, or ""."""
    found = torch.get_device_module(device).get_device_properties(device)
    if device.type == "cuda" and not torch.version.hip and found.major < 7:
        return f"{found.name} has compute capability {found.major}.{found.minor}, and Triton needs 7.0 or newer"
    if vector_dtype(device) != torch.float64:
        return f"{found.name} has no float64, which the scalars of a row need"
    return ""


def _fits(name: str, device: torch.device) -> str:
    """The reason why a backend does not work on a device, or ""."""
    if name == "native" and device.type != "cpu":
        return "works on CPU tensors"
    if name == "triton" and device.type not in GPUS:
        found = load(name)
        if not (device.type == "cpu" and not isinstance(found, str) and found.interpreted()):  # type: ignore[attr-defined]
            return "works on GPU tensors (and on CPU tensors when TRITON_INTERPRET=1 is set, one element at a time)"
    if name == "cuda":
        return _fits_cuda(device)
    if name == "triton" and device.type in GPUS and (missing := lacking(device)):
        return f"does not work on this GPU ({missing})"
    return ""


def _fits_cuda(device: torch.device) -> str:
    found = load("cuda")
    assert not isinstance(found, str)
    if device.type == "cpu" and found.emulated():  # type: ignore[attr-defined]
        return ""
    if device.type != "cuda" or torch.version.hip:
        return "works on tensors on NVIDIA GPUs (and on CPU tensors when CUDFAST_CUDA_EMULATE=1 is set, for tests)"
    gpu = torch.cuda.get_device_properties(device)
    if (gpu.major, gpu.minor) < found.OLDEST:  # type: ignore[attr-defined]
        return f"needs compute capability 7.5 or newer ({gpu.name} has {gpu.major}.{gpu.minor})"
    return ""


@functools.lru_cache(maxsize=64)
def choose(name: str, device: torch.device) -> Backend:
    """The backend for logits on `device`. "auto" is CUDFAST_BACKEND, otherwise the fastest that works.

    The result is cached: the variable is read once per process, when it is first needed.

    Raises:
        ValueError: an unknown name in CUDFAST_BACKEND, or a backend that does not work on this device.
        RuntimeError: the requested backend is not available; the message gives the reason and what to do.
    """
    asked = name
    if name == "auto":
        asked = os.environ.get("CUDFAST_BACKEND", "") or "auto"
        if asked not in ("auto", *NAMES):
            raise ValueError(f"CUDFAST_BACKEND={asked!r}: expected one of {', '.join(('auto', *NAMES))}")
        if asked == "auto":
            asked = _default(device)
    found = load(asked)
    if isinstance(found, str):
        raise RuntimeError(f"backend {asked!r} is not available: {found}")
    if reason := _fits(asked, device):
        raise ValueError(f"backend {asked!r} {reason}, got logits on {device}; use backend='auto' or 'reference'")
    return found
