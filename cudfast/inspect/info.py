"""The text of `python -m cudfast info`: the features of this installation, and a self-check of each backend."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import numpy
import torch

from .. import backends
from .._version import __version__
from ..functional import cud_loss
from ..options import CUDOptions

# One row: student (0, 1, 2), teacher (3, 1, 0), label 1, temperature 2. The value is Eq. 9 worked out in 50 digits.
_KNOWN_LOSS = 1.3487058729273549


def _device(backend: str) -> str | None:
    """A device on which a backend can be checked, or None."""
    if backend == "cuda":
        return "cuda" if torch.cuda.is_available() else None
    if backend != "triton":
        return "cpu"
    return next((name for name in backends.GPUS if torch.get_device_module(name).is_available()), None)


def self_check(backend: str) -> str:
    """Computes one known loss: "ok", or a description of the error."""
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


_NO_OPENMP = " (the compiler has no OpenMP; that of Clang is libomp)"


def _backend(name: str, missing: str) -> dict[str, Any]:
    """Whether a backend can be used, the reason if not, and the self-check: its result and the time of its call."""
    if missing:
        return {"available": False, "reason": missing}
    begin = time.perf_counter()
    verdict = self_check(name)
    took = 1e3 * (time.perf_counter() - begin)
    return {"available": True, "self_check": verdict, "self_check_ms": took if _device(name) else None}


def _native() -> dict[str, Any]:
    """The build of the native core, and the processor features that it uses; empty if it is missing."""
    if isinstance(backends.load("native"), str):
        return {}
    import cudfast._native as _native

    return {
        "compiler": _native.COMPILER,
        "instruction_set": _native.isa(),
        "instruction_sets": _native.runnable_isas(),
        "instruction_set_check_ms": 1e3 * _native.isa_check_seconds(),
        "openmp": _native.OPENMP,
        "threads": torch.get_num_threads() if _native.OPENMP else 1,
    }


def report() -> dict[str, Any]:
    """Everything that `python -m cudfast info --json` prints; "ok" is False if a self-check gave a wrong result."""
    checked = {name: _backend(name, missing) for name, missing in backends.available().items()}
    cuda = backends.load("cuda")
    return {
        "cudfast": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "backends": checked,
        "default_backend": os.environ.get("CUDFAST_BACKEND") or "auto",
        "native": _native(),
        "cuda_architectures": [] if isinstance(cuda, str) else cuda.ARCHITECTURES.split(),  # type: ignore[attr-defined]
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("CUDFAST_")},
        "ok": all(each.get("self_check", "ok").startswith(("ok", "left out")) for each in checked.values()),
    }


def _line(backend: dict[str, Any]) -> str:
    if not backend["available"]:
        return f"missing: {backend['reason']}"
    took = "" if backend["self_check_ms"] is None else f" in {backend['self_check_ms']:.2g} ms"
    return f"available, self-check {backend['self_check']}{took}"


def describe(found: dict[str, Any]) -> str:
    """A report as text, one fact per line."""
    lines = [(name, found[name]) for name in ("cudfast", "torch", "numpy")]
    lines.append(("python", f"{found['python']} on {found['system']}"))
    lines += [(f"backend {name}", _line(backend)) for name, backend in found["backends"].items()]
    if native := found["native"]:
        lines += [
            (
                "instruction set",
                f"{native['instruction_set']}, compared with baseline in {native['instruction_set_check_ms']:.2g} ms "
                f"(available: {', '.join(native['instruction_sets'])})",
            ),
            ("threads", f"{native['threads']}{'' if native['openmp'] else _NO_OPENMP}"),
            ("compiler", native["compiler"]),
        ]
    if found["cuda_architectures"]:
        lines.append(("CUDA kernels for", f"{' '.join(found['cuda_architectures'])}; used only with backend='cuda'"))
    lines.append(("default backend", found["default_backend"]))
    lines += [("variable", f"{name}={value}") for name, value in found["variables"].items()]
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)
