"""The launches of both GPU backends, on CPU tensors: the kernels' own PTX, interpreted."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from cudfast.machine import run

from .machine import Launch, Machine
from .parse import Module, parse

ROOT = Path(__file__).parents[2]


class Device(NamedTuple):
    """What the launches think the GPU has."""

    processors: int = 1
    shared: int = 227 << 10  # bytes of a block
    cluster: int = 8  # blocks


class Ran(NamedTuple):
    """A launch that was interpreted."""

    kernel: str
    blocks: int
    cluster: int
    threads: int
    instructions: int


class Interpreter:
    """Runs launches, and notes them. `seed`: see `Machine`; `change` makes another module of each."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.ran: list[Ran] = []
        self.change = lambda module, entry: module

    def __call__(self, module: Module, suffix: str, launch: Launch) -> None:
        entry = module.entry(suffix)
        steps = Machine(self.change(module, entry), entry, launch, self.seed).run()
        self.ran.append(Ran(suffix or entry.name, launch.grid[0] * launch.grid[1], launch.cluster, launch.threads, steps))


def ranges(values: Any) -> tuple[tuple[int, int], ...]:
    """Addresses of the memory of all tensors among values, of tuples in them, too."""
    if isinstance(values, torch.Tensor):
        storage = values.untyped_storage()
        return ((storage.data_ptr(), storage.data_ptr() + storage.nbytes()),)
    return tuple(pair for each in values for pair in ranges(each)) if isinstance(values, tuple) else ()


# CUDA C++: the PTX in the module that was built; launches come from a second module, compiled here.


@functools.cache
def _modules(target: str = "sm_90") -> tuple[str, ...]:
    """The PTX of each compilation in the module that was built; none if it holds no such PTX."""
    from cudfast.backends.cuda import _cuda

    with tempfile.TemporaryDirectory() as folder:
        run("cuobjdump", "-xptx", "all", str(Path(_cuda.__file__).resolve()), cwd=folder)
        return tuple(file.read_text() for file in sorted(Path(folder).glob(f"*.{target}.ptx")))


_parsed = functools.cache(parse)


def lacking_cuda() -> str:
    """Why the CUDA kernels cannot be interpreted, or ""."""
    try:
        return "" if _modules() else "the CUDA kernels were built without PTX for sm_90"
    except (ImportError, FileNotFoundError) as error:
        return str(error)


@functools.cache
def _recorder() -> ModuleType:
    """csrc/cuda without its kernels: a launch calls what `cudfast_recorder` points to."""
    sources = [ROOT / "tests/ptx/recorder.cpp", ROOT / "csrc/cuda/launch.cpp", ROOT / "csrc/cuda/bindings.cpp"]
    headers = [*sources, ROOT / "tests/ptx/recorder.h", *sorted((ROOT / "csrc").rglob("*.h"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in headers) + torch.__version__.encode()).hexdigest()
    folder = ROOT / "build" / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"_cuda-{digest[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of the suite wait for the one that compiles
        if not built.exists():
            _compile(sources, built)
    spec = importlib.util.spec_from_file_location("_cuda", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(sources: list[Path], built: Path) -> None:
    include = [ROOT / "csrc", ROOT / "tests/ptx", Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
    common = [os.environ.get("CXX", "c++"), "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden"]
    common += [f"-I{path}" for path in include] + ["-DCUDFAST_X86", '-DCUDFAST_CUDA_ARCHS="90"']
    common += ['-DCUDFAST_LAUNCHER="recorder.h"']
    parts = [(sources[0], dtype) for dtype in (0, 2, 3, -1)] + [(source, 0) for source in sources[1:]]
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{i}.o" for i in range(len(parts))]
        for (source, dtype), to in zip(parts, objects):
            subprocess.run([*common, f"-DCUDFAST_DTYPE={dtype}", "-c", str(source), "-o", to], check=True)
        subprocess.run([*common, "-shared", *objects, "-o", f"{folder}/built"], check=True)
        os.replace(f"{folder}/built", built)


class _Machine(ctypes.Structure):  # csrc/cuda/launch.h
    _fields_ = [(name, ctypes.c_int) for name in ("processors", "shared", "capability", "cluster")]


_Recorder = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 5)


class _Calls:
    """The recorder's functions. The tensors of a call are the memory that its launches may touch."""

    def __init__(self, interpret: Interpreter, device: Device) -> None:
        self._module, self._interpret, self._ranges = _recorder(), interpret, ()
        self._error: BaseException | None = None
        self._run = _Recorder(self._launch)  # kept alive with this
        library = ctypes.CDLL(self._module.__file__)
        ctypes.c_void_p.in_dll(library, "cudfast_recorder").value = ctypes.cast(self._run, ctypes.c_void_p).value
        machine = _Machine.in_dll(library, "cudfast_machine")
        machine.processors, machine.shared, machine.capability, machine.cluster = (
            device.processors, device.shared, 90, device.cluster,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not callable(found) or isinstance(found, type):
            return found

        def call(*values: Any) -> Any:
            self._ranges = ranges(values)
            try:
                return found(*values)
            except RuntimeError:
                if self._error is not None:
                    raise self._error from None
                raise

        return call

    def _launch(self, name: bytes, kernel: int, size: int, blocks: int, cluster: int, threads: int, shared: int) -> Any:
        symbol = name.decode().partition("_GLOBAL__N_1")[2]
        suffix = f"INS0_{symbol}EEvT_i"
        try:
            text = next(text for text in _modules() if suffix in text)
            arguments = ctypes.string_at(kernel, size) + cluster.to_bytes(4, "little")
            launch = Launch(arguments, (blocks, 1), threads, shared, cluster, self._ranges)
            self._interpret(_parsed(text), suffix, launch)
        except BaseException as error:  # C++ is between this and the caller
            self._error = error
            return ctypes.cast(ctypes.c_char_p(b"the interpreter raised an error"), ctypes.c_void_p).value
        return None


@contextlib.contextmanager
def cuda(interpret: Interpreter, device: Device) -> Iterator[None]:
    """backend="cuda" on CPU tensors is interpreted."""
    from cudfast.backends import cuda as backend

    before = backend._cuda
    backend._cuda = _Calls(interpret, device)
    try:
        yield
    finally:
        backend._cuda = before
