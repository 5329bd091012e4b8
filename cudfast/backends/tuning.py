"""How rows are laid over a GPU where that was measured or asked for. Where it was not, the backends choose.

tuning.json has what a sweep of `python -m benchmarks.gpu_verify` found to be fastest: a list of entries such as

    {"backend": "triton", "target": "sm_90", "loss": "student", "bytes": 2, "classes": 32768,
     "plan": {"block": 4096, "warps": 8}, "source": "NVIDIA H200, 2026-12-01"}

An entry holds for rows of logits of that many bytes each, whose number of classes has `classes` as its next power of
two. CUDFAST_TRITON_PLAN and CUDFAST_CUDA_PLAN come before it, for all rows of their backend: "block=4096,warps=8";
"default" leaves the table out.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DEFAULT = "default"
TABLE = Path(__file__).with_name("tuning.json")
_POWERS = tuple(1 << i for i in range(5))
FIELDS: dict[str, dict[str, tuple[int, ...]]] = {
    "triton": {
        "block": (256, 512, 1024, 2048, 4096, 8192),  # columns that a program reads at a time
        "warps": (*_POWERS, 32),  # of a program
        "stages": (1, 2, 3, 4),  # of the compiler's pipelines
    },
    "cuda": {
        "cluster": _POWERS,  # blocks that hold a row, at least
        "threads": tuple(range(32, 513, 32)),  # of a block, at most
    },
}


def variable(backend: str) -> str:
    """The environment variable that plans a backend's launches."""
    return f"CUDFAST_{backend.upper()}_PLAN"


def power(classes: int) -> int:
    """The next power of two: what entries are kept by."""
    return 1 << max(0, classes - 1).bit_length()


def parsed(backend: str, text: str) -> dict[str, int]:
    """The fields of a text such as "block=4096,warps=8".

    Raises:
        ValueError: an unknown field, or a value that it cannot have.
    """
    found: dict[str, int] = {}
    if text == DEFAULT:
        return found
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        allowed = FIELDS[backend].get(name)
        if allowed is None:
            raise ValueError(f"{variable(backend)}={text!r}: {name!r} is none of {', '.join(FIELDS[backend])}")
        if not value.isdecimal() or int(value) not in allowed:
            choices = ", ".join(map(str, allowed))
            raise ValueError(f"{variable(backend)}={text!r}: expected {name} to be one of {choices}")
        found[name] = int(value)
    return found


@functools.lru_cache(maxsize=16)
def target(device: torch.device) -> str:
    """What code for a device is called: sm_90, gfx942; else the device's type."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return found.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"


def key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an entry holds for."""
    return tuple(entry[name] for name in ("backend", "target", "loss", "bytes", "classes"))


@functools.cache
def table() -> dict[tuple[Any, ...], dict[str, int]]:
    """The plans of tuning.json."""
    return {key(entry): entry["plan"] for entry in json.loads(TABLE.read_text())}


@functools.lru_cache(maxsize=256)
def _tuned(backend: str, device: torch.device, loss: str, size: int, classes: int, asked: str) -> dict[str, int]:
    if asked:
        return parsed(backend, asked)
    return table().get((backend, target(device), loss, size, classes), {})


def tuned(backend: str, device: torch.device, loss: str, size: int, classes: int) -> dict[str, int]:
    """What was asked for, or measured to be the fastest, for rows of `classes` logits of `size` bytes; empty where the
    backend's plan is to choose.

    Args:
        backend: "triton" or "cuda".
        device: of the logits.
        loss: "student", "teacher" or "projected".
        size: bytes of a logit.
        classes: V.
    """
    return _tuned(backend, device, loss, size, power(classes), os.environ.get(variable(backend), ""))
