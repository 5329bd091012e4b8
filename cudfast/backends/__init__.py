"""Which backends there are, why one is missing, and which one a call uses."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import cast

import torch

from ..rows import Backend

NAMES = ("native", "reference")
_MODULES = {"native": "cudfast.backends.native", "reference": "cudfast.backends.reference"}


@functools.cache
def load(name: str) -> Backend | str:
    """The backend of that name, or why it cannot be used."""
    try:
        return cast(Backend, importlib.import_module(_MODULES[name]))
    except ImportError as error:
        return str(error)


def available() -> dict[str, str]:
    """Every backend with "" when it can be used, else the reason why not.

    Example:
        >>> available()["reference"]
        ''
    """
    return {name: "" if not isinstance(found := load(name), str) else found for name in NAMES}


def _default(device: torch.device) -> str:
    if device.type != "cpu":
        return "reference"
    missing = load("native")
    if not isinstance(missing, str):
        return "native"
    warnings.warn(
        f"cudfast: CPU tensors go through the reference backend, which is much slower: {missing}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


@functools.lru_cache(maxsize=64)
def choose(name: str, device: torch.device) -> Backend:
    """The backend for logits on `device`. "auto" is CUDFAST_BACKEND, or else the fastest that fits.

    The answer holds for the life of the process: the variable is read when it is first needed.

    Raises:
        ValueError: an unknown name in CUDFAST_BACKEND, or a backend that does not work on this device.
        RuntimeError: the backend asked for is not there; the message says why and what to do.
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
    if asked == "native" and device.type != "cpu":
        raise ValueError(
            f"backend 'native' works on CPU tensors, got logits on {device}; use backend='auto' or 'reference'"
        )
    return found
