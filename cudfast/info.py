"""What this installation can do, and proof that it does: the text of `python -m cudfast info`."""

from __future__ import annotations

import os
import platform

import numpy
import torch

from . import backends
from ._version import __version__
from .functional import cud_loss
from .options import CUDOptions

# One row: student (0, 1, 2), teacher (3, 1, 0), label 1, temperature 2. The value is Eq. 9 worked out in 50 digits.
_KNOWN_LOSS = 1.3487058729273549


def _device(backend: str) -> str | None:
    """Where a backend can be checked here."""
    if backend == "cuda":
        return "cuda" if torch.cuda.is_available() else None
    if backend != "triton":
        return "cpu"
    return next((name for name in backends.GPUS if torch.get_device_module(name).is_available()), None)


def self_check(backend: str) -> str:
    """Computes one known loss: "ok", or what went wrong."""
    device = _device(backend)
    if device is None:
        return "left out: no GPU here"
    try:
        options = CUDOptions(backend=backend)  # type: ignore[arg-type]
        student, teacher, label = (
            torch.tensor(values, device=device) for values in ([[0.0, 1.0, 2.0]], [[3.0, 1.0, 0.0]], [1])
        )
        loss = cud_loss(student, teacher, label, options).item()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "ok" if abs(loss - _KNOWN_LOSS) <= 2e-6 else f"wrong: got {loss:.9f}, expected {_KNOWN_LOSS:.9f}"


def _native_lines() -> list[tuple[str, str]]:
    if isinstance(backends.load("native"), str):
        return []
    import cudfast._native as _native

    asked = os.environ.get("CUDFAST_ISA")
    chosen = (
        f"{_native.isa()} (this processor runs {', '.join(_native.runnable_isas())}; CUDFAST_ISA={asked or 'unset'})"
    )
    pool = f"OpenMP, {torch.get_num_threads()} threads (torch.get_num_threads())" if _native.OPENMP else "1 (no OpenMP)"
    return [("instruction set", chosen), ("threads", pool), ("compiler", _native.COMPILER)]


def describe() -> tuple[str, bool]:
    """The report, and whether every backend that is there computes the known loss."""
    lines = [
        ("cudfast", __version__),
        ("torch", str(torch.__version__)),
        ("numpy", numpy.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    good = True
    for name, missing in backends.available().items():
        if missing:
            lines.append((f"backend {name}", f"missing: {missing}"))
            continue
        verdict = self_check(name)
        good = good and verdict.startswith(("ok", "left out"))
        lines.append((f"backend {name}", f"available, self-check {verdict}"))
    lines += _native_lines()
    if not isinstance(cuda := backends.load("cuda"), str):
        lines.append(("CUDA kernels for", f"{cuda.ARCHITECTURES}; opt-in"))  # type: ignore[attr-defined]
    lines.append(("default backend", os.environ.get("CUDFAST_BACKEND") or "auto"))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines), good
